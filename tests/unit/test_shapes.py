"""The bundles that benchmarks make of random weights: as llama.cpp would quantize a whole model, and they run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the convert extra")

from gguf import GGUFReader

import xraygpt_lite
from benchmarks import full_size, shapes
from xraygpt_lite.errors import ConversionError
from xraygpt_lite.values import GenerationOptions

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "synthetic-normal.png"
SIZES = full_size.Sizes(
    vit_width=176, vit_depth=1, vit_mlp=256, grid=16, hidden=64, qformer_layers=2, queries=8, swin_width=24,
    swin_depths=(1, 1), swin_heads=(1, 2), swin_features=64, width=256, layers=8, heads=2, feed_forward=256,
    vocabulary=300,
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def test_repeated_layers_are_what_the_quantizer_makes_of_a_whole_model(tmp_path: Path) -> None:
    made, whole = shapes.language_model(tmp_path, "q4_k_m", SIZES), tmp_path / "whole.gguf"
    shapes.quantize(shapes._plain(tmp_path / "plain", SIZES, SIZES.layers), whole, "q4_k_m")
    types = shapes.tensor_types(whole)
    assert len({types[f"blk.{n}.ffn_down.weight"] for n in range(SIZES.layers)}) == 2
    assert shapes.tensor_types(made) == types
    assert made.stat().st_size == whole.stat().st_size
    (tensors, facts), (reference, expected) = _content(made), _content(whole)
    assert facts == expected
    assert list(tensors) == list(reference)
    # The first layer is the whole model's, bit by bit; the third is the first of its kind once more.
    assert all(tensors[name] == value for name, value in reference.items() if name.startswith("blk.0."))
    assert tensors["blk.2.ffn_up.weight"] == tensors["blk.1.ffn_up.weight"]


def test_a_quantizer_that_ignores_the_given_types_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shapes.quantize
    monkeypatch.setattr(shapes, "quantize", lambda source, target, quant, _types=None: real(source, target, quant))
    with pytest.raises(ConversionError, match="did not get the types of a whole q4_k_m model"):
        shapes.language_model(tmp_path, "q4_k_m", SIZES)
    assert not list((tmp_path / "llm").iterdir())


def _content(path: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    """Bytes of the tensors, and the metadata."""
    reader = GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}, facts


@pytest.mark.parametrize(
    ("family", "vision_type", "tokens"),
    [("xraygpt", "int8", 8), ("xraygpt-paper", "f32", 1), ("minigpt-med", "f32", 256)],
)
def test_a_bundle_loads_and_answers(work: Path, family: str, vision_type: str, tokens: int) -> None:
    folder = shapes.bundle(work, family, "q4_0", vision_type, SIZES)
    with xraygpt_lite.load(folder) as model:
        manifest = model.bundle.manifest
        said = model.summarize(EXAMPLE, options=GenerationOptions(max_tokens=4, min_tokens=4))
    assert said.answer_tokens == 4
    assert shapes.WARNING in said.warnings
    assert manifest.image_tokens == tokens
    assert manifest.weight_types == {"vision": vision_type, "projector": "f32", "llm": "q4_0"}
    assert manifest.agreement["features_max_difference"] < 1e-4
    assert vision_type == "f32" or 0.98 < manifest.agreement["cosine_mean"] < 1


def test_bundles_share_what_is_the_same(work: Path) -> None:
    one, other = (shapes.bundle(work, "xraygpt-paper", quant, "f32", SIZES) for quant in ("q4_0", "f16"))
    third = shapes.bundle(work, "minigpt-med", "q4_0", "f32", SIZES)
    assert (one / "vision.onnx").samefile(other / "vision.onnx")
    assert (one / "llm.gguf").samefile(third / "llm.gguf")
    assert not (one / "llm.gguf").samefile(other / "llm.gguf")
    before = (one / "bundle.json").stat()
    assert shapes.bundle(work, "xraygpt-paper", "q4_0", "f32", SIZES) == one
    assert (one / "bundle.json").stat() == before  # it was there, and was not made again
