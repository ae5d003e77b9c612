"""DICOM: every transfer syntax, the order of the grey-scale steps, what is refused, and that nothing is given away."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import gdcm
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid as uids
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import Decoder
from pydicom.sequence import Sequence

from xraygpt_lite.errors import ImageError
from xraygpt_lite.imaging import dicom, raster
from xraygpt_lite.imaging.guard import silence
from xraygpt_lite.imaging.read import read
from xraygpt_lite.values import Radiograph

UID = "1.2.826.0.1.3680043.8.498.1"
Stored = npt.NDArray[np.integer]
MakeDicom = Callable[..., Dataset]
ToBytes = Callable[[Dataset], bytes]
FULL = {"WindowCenter": "2048", "WindowWidth": "4096"}
FLAT = np.zeros((32, 32), np.uint16)


def with_values(*values: int, dtype: type = np.uint16) -> Stored:
    """32 x 32, its first row opening with `values`, the rest the first of them."""
    stored = np.full((32, 32), values[0], dtype)
    stored[0, : len(values)] = values
    return stored


def gdcm_encode(ds: Dataset, syntax: int, path: Path) -> bytes:
    """Encode with gdcm, the only encoder here of JPEG lossless."""
    ds.save_as(path, enforce_file_format=True)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return path.read_bytes()


@pytest.fixture(params=["rle", "jpeg2000", "jpegls", "jpeg-lossless", "jpeg-lossless-sv1", "implicit", "big-endian"])
def lossless(
    request: pytest.FixtureRequest, picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes, tmp_path: Path
) -> bytes:
    """The picture in one lossless transfer syntax."""
    ds = make_dicom(picture, BitsStored=12, **FULL)
    match request.param:
        case "rle":
            ds.compress(uids.RLELossless, generate_instance_uid=False)
        case "jpeg2000":
            ds.compress(uids.JPEG2000Lossless, generate_instance_uid=False)
        case "jpegls":
            ds.compress(uids.JPEGLSLossless, generate_instance_uid=False)
        case "jpeg-lossless":
            return gdcm_encode(ds, gdcm.TransferSyntax.JPEGLosslessProcess14, tmp_path / "x.dcm")
        case "jpeg-lossless-sv1":
            return gdcm_encode(ds, gdcm.TransferSyntax.JPEGLosslessProcess14_1, tmp_path / "x.dcm")
        case "implicit":
            ds.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian
        case "big-endian":
            ds.file_meta.TransferSyntaxUID = uids.ExplicitVRBigEndian
            ds.PixelData = picture.byteswap().tobytes()
            ds["PixelData"].VR = "OW"
    return to_bytes(ds)


def test_lossless_syntaxes_decode_equal(lossless: bytes, picture: Stored) -> None:
    radiograph = read(lossless)
    np.testing.assert_array_equal(np.rint(radiograph.pixels * 4095), picture)
    assert radiograph.warnings == ()
    assert radiograph.sop_instance_uid == UID


def test_every_truncation_is_an_image_or_an_image_error(lossless: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    refused = []
    for end in [*range(0, len(lossless), max(1, len(lossless) // 60)), len(lossless) - 1]:
        try:
            assert isinstance(read(lossless[:end]), Radiograph)
        except ImageError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert "SECRET" not in " ".join(refused)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("syntax", [uids.JPEG2000, uids.JPEGLSNearLossless])
def test_lossy_syntaxes_decode_close(syntax: str, picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    ds = make_dicom(picture, BitsStored=12, **FULL)
    options = {"j2k_cr": [2]} if syntax == uids.JPEG2000 else {"jls_error": 2}
    ds.compress(syntax, generate_instance_uid=False, **options)
    assert np.abs(read(to_bytes(ds)).pixels * 4095 - picture).max() < 60


def test_rle_whose_bytes_look_like_jpeg(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    stored = with_values(1, 0xFF, 0xD8, 0xFF, 0xC0, 0, 11, dtype=np.uint8)
    ds = make_dicom(stored)
    ds.compress(uids.RLELossless, generate_instance_uid=False)
    data = to_bytes(ds)
    assert b"\xff\xd8\xff" in data
    np.testing.assert_array_equal(np.rint(read(data).pixels * 255), stored)


def test_jpeg_baseline(picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    grey = (picture >> 4).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=95)
    ds = make_dicom(grey)
    ds.file_meta.TransferSyntaxUID = uids.JPEGBaseline8Bit
    ds.PixelData = encapsulate([buffer.getvalue()])
    ds["PixelData"].is_undefined_length = True
    expected = np.asarray(Image.open(buffer))
    assert np.abs(read(to_bytes(ds)).pixels * 255 - expected).max() <= 1
    ds.Rows = 40  # a header that names another size than the JPEG
    with pytest.raises(ImageError, match="40 x 48 pixels, the DICOM header says 40 x 40"):
        read(to_bytes(ds))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_size_is_that_of_the_image_that_is_decoded(
    wrapped: bool, picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes
) -> None:
    """Not that of what stands in the offset table; also where a writer put a whole JP2 file there."""
    ds = make_dicom(picture, BitsStored=12, **FULL)
    ds.compress(uids.JPEG2000Lossless, generate_instance_uid=False)
    codestream = get_frame(ds.PixelData, 0, number_of_frames=1)
    if wrapped:
        signature = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
        codestream = signature + (8 + len(codestream)).to_bytes(4, "big") + b"jp2c" + codestream
    small = b"\0\0\0\0\xff\x4f\xff\x51\0\x29\0\0" + (40).to_bytes(4, "big") + (40).to_bytes(4, "big") + bytes(16)
    first = b"\xfe\xff\x00\xe0" + len(small).to_bytes(4, "little") + small  # offsets: 0, and what looks like an image
    ds.PixelData = first + encapsulate([codestream], has_bot=False)[8:]
    ds.Rows = 40
    with pytest.raises(ImageError, match="40 x 48 pixels, the DICOM header says 40 x 40"):
        read(to_bytes(ds))


def test_offset_tables_that_pydicom_ignores_say_nothing_about_the_size(
    picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes
) -> None:
    frames = []
    for stored in (np.tile(picture, (2, 2)), picture):
        ds = make_dicom(stored, BitsStored=12, NumberOfFrames=2, **FULL)
        ds.compress(uids.JPEG2000Lossless, np.stack([stored, stored]), generate_instance_uid=False)
        frames.append(get_frame(ds.PixelData, 0, number_of_frames=2))
    ds.PixelData = encapsulate(frames, has_bot=False)
    second = 8 + len(frames[0]) + len(frames[0]) % 2
    ds.ExtendedOffsetTable = second.to_bytes(8, "little") + bytes(8)
    ds.ExtendedOffsetTableLengths = len(frames[1]).to_bytes(8, "little")  # one length for two offsets
    with pytest.raises(ImageError, match="80 x 96 pixels, the DICOM header says 40 x 48"):
        read(to_bytes(ds))


@pytest.mark.parametrize(
    ("syntax", "shape", "bits"),
    [(uids.JPEG2000Lossless, (3,), 8), (uids.JPEGBaseline8Bit, (3,), 8), (uids.JPEG2000Lossless, (), 16)],
)
def test_a_compressed_image_of_more_channels_or_bits_than_the_header_says(
    syntax: str, shape: tuple[int, ...], bits: int, make_dicom: MakeDicom, to_bytes: ToBytes
) -> None:
    """Decoders give scrambled pictures for it, or end the process."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.full((48, 40, *shape), 100, f"u{bits // 8}"))
    picture.save(buffer, "JPEG2000" if syntax == uids.JPEG2000Lossless else "JPEG")
    ds = make_dicom(np.zeros((48, 40), np.uint8))
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([buffer.getvalue()])
    ds["PixelData"].is_undefined_length = True
    channels = 3 if shape else 1
    with pytest.raises(ImageError, match=rf"has {channels} channels of {bits} bits, the DICOM header says one of at"):
        read(to_bytes(ds))


@pytest.mark.parametrize("lengths", [None, b""])
def test_an_extended_offset_table_without_content_is_passed_over(
    lengths: bytes | None, picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes
) -> None:
    ds = make_dicom(picture, BitsStored=12, **FULL)
    ds.compress(uids.JPEG2000Lossless, generate_instance_uid=False)
    ds.ExtendedOffsetTable = b"" if lengths is not None else bytes(8)
    if lengths is not None:
        ds.ExtendedOffsetTableLengths = lengths
    np.testing.assert_array_equal(np.rint(read(to_bytes(ds)).pixels * 4095), picture)


def test_a_jp2_box_without_a_length_is_the_last() -> None:
    assert dicom._codestream(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)) == 12


