"""Records come back from JSON as they were, and what is no record is refused by the field's name alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xraygpt_lite import records
from xraygpt_lite.records import from_json, line, parse, to_json
from xraygpt_lite.values import Box, Failure, Finding, Record, Sampling, Summary, Timings

# A name that is not UTF-8 comes as a lone low surrogate. A high one before it would be another character once written.
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(["\udc80", "\udcff"]), max_size=20)
SHA = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNT = st.integers(0, 2**53)
NUMBER = st.floats(-1e9, 1e9).map(lambda value: round(value, 6))
FAILURES = st.builds(Failure, TEXT, st.none() | SHA, TEXT, TEXT, TEXT, TEXT)
SUMMARIES = st.builds(
    Summary,
    source=TEXT,
    sha256=SHA,
    sop_instance_uid=st.none() | TEXT,
    question=TEXT,
    prompt_variant=TEXT,
    text=TEXT,
    raw_text=TEXT,
    finish=st.sampled_from(["stop", "length"]),
    warnings=st.lists(TEXT, max_size=2).map(tuple),
    options=st.builds(Sampling, seed=COUNT, temperature=NUMBER, stops=st.lists(TEXT, max_size=2).map(tuple)),
    device=st.sampled_from(["cpu", "cuda"]),
    bundle_id=SHA,
    bundle_name=TEXT,
    timings=st.builds(Timings, NUMBER, NUMBER, NUMBER, NUMBER),
    prompt_tokens=COUNT,
    image_tokens=COUNT,
    answer_tokens=COUNT,
    disclaimer=TEXT,
    findings=st.lists(st.builds(Finding, TEXT, st.booleans(), st.none() | NUMBER), max_size=2).map(tuple),
    task=st.none() | TEXT,
    asked_box=st.none() | st.tuples(NUMBER, NUMBER, NUMBER, NUMBER),
    boxes=st.lists(st.builds(Box, TEXT, NUMBER, NUMBER, NUMBER, NUMBER), max_size=2).map(tuple),
)
SUMMARY = Summary(
    source="a.png", sha256="0" * 64, sop_instance_uid=None, question="?", prompt_variant="chat", text="secret",
    raw_text="secret", finish="stop", warnings=("one",), options=Sampling(), device="cpu", bundle_id="f" * 64,
    bundle_name="tiny", timings=Timings(), prompt_tokens=1, image_tokens=2, answer_tokens=3, disclaimer="Research.",
    findings=(Finding("Mass", False),), asked_box=(1.0, 2.0, 3.0, 4.0),
)  # fmt: skip
FAILURE = Failure("b.dcm", None, "?", "read", "ImageError", "b.dcm is empty")


@given(FAILURES | SUMMARIES)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    written = line(to_json(record))
    assert written.isascii()
    assert written.count("\n") == 1
    again = from_json(json.loads(written))
    assert again == record
    assert line(to_json(again)) == written


def test_floats_are_rounded_once() -> None:
    record = replace(SUMMARY, timings=Timings(read=1 / 3))
    again = from_json(to_json(record))
    assert again == replace(SUMMARY, timings=Timings(read=0.333333))
    assert from_json(to_json(again)) == again


@pytest.mark.parametrize("record", [SUMMARY, FAILURE])
def test_the_schema_comes_first_and_tuples_are_lists(record: Record) -> None:
    written = to_json(record)
    assert next(iter(written)) == "schema"
    assert json.loads(line(written)) == written


def test_numbers_may_be_written_without_a_point() -> None:
    written = to_json(SUMMARY)
    written["asked_box"] = [1, 2, 3, 4]
    again = from_json(written)
    assert again == SUMMARY
    assert isinstance(again, Summary)
    assert again.asked_box is not None
    assert {type(value) for value in again.asked_box} == {float}


def test_an_older_writer_lacks_fields_and_a_newer_one_has_more() -> None:
    written = to_json(SUMMARY)
    for name in ("findings", "task", "asked_box", "boxes"):
        del written[name]
    del written["options"]["beams"]
    written |= {"added": {"later": 1}, "key": "0" * 64}
    assert from_json(written) == replace(SUMMARY, findings=(), asked_box=None)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", "xraygpt-lite/record/2", r"schema is not xraygpt-lite/record/1"),
        ("text", 5, "text is a whole number, expected text"),
        ("text", ..., "text is missing"),
        ("prompt_tokens", True, "prompt_tokens is true or false, expected a whole number"),
        ("prompt_tokens", 1.0, "prompt_tokens is a number, expected a whole number"),
        ("finish", "secret", "finish is none of stop, length"),
        ("finish", ["stop"], "finish is none of stop, length"),
        ("warnings", "secret", "warnings is text, expected a list"),
        ("warnings", ["fine", None], r"warnings\[1\] is null, expected text"),
        ("options", None, "options is null, expected an object"),
        ("options.top_p", "secret", "options.top_p is text, expected a finite number"),
        ("timings.read", float("nan"), "timings.read is a number, expected a finite number"),
        ("timings.read", float("inf"), "timings.read is a number, expected a finite number"),
        ("timings.read", 10**400, "timings.read is a whole number, expected a finite number"),
        ("asked_box", [1, 2, 3], "asked_box is a list, expected a list of 4"),
        ("asked_box", [1, 2, 3, "4"], r"asked_box\[3\] is text, expected a finite number"),
        ("findings", [{"name": "secret"}], r"findings\[0\].present is missing"),
        ("findings", [{"name": "a", "present": 1}], r"findings\[0\].present is a whole number, expected true or false"),
    ],
)
def test_what_is_no_record_is_refused_by_its_place(path: str, value: Any, message: str) -> None:
    written = to_json(SUMMARY)
    inside = written
    *folders, name = path.split(".")
    for folder in folders:
        inside = inside[folder]
    if value is ...:
        del inside[name]
    else:
        inside[name] = value
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        from_json(written)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "secret", 3, {}, {"schema": None}])
def test_any_other_json_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^(the record is .*, expected an object|schema is not .*)$"):
        from_json(value)


def test_a_part_of_a_record_can_be_read_alone() -> None:
    assert parse(Timings, {"read": 1}) == Timings(read=1.0)
    with pytest.raises(ValueError, match=r"^the value is a list, expected an object$"):
        parse(Timings, [])


def test_what_json_cannot_say_is_an_error() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        line({"a": float("nan")})


def test_importing_it_does_not_load_numpy() -> None:
    program = f"import {records.__name__}, xraygpt_lite.report, sys; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
