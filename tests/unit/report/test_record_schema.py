"""Records written as JSON are what the shipped schema says, and the schema says all that is in a record."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from importlib import resources
from typing import Any

import pytest

from xraygpt_lite.report import FORMATS
from xraygpt_lite.values import Box, Failure, Finding, Sampling, Summary, Timings

SCHEMA = json.loads((resources.files("xraygpt_lite.report") / "record.schema.json").read_text("utf-8"))
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
SUMMARY = Summary(
    source="a/\udcff.dcm",
    sha256="0" * 64,
    sop_instance_uid="1.2.3",
    question="¿Qué?",
    prompt_variant="demo",
    text="No acute finding.\x1b[2J",
    raw_text=" No acute finding.\x1b[2J ",
    finish="stop",
    warnings=("one", "two"),
    options=Sampling(stops=("###",)),
    device="cpu",
    bundle_id="f" * 64,
    bundle_name="tiny",
    timings=Timings(read=1 / 3, vision=1e-9),
    prompt_tokens=1,
    image_tokens=2,
    answer_tokens=3,
    disclaimer="Research use only.",
    findings=(Finding("Effusion", True, 0.25), Finding("Mass", False)),
    task="identify",
    asked_box=(1.0, 2.5, 30.0, 40.0),
    boxes=(Box("heart", 0.0, 1.5, 1 / 3, 1024.0), Box("", 1.0, 2.0, 3.0, 4.0)),
)
FAILURE = Failure("b.dcm", None, "?", "read", "ImageError", "b.dcm is empty")


def faults(value: Any, schema: dict[str, Any], at: str = "$") -> list[str]:
    """What is wrong with `value`, for the keywords that record.schema.json uses; an unknown keyword is a KeyError."""
    found: list[str] = []
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(
        isinstance(value, _TYPES[kind]) and (kind == "boolean" or value is not True) for kind in kinds
    ):
        return [f"{at} is no {kinds}"]
    checks = {
        "type": lambda _: True,
        "description": lambda _: True,
        "const": lambda expected: value == expected,
        "enum": lambda allowed: value in allowed,
        "pattern": lambda pattern: value is None or re.search(pattern, value),
        "minimum": lambda bound: value is None or value >= bound,
        "maximum": lambda bound: value is None or value <= bound,
        "required": lambda names: set(names) <= set(value),
    }
    for keyword, argument in schema.items():
        if keyword == "$ref":
            found += faults(value, SCHEMA["$defs"][argument.removeprefix("#/$defs/")], at)
        elif value is None and keyword in ("properties", "items"):
            pass  # its type allows null
        elif keyword == "properties":
            for name in argument.keys() & value.keys():
                found += faults(value[name], argument[name], f"{at}.{name}")
        elif keyword == "items":
            for n, item in enumerate(value):
                found += faults(item, argument, f"{at}[{n}]")
        elif not checks[keyword](argument):
            found.append(f"{at}: {keyword}")
    return found


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (SUMMARY, "summary"),
        (replace(SUMMARY, sop_instance_uid=None, findings=(), task=None, asked_box=None, boxes=()), "summary"),
        (FAILURE, "failure"),
    ],
)
def test_a_record_is_what_the_schema_says(record: Summary | Failure, kind: str) -> None:
    line = FORMATS["json"].record(record, True)
    assert line.isascii()
    assert line.count("\n") == 1
    written = json.loads(line)
    assert faults(written, SCHEMA["$defs"][kind]) == []
    other = "failure" if kind == "summary" else "summary"
    assert faults(written, SCHEMA["$defs"][other]) != []
    assert faults({**written, "schema": "xraygpt-lite/record/2"}, SCHEMA["$defs"][kind]) == ["$.schema: const"]


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("summary", Summary),
        ("failure", Failure),
        ("sampling", Sampling),
        ("timings", Timings),
        ("finding", Finding),
        ("box", Box),
    ],
)
def test_the_schema_names_every_field(kind: str, record: type) -> None:
    names = {field.name for field in fields(record)}
    assert set(SCHEMA["$defs"][kind]["properties"]) == names
    assert set(SCHEMA["$defs"][kind]["required"]) == names


def test_values_survive_and_floats_are_rounded() -> None:
    written = json.loads(FORMATS["json"].record(SUMMARY, False))
    assert next(iter(written)) == "schema"
    assert (written["source"], written["text"], written["question"]) == (SUMMARY.source, SUMMARY.text, "¿Qué?")
    assert (written["timings"]["read"], written["timings"]["vision"]) == (0.333333, 0.0)
    assert written["findings"][0] == {"name": "Effusion", "present": True, "probability": 0.25}
    assert written["asked_box"] == [1.0, 2.5, 30.0, 40.0]
    assert written["boxes"][0] == {"phrase": "heart", "x0": 0.0, "y0": 1.5, "x1": 0.333333, "y1": 1024.0}
    assert FORMATS["json"].end([SUMMARY]) == ""


def test_what_json_cannot_say_is_an_error() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        FORMATS["json"].record(replace(SUMMARY, timings=Timings(read=float("nan"))), False)
