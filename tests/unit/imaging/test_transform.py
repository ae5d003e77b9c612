"""Where an image lies on the encoder's square, and what the batch looks like."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xraygpt_lite.imaging.read import read
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.values import Fit, ImageSpec


def spec(fit: Fit, size: int = 64) -> ImageSpec:
    return ImageSpec(size, fit, "bilinear", (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))


def test_each_channel_has_its_own_mean_and_deviation() -> None:
    pixels = transform([read(np.full((64, 64), 255, np.uint8))], spec("stretch"))

    assert pixels.data.shape == (1, 3, 64, 64)
    assert pixels.data[0, :, 0, 0] == pytest.approx([1.0, 1.5, 1.0])


def test_batch_equals_single_images_of_other_sizes() -> None:
    rng = np.random.default_rng(0)
    images = [read(rng.integers(0, 256, shape, np.uint8)) for shape in ((40, 50), (90, 30))]

    together = transform(images, spec("pad"))

    for i, image in enumerate(images):
        np.testing.assert_array_equal(together.data[i], transform([image], spec("pad")).data[0])


def test_padding_is_black_and_centred() -> None:
    pixels = transform([read(np.full((128, 64), 255, np.uint8))], spec("pad")).data[0, 2]

    assert pixels[:, :14].max() == 0
    assert pixels[:, 50:].max() == 0
    assert pixels[:, 18:46].min() == 1


def test_a_small_image_is_padded_to_the_size_not_enlarged() -> None:
    result = transform([read(np.full((32, 32), 255, np.uint8))], spec("pad"))

    assert int(result.data[0, 2].sum()) == 32 * 32
    assert result.placements[0].scale == (1.0, 1.0)
    assert result.placements[0].offset == (16.0, 16.0)


def test_no_image_is_an_empty_batch() -> None:
    assert transform([], spec("pad")).data.shape == (0, 3, 64, 64)


@settings(max_examples=30, deadline=None)
@given(st.integers(40, 120), st.integers(40, 120), st.sampled_from(["stretch", "pad"]), st.data())
def test_placement_maps_a_spot_back(height: int, width: int, fit: Fit, data: st.DataObject) -> None:
    y, x = data.draw(st.integers(6, height - 7)), data.draw(st.integers(6, width - 7))
    image = np.zeros((height, width), np.uint8)
    image[y - 3 : y + 4, x - 3 : x + 4] = 255

    result = transform([read(image)], spec(fit, 96))

    weight = result.data[0, 2]
    grid = np.arange(96) + 0.5
    seen = (weight.sum(0) @ grid / weight.sum(), weight.sum(1) @ grid / weight.sum())
    place = result.placements[0]
    back = [(s - o) / k for s, o, k in zip(seen, place.offset, place.scale, strict=True)]
    assert back == pytest.approx([x + 0.5, y + 0.5], abs=0.6)
    assert place.size == (width, height)
