"""The page as text: what stands in it, that nothing in it is markup which should not be, and that it comes as a stream.

How it looks and works is for `tests/browser`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xraygpt_lite.batch.journal import Header
from xraygpt_lite.report import html, thumbnail
from xraygpt_lite.report.survey import Named, survey, together
from xraygpt_lite.values import Box, Failure, Finding, Record, Sampling, Summary, Timings

OPTIONS = {
    "questions": ["Normal?", "Heart?"], "task": None, "sampling": {"max_tokens": 200, "temperature": 0.5, "stops": []},
    "identifiers": True,
}  # fmt: skip
RUN = Header("f" * 64, "tiny", OPTIONS, 4, (3, 16), "Research only.", "1.2")
SUMMARY = Summary(
    source="/data/a.dcm", sha256="0" * 64, sop_instance_uid="1.2.3", question="Normal?", prompt_variant="demo",
    text="Clear lungs.", raw_text="raw", finish="stop", warnings=(), options=Sampling(), device="cpu",
    bundle_id="f" * 64, bundle_name="tiny", timings=Timings(0.5, 0.25, 0.125, 0.125), prompt_tokens=15, image_tokens=16,
    answer_tokens=17, disclaimer="Research only.",
)  # fmt: skip
FAILURE = Failure("/data/b.png", None, "Normal?", "read", "ImageError", "b.png: is a folder")
HOSTILE = "</p></section><script>alert(1)</script><img src=\"x\" onerror='y'>&amp;\x1b[2J\udcff\x00"
ESCAPED = (
    "&lt;/p&gt;&lt;/section&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=&quot;x&quot; onerror=&#x27;y&#x27;&gt;"
    "&amp;amp;\\x1b[2J\\udcff\\x00"
)
VOID = {"meta", "img", "input"}


class Reader(HTMLParser):
    """Checks that every element is closed where it was opened; keeps the text and what elements there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def rendered(*records: Named, run: Header = RUN, picture: html.Picture | None = None) -> str:
    return "".join(html.render(run, survey(records), iter(records), picture))


def parsed(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def cards(page: str) -> list[str]:
    return re.findall(r"<article.*?</article>", page, flags=re.DOTALL)


def test_above_the_records() -> None:
    records = [("a", SUMMARY), ("b", FAILURE), ("c", replace(SUMMARY, warnings=("One.",)))]
    page = rendered(*records)
    text = " ".join("".join(parsed(page).text).split())
    assert text.index("Research only.") < text.index("Chest-radiograph summaries – tiny") + 100
    assert "inputs 3summaries 2failures 1with warnings 1without a record 1" in text
    assert f"bundletinybundle id{'f' * 64}shard3 of 16questionsNormal?; Heart?" in text
    assert "samplingmax tokens 200, temperature 0.5identifiersyesmade byxraygpt-lite 1.2" in text
    assert "all (3)summaries (2)failures (1)with warnings (1)" in text
    assert "without a record" not in rendered(*records, run=replace(RUN, inputs=3))
    assert "without a record" not in rendered(*records, run=replace(RUN, inputs=None))


def test_a_summary_and_a_failure() -> None:
    boxes = (Box("the heart", 1.4, 2.6, 300.0, 40.0), Box(" ", 0.0, 0.0, 5.0, 5.0))
    findings = (Finding("Mass", False, 0.25), Finding("Nodule", True, 0.75), Finding("Effusion", False))
    full = replace(SUMMARY, boxes=boxes, findings=findings, warnings=("Two frames.",), finish="length")
    one, other = cards(rendered(("dir/a.dcm", full), ("b.png", FAILURE)))
    text = "|".join(part.strip() for part in parsed(one).text if part.strip())
    assert text == (
        "dir/a.dcm|Normal?|Clear lungs.|the heart|1, 3 – 300, 40 px|box|0, 0 – 5, 5 px|Nodule 75%|Mass 25%|"
        "Effusion: no|Two frames.|17 tokens, cut off there · 1.00 s|Identifiers|"
        f"SHA-256|{'0' * 64}|SOP Instance UID|1.2.3"
    )
    assert "<b>Nodule 75%</b></li><li>Mass" in one
    assert 'data-seconds="1.000000" data-tokens="17"' in one
    assert "data-warned" in one
    text = "|".join(part.strip() for part in parsed(other).text if part.strip())
    assert text == "b.png|Normal?|No result: read failed|b.png: is a folder"
    assert "data-seconds" not in other


def test_questions_about_one_radiograph_stand_together() -> None:
    second = replace(SUMMARY, question="Heart?", text="Large.", boxes=(Box("heart", 1, 2, 3, 4),))
    first = replace(SUMMARY, boxes=(Box("lung", 1, 2, 3, 4), Box("", 1, 2, 3, 4)))
    changed = replace(SUMMARY, sha256="1" * 64, text="Another file by now.")
    found = cards(rendered(("a", first), ("b", FAILURE), ("a", changed), ("a", second)))
    assert [card.count("<section") for card in found] == [1, 1, 2]
    both = found[2]
    assert both.index("Clear lungs.") < both.index("Large.")
    assert re.findall('start="([0-9]+)"', both) == ["1", "3"]  # numbered through, as in the picture
    assert 'data-seconds="2.000000" data-tokens="34"' in both
    assert both.count("SHA-256") == 1


def test_where_names_are_kept_out_no_digest_is_shown() -> None:
    page = rendered(("input-0123", SUMMARY), run=replace(RUN, options={"identifiers": False}))
    assert "0" * 64 not in page
    assert "1.2.3" not in page


def test_hostile_text_is_text_wherever_it_stands() -> None:
    summary = replace(
        SUMMARY, text=HOSTILE, question=HOSTILE, warnings=(HOSTILE,), boxes=(Box(HOSTILE, 0, 0, 1, 1),),
        findings=(Finding(HOSTILE, True, 0.5),), sop_instance_uid=HOSTILE,
    )  # fmt: skip
    failure = Failure(HOSTILE, None, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    run = Header(HOSTILE, HOSTILE, {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}, None, None, HOSTILE, HOSTILE)
    harmless = replace(summary, text="x", question="x", warnings=("x",), boxes=(Box("x", 0, 0, 1, 1),),
                       findings=(Finding("x", True, 0.5),), sop_instance_uid="x")  # fmt: skip
    tame = Header("x", "x", {"x": ["x", {"x": "x"}]}, None, None, "x", "x")
    page = rendered((HOSTILE, summary), (HOSTILE, failure), run=run, picture=ramp)
    plain = rendered(("x", harmless), ("x", Failure("x", None, "x", "x", "x", "x")), run=tame, picture=ramp)
    assert [tag for tag, _ in parsed(page).seen] == [tag for tag, _ in parsed(plain).seen]
    assert [set(attributes) for _, attributes in parsed(page).seen] == [set(own) for _, own in parsed(plain).seen]
    assert page.count(ESCAPED) >= 15
    page.encode()


def test_the_policy_lets_only_the_pages_own_style_and_script_in() -> None:
    reader = parsed(page := rendered(("a", SUMMARY), picture=ramp))
    policy = next(meta["content"] for meta in reader.all("meta") if "http-equiv" in meta) or ""
    digests = [
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, flags=re.DOTALL)
    ]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src '{digests[0]}'; script-src '{digests[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert page.index("Content-Security-Policy") < page.index("<title>")
    assert page.index("charset") < 200
    assert not [
        name for _, attributes in reader.seen for name in attributes if name == "style" or name.startswith("on")
    ]
    sources = [value for _, own in reader.seen for name, value in own.items() if name in ("src", "href", "action")]
    assert len(sources) == 1
    assert (sources[0] or "").startswith("data:image/jpeg;base64,")
    assert not re.search(r"https?:|url\(|@import|//", re.sub('base64,[^"]*', "", page).replace("// ", ""))


def ramp(_name: str, _records: Sequence[Record]) -> thumbnail.Thumbnail:
    return thumbnail.make(np.linspace(0, 1, 600 * 300, dtype=np.float32).reshape(300, 600))


def test_a_thumbnail_is_the_radiograph_small_and_grey() -> None:
    made = ramp("", ())
    assert made.size == (600, 300)
    with Image.open(io.BytesIO(made.jpeg)) as image:
        assert (image.format, image.mode, image.size, image.info.get("exif")) == ("JPEG", "L", (128, 64), None)
        rows = np.asarray(image, np.float32).mean(1)
    np.testing.assert_allclose(rows, np.linspace(0, 255, 64), atol=4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (20, 30), (3000, 2000)])
