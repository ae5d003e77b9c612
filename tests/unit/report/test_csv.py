"""The table: what any reader of CSV gets back, what a spreadsheet does not run, and the columns people rely on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xraygpt_lite.batch.journal import Header
from xraygpt_lite.report import csv as table
from xraygpt_lite.report.survey import Named, survey
from xraygpt_lite.report.text import printable
from xraygpt_lite.values import Box, Failure, Finding, Sampling, Summary, Timings

RUN = Header("f" * 64, "tiny", {}, 2, None, "Research only.", "1")
SUMMARY = Summary(
    source="/data/a/1.dcm", sha256="0" * 64, sop_instance_uid="1.2.3", question="Normal?", prompt_variant="demo",
    text='The lungs are "clear",\nthe heart is not.', raw_text="raw", finish="stop", warnings=("One.", "Two."),
    options=Sampling(), device="cpu", bundle_id="e" * 64, bundle_name="other", timings=Timings(0.5, 0.25, 0.125, 1e-7),
    prompt_tokens=15, image_tokens=16, answer_tokens=17, disclaimer="Another.", task="vqa",
    asked_box=(1.0, 2.5, 30.0, 40.0), boxes=(Box("heart", 0.0, 1.5, 1 / 3, 1024.0), Box("", 1.0, 2.0, 3.0, 4.0)),
)  # fmt: skip
FAILURE = Failure("/data/b.png", None, "Normal?", "read", "ImageError", "b.png: is a folder")


def rendered(*records: Named) -> str:
    return "".join(table.render(RUN, survey(records), iter(records)))


def rows(*records: Named) -> Sequence[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(rendered(*records), newline=""), strict=True))


def test_the_columns_stand_in_the_documented_order() -> None:
    """Scripts count columns: new ones go to the end, before the findings."""
    assert rendered(("a", FAILURE)).split("\r\n")[0] == (
        "input,status,question,text,task,finish,warnings,boxes,asked_box,stage,error,message,sha256,sop_instance_uid,"
        "bundle,bundle_id,prompt_variant,device,prompt_tokens,image_tokens,answer_tokens,read_seconds,vision_seconds,"
        "prefill_seconds,generate_seconds,disclaimer"
    )


def test_a_summary() -> None:
    assert rows(("a/1.dcm", SUMMARY)) == [
        {
            "input": "a/1.dcm", "status": "summary", "question": "Normal?",
            "text": 'The lungs are "clear",\nthe heart is not.', "task": "vqa", "finish": "stop",
            "warnings": "One.\nTwo.", "boxes": "0 1.5 0.333333 1024 heart\n1 2 3 4", "asked_box": "1 2.5 30 40",
            "stage": "", "error": "", "message": "", "sha256": "0" * 64, "sop_instance_uid": "1.2.3", "bundle": "tiny",
            "bundle_id": "f" * 64, "prompt_variant": "demo", "device": "cpu", "prompt_tokens": "15",
            "image_tokens": "16", "answer_tokens": "17", "read_seconds": "0.5", "vision_seconds": "0.25",
            "prefill_seconds": "0.125", "generate_seconds": "0", "disclaimer": "Research only.",
        }
    ]  # fmt: skip


def test_a_failure_has_stage_error_and_message_and_the_disclaimer_too() -> None:
    (row,) = rows(("b.png", FAILURE))
    assert {name: cell for name, cell in row.items() if cell} == {
        "input": "b.png", "status": "failure", "question": "Normal?", "stage": "read", "error": "ImageError",
        "message": "b.png: is a folder", "bundle": "tiny", "bundle_id": "f" * 64, "disclaimer": "Research only.",
    }  # fmt: skip


def test_findings_have_a_column_each() -> None:
    scored = replace(SUMMARY, findings=(Finding("Mass", True, 0.75), Finding("Effusion", False)))
    other = replace(SUMMARY, findings=(Finding("Nodule", True), Finding("Mass", False, 0.0)))
    found = rows(("a", scored), ("b", FAILURE), ("c", other))
    assert list(found[0])[-3:] == ["finding: Mass", "finding: Effusion", "finding: Nodule"]
    assert [list(row.values())[-3:] for row in found] == [["0.75", "absent", ""], ["", "", ""], ["0", "", "present"]]


def test_lines_end_as_rfc_4180_has_it_and_no_record_is_a_heading() -> None:
    text = rendered(("a", replace(SUMMARY, text="one", warnings=(), boxes=())), ("b", FAILURE))
    assert text.count("\n") == text.count("\r\n") == 3
    assert text.endswith("\r\n")
    assert rendered() == f"{','.join(table.COLUMNS)}\r\n"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ('=HYPERLINK("http://x","y")', '\'=HYPERLINK("http://x","y")'),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'\t=1"),
        ("\tplain", "'\tplain"),
        ("\r=1", "'\\r=1"),
        ("\n=1", "'\n=1"),
        (" \n =1", "' \n =1"),
        ("＝1", "'＝1"),
        ("1-1=0", "1-1=0"),
        ("a =b", "a =b"),
        ("", ""),
        ("\x00=1", "\\x00=1"),
        ("a\udcff", "a\\udcff"),
        ("Größe 心", "Größe 心"),
    ],
)
def test_no_spreadsheet_takes_text_for_a_formula(text: str, cell: str) -> None:
    summary = replace(SUMMARY, text=text, question=text, warnings=(text,), task=text, sop_instance_uid=text)
    failure = replace(FAILURE, message=text, stage=text, error=text)
    one, other = rows((text, summary), (text, failure))
    for name in ("input", "text", "question", "warnings", "task", "sop_instance_uid"):
        assert one[name] == cell
    for name in ("stage", "error", "message"):
        assert other[name] == cell


@given(st.text(alphabet=st.characters(blacklist_categories=()), max_size=30))
def test_any_text_comes_back_as_one_cell(text: str) -> None:
    data = rendered((text, replace(SUMMARY, text=text))).encode()
    (row,) = csv.DictReader(io.StringIO(data.decode(), newline=""), strict=True)
    assert row["text"].removeprefix("'") == printable(text).removeprefix("'")
    assert not row["text"].lstrip().startswith(("=", "+", "-", "@"))
    assert None not in row


def test_rows_come_one_by_one() -> None:
    taken = []

    def records() -> Any:
        for n in range(100):
            taken.append(n)
            yield "a", SUMMARY

    first = next(iter(table.render(RUN, survey([("a", SUMMARY)]), records())))
    assert first.count("\r\n") == 2
    assert len(taken) == 1
