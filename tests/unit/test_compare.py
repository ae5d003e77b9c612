"""The figures by which two precisions of one model are compared, on made values and on bundles that really run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_bundle
from PIL import Image

from xraygpt_lite import compare, load, verify
from xraygpt_lite.bundle import manifest
from xraygpt_lite.compare import Observation
from xraygpt_lite.errors import ImageError, UsageError


def observation(tokens: list[list[float]], logits: list[float], *ids: int) -> Observation:
    return Observation(np.array(tokens, np.float32), np.array(logits, np.float32), ids)


def test_the_same_observations_agree_wholly() -> None:
    same = [observation([[1, 2], [0, 0]], [1, 2, 3], 2, 1), observation([[3, -4], [1, 1]], [0, 0, 0], 0)]
    assert compare.agreement(same, same) == {
        "images": 2, "cosine_mean": 1, "cosine_worst": 1, "relative_error": 0, "first_token_kl": 0,
        "first_token_top1": 1, "texts_identical": 1,
    }  # fmt: skip
    assert compare.shortfall(compare.agreement(same, same)) is None


def test_each_figure_by_hand() -> None:
    reference = [observation([[3, 4], [1, 0]], [0, 0], 5, 6), observation([[0, 2], [2, 0]], [1, 0], 7)]
    seen = [observation([[4, 3], [1, 0]], [math.log(3), 0], 5, 7), observation([[0, 2], [0, 2]], [1, 0], 7)]
    figures = compare.agreement(seen, reference)
    assert figures["cosine_mean"] == pytest.approx((24 / 25 + 1 + 1 + 0) / 4)
    assert figures["cosine_worst"] == 0
    assert figures["relative_error"] == pytest.approx(2 / 4)
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert figures["first_token_kl"] == pytest.approx(divergence / 2, rel=1e-5)
    assert figures["texts_identical"] == 0.5
    assert "0.7400 on average and 0.0000 at worst" in str(compare.shortfall(figures))
    assert list(figures) == list(compare.FIGURES)


@pytest.mark.parametrize(("mean", "worst", "enough"), [(0.99, 0.95, True), (0.9899, 1, False), (1, 0.9499, False)])
def test_both_limits_count(mean: float, worst: float, enough: bool) -> None:
    assert (compare.shortfall({"cosine_mean": mean, "cosine_worst": worst}) is None) == enough


@pytest.mark.parametrize("other", [([[1, 2, 3]], [1, 2]), ([[1, 2]], [1, 2, 3])])
def test_different_models_are_refused(other: tuple[list[list[float]], list[float]]) -> None:
    with pytest.raises(UsageError, match="different models"):
        compare.agreement([observation([[1, 2]], [1, 2], 0)], [observation(*other, 0)])


def test_a_bundle_against_itself_and_against_other_weights(tmp_path: Path, made_bundle: Path) -> None:
    tiny_bundle.make(tmp_path / "other", seed=1)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in (1, 2):
        pixels = (verify.test_radiograph(seed).pixels * 255).astype(np.uint8)
        Image.fromarray(pixels).save(pictures / f"{seed}.png")
    (pictures / "notes.txt").write_text("not a radiograph")
    same = compare.bundles(made_bundle, made_bundle, pictures)
    assert same | {"relative_error": 0.0, "first_token_kl": 0.0} == same
    assert (same["images"], same["cosine_worst"], same["texts_identical"]) == (2, 1, 1)
    other = compare.bundles(tmp_path / "other", made_bundle, pictures)
    assert compare.shortfall(other) is not None
    assert other["first_token_kl"] > 0


def test_an_empty_answer_is_compared_by_its_first_logits(made_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(made_bundle) as model:
        radiograph = verify.test_radiograph(1)
        (usual,) = compare.observe(model, [radiograph])
        monkeypatch.setattr(model, "generate_ids", lambda *_: ())
        (empty,) = compare.observe(model, [radiograph])
    np.testing.assert_array_equal(empty.logits, usual.logits)
    assert empty.ids == ()


def test_bundles_of_another_prompt_are_no_comparison(tmp_path: Path, made_bundle: Path) -> None:
    other = tiny_bundle.make(tmp_path / "other")
    kept = manifest.parse((other / manifest.FILE_NAME).read_bytes())
    tiny_bundle.seal(other, replace(kept, prompt=replace(kept.prompt, default_question="Why?")))
    with pytest.raises(UsageError, match="differ in prompt"):
        compare.bundles(other, made_bundle, None)


def test_check_images(tmp_path: Path) -> None:
    examples = [radiograph.source for radiograph in compare.check_images(None)]
    assert [Path(source).suffix for source in examples] == [".dcm", ".dcm", ".png"]
    with pytest.raises(UsageError, match=r"holds no \.dcm"):
        compare.check_images(tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        compare.check_images(tmp_path / "absent")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError):
        compare.check_images(tmp_path)
