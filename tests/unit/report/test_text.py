"""What a reader sees: the answer, headings among several, the disclaimer wherever there is an answer."""

from __future__ import annotations

from dataclasses import replace

from xraygpt_lite.report import FORMATS, text
from xraygpt_lite.values import Box, Failure, Sampling, Summary, Timings

FORM = FORMATS["text"]
ONE = Summary(
    source="a.dcm", sha256="0" * 64, sop_instance_uid=None, question="?", prompt_variant="demo", text="Clear lungs.",
    raw_text=" Clear lungs.", finish="stop", warnings=(), options=Sampling(), device="cpu", bundle_id="f" * 64,
    bundle_name="tiny", timings=Timings(), prompt_tokens=1, image_tokens=2, answer_tokens=3,
    disclaimer="Research only.",
)  # fmt: skip
NONE = Failure("b.dcm", None, "?", "read", "ImageError", "b.dcm is empty")


def whole(*records: Summary | Failure) -> str:
    several = len(records) > 1
    return "".join(FORM.record(record, several) for record in records) + FORM.end(records)


def test_one_answer() -> None:
    assert whole(ONE) == "Clear lungs.\n\nResearch only.\n"


def test_boxes_stand_under_the_answer_in_whole_pixels() -> None:
    boxes = (Box("the\nheart\x1b", 1.4, 2.6, 300.0, 40.0), Box("", 0.0, 0.0, 5.0, 5.0))
    lines = "box 1,3,300,40 px: the heart\\x1b\nbox 0,0,5,5 px\n"
    assert whole(replace(ONE, boxes=boxes)) == f"Clear lungs.\n{lines}\nResearch only.\n"
    assert whole(replace(ONE, text="", boxes=boxes)) == f"{lines}\nResearch only.\n"


def test_no_answer_needs_no_disclaimer() -> None:
    assert whole(NONE) == "No result: read failed.\n"


def test_several_have_headings_and_one_disclaimer() -> None:
    assert whole(ONE, NONE, replace(ONE, source="c.dcm")) == (
        "== a.dcm ==\nClear lungs.\n\n== b.dcm ==\nNo result: read failed.\n\n"
        "== c.dcm ==\nClear lungs.\n\nResearch only.\n"
    )


def test_what_steers_a_terminal_is_escaped() -> None:
    assert text.printable("a\x1b[2J\x07\x9b\udcff\n\tü\u200d漢") == "a\\x1b[2J\\x07\\x9b\\udcff\n\tü\u200d漢"
    assert text.heading("a\nb\x1b") == "== a b\\x1b ==\n"


def test_a_table_is_aligned_and_has_no_trailing_space() -> None:
    assert text.table([("NAME", "WHAT"), ("long name", "x\ny"), ("n", "")]) == "NAME       WHAT\nlong name  x y\nn\n"
