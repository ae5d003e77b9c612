"""Renders finished records: one file a format, and the table that names them.

Knows records only; no model, no files and no terminal. Importing it does not load numpy: `--help` passes here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xraygpt_lite.report import json, text

if TYPE_CHECKING:
    from xraygpt_lite.values import Record

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True)
class Format:
    """A way to write records down.

    Attributes
    ----------
    record
        (record, several) → its text, newline included; `several` says that other records stand beside it.
    end
        All records → what closes the output, newline included, or "".
    """

    record: Callable[[Record, bool], str]
    end: Callable[[Sequence[Record]], str]


FORMATS: Mapping[str, Format] = {
    "text": Format(text.record, text.end),
    "json": Format(json.record, json.end),
}
