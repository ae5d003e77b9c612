"""Records as JSON lines: one object a record, the keys in the order of the fields, ASCII only.

`record.schema.json` beside this file describes the objects. Within one schema number fields are only added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xraygpt_lite.values import Record

_DIGITS = 6


def record(record: Record, several: bool = False) -> str:  # noqa: ARG001 (a line is the same alone and among others)
    """One line for a `Summary` or a `Failure`, "schema" first; floats are rounded to six decimals."""
    fields = plain(record)
    return line({"schema": fields.pop("schema"), **fields})


def end(records: Sequence[Record]) -> str:  # noqa: ARG001 (lines need no closing)
    """Nothing: lines stand alone."""
    return ""


def line(value: Any) -> str:
    """`value` as one line of JSON, newline included.

    Raises
    ------
    ValueError
        A float is not finite: JSON cannot say it.
    """
    return json.dumps(plain(value), allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses → dicts, tuples → lists, floats rounded; the rest as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value
