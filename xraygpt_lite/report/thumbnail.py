"""A radiograph's pixels as a small JPEG for a page. Knows pixels; reads and writes no file."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from xraygpt_lite.values import Float32

SIDE = 128
"""Longest side, pixels: about 3 kB, so that a page of ten thousand radiographs still opens."""
_QUALITY = 75


@dataclass(frozen=True)
class Thumbnail:
    """A grey JPEG, nothing but pixels in it, and the (width, height) of the original in pixels."""

    jpeg: bytes
    size: tuple[int, int]


def make(pixels: Float32) -> Thumbnail:
    """Shrink `pixels`, float32 (H, W) in [0, 1], to fit `SIDE` x `SIDE`; smaller ones stay as they are."""
    height, width = pixels.shape
    image = Image.fromarray(np.rint(pixels * np.float32(255)).astype(np.uint8))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return Thumbnail(file.getvalue(), (width, height))
