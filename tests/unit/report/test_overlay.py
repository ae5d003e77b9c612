"""The drawn picture: the radiograph's size, boxes where they are said to be, labels inside and apart, disclaimer."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from xraygpt_lite.imaging.read import read
from xraygpt_lite.report import overlay
from xraygpt_lite.values import Box, Sampling, Summary, Timings

SUMMARY = Summary(
    source="a.png", sha256="0" * 64, sop_instance_uid=None, question="[refer] heart", prompt_variant="chat",
    text="", raw_text="", finish="stop", warnings=(), options=Sampling(), device="cpu", bundle_id="f" * 64,
    bundle_name="tiny", timings=Timings(), prompt_tokens=1, image_tokens=2, answer_tokens=3,
    disclaimer="Research use only. Not a medical device: the text may be wrong and must not guide care.",
)  # fmt: skip
GREY = np.full((400, 600), 0.5, np.float32)


def drawn(pixels: np.ndarray, *boxes: Box, question: str = "heart") -> Image.Image:
    data = overlay.render(pixels, replace(SUMMARY, boxes=boxes, question=question))
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", pixels.shape[::-1])
        image.load()
        return image


def changed(one: Image.Image, other: Image.Image) -> tuple[int, int, int, int] | None:
    return ImageChops.difference(one, other).getbbox()


def test_without_boxes_the_radiograph_and_the_disclaimer_stand_alone() -> None:
    ramp = np.linspace(0, 1, 400 * 600, dtype=np.float32).reshape(400, 600)
    image = np.asarray(drawn(ramp))
    kept = 340  # the strip at the bottom is smaller than this leaves
    np.testing.assert_array_equal(image[:kept], np.rint(ramp[:kept, :, None] * 255).astype(np.uint8).repeat(3, 2))
    strip = image[-12:]
    assert strip.min() == 0
    assert strip.max() > 200


def test_a_box_is_drawn_at_its_pixels_and_leaves_what_it_holds_visible() -> None:
    bare, image = drawn(GREY), drawn(GREY, Box("heart", 100.0, 150.0, 300.0, 250.0))
    left, top, right, bottom = changed(bare, image) or (0, 0, 0, 0)
    assert (left, right, bottom) == (99, 301, 251)  # a dark line of one pixel lies around the coloured one
    assert 100 <= top < 150  # the label above it
    assert image.getpixel((100, 200)) == image.getpixel((299, 200)) == (0xF0, 0xE4, 0x42)
    assert image.getpixel((200, 200)) == bare.getpixel((200, 200))


@pytest.mark.parametrize("ground", [0.0, 1.0])
def test_lines_are_seen_on_dark_and_on_bright_ground(ground: float) -> None:
    image = np.asarray(drawn(np.full((400, 400), ground, np.float32), Box("", 100, 100, 300, 300))).astype(int)
    row = image[200, 95:110].sum(1)
    assert row.max() - row.min() > 300
    assert abs(row - ground * 3 * 255).max() > 300


def test_colours_differ_and_labels_do_not_hide_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [Box(f"finding {n}", 250, 180, 270, 200) for n in range(5)]
    boxes += [Box("top", 0, 0, 10, 10), Box("right", 590, 0, 600, 400), Box("bottom", 0, 390, 30, 400)]
    areas: list[tuple[int, int, int, int]] = []
    place = overlay._place

    def noting(*args: object) -> tuple[int, int, int, int]:
        areas.append(place(*args))  # type: ignore[arg-type]
        return areas[-1]

    monkeypatch.setattr(overlay, "_place", noting)
    image = drawn(GREY, *boxes)
    for n, (left, top, right, bottom) in enumerate(areas):
        assert 0 <= left <= right < 600
        assert 0 <= top <= bottom < 400
        for a, b, c, d in areas[:n]:
            assert right < a or c < left or bottom < b or d < top
    colours = [image.getpixel((left + 1, top + 1)) for left, top, _, _ in areas]
    assert len(set(colours[:6])) == 6
    assert all(max(colour) == 255 or sum(colour) > 400 for colour in colours)  # black letters can be read on each


def test_a_box_without_a_phrase_is_labelled_with_what_was_asked() -> None:
    nameless = Box("", 100, 150, 300, 250)
    assert changed(drawn(GREY, nameless, question="heart"), drawn(GREY, replace(nameless, phrase="heart"))) is None
    assert changed(drawn(GREY, nameless, question="heart"), drawn(GREY, nameless, question="lung")) is not None


def test_a_long_label_is_wrapped_and_ends_in_dots() -> None:
    words = " ".join(["consolidation"] * 200)
    left, top, right, bottom = changed(drawn(GREY), drawn(GREY, Box(words, 580, 300, 600, 320))) or (0, 0, 0, 0)
    assert left > 200  # not across the whole picture
    assert top > 150
    assert (right, bottom) <= (600, 400)


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3), (20, 20), (200, 64)])
def test_pictures_of_any_size_can_be_drawn_on(shape: tuple[int, int]) -> None:
    height, width = shape
    odd = Box("heart 心 🫀\n\x00\x1b" * 9, 0, 0, width, height)
    drawn(np.ones(shape, np.float32), odd, Box("x" * 5000, width * 0.4, height * 0.4, width * 0.5, height * 0.5))


def test_on_a_real_radiograph(shared: Path) -> None:
    pixels = read(sorted((shared / "data" / "png1024").glob("*.png"))[0]).pixels
    bare, full = drawn(pixels), drawn(pixels, Box("the whole image", 0, 0, pixels.shape[1], pixels.shape[0]))
    assert changed(bare, full) == (0, 0, *full.size)
