"""Preprocessing equals the authors' own, to 1e-5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xraygpt_lite.imaging.read import read
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.values import ImageSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EVA_224 = ImageSpec(224, "stretch", "bicubic", CLIP_MEAN, CLIP_STD)
EVA_448 = ImageSpec(448, "stretch", "bicubic", CLIP_MEAN, CLIP_STD)
MEDCLIP = ImageSpec(224, "pad", "bicubic", (0.5862785803043838,) * 3, (0.27950088968644304,) * 3)


@pytest.mark.parametrize(("name", "spec"), [("stretch224", EVA_224), ("stretch448", EVA_448), ("medclip224", MEDCLIP)])
def test_equals_the_authors_preprocessing(shared: Path, name: str, spec: ImageSpec) -> None:
    golden = np.load(shared / "data/oracle/preprocess_golden.npz")

    pixels = transform([read(golden["image"])], spec)

    assert pixels.data.dtype == np.float32
    assert pixels.data.flags.c_contiguous
    np.testing.assert_allclose(pixels.data[0], golden[name], rtol=0, atol=1e-5)
