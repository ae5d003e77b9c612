"""A journal's lines are what the shipped schema says, and the schema names all that a line adds to a record."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from importlib import resources

import pytest
from unit.report.test_record_schema import FAILURE, SUMMARY, faults
from unit.report.test_record_schema import SCHEMA as RECORD

from xraygpt_lite.batch.journal import Entry, Header, Keys
from xraygpt_lite.values import Record

SCHEMA = json.loads((resources.files("xraygpt_lite.report") / "journal.schema.json").read_text("utf-8"))
HEADER = Header(
    bundle_id="f" * 64,
    bundle_name="tiny",
    options={"questions": ["¿Qué?"], "identifiers": False, "generation": {"max_tokens": 3}},
    inputs=200,
    shard=(3, 16),
    disclaimer="Research use only.",
    version="0.1.0",
    salt=Keys(b"s" * 32).fingerprint,
)


@pytest.mark.parametrize("header", [HEADER, replace(HEADER, inputs=None, shard=None, salt=None, options={})])
def test_a_header_is_what_the_schema_says(header: Header) -> None:
    line = header.line()
    assert line.isascii()
    assert line.count(b"\n") == 1
    written = json.loads(line)
    assert next(iter(written)) == "schema"
    assert faults(written, SCHEMA["$defs"]["header"]) == []
    assert faults(written, SCHEMA["$defs"]["entry"]) != []
    assert faults({**written, "shard": ["3", 16]}, SCHEMA["$defs"]["header"]) == ["$.shard[0] is no ['integer']"]


@pytest.mark.parametrize(("record", "kind"), [(SUMMARY, "summary"), (FAILURE, "failure")])
def test_an_entry_is_a_record_and_what_it_is_known_by(record: Record, kind: str) -> None:
    line = Entry("a/\udcff.dcm", "0" * 64, "1" * 64, record).line()
    assert line.isascii()
    assert line.count(b"\n") == 1
    written = json.loads(line)
    assert list(written)[:4] == ["schema", "input", "key", "file"]
    assert faults(written, RECORD["$defs"][kind]) == []
    assert faults(written, SCHEMA["$defs"]["entry"]) == []
    assert faults(written, SCHEMA["$defs"]["header"]) != []
    assert faults({**written, "key": "0"}, SCHEMA["$defs"]["entry"]) == ["$.key: pattern"]


def test_the_schema_names_every_field() -> None:
    header, entry = SCHEMA["$defs"]["header"], SCHEMA["$defs"]["entry"]
    assert set(header["properties"]) == set(header["required"]) == {field.name for field in fields(Header)}
    added = {field.name for field in fields(Entry)} - {"record"}
    assert set(entry["properties"]) == set(entry["required"]) == added | {"schema", "question"}
    for kind in ("summary", "failure"):
        assert not added & set(RECORD["$defs"][kind]["properties"])  # an entry is flat: names must not meet


def test_the_two_schemas_know_each_other() -> None:
    """`../record/1` seen from `xraygpt-lite/journal/1`."""
    assert SCHEMA["$id"].rsplit("/", 2)[0] + "/record/1" == RECORD["$id"]
    assert {"$ref": "../record/1"} in SCHEMA["oneOf"][1]["allOf"]
