"""Records as one page that needs nothing else: no request, no server, and without JavaScript it still shows everything.

Knows finished records and thumbnails; writes no file. `page.css` and `page.js` beside this file go into the page.

Names, messages and above all the model's text are hostile input: every piece of text passes `_text`, and the page's
Content-Security-Policy lets nothing run or load but these two files, told by their hashes, and inline pictures.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from xraygpt_lite.report.survey import Heading, Named, Survey, together
from xraygpt_lite.report.text import printable
from xraygpt_lite.report.thumbnail import Thumbnail
from xraygpt_lite.values import Box, Failure, Finding, Record, Summary

Picture = Callable[[str, Sequence[Record]], Thumbnail | None]
"""(input, the records about it) → its thumbnail, None where there is none to show."""

_TITLE = "Chest-radiograph summaries"
_SORTS = {"run": "order of the run", "input": "input", "status": "status", "seconds": "time", "tokens": "tokens"}


def render(run: Heading, seen: Survey, records: Iterable[Named], picture: Picture | None = None) -> Iterator[str]:
    """The page, piece by piece.

    Parameters
    ----------
    run
        What the page says above the records.
    seen
        What a first look over the same records gave.
    records
        Those about one radiograph are shown together, radiographs in the order in which they were finished.
    picture
        Gives thumbnails; without it the page has no place for them.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{_TITLE} – {_text(run.bundle_name)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<p class="notice" role="note">{_text(run.disclaimer)}</p>\n'
    )
    yield _head(run, seen)
    yield _controls(seen)
    yield f'<main id="cards"{"" if picture else " class=bare"}>\n'
    named = run.options.get("identifiers", True)  # where not, the digests in the records are no file's
    for name, group in together(records, seen):
        yield _card(name, group, picture, _identity(group) if named else "")
    yield f"</main>\n<script>{script}</script>\n</body>\n</html>\n"


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")


