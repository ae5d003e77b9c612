"""A DICOM file to grey values; the only file that imports pydicom.

Order: decode → rescale or modality LUT → VOI LUT or window → MONOCHROME1 → [0, 1] (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2).
Only the elements in `_TAGS` are ever parsed; of them only the SOP Instance UID leaves this file. Messages and warnings
are fixed sentences that never quote an element's value.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_windowing
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from xraygpt_lite.errors import ImageError
from xraygpt_lite.imaging.guard import check_size, no_memory, silence
from xraygpt_lite.values import Float32

_TAGS = [
    "SOPInstanceUID", "Modality", "BodyPartExamined", "ViewPosition", "PresentationIntentType", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation",
    "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "PixelPaddingValue", "PixelPaddingRangeLimit", "EncryptedAttributesSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData", "FloatPixelData", "DoubleFloatPixelData",
]  # fmt: skip
_RADIOGRAPHS = frozenset({"CR", "DX", "RG"})
_DOUBTFUL = frozenset({"", "OT", "SC", "RF"})
_OTHER_MODALITIES = {
    "CT": "computed tomography", "MR": "magnetic resonance", "US": "ultrasound", "MG": "mammography",
    "PT": "positron emission tomography", "NM": "nuclear medicine", "XA": "angiography", "ES": "endoscopy",
    "IO": "an intra-oral image", "PX": "a panoramic dental image", "XC": "a photograph", "SM": "microscopy",
    "SR": "a structured report", "PR": "a presentation state", "SEG": "a segmentation", "DOC": "a document",
}  # fmt: skip
_CHEST = ("CHEST", "THORAX", "LUNG", "RIB", "HEART")
_LATERAL = frozenset({"LL", "RL", "LAT", "LATERAL"})
_UNUSABLE = (ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What pydicom and numpy raise on elements that are empty, short or of another kind."""
_DECODERS = ("pylibjpeg", "pyjpegls", "pillow", "pydicom", "gdcm")
"""Order of preference: gdcm last, it turns pixels into text and back; it is the only one for JPEG lossless."""


def decode(data: bytes, source: str) -> tuple[Float32, tuple[str, ...], str | None]:
    """Pixels float32 (H, W) in [0, 1], warnings, and the SOP Instance UID where it is a valid one.

    Raises
    ------
    ImageError
        Not a whole, unencrypted, single-channel radiograph in a transfer syntax that can be decoded.
    """
    if DeflatedExplicitVRLittleEndian.encode() in data[:1024]:
        raise ImageError(f"{source}: the DICOM file is deflated, which is not read. Convert it with `gdcmconv --raw`.")
    with silence():
        try:
            ds = dcmread(io.BytesIO(data), force=True, specific_tags=_TAGS)
            notes = _check(ds, source)
            stored = _decode_pixels(ds, source)
            pixels, more = _display(stored, ds)
            uid = UID(str(ds.get("SOPInstanceUID", "")))
        except ImageError:
            raise
        except MemoryError:
            raise no_memory(source) from None
        except Exception as error:  # pydicom and its decoders raise errors of any kind on damaged data
            raise ImageError(
                f"{source}: the DICOM file is damaged, incomplete or encrypted ({type(error).__name__}); expected a "
                "whole image that this version can decode. Export or copy it again."
            ) from None
    return pixels, notes + more, str(uid) if uid.is_valid else None


def _text(ds: Dataset, keyword: str) -> str:
    return str(ds.get(keyword) or "").strip().upper()


