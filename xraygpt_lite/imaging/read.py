"""A path, bytes or an array to a Radiograph; the format is told by content, never by the name.

It knows no model. Pixels are decoded only after the size was checked, and each reader's own warnings stay unheard.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xraygpt_lite.errors import ImageError
from xraygpt_lite.imaging import raster
from xraygpt_lite.imaging.guard import check_size, to_unit
from xraygpt_lite.values import Float32, Radiograph

MAX_BYTES = 512 * 2**20
"""Largest file that is read."""

_RASTER = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHERS = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"RIFF": "a WebP image or another RIFF file",
    b"<": "HTML or XML text",
    b"{": "JSON text",
}
_DICOM_MARK = 128
_BARE_DICOM = tuple(group + b"\0" for group in (b"\x02", b"\x08"))


def read(source: str | os.PathLike[str] | bytes | npt.NDArray[np.generic]) -> Radiograph:
    """Read one radiograph.

    Parameters
    ----------
    source
        A path; the bytes of a PNG, JPEG, TIFF or DICOM file; or an array (H, W), (H, W, 1) or (H, W, 3): uint8,
        uint16, or floating point in [0, 1], 0 = dark.

    Returns
    -------
    Radiograph
        With pixels float32 (H, W) in [0, 1].

    Raises
    ------
    ImageError
        Whatever is wrong with the file or array, in a sentence.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        name, data = "bytes", bytes(source)
    elif isinstance(source, str | os.PathLike):
        name, data = os.fspath(source), load(source)
    else:
        raise ImageError(f"a {type(source).__name__} is no image; expected a path, bytes or a numpy array.")
    return decode(data, name, hashlib.sha256(data).hexdigest())


def decode(data: bytes, name: str, sha256: str) -> Radiograph:
    """`read` behind a file's bytes, for a caller that has loaded and hashed them."""
    uid = None
    if is_dicom(data):
        from xraygpt_lite.imaging import dicom  # pydicom is loaded only for a DICOM file

        pixels, notes, uid = dicom.decode(data, name)
    elif data.startswith(_RASTER):
        pixels, notes = raster.decode(data, name)
    else:
        raise ImageError(
            f"{name}: not an image that can be read, it looks like {_describe(data)}; expected PNG, JPEG, TIFF or "
            "DICOM. Export the radiograph in one of these formats."
        )
    return _finish(pixels, name, sha256, notes, uid)


def is_dicom(data: bytes) -> bool:
    """Whether bytes are a DICOM file, or a DICOM data set without preamble and header."""
    if data[_DICOM_MARK : _DICOM_MARK + 4] == b"DICM":
        return True
    # A bare data set opens with an element of group 2 or 8: an explicit VR or a small length follows its tag.
    return len(data) >= 16 and data.startswith(_BARE_DICOM) and (data[4:6].isalpha() or data[6:8] == b"\0\0")


def load(source: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most `MAX_BYTES`; raises as `read`."""
    path, name = Path(source), os.fspath(source)
    if "\0" in name:
        raise ImageError("the path holds a NUL character; give a path to a file.")
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name}: is a folder; expected a file. Name the files in it.")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name}: is not a regular file; expected a PNG, JPEG, TIFF or DICOM file.")
        if status.st_size > MAX_BYTES:
            raise ImageError(
                f"{name}: {status.st_size / 2**20:.0f} MiB; at most {MAX_BYTES // 2**20} MiB are read. "
                "Export one frame."
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such file. Check the path.") from None
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror}). Check the path and its permissions.") from None


def _describe(data: bytes) -> str:
    if not data:
        return "an empty file"
    known = (what for mark, what in _OTHERS.items() if data.startswith(mark))
    return next(known, f"something else (its first bytes are {data[:4].hex(' ')})")


def _from_array(array: npt.NDArray[np.generic]) -> Radiograph:
    name = "array"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(f"array: shape {array.shape}; expected (H, W), (H, W, 1) or (H, W, 3).")
    check_size(array.shape[1], array.shape[0], name)
    if array.dtype not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"array: dtype {array.dtype}; expected uint8, uint16, or floating point in [0, 1].")
    digest = hashlib.sha256(f"{array.shape} {array.dtype.str} ".encode())
    digest.update(np.ascontiguousarray(array).data)
    notes: tuple[str, ...] = ()
    if array.dtype in (np.uint8, np.uint16):
        unit, notes = to_unit(array)  # type: ignore[arg-type]  # the dtype was just checked
    else:
        unit = array.astype(np.float32)
        low, high = float(unit.min()), float(unit.max())
        if not (low >= 0 and high <= 1):  # also when either is NaN
            raise ImageError(
                f"array: values from {low:g} to {high:g}; expected finite values in [0, 1]. Divide by the largest "
                "possible value, or give uint8 or uint16."
            )
    if unit.ndim == 3:
        if raster.is_coloured(np.rint(unit * 255).astype(np.uint8)):
            notes += ("The image is in colour; is it a photograph of a radiograph? It was read as grey.",)
        grey = (unit == unit[:, :, :1]).all()
        unit = unit[:, :, 0] if grey else unit @ np.array([0.299, 0.587, 0.114], np.float32)
    return _finish(unit, name, digest.hexdigest(), notes, None)


def _finish(pixels: Float32, name: str, sha256: str, notes: tuple[str, ...], uid: str | None) -> Radiograph:
    if pixels.min() == pixels.max():
        notes += ("All pixels have the same value; the image is blank.",)
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False
    return Radiograph(pixels=pixels, source=name, sha256=sha256, warnings=notes, sop_instance_uid=uid)
