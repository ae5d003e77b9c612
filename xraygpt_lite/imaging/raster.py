"""PNG, JPEG and TIFF to grey values, with Pillow.

It knows neither DICOM nor any model. Orientation tags are obeyed, transparency is laid on black (air), colour becomes
luma (ITU-R 601) with a warning, of several pages the first is read.
"""

from __future__ import annotations

import ctypes
import functools
import io

import numpy as np
from PIL import Image, ImageOps, _imaging

from xraygpt_lite.errors import ImageError
from xraygpt_lite.imaging.guard import check_size, no_memory, silence, to_unit
from xraygpt_lite.values import Float32

FORMATS = ("PNG", "JPEG", "TIFF")
_EIGHT_BIT = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"})
_SIXTEEN_BIT = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_COLOUR_SPREAD = 24
_COLOUR_SHARE = 0.002
_PHOTOMETRIC_TAG = 262


def decode(data: bytes, source: str) -> tuple[Float32, tuple[str, ...]]:
    """Pixels float32 (H, W) in [0, 1] and warnings.

    Raises
    ------
    ImageError
        Damaged data, too many pixels, or pixels that are neither 8 nor unsigned 16 bit.
    """
    if not data.startswith((b"\x89", b"\xff")):
        _hush_libtiff()
    with silence():
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(*image.size, source)
                return _grey(image, source)
        except ImageError:
            raise
        except MemoryError:
            raise no_memory(source) from None
        except Image.DecompressionBombError:
            raise ImageError(f"{source}: the image says more pixels than are ever decoded. Scale it down.") from None
        except Exception as error:  # Pillow's decoders raise errors of any kind on damaged data
            raise ImageError(
                f"{source}: the image data are damaged or incomplete ({type(error).__name__}); expected a whole PNG, "
                "JPEG or TIFF. Export or copy it again."
            ) from None


@functools.cache
def _hush_libtiff() -> None:
    """Stop libtiff from writing about damaged files to stderr; Pillow reports them as errors all the same.

    Pillow has no switch for it. Where libtiff's own is not exported, damaged files stay noisy.
    """
    library = ctypes.CDLL(_imaging.__file__)
    switch = getattr(library, "TIFFSetErrorHandler", None)
    if switch is not None:
        switch.argtypes, switch.restype = [ctypes.c_void_p], ctypes.c_void_p
        switch(None)


def _grey(image: Image.Image, source: str) -> tuple[Float32, tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if getattr(image, "n_frames", 1) > 1:
        notes += ("The file holds several images; only the first was read.",)
    if image.mode in _SIXTEEN_BIT:
        # Pillow leaves 16-bit "white is zero" TIFF as stored, and inverts the 8-bit kind itself.
        inverted = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC_TAG) == 0  # type: ignore[attr-defined]
        upright = ImageOps.exif_transpose(image)
        values = np.asarray(upright).astype(np.uint16, copy=False)
        unit, more = to_unit(values)
        if "transparency" in image.info:
            unit = np.where(values == image.info["transparency"], np.float32(0), unit)
        return (1 - unit if inverted else unit), notes + more
    if image.mode not in _EIGHT_BIT:
        raise ImageError(
            f"{source}: the pixels are signed, 32-bit or floating point; expected 8 or unsigned 16 bits. Export the "
            "image again as 8 or 16 bit grey."
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    elif image.mode not in {"1", "L"}:
        image = image.convert("RGB")
    if image.mode == "RGB" and is_coloured(np.asarray(image)):
        notes += ("The image is in colour; is it a photograph of a radiograph? It was read as grey.",)
    unit, more = to_unit(np.asarray(image.convert("L")))
    return unit, notes + more


def is_coloured(rgb: np.ndarray) -> bool:
    """Whether uint8 (H, W, 3) has colour beyond what JPEG makes of grey or a small mark brings."""
    spread = rgb.max(-1).astype(np.int16) - rgb.min(-1)
    return bool((spread > _COLOUR_SPREAD).mean() > _COLOUR_SHARE)
