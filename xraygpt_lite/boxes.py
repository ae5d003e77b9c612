"""Rectangles as models write them, `{<x0><y0><x1><y1>}` in parts of the square input's sides, to pixels and back.

Knows the markup, and where an image lies in the square (`Placement`); knows no task, no model and no picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from xraygpt_lite.errors import UsageError
from xraygpt_lite.values import Box, Corners, Placement

_BOX = re.compile(r"\{<([0-9]{1,6})><([0-9]{1,6})><([0-9]{1,6})><([0-9]{1,6})>\}")
_ONE = r"\{(?:<[0-9]{1,6}>){4}\}"
_PHRASE = r"<p>((?:(?!</?p>).)*)</p>"
# A phrase and its boxes, boxes alone, or a phrase alone.
_MARKED = re.compile(rf"(?:{_PHRASE}\s*)?({_ONE}(?:\s*(?:<delim>\s*)?{_ONE})*)|{_PHRASE}", re.DOTALL)
_BROKEN = re.compile(r"\{\s*<|>\s*\}|</?p>|<delim>")
_DIGITS = 6  # of a pixel: what is beyond them is noise of the arithmetic
_ROUNDING = 1e-6  # of a step: what float arithmetic may lose must not cost a whole step when it is truncated


@dataclass(frozen=True)
class Reading:
    """An answer whose boxes were read: the text without their markup, the boxes in order, sentences for the reader."""

    text: str
    boxes: tuple[Box, ...]
    warnings: tuple[str, ...]


def corners(given: Sequence[float | str]) -> Corners:
    """(x0, y0, x1, y1) as floats, or as typed, once they are a rectangle of some image.

    Raises
    ------
    UsageError
        They are not four finite numbers, or nothing lies between them.
    """
    try:
        x0, y0, x1, y1 = map(float, given)
    except (TypeError, ValueError, OverflowError):
        raise UsageError("a box needs four numbers, X0,Y0,X1,Y1, in pixels of the original image") from None
    if not (0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf):
        raise UsageError(
            f"box {_plain((x0, y0, x1, y1))} holds nothing; expected 0 <= X0 < X1 and 0 <= Y0 < Y1, in pixels of the "
            "original image"
        )
    return x0, y0, x1, y1


def markup(box: Corners, placement: Placement, side: int, grid: int) -> str:
    """A rectangle as a model reads it.

    Parameters
    ----------
    box
        In pixels of the original image, as `corners` gave it.
    placement, side
        Where the original lies in the square input, and that square's side in pixels.
    grid
        Steps of the model's grid along a side. Coordinates are truncated to it, as the authors do; what is thinner than
        a step becomes one step wide.

    Raises
    ------
    UsageError
        It reaches outside the image.
    """
    width, height = placement.size
    if box[2] > width or box[3] > height:
        raise UsageError(
            f"box {_plain(box)} reaches outside the image, which is {width} x {height} pixels; "
            f"expected 0 <= X0 < X1 <= {width} and 0 <= Y0 < Y1 <= {height}"
        )
    spans = []
    for axis in (0, 1):
        scale, offset = placement.scale[axis], placement.offset[axis]
        low, high = (int((box[axis + n] * scale + offset) * grid / side + _ROUNDING) for n in (0, 2))
        low = min(low, grid - 1)
        spans.append((low, max(high, low + 1)))
    (x0, x1), (y0, y1) = spans
    return f"{{<{x0}><{y0}><{x1}><{y1}>}}"


def parse(text: str, placement: Placement, side: int, grid: int) -> Reading:
    """Read the boxes of an answer: one, several (joined by `<delim>` or side by side), each with its `<p>phrase</p>`.

    Markup that is malformed, off the grid or empty stays in the text as the model wrote it, with a warning. Any text is
    accepted. Parameters as for `markup`; the boxes are clipped to the image.
    """
    shown, found, broken, at = "", list[Box](), False, 0
    for match in _MARKED.finditer(text):
        phrase = " ".join((match[1] or match[3] or "").split())
        unread = []
        for one in _BOX.finditer(match[2] or ""):
            box = _pixels(phrase, [int(number) for number in one.groups()], placement, side, grid)
            if box is None:
                unread.append(one[0])
            else:
                found.append(box)
        before = text[at : match.start()]
        broken = broken or bool(unread) or _BROKEN.search(before) is not None
        shown = _joined(_joined(shown, before), " ".join(filter(None, (phrase, *unread))))
        at = match.end()
    rest = text[at:]
    broken = broken or _BROKEN.search(rest) is not None
    warnings = (
        "a box in the answer could not be read (malformed, empty or off the image); it stands in the text as the model "
        "wrote it",
    )
    return Reading(_joined(shown, rest).strip(), tuple(found), warnings if broken else ())


def _pixels(phrase: str, numbers: list[int], placement: Placement, side: int, grid: int) -> Box | None:
    """The box in pixels of the original, clipped to it; None where it is no rectangle on the grid or holds no pixel."""
    x0, y0, x1, y1 = numbers
    if not (x0 < x1 <= grid and y0 < y1 <= grid):
        return None

    def back(step: int, axis: int) -> float:
        pixel = (step * side / grid - placement.offset[axis]) / placement.scale[axis]
        return min(max(round(pixel, _DIGITS), 0.0), float(placement.size[axis]))

    box = Box(phrase, back(x0, 0), back(y0, 1), back(x1, 0), back(y1, 1))
    return box if box.x0 < box.x1 and box.y0 < box.y1 else None


def _joined(left: str, right: str) -> str:
    """Two texts between which markup stood: one space or line break, and none before a comma or a full stop."""
    head, tail = left.rstrip(), right.lstrip()
    if not head or not tail:
        return left + right
    between = left[len(head) :] + right[: len(right) - len(tail)]
    if "\n" in between:
        return f"{head}\n{tail}"
    return head + tail if tail[0] in ".,;:!?)" or head[-1] == "(" else f"{head} {tail}"


def _plain(box: Corners) -> str:
    return ",".join(f"{value:g}" for value in box)
