"""Verify passes where it was recorded and after rounding, and fails when image, graph or LLM is another's."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_bundle

from xraygpt_lite import prompt, verify, vision
from xraygpt_lite.bundle import manifest, store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import BundleError, DeviceError, NativeError
from xraygpt_lite.llm import native, quantize, selftest
from xraygpt_lite.model import XrayModel, open_bundle
from xraygpt_lite.values import Check, Float32, ImageTokens

STEPS = (
    "manifest and files",
    "sha256 of every file",
    "language model fits projector",
    "language model runs",
    "model opens",
    "image tokens",
    "recorded answer",
)


def failed(checks: list[Check]) -> str:
    """The one check that failed; those before it are ok, those behind it skipped."""
    assert tuple(check.name for check in checks) == STEPS
    states = [check.status for check in checks]
    at = states.index("failed")
    assert states == ["ok"] * at + ["failed"] + ["skipped"] * (len(states) - at - 1)
    assert all(checks[at].name in check.detail for check in checks[at + 1 :])
    return checks[at].name


@pytest.fixture
def recorded_copy(recorded_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded_bundle, tmp_path / "copy"))


def reseal(folder: Path) -> None:
    tiny_bundle.seal(folder, manifest.parse((folder / "bundle.json").read_bytes()))


def test_what_this_machine_lacks_says_nothing_of_the_bundle(recorded_bundle: Path) -> None:
    if "CUDAExecutionProvider" in vision.available_providers() and native.supports_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match="cannot be met"):
        verify.run(recorded_bundle, device="cuda")


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_broken_build_says_nothing_of_the_bundle(
    recorded_bundle: Path, monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    def probe(gguf: Path) -> selftest.Verdict:
        broken = everywhere or gguf.parent == recorded_bundle
        return selftest.Verdict(not broken, broken, "an illegal instruction" * broken, "build", "cpu", 0.1)

    monkeypatch.setattr(selftest, "probe", probe)
    if everywhere:
        with pytest.raises(NativeError, match="reinstall it with"):
            verify.run(recorded_bundle, device="cpu")
        return
    checks = verify.run(recorded_bundle, device="cpu")
    assert failed(checks) == "language model runs"
    assert any("but not this llm.gguf: an illegal instruction" in check.detail for check in checks)


def test_passes_where_it_was_recorded(recorded_bundle: Path) -> None:
    checks = verify.run(recorded_bundle, device="cpu")
    assert [(check.name, check.status) for check in checks] == [(name, "ok") for name in STEPS]
    assert all(check.detail for check in checks)


def test_record_is_repeatable_and_survives_the_manifest(recorded_bundle: Path) -> None:
    bundle = store.load(recorded_bundle, Cache(None))
    with open_bundle(bundle, device="cpu") as model:
        assert verify.record(model) == bundle.manifest.self_test
    test = bundle.manifest.self_test
    assert len(test.positions) == len(set(test.positions)) == tiny_bundle.TOKENS * tiny_bundle.WIDTH
    assert test.question == bundle.manifest.prompt.default_question


def test_noise_in_place_of_the_image_is_noticed(recorded_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_bundle(store.load(recorded_bundle, Cache(None)), device="cpu") as model:
        assert verify.notices_noise(model)
        monkeypatch.setattr(verify, "_noise_radiograph", verify.test_radiograph)
        assert not verify.notices_noise(model)
    monkeypatch.undo()
    monkeypatch.setattr(verify, "test_radiograph", verify._noise_radiograph)
    assert failed(verify.run(recorded_bundle, device="cpu")) == "image tokens"


def test_another_picture_is_noticed(recorded_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = verify.test_radiograph(1)
    upside_down = replace(picture, pixels=np.ascontiguousarray(picture.pixels[::-1]))
    monkeypatch.setattr(verify, "test_radiograph", lambda seed: upside_down)
    assert failed(verify.run(recorded_bundle, device="cpu")) == "image tokens"


@pytest.mark.parametrize(
    ("name", "step"),
    [("vision.onnx", "image tokens"), ("projector.onnx", "image tokens"), ("llm.gguf", "recorded answer")],
)
def test_a_file_of_another_model_is_noticed(recorded_copy: Path, tmp_path: Path, name: str, step: str) -> None:
    other = tiny_bundle.make(tmp_path / "other", seed=9)
    shutil.copy(other / name, recorded_copy / name)
    assert failed(verify.run(recorded_copy)) in ("manifest and files", "sha256 of every file")
    reseal(recorded_copy)
    assert failed(verify.run(recorded_copy, device="cpu")) == step


def test_a_language_model_that_ignores_the_image_is_noticed(
    recorded_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = XrayModel.trace

    def blind(self: XrayModel, tokens: ImageTokens, question: str | None, ids: tuple[int, ...]) -> Float32:
        return trace(self, ImageTokens(np.zeros_like(tokens.data)), question, ids)

    monkeypatch.setattr(XrayModel, "trace", blind)
    assert failed(verify.run(recorded_bundle, device="cpu")) == "recorded answer"


def test_a_model_requantized_from_the_same_weights_passes(recorded_copy: Path, tmp_path: Path) -> None:
    """As far from the recorded logits as another machine's build could be."""
    quantize.quantize(recorded_copy / "llm.gguf", tmp_path / "f16.gguf", "f16")
    shutil.copy(tmp_path / "f16.gguf", recorded_copy / "llm.gguf")
    reseal(recorded_copy)
    assert {check.status for check in verify.run(recorded_copy, device="cpu")} == {"ok"}


