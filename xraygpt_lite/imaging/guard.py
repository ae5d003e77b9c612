"""What every reader holds to: limits on size, and silence.

It knows no file format.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from xraygpt_lite.errors import ImageError
from xraygpt_lite.values import Float32

MAX_PIXELS = 50_000_000
"""Largest image that is decoded; a digital radiograph has 4 to 20 million pixels."""
MIN_SIDE = 16
"""Smallest side, pixels."""
MAX_ASPECT = 5
"""Longest side over shortest: padding to a square must not multiply the memory that `MAX_PIXELS` bounds."""

_LOGGERS = ("pydicom", "pylibjpeg", "PIL", "PIL.Image", "PIL.PngImagePlugin", "PIL.TiffImagePlugin", "PIL.ImageFile")
_lock = threading.Lock()
_quiet: list[object] = []


def check_size(width: int, height: int, source: str) -> None:
    """Refuse a size before anything is decoded.

    Raises
    ------
    ImageError
        More than `MAX_PIXELS`, a side below `MIN_SIDE`, or longer than `MAX_ASPECT` times its width.
    """
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{source}: the image says {width} x {height} = {width * height / 1e6:.0f} million pixels; at most "
            f"{MAX_PIXELS // 1_000_000} million are decoded. Scale it down first."
        )
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{source}: {width} x {height} pixels is no radiograph's shape; expected sides of at least {MIN_SIDE} "
            f"pixels and at most {MAX_ASPECT} to 1. Give the whole image."
        )


def to_unit(values: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> tuple[Float32, tuple[str, ...]]:
    """Unsigned display values to [0, 1], with warnings.

    8 bits are divided by 255. 16 bits are divided by 2^k - 1, k the smallest of 8, 10, 12, 14 and 16 that holds the
    largest value, since 10 to 14 bit images are often stored in 16 unscaled; k below 16 is a warning.
    """
    bits = 8
    if values.dtype != np.uint8:
        top = int(values.max())
        bits = next(k for k in (8, 10, 12, 14, 16) if top < 2**k)
    unit = np.multiply(values, np.float32(1 / (2**bits - 1)), dtype=np.float32)
    if values.dtype == np.uint8 or bits == 16:
        return unit, ()
    return unit, (f"The 16-bit image uses {bits} bits; it was scaled as a {bits}-bit image.",)


@contextmanager
def silence() -> Iterator[None]:
    """No warning or log record of pydicom or Pillow gets out: they may quote values of the file.

    Threads that read at the same time share one section: the first switches off, the last restores.
    """
    with _lock:
        if not _quiet:
            caught = warnings.catch_warnings()
            caught.__enter__()
            warnings.simplefilter("ignore")
            loggers = [logging.getLogger(name) for name in _LOGGERS]
            before = [logger.disabled for logger in loggers]
            for logger in loggers:
                logger.disabled = True

            def restore() -> None:
                caught.__exit__(None, None, None)
                for logger, disabled in zip(loggers, before, strict=True):
                    logger.disabled = disabled

            _quiet.append(restore)
        else:
            _quiet.append(None)
    try:
        yield
    finally:
        with _lock:
            # The first entry holds what undoes the section; it goes last.
            undo = _quiet.pop() if len(_quiet) > 1 else _quiet.pop(0)
            if callable(undo):
                undo()


def no_memory(source: str) -> ImageError:
    """What is said of an image that may well be whole."""
    return ImageError(f"{source}: memory ran out while the image was decoded. Close other programs and try again.")
