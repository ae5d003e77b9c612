"""Radiographs to the encoder's input, exactly as the models' authors prepare it: on 8 bits, with Pillow.

It knows the ImageSpec and no model family.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from xraygpt_lite.values import Float32, ImageSpec, Pixels, Placement, Radiograph, UInt8

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def transform(radiographs: Sequence[Radiograph], spec: ImageSpec) -> Pixels:
    """Make the encoder's input.

    8 bits → stretch, or zero-pad to a square of at least `spec.size` → resize → / 255 → mean and std per channel.

    Parameters
    ----------
    radiographs
        B images of any sizes.
    spec
        Size, fit, filter and normalization of the encoder.

    Returns
    -------
    Pixels
        float32 (B, 3, S, S) and a Placement for each image.
    """
    fitted = [fit(radiograph.pixels, spec) for radiograph in radiographs]
    return Pixels(normalize([square for square, _ in fitted], spec), tuple(placement for _, placement in fitted))


def fit(pixels: Float32, spec: ImageSpec) -> tuple[UInt8, Placement]:
    """One image (H, W) in [0, 1] on the encoder's square: uint8 (S, S), and where it lies."""
    image = Image.fromarray(np.rint(pixels * np.float32(255)).astype(np.uint8))
    width, height = image.size
    offset = (0, 0)
    if spec.fit == "pad":
        side = max(width, height, spec.size)
        offset = ((side - width) // 2, (side - height) // 2)
        square = Image.new("L", (side, side))
        square.paste(image, offset)
        image = square
    scale = (spec.size / image.width, spec.size / image.height)
    small = image.resize((spec.size, spec.size), _FILTERS[spec.interpolation])
    placement = Placement(scale, (offset[0] * scale[0], offset[1] * scale[1]), (width, height))
    return np.asarray(small), placement


def normalize(squares: Sequence[UInt8], spec: ImageSpec) -> Float32:
    """B squares uint8 (S, S) as the encoder takes them: float32 (B, 3, S, S)."""
    mean = np.array(spec.mean, np.float32)[:, None, None]
    std = np.array(spec.std, np.float32)[:, None, None]
    data = np.empty((len(squares), 3, spec.size, spec.size), np.float32)
    for row, square in zip(data, squares, strict=True):
        np.subtract(np.asarray(square, np.float32) / np.float32(255), mean, out=row)
        row /= std
    return data