@pytest.mark.parametrize(("rounding", "good"), [(1e-3, True), (3e-2, False)])
def test_rounding_of_image_tokens(
    recorded_bundle: Path, monkeypatch: pytest.MonkeyPatch, rounding: float, good: bool
) -> None:
    tokens_of = XrayModel.tokens_of

    def rounded(self: XrayModel, image: object) -> ImageTokens:
        data = tokens_of(self, image).data  # type: ignore[arg-type]
        step = np.float32(rounding * np.abs(data).max())
        return ImageTokens(
            data + step * np.where(np.arange(data.size).reshape(data.shape) % 2, 1, -1).astype(np.float32)
        )

    monkeypatch.setattr(XrayModel, "tokens_of", rounded)
    checks = verify.run(recorded_bundle, device="cpu")
    assert (checks[5].status == "ok") == good
    assert (checks[6].status == "ok") == good


@pytest.mark.parametrize("name", manifest.REQUIRED_FILES)
def test_an_altered_file_is_noticed_whatever_is_cached(recorded_copy: Path, name: str) -> None:
    data = bytearray((recorded_copy / name).read_bytes())
    data[-5] ^= 1
    (recorded_copy / name).write_bytes(data)
    assert failed(verify.run(recorded_copy)) == "sha256 of every file"


def test_what_is_no_bundle_fails_at_once(tmp_path: Path) -> None:
    assert failed(verify.run(tmp_path / "nothing")) == "manifest and files"


def test_a_gguf_that_llama_refuses_fails_in_the_child(recorded_copy: Path) -> None:
    path = recorded_copy / "llm.gguf"
    path.write_bytes(path.read_bytes()[:-500])
    reseal(recorded_copy)
    assert failed(verify.run(recorded_copy)) == "language model runs"


def blind_vision(tokens: ImageTokens) -> ImageTokens:
    return ImageTokens(np.ones_like(tokens.data))


def test_record_refuses_a_vision_that_does_not_see(recorded_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_of = XrayModel.tokens_of
    monkeypatch.setattr(XrayModel, "tokens_of", lambda self, image: blind_vision(tokens_of(self, image)))
    with (
        open_bundle(store.load(recorded_bundle, Cache(None)), device="cpu") as model,
        pytest.raises(BundleError, match="do not see the image"),
    ):
        verify.record(model)


def test_record_refuses_a_language_model_that_does_not_see(
    recorded_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = prompt.prefix
    monkeypatch.setattr(prompt, "prefix", lambda variant, rows, *rest: prefix(variant, np.ones_like(rows), *rest))
    with (
        open_bundle(store.load(recorded_bundle, Cache(None)), device="cpu") as model,
        pytest.raises(BundleError, match="language model does not see the image"),
    ):
        verify.record(model)


def test_the_test_radiograph_is_the_same_everywhere() -> None:
    picture = verify.test_radiograph(1)
    assert picture.pixels.shape == (256, 256)
    assert picture.pixels.dtype == np.float32
    assert picture.pixels.min() >= 0
    assert picture.pixels.max() <= 1
    levels = np.rint(picture.pixels * 255).astype(np.uint8)
    assert hashlib.sha256(levels.tobytes()).hexdigest() == picture.sha256
    assert picture.sha256 == "111a55c3c6ae7a8d099d33769196bc0060cab8b302fd7a361682796f6dc80adf"
    assert verify.test_radiograph(2).sha256 != picture.sha256


def test_the_test_radiograph_looks_like_a_chest() -> None:
    pixels = verify.test_radiograph(1).pixels
    lungs, middle, belly = pixels[80:140, 60:95].mean(), pixels[60:140, 122:134].mean(), pixels[235:, 60:190].mean()
    assert lungs < 0.4 < middle < belly


@pytest.mark.parametrize("folder", sorted((Path(__file__).parents[1] / "golden" / "bundles").glob("v*")))
def test_stored_bundles_of_every_schema_still_pass(folder: Path) -> None:
    assert json.loads((folder / "bundle.json").read_bytes())["schema"] == int(folder.name[1:])
    assert [check for check in verify.run(folder, device="cpu") if check.status != "ok"] == []
