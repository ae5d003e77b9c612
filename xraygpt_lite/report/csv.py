"""Records as a table: RFC 4180, UTF-8 without a byte order mark, a row for each record, columns in a fixed order.

Knows finished records; writes no file. The columns are `COLUMNS`, and after them "finding: NAME" for each finding that
some record holds. A cell that does not apply is empty.

Two things are changed, because spreadsheets run what looks like a formula and choke on control characters: text that
begins (after white space) with = + - @ or one of their full-width forms, or with a tab or a line end, has an apostrophe
put in front; and what cannot be printed is an escape, as in `text.printable`. JSON has the texts as they are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping

from xraygpt_lite.report.survey import Heading, Named, Survey
from xraygpt_lite.report.text import printable
from xraygpt_lite.values import Finding, Record, Summary

COLUMNS = (
    "input",
    "status",  # summary | failure
    "question",
    "text",
    "task",
    "finish",  # stop | length
    "warnings",  # a line each
    "boxes",  # a line each: x0 y0 x1 y1, in pixels of the original, and the phrase
    "asked_box",
    "stage",  # this and the next two of failures only
    "error",
    "message",
    "sha256",
    "sop_instance_uid",
    "bundle",
    "bundle_id",
    "prompt_variant",
    "device",
    "prompt_tokens",
    "image_tokens",
    "answer_tokens",
    "read_seconds",
    "vision_seconds",
    "prefill_seconds",
    "generate_seconds",
    "disclaimer",
)
_FORMULA = tuple("=+-@＝＋－＠")
_Cell = str | int


def render(run: Heading, seen: Survey, records: Iterable[Named]) -> Iterator[str]:
    """The table, row by row, each with its line end (CR LF).

    Parameters
    ----------
    run
        Its bundle and disclaimer stand in every row.
    seen
        What a first look over the same records gave; it names the columns of the findings.
    records
        In the order of the rows.
    """
    common = {"bundle": run.bundle_name, "bundle_id": run.bundle_id, "disclaimer": run.disclaimer}
    columns = {finding: f"finding: {finding}" for finding in seen.findings}
    buffer = io.StringIO(newline="")
    table = csv.DictWriter(buffer, (*COLUMNS, *columns.values()), restval="")
    table.writerow({column: _safe(column) for column in table.fieldnames})
    for name, record in records:
        row = {**common, **_row(name, record, columns)}
        table.writerow({column: _safe(cell) for column, cell in row.items()})
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()  # the heading, where there is no record


def _row(name: str, record: Record, columns: Mapping[str, str]) -> dict[str, _Cell]:
    row: dict[str, _Cell] = {"input": name, "question": record.question, "sha256": record.sha256 or ""}
    if not isinstance(record, Summary):
        failure = {"stage": record.stage, "error": record.error, "message": record.message}
        return {**row, "status": "failure", **failure}
    times = record.timings
    return {
        **row,
        "status": "summary",
        "text": record.text,
        "task": record.task or "",
        "finish": record.finish,
        "warnings": "\n".join(record.warnings),
        "boxes": "\n".join(f"{_corners(box.x0, box.y0, box.x1, box.y1)} {box.phrase}".strip() for box in record.boxes),
        "asked_box": _corners(*record.asked_box) if record.asked_box else "",
        "sop_instance_uid": record.sop_instance_uid or "",
        "prompt_variant": record.prompt_variant,
        "device": record.device,
        "prompt_tokens": record.prompt_tokens,
        "image_tokens": record.image_tokens,
        "answer_tokens": record.answer_tokens,
        "read_seconds": _number(times.read),
        "vision_seconds": _number(times.vision),
        "prefill_seconds": _number(times.prefill),
        "generate_seconds": _number(times.generate),
        **{columns[finding.name]: _finding(finding) for finding in record.findings if finding.name in columns},
    }


def _finding(finding: Finding) -> str:
    """The probability, or in a word what is stated without one."""
    if finding.probability is not None:
        return _number(finding.probability)
    return "present" if finding.present else "absent"


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _corners(*values: float) -> str:
    return " ".join(map(_number, values))


def _safe(cell: _Cell) -> _Cell:
    """Text that no spreadsheet takes for a formula."""
    if not isinstance(cell, str):
        return cell
    formula = cell.lstrip().startswith(_FORMULA) or cell.startswith(("\t", "\r", "\n"))
    return f"'{printable(cell)}" if formula else printable(cell)