@pytest.mark.parametrize("marker", [0x00, 0x01, 0xBF, 0xD0, 0xD9])
def test_a_jpeg_marker_without_a_length_hides_no_size(
    marker: int, make_dicom: MakeDicom, to_bytes: ToBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for one with a length, it leads into a comment, past the frame header that is decoded."""
    buffer = io.BytesIO()
    Image.new("L", (80, 96)).save(buffer, "JPEG")
    comment = bytearray(0xFFFD - 2)
    small = b"\xff\xc0\0\x0b\x08" + (48).to_bytes(2, "big") + (40).to_bytes(2, "big") + b"\1\1\x11\0"
    at = 4 + 0xFFE1 - 8  # the next marker's bytes, FF E1, as a length
    comment[at : at + len(small)] = small
    opening = b"\xff\xd8\xff" + bytes([marker]) + b"\xff\xe1\xff\xfd"
    ds = make_dicom(np.zeros((48, 40), np.uint8))
    ds.file_meta.TransferSyntaxUID = uids.JPEGBaseline8Bit
    ds.PixelData = encapsulate([opening + bytes(comment) + buffer.getvalue()[2:]])
    monkeypatch.setattr(dicom, "_DECODERS", ())  # gdcm may end the process on such a file
    with pytest.raises(ImageError, match="0 x 0 pixels, the DICOM header says 40 x 48"):
        read(to_bytes(ds))


def test_another_decoder_s_error_does_not_hide_that_memory_ran_out(
    picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = make_dicom(picture, BitsStored=12, **FULL)
    ds.compress(uids.JPEG2000Lossless, generate_instance_uid=False)

    def fail(*_: object, decoding_plugin: str, **__: object) -> None:
        raise MemoryError if decoding_plugin == "pylibjpeg" else RuntimeError

    monkeypatch.setattr(Decoder, "as_array", fail)
    with pytest.raises(ImageError, match="memory ran out while the image was decoded"):
        read(to_bytes(ds))


def test_without_memory_no_image_is_called_damaged(
    make_dicom: MakeDicom, to_bytes: ToBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    Image.new("L", (40, 48)).save(buffer, "PNG")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(dicom, "_display", fail)
    monkeypatch.setattr(raster, "_grey", fail)
    for data in (to_bytes(make_dicom(with_values(1))), buffer.getvalue()):
        with pytest.raises(ImageError, match="memory ran out while the image was decoded"):
            read(data)


def test_shared_files_against_an_independent_reading(shared: Path) -> None:
    folder = shared / "data/dicom"
    for path in folder.glob("*.dcm"):
        radiograph = read(path)
        ds = pydicom.dcmread(path)
        stored = ds.pixel_array.astype(np.float64)
        if ds.PhotometricInterpretation == "MONOCHROME1":
            expected = 1 - np.clip((stored - 14999.5) / 29999 + 0.5, 0, 1)
        else:
            expected = stored / 255
        np.testing.assert_allclose(radiograph.pixels, expected, atol=1e-5)
        assert radiograph.warnings == ()
        assert radiograph.sop_instance_uid == ds.SOPInstanceUID


def test_monochrome1_with_rescale_and_window_by_hand(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    # x → 2x - 100 → window centre 300.5, width 401: from 100 to 500 → inverted. In any other order it differs.
    ds = make_dicom(with_values(0, 100, 150, 200, 300, 4095), BitsStored=12, PhotometricInterpretation="MONOCHROME1")
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = "2", "-100", "300.5", "401"
    assert read(to_bytes(ds)).pixels[0, :6] == pytest.approx([1, 1, 0.75, 0.5, 0, 0])
    ds.PhotometricInterpretation = "MONOCHROME2"
    assert read(to_bytes(ds)).pixels[0, :6] == pytest.approx([0, 0, 0.25, 0.5, 1, 1])


def test_negative_slope_is_applied_before_the_window(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    ds = make_dicom(with_values(0, 1000, 4000), BitsStored=12, RescaleSlope="-1", RescaleIntercept="4000")
    ds.WindowCenter, ds.WindowWidth = "2000.5", "4001"
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx([1, 0.75, 0])


def test_signed_values(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    ds = make_dicom(with_values(-1000, 0, 500, 1000, dtype=np.int16), WindowCenter="0.5", WindowWidth="2001")
    assert read(to_bytes(ds)).pixels[0, :4] == pytest.approx([0, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    ("function", "expected"),
    [("LINEAR", [0, 0.5, 1]), ("LINEAR_EXACT", [0.00495, 0.5, 0.995]), ("SIGMOID", [0.1206, 0.5, 0.8794])],
)
def test_window_functions(function: str, expected: list[float], make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    width = 101 if function == "LINEAR" else 100
    centre = 150.5 if function == "LINEAR" else 150
    low, high = (100, 200) if function == "LINEAR" else (100.495, 199.5)
    ds = make_dicom(with_values(round(low), 150, round(high)), VOILUTFunction=function)
    ds.WindowCenter, ds.WindowWidth = str(centre), str(width)
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx(expected, abs=0.006)


def test_first_of_several_windows(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    ds = make_dicom(with_values(0, 50, 100), WindowCenter=["50.5", "5000"], WindowWidth=["101", "1000"])
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx([0, 0.5, 1])


def lut(first: int, bits: int, *entries: int) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", list(entries))
    return Sequence([item])


def test_modality_lut_then_voi_lut_then_inversion(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    # 12-bit modality entries and a VOI table of 8-bit entries over values above 255, where index types overflow.
    ds = make_dicom(with_values(0, 10, 11, 12, 4000), BitsStored=12, PhotometricInterpretation="MONOCHROME1")
    ds.ModalityLUTSequence = lut(10, 12, 1000, 1002, 1003)
    ds.VOILUTSequence = lut(1000, 8, 0, 51, 102, 255)
    ds.WindowCenter, ds.WindowWidth = "1", "1"
    assert read(to_bytes(ds)).pixels[0, :5] == pytest.approx([1, 1, 0.6, 0, 0])


def test_voi_lut_of_bytes(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    ds = make_dicom(with_values(0, 500, 1000))
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [1001, 0, 10])
    item.add_new("LUTData", "OW", np.arange(1001, dtype="<u2").tobytes())
    ds.VOILUTSequence = Sequence([item])
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx([0, 500 / 1023, 1000 / 1023])


def test_a_long_lut_is_read_in_implicit_vr_with_signed_pixels(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    # Its count of 40000 is read as a negative number there.
    ds = make_dicom(with_values(0, 10000, 20000, dtype=np.int16))
    ds.VOILUTSequence = lut(0, 16, *range(40000))
    ds.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx([0, 10000 / 65535, 20000 / 65535])


@pytest.mark.parametrize("syntax", [uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian])
def test_a_lut_whose_first_value_has_another_sign_than_the_pixels(
    syntax: str, make_dicom: MakeDicom, to_bytes: ToBytes
) -> None:
    ds = make_dicom(with_values(0, 500, 1000), RescaleSlope="1", RescaleIntercept="-1000")
    ds.VOILUTSequence = lut(2**16 - 1000, 10, *range(1001))  # from -1000 on
    ds.file_meta.TransferSyntaxUID = syntax
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx([0, 500 / 1023, 1000 / 1023])
    ds = make_dicom(with_values(0, 500, 1000, dtype=np.int16), RescaleSlope="1", RescaleIntercept="40000")
    ds.VOILUTSequence = lut(40000, 10, *range(1001))
    ds.file_meta.TransferSyntaxUID = syntax
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx([0, 500 / 1023, 1000 / 1023])
    # A negative first value that is meant, below values of both signs that go beyond 2**15.
    ds = make_dicom(with_values(-500, 0, 20000, dtype=np.int16), RescaleSlope="2", RescaleIntercept="0")
    ds.VOILUTSequence = lut(2**16 - 1000, 16, *range(20000))
    ds.file_meta.TransferSyntaxUID = syntax
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx([0, 1000 / 65535, 19999 / 65535])
    # One that is meant, below values that are all above it and go beyond 2**15.
    item = Dataset()
    item.add_new("LUTDescriptor", "SS", [0, -1000, 16])
    item.add_new("LUTData", "OW", np.arange(2**16, dtype="<u2").tobytes())
    ds = make_dicom(with_values(1000, 20000, 50000, dtype=np.uint16), RescaleSlope="1", RescaleIntercept="-1000")
    ds.VOILUTSequence = Sequence([item])
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx([1000 / 65535, 20000 / 65535, 50000 / 65535])


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [("", "", [0, 0.5, 1]), (None, "-1000", [0, 0.25, 0.75]), ("2", None, [0, 1, 1]), ("2", "", [0, 1, 1])],
)
def test_a_rescale_that_is_empty_or_half_there(
    slope: str | None, intercept: str | None, expected: list[float], make_dicom: MakeDicom, to_bytes: ToBytes
) -> None:
    ds = make_dicom(with_values(0, 2000, 4000), WindowCenter="2000.5", WindowWidth="4001")
    for name, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if value is not None:
            setattr(ds, name, value)
    ds.HighBit = None  # empty, too
    assert read(to_bytes(ds)).pixels[0, :3] == pytest.approx(expected)


def test_without_a_window_the_full_range_without_padding(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    ds = make_dicom(with_values(1000, 2000, 3000, 0), BitsStored=12)
    radiograph = read(to_bytes(ds))
    assert radiograph.pixels[0, :4] == pytest.approx([1 / 3, 2 / 3, 1, 0])
    assert "no window" in radiograph.warnings[0]
    ds.add_new("PixelPaddingValue", "US", 0)
    assert read(to_bytes(ds)).pixels[0, :4] == pytest.approx([0, 0.5, 1, 0])
    ds.PhotometricInterpretation = "MONOCHROME1"
    assert read(to_bytes(ds)).pixels[0, :4] == pytest.approx([1, 0.5, 0, 0])
    ds.add_new("PixelPaddingRangeLimit", "US", 1500)
    assert read(to_bytes(ds)).pixels[0, :4] == pytest.approx([0, 1, 0, 0])


def test_8_bits_without_a_window_are_display_values(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    radiograph = read(to_bytes(make_dicom(with_values(51, 102, dtype=np.uint8))))
    assert radiograph.pixels[0, :2] == pytest.approx([0.2, 0.4])
    assert radiograph.warnings == ()


def test_a_voi_look_up_table_that_cannot_be_used_is_a_warning(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    ds = make_dicom(with_values(10, 20, 30))
    for item in (lut(0, 16, *range(100)), Sequence([Dataset()])):
        if "LUTDescriptor" in item[0]:
            item[0].LUTDescriptor = [1000, 0, 16]
        ds.VOILUTSequence = item
        radiograph = read(to_bytes(ds))
        assert radiograph.pixels[0, :3] == pytest.approx([0, 0.5, 1])
        assert radiograph.warnings == (
            "The file's VOI look-up table cannot be used; the full range of its values was shown.",
        )
    ds.WindowCenter, ds.WindowWidth = "20.5", "21"
    radiograph = read(to_bytes(ds))
    assert radiograph.pixels[0, :3] == pytest.approx([0, 0.5, 1])
    assert radiograph.warnings == ("The file's VOI look-up table cannot be used; its window was.",)
    ds.ModalityLUTSequence = item
    with pytest.raises(ImageError, match="damaged"):  # the values themselves are not known
        read(to_bytes(ds))


@pytest.mark.parametrize(
    ("centre", "width"), [("100", "0"), ("100", "-5"), (["", "40"], ["", "80"]), (["", ""], "5"), ("1e999", "5")]
)
def test_a_window_that_cannot_be_used_is_a_warning(
    centre: str | list[str], width: str | list[str], make_dicom: MakeDicom, to_bytes: ToBytes
) -> None:
    radiograph = read(to_bytes(make_dicom(with_values(10, 20, 30), WindowCenter=centre, WindowWidth=width)))
    assert radiograph.pixels[0, :3] == pytest.approx([0, 0.5, 1])
    assert "window cannot be used" in radiograph.warnings[0]


@pytest.mark.parametrize("compress", [False, True])
def test_first_of_several_frames(compress: bool, picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    ds = make_dicom(np.stack([picture, picture // 2]), BitsStored=12, NumberOfFrames=2, **FULL)
    if compress:
        ds.compress(uids.RLELossless, generate_instance_uid=False)
    radiograph = read(to_bytes(ds))
    np.testing.assert_array_equal(np.rint(radiograph.pixels * 4095), picture)
    assert radiograph.warnings == ("The file holds several frames; only the first was read.",)


@pytest.mark.parametrize("syntax", [uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian])
def test_without_preamble_header_and_extension(
    syntax: str, picture: Stored, make_dicom: MakeDicom, tmp_path: Path
) -> None:
    ds = make_dicom(picture, BitsStored=12, **FULL)
    del ds.file_meta
    path = tmp_path / "IM000001"
    implicit = syntax == uids.ImplicitVRLittleEndian
    pydicom.dcmwrite(path, ds, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert path.read_bytes()[128:132] != b"DICM"
    radiograph = read(path)
    np.testing.assert_array_equal(np.rint(radiograph.pixels * 4095), picture)
    assert radiograph.sop_instance_uid == UID


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"Modality": "CT"}, "computed tomography"),
        ({"Modality": "MR"}, "magnetic resonance"),
        ({"Modality": "US"}, "ultrasound"),
        ({"Modality": "SECRET"}, "of another kind"),
        ({"PixelData": None}, "no pixels"),
        ({"PixelData": None, "FloatPixelData": b"\0" * 4096}, "floating-point"),
        ({"PixelData": None, "EncryptedAttributesSequence": Sequence([Dataset()])}, "encrypted"),
        ({"PixelData": b"\0" * 100}, "incomplete"),
        ({"PixelData": b""}, "incomplete"),
        ({"Rows": 10_000, "Columns": 10_000}, "100 million pixels; at most 50 million"),
        ({"Rows": 0}, "32 x 0"),
        ({"Rows": None}, "lacks Rows"),
        ({"PhotometricInterpretation": None}, "lacks PhotometricInterpretation"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "in colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "in colour"),
        ({"BitsAllocated": 32}, "32 bits a pixel"),
        ({"BitsStored": 12, "HighBit": 15}, "highest bit"),
        ({"RescaleSlope": "1e400", "RescaleIntercept": "0"}, "damaged"),
    ],
)
def test_what_is_refused(changes: dict[str, object], says: str, make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    with pytest.raises(ImageError) as caught:
        read(to_bytes(make_dicom(FLAT, **changes)))
    assert says in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("syntax", "says"),
    [
        ("1.2.840.10008.1.2.4.100", "transfer syntax"),
        ("1.2.3.4.5", "transfer syntax"),
        (uids.DeflatedExplicitVRLittleEndian, "deflated"),
    ],
)
def test_unknown_compression(syntax: str, says: str, make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    data = to_bytes(make_dicom(FLAT))
    old = b"1.2.840.10008.1.2.1\0"
    new = str(syntax).encode() + b"\0" * (len(syntax) % 2)
    at = data.index(old)
    grown = len(new) - len(old)
    head = bytearray(data[:at])
    head[at - 2 : at] = len(new).to_bytes(2, "little")
    length = int.from_bytes(head[140:144], "little") + grown
    head[140:144] = length.to_bytes(4, "little")
    with pytest.raises(ImageError, match=says):
        read(bytes(head) + new + data[at + len(old) :])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"Modality": "OT"}, "does not say that it is a radiograph"),
        ({"Modality": "SC"}, "does not say that it is a radiograph"),
        ({"Modality": None}, "does not say that it is a radiograph"),
        ({"BodyPartExamined": "SECRET KNEE"}, "not the chest"),
        ({"ViewPosition": "LL"}, "lateral"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "raw"),
    ],
)
def test_what_is_doubtful(changes: dict[str, object], says: str, make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    (note,) = read(to_bytes(make_dicom(with_values(0, 1), WindowCenter="1", WindowWidth="2", **changes))).warnings
    assert says in note
    assert "SECRET" not in note


def with_uid(data: bytes, value: str) -> bytes:
    """The file with another text of the same length in the place of its SOP Instance UID."""
    return data.replace(UID.encode(), value.encode().ljust(len(UID), b"\0"))


@pytest.mark.parametrize("value", ["SECRET-NAME", "1..2", ""])
def test_an_invalid_identifier_is_dropped(value: str, make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    assert read(with_uid(to_bytes(make_dicom(with_values(0, 1))), value)).sop_instance_uid is None


def test_nothing_is_warned_or_logged(
    make_dicom: MakeDicom, to_bytes: ToBytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    data = with_uid(to_bytes(make_dicom(with_values(0, 1), PixelData=b"\0" * 5000)), "SECRET")
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        read(data)
    assert "SECRET" not in caplog.text
    assert capfd.readouterr() == ("", "")


def test_silence_is_lifted_after_reads_in_many_threads(make_dicom: MakeDicom, to_bytes: ToBytes) -> None:
    data = to_bytes(make_dicom(with_values(0, 1)))
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [read(data) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
    assert not logging.getLogger("pydicom").disabled
    with silence():
        assert logging.getLogger("pydicom").disabled


@pytest.fixture(scope="module")
def intact(picture: Stored, make_dicom: MakeDicom, to_bytes: ToBytes) -> bytes:
    """A small JPEG 2000 file."""
    ds = make_dicom(picture, BitsStored=12, RescaleSlope="1", RescaleIntercept="0", **FULL)
    ds.compress(uids.JPEG2000Lossless, generate_instance_uid=False)
    return to_bytes(ds)


@settings(max_examples=150, deadline=None)
@given(hits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_is_an_image_or_an_image_error(intact: bytes, hits: list[tuple[float, int]]) -> None:
    data = bytearray(intact)
    for where, value in hits:
        data[int(where * (len(data) - 1))] = value
    try:
        pixels = read(bytes(data)).pixels
    except ImageError:
        return
    assert 0 <= pixels.min() <= pixels.max() <= 1


@pytest.mark.parametrize("name", ["synthetic-cr-monochrome1.dcm", "synthetic-cr-jpeg2000.dcm", "synthetic-normal.png"])
def test_examples_are_clean_and_say_that_they_are_synthetic(name: str) -> None:
    path = Path(__file__).parents[3] / "examples" / name
    radiograph = read(path)
    assert radiograph.warnings == ()
    assert radiograph.pixels.shape == (768, 768)
    # Air in the upper corner is dark, the spine and the belly are bright.
    assert radiograph.pixels[20:60, 20:60].mean() < 0.3 < 0.6 < radiograph.pixels[680:, 360:400].mean()
    assert b"SYNTHETIC" in path.read_bytes()
