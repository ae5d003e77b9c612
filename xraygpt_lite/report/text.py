"""Records as text for a reader: the answer, a heading each where there are several, the disclaimer at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xraygpt_lite.values import Record

# C0 and C1 controls steer a terminal, lone surrogates (file names that are not UTF-8) cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def record(record: Record, several: bool) -> str:
    """The answer, or one line that says there is none; under a heading and before an empty line among `several`."""
    from xraygpt_lite.values import Summary

    body = printable(record.text) if isinstance(record, Summary) else f"No result: {record.stage} failed."
    return f"{heading(record.source)}{body}\n\n" if several else f"{body}\n"


def end(records: Sequence[Record]) -> str:
    """The disclaimers of the answers (one, since one bundle gave them); nothing where there is no answer."""
    from xraygpt_lite.values import Summary

    summaries = [record for record in records if isinstance(record, Summary)]
    notes = dict.fromkeys(printable(summary.disclaimer) for summary in summaries)
    gap = "\n" if len(records) == 1 else ""  # several records have each left an empty line behind them
    return "".join(f"{gap}{note}\n" for note in notes)


def heading(source: str) -> str:
    """The line above one answer among several."""
    return f"== {one_line(source)} ==\n"


def printable(text: str) -> str:
    """`text` with what would steer a terminal or cannot be encoded as escapes; line breaks and tabs stay."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`printable`, with every run of white space as one space."""
    return printable(" ".join(text.split()))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns, the last one free; each row ends in a newline."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    widths[-1:] = [0]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells
    )