def test_thumbnails_of_any_shape(shape: tuple[int, int]) -> None:
    made = thumbnail.make(np.full(shape, 0.5, np.float32))
    with Image.open(io.BytesIO(made.jpeg)) as image:
        assert max(image.size) == min(128, max(shape))
        assert min(image.size) >= 1
        assert abs(int(np.asarray(image)[0, 0]) - 128) <= 2


def test_pictures_carry_their_boxes_and_may_be_missing_or_unwanted() -> None:
    boxed = replace(SUMMARY, boxes=(Box("heart", 60.0, 30.0, 300.0, 150.5),))
    page = rendered(("a", boxed), picture=ramp)
    assert (
        '<svg viewBox="0 0 600 300" aria-hidden="true"><rect x="60.0" y="30.0" width="240.0" height="120.5"/>' in page
    )
    assert parsed(page).all("img")[0]["alt"] == "Radiograph a"
    missing = rendered(("a", boxed), picture=lambda *_: None)
    assert "no picture" in missing
    assert "<img" not in missing
    assert 'class="picture"' not in rendered(("a", boxed))


def test_the_page_is_a_stream_that_holds_no_more_than_what_is_incomplete() -> None:
    questions = [replace(SUMMARY, question=f"{n}?") for n in range(3)]
    records: list[Named] = [(f"{n}.png", one) for n in range(500) for one in questions]
    taken = 0

    def stream() -> Any:
        nonlocal taken
        for record in records:
            taken += 1
            yield record

    pieces = html.render(RUN, survey(records), stream())
    for n, piece in enumerate(piece for piece in pieces if piece.startswith("<article")):
        assert taken == 3 * (n + 1)
        assert piece.count("<section") == 3
    assert taken == 1500


def test_a_journal_that_grows_or_shrinks_between_the_two_looks() -> None:
    records: list[Named] = [("a", SUMMARY), ("a", replace(SUMMARY, question="2?")), ("b", FAILURE)]
    seen = survey(records)
    assert [name for name, _ in together(iter([*records, ("c", FAILURE)]), seen)] == ["a", "b"]
    assert [(name, len(group)) for name, group in together(iter(records[1:2]), seen)] == [("a", 1)]