def _hash(asset: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(asset.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    """`text` as it may stand between tags and in a quoted attribute."""
    return html.escape(printable(text))


def _head(run: Heading, seen: Survey) -> str:
    counts = {
        "inputs": seen.inputs,
        "summaries": seen.summaries,
        "failures": seen.failures,
        "with warnings": seen.warned,
    }
    if run.inputs is not None and run.inputs > seen.inputs:
        counts["without a record"] = run.inputs - seen.inputs
    facts = {
        "bundle": run.bundle_name,
        "bundle id": run.bundle_id,
        **({"shard": f"{run.shard[0]} of {run.shard[1]}"} if run.shard else {}),
        **{key.replace("_", " "): _words(value) for key, value in run.options.items() if value not in (None, [], {})},
        "made by": f"xraygpt-lite {run.version}",
    }
    numbers = "".join(f"<li>{what} <b>{number:,}</b></li>" for what, number in counts.items())
    return (
        f'<header>\n<h1>{_TITLE}</h1>\n<ul class="counts">{numbers}</ul>\n'
        f'<dl class="run">{_terms(facts)}</dl>\n</header>\n'
    )


def _words(value: Any) -> str:
    """A JSON value as a reader takes it: names and numbers, no braces."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key.replace('_', ' ')} {_words(item)}" for key, item in value.items() if item not in (None, [], {})
        )
    if isinstance(value, list | tuple):
        return "; ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _terms(facts: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in facts.items())


def _controls(seen: Survey) -> str:
    """Hidden until the script, which they need, shows them."""
    kinds = {
        "all": f"all ({seen.records:,})",
        "summary": f"summaries ({seen.summaries:,})",
        "failure": f"failures ({seen.failures:,})",
        "warned": f"with warnings ({seen.warned:,})",
    }
    return (
        '<div class="controls" id="controls" role="search" hidden>\n'
        '<label>Text <input id="filter" type="search" autocomplete="off" spellcheck="false"></label>\n'
        f'<label>Show <select id="status">{_choices(kinds)}</select></label>\n'
        f'<label>Sort by <select id="sort">{_choices(_SORTS)}</select></label>\n'
        '<button id="reverse" type="button" aria-pressed="false">Reverse</button>\n</div>\n'
        f'<p class="shown"><output id="shown">{_count(seen.records)}</output></p>\n'
    )


def _choices(choices: Mapping[str, str]) -> str:
    return "".join(f'<option value="{value}">{_text(label)}</option>' for value, label in choices.items())


def _count(records: int) -> str:
    return "1 record" if records == 1 else f"{records:,} records"


def _card(name: str, records: Sequence[Record], picture: Picture | None, identity: str) -> str:
    """Everything about one radiograph."""
    summaries = [record for record in records if isinstance(record, Summary)]
    seconds = sum(sum(vars(record.timings).values()) for record in summaries)
    tokens = sum(record.answer_tokens for record in summaries)
    sums = f' data-seconds="{seconds:.6f}" data-tokens="{tokens}"' if summaries else ""
    boxes = [box for summary in summaries for box in summary.boxes]
    shown = _picture(name, picture(name, records), boxes) if picture else ""
    first, answers = 1, []
    for record in records:
        answers.append(_answer(record, first))
        first += len(record.boxes) if isinstance(record, Summary) else 0
    return (
        f"<article{sums}>\n<h2><bdi>{_text(name)}</bdi></h2>\n{shown}"
        f'<div class="answers">\n{"".join(answers)}</div>\n{identity}</article>\n'
    )


def _picture(name: str, thumbnail: Thumbnail | None, boxes: Sequence[Box]) -> str:
    if thumbnail is None:
        return '<div class="picture"><span>no picture</span></div>\n'
    width, height = thumbnail.size
    data = base64.b64encode(thumbnail.jpeg).decode()
    drawn = "".join(_rectangle(n, box, max(width, height) / 9) for n, box in enumerate(boxes, 1))
    frame = f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{drawn}</svg>' if boxes else ""
    return (
        f'<div class="picture"><img alt="Radiograph {_text(name)}" decoding="async" '
        f'src="data:image/jpeg;base64,{data}">{frame}</div>\n'
    )


def _rectangle(number: int, box: Box, letters: float) -> str:
    """A box and its number, in pixels of the original; the number inside, where it is not cut off."""
    return (
        f'<rect x="{box.x0:.1f}" y="{box.y0:.1f}" width="{box.x1 - box.x0:.1f}" height="{box.y1 - box.y0:.1f}"/>'
        f'<text x="{box.x0 + letters / 4:.1f}" y="{box.y0 + letters:.1f}" font-size="{letters:.1f}">{number}</text>'
    )


def _answer(record: Record, first: int) -> str:
    """One question and what came of it; `first` is the number of its first box in the picture."""
    question = f'<p class="question" dir="auto">{_text(record.question)}</p>\n'
    if isinstance(record, Failure):
        return (
            f'<section data-status="failure">\n{question}'
            f'<p class="failed">No result: {_text(record.stage)} failed</p>\n'
            f'<p class="message" dir="auto">{_text(record.message)}</p>\n</section>\n'
        )
    said = f'<p class="text" dir="auto">{_text(record.text)}</p>\n' if record.text or not record.boxes else ""
    warnings = "".join(f'<p class="warning" dir="auto">{_text(warning)}</p>\n' for warning in record.warnings)
    tokens = f"{record.answer_tokens} token{'' if record.answer_tokens == 1 else 's'}"
    cut = ", cut off there" if record.finish == "length" else ""
    return (
        f'<section data-status="summary"{" data-warned" if record.warnings else ""}>\n{question}{said}'
        f"{_boxes(record.boxes, first)}{_findings(record.findings)}{warnings}"
        f'<p class="cost">{tokens}{cut} · {sum(vars(record.timings).values()):.2f} s</p>\n</section>\n'
    )


def _boxes(boxes: Sequence[Box], first: int) -> str:
    items = "".join(
        f'<li><span dir="auto">{_text(box.phrase.strip() or "box")}</span> '
        f"<small>{box.x0:.0f}, {box.y0:.0f} – {box.x1:.0f}, {box.y1:.0f} px</small></li>"
        for box in boxes
    )
    return f'<ol class="boxes" start="{first}">{items}</ol>\n' if boxes else ""


def _findings(findings: Sequence[Finding]) -> str:
    """The likeliest first, those that are present in bold."""
    items = "".join(f"<li>{_finding(finding)}</li>" for finding in sorted(findings, key=_likelihood, reverse=True))
    return f'<ul class="findings">{items}</ul>\n' if findings else ""


def _likelihood(finding: Finding) -> float:
    """Its probability; what was not scored stands before or behind all that was."""
    return finding.probability if finding.probability is not None else 2.0 if finding.present else -1.0


def _finding(finding: Finding) -> str:
    share = "" if finding.probability is None else f" {finding.probability:.0%}"
    name = _text(finding.name)
    return f"<b>{name}{share}</b>" if finding.present else f"{name}{share or ': no'}"


def _identity(records: Sequence[Record]) -> str:
    uid = next((record.sop_instance_uid for record in records if isinstance(record, Summary)), None)
    facts = {"SHA-256": records[0].sha256, "SOP Instance UID": uid}
    known = {key: value for key, value in facts.items() if value}
    return f"<details><summary>Identifiers</summary><dl>{_terms(known)}</dl></details>\n" if known else ""
