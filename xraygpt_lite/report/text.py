"""Records as text for a reader: the answer and its boxes, a heading each where there are several, the disclaimer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xraygpt_lite.values import Box, Record, Summary

# C0 and C1 controls steer a terminal, lone surrogates (file names that are not UTF-8) cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def record(record: Record, several: bool) -> str:
    """The answer, or one line that says there is none; under a heading and before an empty line among `several`."""
    from xraygpt_lite.values import Summary

    body = answer(record) if isinstance(record, Summary) else f"No result: {record.stage} failed.\n"
    return f"{heading(record.source)}{body}\n" if several else body


def answer(summary: Summary) -> str:
    """The answer's text, and under it a line for each of its boxes."""
    said = [printable(summary.text)] if summary.text or not summary.boxes else []
    return "".join(f"{line}\n" for line in (*said, *map(_box, summary.boxes)))


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


def _box(box: Box) -> str:
    """In whole pixels, in the order that `--box` takes."""
    where = ",".join(f"{value:.0f}" for value in (box.x0, box.y0, box.x1, box.y1))
    return f"box {where} px: {one_line(box.phrase)}" if box.phrase.strip() else f"box {where} px"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns, the last one free; each row ends in a newline."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    widths[-1:] = [0]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells
    )
