"""Files that are not DICOM, bytes, arrays; and everything that is no image."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xraygpt_lite.errors import ImageError
from xraygpt_lite.imaging.read import MAX_BYTES, read
from xraygpt_lite.values import Radiograph

GREY = np.arange(40 * 48, dtype=np.uint16).reshape(40, 48)
GREY8 = (GREY % 251).astype(np.uint8)


def encode(array: npt.NDArray[np.generic], form: str = "PNG", **options: object) -> bytes:
    return save(Image.fromarray(array), form, **options)


def save(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]  # options differ by format
    return buffer.getvalue()


def test_shared_pngs_are_their_values_over_255(shared: Path) -> None:
    for path in sorted((shared / "data/png1024").glob("*.png"))[:6]:
        radiograph = read(path)
        expected = np.asarray(Image.open(path).convert("L"))
        np.testing.assert_array_equal(np.rint(radiograph.pixels * 255), expected)
        assert radiograph.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert radiograph.source == str(path)
        assert radiograph.warnings == ()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_path_bytes_and_array_give_the_same_pixels(tmp_path: Path, form: str) -> None:
    data = encode(GREY8, form)
    path = tmp_path / "no-extension"
    path.write_bytes(data)

    for radiograph in (read(path), read(str(path)), read(data), read(GREY8), read(GREY8[:, :, None])):
        assert radiograph.pixels.dtype == np.float32
        assert radiograph.pixels.flags.c_contiguous
        np.testing.assert_allclose(radiograph.pixels, GREY8 / 255, atol=1e-7)
    assert read(data).source == "bytes"
    assert read(GREY8).source == "array"


def test_jpeg_is_read() -> None:
    data = encode(GREY8 // 4 + 100, "JPEG", quality=98)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.rint(read(data).pixels * 255), expected)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(("top", "bits"), [(200, 8), (1000, 10), (4095, 12), (4096, 14), (40000, 16)])
def test_16_bits_are_scaled_by_the_depth_in_use(form: str, top: int, bits: int) -> None:
    values = GREY % 100
    values[0, 0] = top
    radiograph = read(encode(values.astype(np.uint16), form))
    assert radiograph.pixels[0, 0] == pytest.approx(top / (2**bits - 1))
    assert len(radiograph.warnings) == (bits < 16)
    np.testing.assert_array_equal(read(values.astype(np.uint16)).pixels, radiograph.pixels)


def test_big_endian_tiff() -> None:
    image = Image.frombytes("I;16B", (48, 40), (GREY * 30).astype(">u2").tobytes())
    np.testing.assert_allclose(read(save(image, "TIFF")).pixels, GREY * 30 / 65535, atol=1e-6)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_white_is_zero_tiff_is_inverted(dtype: type, top: int) -> None:
    values = (GREY * (1 if dtype is np.uint8 else 30)).astype(dtype)
    values[0, 0] = top
    data = bytearray(encode(values, "TIFF"))
    entry = data.index(struct.pack("<HHI", 262, 3, 1))
    data[entry + 8] = 0
    np.testing.assert_allclose(read(bytes(data)).pixels, 1 - values / top, atol=1e-6)


def test_grey_in_rgb_is_quiet_and_colour_is_not() -> None:
    rgb = np.repeat(GREY8[:, :, None], 3, 2)
    assert read(encode(rgb)).warnings == ()
    np.testing.assert_array_equal(read(encode(rgb)).pixels, read(GREY8).pixels)
    np.testing.assert_array_equal(read(rgb).pixels, read(GREY8).pixels)
    rgb[:, :, 0] //= 3
    for radiograph in (read(encode(rgb)), read(rgb)):
        assert "colour" in radiograph.warnings[0]


def test_transparency_is_laid_on_black() -> None:
    rgba = np.full((40, 40, 4), 255, np.uint8)
    rgba[:20, :, 3] = 0
    pixels = read(encode(rgba)).pixels
    assert pixels[:20].max() == 0
    assert pixels[20:].min() == 1
    grey = np.full((40, 40), 40000, np.uint16)
    grey[:20] = 65535
    pixels = read(encode(grey, transparency=65535)).pixels
    assert pixels[:20].max() == 0
    assert pixels[20:].min() == pytest.approx(40000 / 65535)


def test_palette_image() -> None:
    image = Image.fromarray(GREY8).convert("P")
    assert read(save(image)).pixels.shape == (40, 48)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_orientation_tag_is_obeyed(form: str) -> None:
    array = np.zeros((40, 60), np.uint8)
    array[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned 90 degrees clockwise
    pixels = read(encode(array, form, exif=exif)).pixels
    assert pixels.shape == (60, 40)
    assert pixels[:28].min() > 0.9
    assert pixels[32:].max() < 0.1


def test_first_of_several_pages() -> None:
    data = save(Image.fromarray(GREY8), "TIFF", save_all=True, append_images=[Image.fromarray(GREY8 // 2)])
    radiograph = read(data)
    np.testing.assert_array_equal(radiograph.pixels, read(GREY8).pixels)
    assert "several images" in radiograph.warnings[0]


def test_blank_image_is_a_warning() -> None:
    assert "blank" in read(np.zeros((32, 32), np.uint8)).warnings[0]


def test_float_array_is_taken_as_it_is() -> None:
    values = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    np.testing.assert_allclose(read(values).pixels, values, atol=1e-7)
    assert values.flags.writeable


def test_array_hash_tells_shape_and_type_apart() -> None:
    a = np.zeros((32, 64), np.uint8)
    assert len({read(x).sha256 for x in (a, a.reshape(64, 32), a.astype(np.uint16), a.astype(np.float32))}) == 4


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((32, 32), np.nan), "nan"),
        (np.where(np.eye(32) > 0, np.nan, 0.5), "nan"),
        (np.full((32, 32), 2.0), "from 2 to 2"),
        (np.full((32, 32), -1.0), "-1"),
        (np.full((32, 32), np.inf), "inf"),
        (np.zeros((32, 32), np.int32), "int32"),
        (np.zeros((32, 32), bool), "bool"),
        (np.zeros(32), "shape (32,)"),
        (np.zeros((32, 32, 4), np.uint8), "shape (32, 32, 4)"),
        (np.zeros((0, 5), np.uint8), "5 x 0"),
        (np.zeros((8, 8), np.uint8), "8 x 8"),
        (np.zeros((20, 2000), np.uint8), "2000 x 20"),
        (np.broadcast_to(np.uint8(0), (10000, 10000)), "100 million"),
    ],
)
def test_wrong_arrays(array: npt.NDArray[np.generic], says: str) -> None:
    with pytest.raises(ImageError) as caught:
        read(array)
    assert says in str(caught.value)
    assert "expected" in str(caught.value) or "at most" in str(caught.value)


def bomb_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(b"\0" * (1 + width) * 8)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_bomb_is_refused(side: int) -> None:
    with pytest.raises(ImageError, match=r"million|more pixels"):
        read(bomb_png(side, side))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file"),
        (b"hello, this is a text", "68 65 6c 6c"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"PK\x03\x04....", "ZIP"),
        (b"GIF89a....", "GIF"),
        (b"\0" * 1000, "00 00"),
        (b"\x30\x82\x10\x00" * 100, "30 82"),
    ],
)
def test_what_is_no_image(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "expected PNG, JPEG, TIFF or DICOM" in str(caught.value)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "missing.png", "no such file"),
        (fifo, "not a regular file"),
        (huge, "512 MiB"),
        (huge / "below", "cannot be read"),
        ("a\0b", "NUL"),
    ):
        with pytest.raises(ImageError, match=says):
            read(path)
    with pytest.raises(ImageError, match="NoneType"):
        read(None)  # type: ignore[arg-type]  # what a caller may get wrong


def test_signed_or_wide_pixels_are_refused() -> None:
    for array in (GREY.astype(np.int32), GREY.astype(np.float32)):
        with pytest.raises(ImageError, match="8 or unsigned 16 bits"):
            read(encode(array, "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_every_truncation_is_an_image_or_an_image_error(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"compression": "tiff_lzw"} if form == "TIFF" else {}
    data = encode(GREY8, form, **options)
    outcomes = set()
    for end in range(0, len(data), max(1, len(data) // 300)):
        try:
            outcomes.add(type(read(data[:end])))
        except ImageError:
            outcomes.add(ImageError)
    assert ImageError in outcomes
    assert outcomes <= {ImageError, Radiograph}
    assert capfd.readouterr() == ("", "")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "TIFF"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
def test_damage_is_an_image_or_an_image_error(form: str, hits: list[tuple[float, int]]) -> None:
    data = bytearray(encode(GREY8, form))
    for where, value in hits:
        data[int(where * (len(data) - 1))] = value
    try:
        pixels = read(bytes(data)).pixels
    except ImageError:
        return
    assert pixels.min() >= 0
    assert pixels.max() <= 1