def _check(ds: Dataset, source: str) -> tuple[str, ...]:
    """Refuse what is no grey radiograph, before its pixels are decoded; what is merely doubtful is a warning."""
    notes = []
    modality = _text(ds, "Modality")
    if modality not in _RADIOGRAPHS | _DOUBTFUL:
        kind = _OTHER_MODALITIES.get(modality, "of another kind")
        raise ImageError(f"{source}: the DICOM file is {kind}; expected a radiograph (modality CR, DX or RG).")
    if modality in _DOUBTFUL:
        notes.append("The DICOM file does not say that it is a radiograph (modality CR, DX or RG).")
    if "PixelData" not in ds:
        if "EncryptedAttributesSequence" in ds:
            raise ImageError(f"{source}: the DICOM file is encrypted and has no readable pixels. Decrypt it first.")
        found = "floating-point pixels" if {"FloatPixelData", "DoubleFloatPixelData"} & set(ds.dir()) else "no pixels"
        raise ImageError(f"{source}: the DICOM file has {found}; expected integer pixel data. Export the image again.")
    missing = [k for k in ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation") if ds.get(k) in (None, "")]
    if missing:
        raise ImageError(f"{source}: the DICOM file lacks {', '.join(missing)}; without it the pixels cannot be read.")
    check_size(int(ds.Columns), int(ds.Rows), source)
    if int(ds.get("SamplesPerPixel") or 1) != 1 or _text(ds, "PhotometricInterpretation") not in (
        "MONOCHROME1",
        "MONOCHROME2",
    ):
        raise ImageError(
            f"{source}: the DICOM image is in colour; expected one grey channel (MONOCHROME1 or MONOCHROME2). Export "
            "the radiograph itself, not a picture of it."
        )
    stored_bits = int(ds.get("BitsStored") or ds.BitsAllocated)
    if ds.BitsAllocated not in (8, 16) or not 1 < stored_bits <= ds.BitsAllocated:
        raise ImageError(
            f"{source}: the DICOM image has {int(ds.BitsAllocated)} bits a pixel, {stored_bits} of them used; expected "
            "at most 8 or 16. Export it again."
        )
    if _number(ds, "HighBit", stored_bits - 1) != stored_bits - 1:
        raise ImageError(f"{source}: the DICOM image's highest bit is not its last used one. Export it again.")
    if int(ds.get("NumberOfFrames") or 1) > 1:
        notes.append("The file holds several frames; only the first was read.")
    if _text(ds, "PresentationIntentType") == "FOR PROCESSING":
        notes.append("The image is marked as raw (for processing), not as prepared for viewing.")
    part = _text(ds, "BodyPartExamined")
    if part and not any(word in part for word in _CHEST):
        notes.append("The file says that the body part is not the chest.")
    if _text(ds, "ViewPosition") in _LATERAL:
        notes.append("The file says that the view is lateral; the models know frontal views.")
    return tuple(notes)


def _decode_pixels(ds: Dataset, source: str) -> npt.NDArray[np.integer[Any]]:
    """The first frame's stored values, (H, W)."""
    syntax = getattr(ds, "file_meta", Dataset()).get("TransferSyntaxUID")
    if syntax is None:
        implicit, little = ds.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        ds.ensure_file_meta()
        ds.file_meta.TransferSyntaxUID = syntax
    if not ds.get("BitsStored"):
        ds.BitsStored = ds.BitsAllocated
    for keyword, value in (("SamplesPerPixel", 1), ("PixelRepresentation", 0)):
        if ds.get(keyword) is None:
            setattr(ds, keyword, value)
    try:
        decoder = get_decoder(UID(str(syntax)))
    except NotImplementedError:
        raise ImageError(
            f"{source}: the DICOM file's compression (transfer syntax) is unknown. Convert it with `gdcmconv --raw`."
        ) from None
    if UID(str(syntax)).is_encapsulated:
        if syntax != RLELossless:  # whose output is bounded by the header's size, and whose bytes may look like JPEG
            _check_codestream(ds, source)
        plugins = [p for p in _DECODERS if p in decoder.available_plugins]
    else:
        plugins = [""]
    for last in plugins:
        try:
            frame, _ = decoder.as_array(ds, index=0, raw=True, decoding_plugin=last)
            return frame
        except MemoryError:  # what the next decoder says of the image would hide it
            raise
        except Exception:  # each decoder raises its own errors; the last one's is reported by the caller
            if last == plugins[-1]:
                raise
    raise ImageError(f"{source}: no decoder for the DICOM file's compression is installed. Reinstall xraygpt-lite.")


def _check_codestream(ds: Dataset, source: str) -> None:
    """Hold what the compressed image says of itself against the header.

    A small header must not hide a huge image, and more channels or bits than it tells of come out scrambled, or end
    the process within a decoder.
    """
    offsets, lengths = ds.get("ExtendedOffsetTable"), ds.get("ExtendedOffsetTableLengths")
    if not offsets or not lengths or len(offsets) != len(lengths):  # unusable: the frame is found without them
        ds.pop("ExtendedOffsetTable", None)
        ds.pop("ExtendedOffsetTableLengths", None)
        offsets = None
    # The very bytes that are decoded: other items may hold what looks like an image of another size.
    data = get_frame(
        ds.PixelData,
        0,
        number_of_frames=int(ds.get("NumberOfFrames") or 1),
        extended_offsets=None if offsets is None else (offsets, lengths),
    )
    start = _codestream(data)
    if data.startswith(b"\xff\x4f\xff\x51", start):  # JPEG 2000: SIZ has Xsiz, Ysiz, XOsiz, YOsiz
        x, y, left, top = (int.from_bytes(data[i : i + 4], "big") for i in range(start + 8, start + 24, 4))
        width, height = x - left, y - top
        channels = int.from_bytes(data[start + 40 : start + 42], "big")
        bits = 1 + (int.from_bytes(data[start + 42 : start + 43], "big") & 0x7F)
    elif data.startswith(b"\xff\xd8\xff", start):
        width, height, channels, bits = _jpeg_frame(data, start + 2)
    else:
        raise ValueError("no compressed image")
    if (width, height) != (ds.Columns, ds.Rows):
        raise ImageError(
            f"{source}: the compressed image has {width} x {height} pixels, the DICOM header says "
            f"{int(ds.Columns)} x {int(ds.Rows)}. Export or copy it again."
        )
    if channels != 1 or bits > ds.BitsAllocated:
        raise ImageError(
            f"{source}: the compressed image has {channels} channels of {bits} bits, the DICOM header says one of at "
            f"most {int(ds.BitsAllocated)}. Export or copy it again."
        )


def _codestream(data: bytes) -> int:
    """Where the compressed image begins: at once, or in a box of a JP2 file, which some writers put there."""
    at = 0
    while data.startswith(b"\0\0\0\x0cjP  ") and at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        long = length == 1
        if kind == b"jp2c":
            return at + (16 if long else 8)
        step = int.from_bytes(data[at + 8 : at + 16], "big") if long else length
        if step < 8:  # the last box, or none
            break
        at += step
    return at


def _jpeg_frame(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Width, height, channels and bits in the frame header of a JPEG, JPEG lossless or JPEG-LS; 0 without one."""
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            return width, height, data[at + 9], data[at + 4]
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # has no length, and no place here: a decoder would go on elsewhere
            break
        at += 1 if marker == 0xFF else 2 + length
    return 0, 0, 0, 0


def _display(stored: npt.NDArray[np.integer[Any]], ds: Dataset) -> tuple[Float32, tuple[str, ...]]:
    """Stored values to [0, 1], 0 = dark.

    Every step acts on a value alone, so the steps run on the list of possible values, which then serves as a table:
    quick, small, and the same for 3000 x 3000 pixels. Padding comes out dark and has no part in the full range.
    """
    low, high = int(stored.min()), int(stored.max())
    values = np.arange(low, high + 1, dtype=np.int32)
    padding = _padding(values, ds)
    index = stored.astype(np.int32) - low
    present = (np.bincount(index.ravel()) > 0) & ~padding
    table, notes = _grey(values, present, ds)
    if _text(ds, "PhotometricInterpretation") == "MONOCHROME1":
        table = 1 - table
    if not np.isfinite(table).all():
        raise ValueError("rescale or window is not a number")
    unit: Float32 = np.clip(table, 0, 1).astype(np.float32)
    unit[padding] = 0
    return unit[index], notes


def _padding(values: npt.NDArray[np.int32], ds: Dataset) -> npt.NDArray[np.bool_]:
    """Which values pad the image (PS3.3 C.7.5.1.1.2)."""
    first = ds.get("PixelPaddingValue")
    if first is None or isinstance(first, bytes):
        return np.zeros(len(values), bool)
    last = ds.get("PixelPaddingRangeLimit")
    first, last = int(first), int(first if last is None or isinstance(last, bytes) else last)
    return (values >= min(first, last)) & (values <= max(first, last))


def _grey(
    values: npt.NDArray[np.int32], present: npt.NDArray[np.bool_], ds: Dataset
) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    """Modality, then VOI: float64 in [0, 1] for each stored value.

    A VOI LUT goes before a window, the first of several is used; what is broken is passed over, with a warning. Without
    either, 8-bit images without a modality step are display values as they are; others take the full range of the
    values present, with a warning.
    """
    modality = ds.get("ModalityLUTSequence")
    if modality:
        linear, _ = _look_up(values, modality[0], ds)
    else:
        # Not pydicom's function: it fails where an element is empty, and leaves a lone one out.
        linear = values.astype(np.float64) * _number(ds, "RescaleSlope", 1) + _number(ds, "RescaleIntercept", 0)
    note = ""
    if ds.get("VOILUTSequence"):
        try:
            entries, top = _look_up(linear, ds.VOILUTSequence[0], ds)
            return entries / top, ()
        except _UNUSABLE:
            note = "The file's VOI look-up table cannot be used"
    if ds.get("WindowCenter") not in (None, "") and ds.get("WindowWidth") not in (None, ""):
        try:
            return _window(linear, ds), (f"{note}; its window was.",) if note else ()
        except _UNUSABLE:
            note = "The file's window cannot be used"
    elif not note and ds.BitsStored == 8 and ds.PixelRepresentation == 0 and np.array_equal(linear, values):
        return linear / 255, ()
    note = note or "The file has no window"
    seen = linear[present] if present.any() else linear
    low, high = float(seen.min()), float(seen.max())
    return (linear - low) / ((high - low) or 1), (f"{note}; the full range of its values was shown.",)


def _number(ds: Dataset, name: str, default: float) -> float:
    """An element's value; `default` where it is absent or empty."""
    value = ds.get(name)
    return default if value in (None, "") else float(value)


def _window(linear: npt.NDArray[np.float64], ds: Dataset) -> npt.NDArray[np.float64]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3. A pretended 1-bit output makes pydicom's output range [0, 1]."""
    several = isinstance(ds.WindowCenter, MultiValue), isinstance(ds.WindowWidth, MultiValue)
    centre = float(ds.WindowCenter[0] if several[0] else ds.WindowCenter)
    width = float(ds.WindowWidth[0] if several[1] else ds.WindowWidth)
    if not np.isfinite([centre, width]).all():
        raise ValueError("the window is not a number")
    view = Dataset()
    view.WindowCenter, view.WindowWidth = centre, width
    view.VOILUTFunction = ds.get("VOILUTFunction") or "LINEAR"
    view.PhotometricInterpretation, view.PixelRepresentation, view.BitsStored = "MONOCHROME2", 0, 1
    return np.asarray(apply_windowing(linear, view), np.float64)


def _look_up(values: npt.NDArray[Any], item: Dataset, ds: Dataset) -> tuple[npt.NDArray[np.float64], int]:
    """Values through one item of a LUT sequence, and the largest value its entries can have.

    pydicom's own functions are not used: they index in the entries' or the pixels' type, which overflows, and know
    modality LUTs of 8 and 16 bits only.
    """
    count, first, bits = (int(v) for v in item.LUTDescriptor)
    count = count % 2**16 or 2**16  # an implicit VR with signed pixels makes a negative number of a large one
    # Its sign is that of the pixels where the type is left open (implicit VR) and with some writers elsewhere, and need
    # not be that of the values: the one is meant with which the table covers more of them.
    low, high, other = values.min(), values.max(), first + (2**16 if first < 0 else -(2**16) if first >= 2**15 else 0)
    first = max(first, other, key=lambda start: min(high, start + count - 1) - max(low, start))
    data = item.LUTData
    if isinstance(data, bytes):
        big = not ds.original_encoding[1]
        entries = np.frombuffer(data, "u1" if bits <= 8 and len(data) < 2 * count else ">u2" if big else "<u2")
    else:
        entries = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    if len(entries) < count or not 0 < bits <= 16:
        raise ValueError("the look-up table is shorter than it says")
    index = np.clip(np.rint(values) - first, 0, count - 1).astype(np.intp)
    return entries[index].astype(np.float64), 2**bits - 1
