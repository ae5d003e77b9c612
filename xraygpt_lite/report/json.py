"""Records as JSON lines: one object a record, the keys in the order of the fields, ASCII only.

`record.schema.json` beside this file describes the objects. Within one schema number fields are only added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xraygpt_lite.records import line, to_json

if TYPE_CHECKING:
    from xraygpt_lite.values import Record

__all__ = ["end", "line", "record"]


def record(record: Record, several: bool = False) -> str:  # noqa: ARG001 (a line is the same alone and among others)
    """One line for a `Summary` or a `Failure`, "schema" first; floats are rounded to six decimals."""
    return line(to_json(record))


def end(records: Sequence[Record]) -> str:  # noqa: ARG001 (lines need no closing)
    """Nothing: lines stand alone."""
    return ""
