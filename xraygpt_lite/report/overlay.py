"""The boxes of one answer drawn on its radiograph, with their labels and the disclaimer, as a PNG of the same size.

Knows pixels and finished records; writes no file.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xraygpt_lite.values import Box, Float32, Summary

# Bright enough for black text; told apart by eyes that confuse red and green as well (after Okabe and Ito).
_COLOURS = ("#f0e442", "#56b4e9", "#ff9a3c", "#4de0b0", "#ff9ecf", "#ffffff")
_DARK = "#000000"
_MOST_LINES = 3  # of a label
_SMALLEST = 9  # height of letters, pixels
_Area = tuple[int, int, int, int]  # left, top, right, bottom; the right and bottom pixels belong to it
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def render(pixels: Float32, summary: Summary) -> bytes:
    """Draw an answer's boxes.

    Parameters
    ----------
    pixels
        The radiograph, float32 (H, W) in [0, 1], 0 = dark; shown in 8 bits.
    summary
        The answer about it. A box is labelled with its phrase, or with the question where the answer names none.

    Returns
    -------
    bytes
        An RGB PNG of H x W pixels. The disclaimer stands at the bottom, whether there are boxes or not.
    """
    image = Image.fromarray(np.rint(pixels * np.float32(255)).astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(image)
    letters = max(_SMALLEST, min(image.size) // 40)
    stroke = max(1, min(image.size) // 300)
    taken = [_notice(draw, summary.disclaimer, max(_SMALLEST, letters * 2 // 3))]
    frames = [_frame(box, image.size) for box in summary.boxes]
    for frame, colour in zip(frames, _colours(), strict=False):
        _outline(draw, frame, colour, stroke)
    for box, frame, colour in zip(summary.boxes, frames, _colours(), strict=False):
        taken.append(_label(draw, box.phrase.strip() or summary.question, frame, colour, letters, taken))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # a third of the time, a quarter larger
    return file.getvalue()


def _colours() -> Iterator[str]:
    while True:
        yield from _COLOURS


def _frame(box: Box, size: tuple[int, int]) -> _Area:
    """The pixels that a box spans, at least one."""
    left, top = (min(int(value), side - 1) for value, side in zip((box.x0, box.y0), size, strict=True))
    right, bottom = (min(round(value), side) - 1 for value, side in zip((box.x1, box.y1), size, strict=True))
    return left, top, max(left, right), max(top, bottom)


def _outline(draw: ImageDraw.ImageDraw, frame: _Area, colour: str, stroke: int) -> None:
    """A coloured line inside the frame between two dark ones: seen on bright ground as on dark."""
    left, top, right, bottom = frame
    edge = max(1, stroke // 2)
    for inset, width, ink in ((-edge, stroke + 2 * edge, _DARK), (0, stroke, colour)):
        if right - inset >= left + inset and bottom - inset >= top + inset:
            draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=ink, width=width)


def _label(draw: ImageDraw.ImageDraw, text: str, frame: _Area, colour: str, letters: int, taken: list[_Area]) -> _Area:
    """Write a label at its frame, where it hides no other; return what it takes."""
    font = ImageFont.load_default(letters)
    gap = max(2, letters // 4)
    width, height = draw.im.size
    widest = min(width, max(width // 2, 12 * letters))  # a long label must not lie across the whole picture
    lines = _wrapped(draw, text, font, widest - 2 * gap, _MOST_LINES)
    size = (
        min(width, max(_width(draw, line, font) for line in lines) + 2 * gap),
        min(height, len(lines) * _line_height(letters) + gap),
    )
    area = _place(frame, size, (width, height), taken)
    draw.rectangle(area, fill=colour, outline=_DARK)
    _write(draw, lines, (area[0] + gap, area[1] + gap // 2), font, letters, _DARK)
    return area


def _place(frame: _Area, size: tuple[int, int], image: tuple[int, int], taken: list[_Area]) -> _Area:
    """Where a label goes: above its frame, below or beside it, else on a row near by; where all is taken, over it."""
    left, top, right, bottom = frame
    width, height = size
    rows = sorted(range(0, image[1] - height + 1, max(1, height // 2)), key=lambda row: abs(row - top))
    spots = [(left, top - height), (left, bottom + 1), (right + 1, top), (left - width, top)]
    areas = [_kept_inside(spot, size, image) for spot in (*spots, *((left, row) for row in rows))]
    free = [area for area in areas if not any(_overlap(area, other) for other in taken)]
    outside = [area for area in free if not _overlap(area, frame)]
    return (outside or free or areas)[0]


def _kept_inside(spot: tuple[int, int], size: tuple[int, int], image: tuple[int, int]) -> _Area:
    x, y = (max(0, min(at, side - extent)) for at, extent, side in zip(spot, size, image, strict=True))
    return x, y, x + size[0] - 1, y + size[1] - 1


def _overlap(one: _Area, other: _Area) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _notice(draw: ImageDraw.ImageDraw, text: str, letters: int) -> _Area:
    """The disclaimer on a dark strip along the bottom; return what it takes."""
    width, height = draw.im.size
    font = ImageFont.load_default(letters)
    gap = max(2, letters // 3)
    most = max(1, (height // 3 - gap) // _line_height(letters))  # a small picture keeps two thirds of itself
    lines = _wrapped(draw, text, font, width - 2 * gap, most)
    top = max(0, height - len(lines) * _line_height(letters) - gap)
    area = (0, top, width - 1, height - 1)
    draw.rectangle(area, fill=_DARK)
    _write(draw, lines, (gap, top + gap // 2), font, letters, "#ffffff")
    return area


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int, most: int) -> list[str]:
    """`text` in lines that fit `width`, at most so many; where more would be needed the last one ends in "…"."""
    lines = [""]
    words = text.split()
    for n, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if _width(draw, longer, font) <= width:
            lines[-1] = longer
        elif len(lines) < most and lines[-1]:
            lines.append(_cut(draw, word, font, width))
        else:
            lines[-1] = _cut(draw, " ".join([lines[-1], *words[n:]]).strip(), font, width)
            break
    return lines


def _cut(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> str:
    """`text`, or as much of its beginning as fits with "…"."""
    if _width(draw, text, font) <= width:
        return text
    most = min(len(text), max(0, width))  # no letter is narrower than a pixel
    fitting = bisect_right(range(most + 1), width, key=lambda n: _width(draw, f"{text[:n]}…", font))
    return f"{text[: max(0, fitting - 1)]}…"


def _write(
    draw: ImageDraw.ImageDraw, lines: list[str], at: tuple[int, int], font: _Font, letters: int, ink: str
) -> None:
    for n, line in enumerate(lines):
        draw.text((at[0], at[1] + n * _line_height(letters)), line, fill=ink, font=font)


def _width(draw: ImageDraw.ImageDraw, line: str, font: _Font) -> int:
    return int(draw.textlength(line, font=font)) + 1


def _line_height(letters: int) -> int:
    return letters * 5 // 4
