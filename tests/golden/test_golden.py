"""Converted models give the authors' values: every vision stage, token ids, logits, greedy ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sentencepiece import SentencePieceProcessor

from xraygpt_lite import prompt, verify
from xraygpt_lite.converters.families import loader
from xraygpt_lite.converters.llama import LlamaFolder
from xraygpt_lite.llm.quantize import quantize
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.values import Bundle, DevicePlan, EmbeddingSegment, Pixels, Placement, Segment, TokenSegment
from xraygpt_lite.vision import Encoder

TOLERANCE = 1e-4
PLAN = DevicePlan(context=512, threads=2, float32_cache=True)
BOS = 1
# Loose on purpose: what is asserted is that rounding, not a mistake, made the difference. The figures are printed.
LARGEST_LOGIT_CHANGE = {"f16": 0.02, "q8_0": 0.5}

Converted = Callable[[str], Bundle]


@pytest.mark.parametrize("encoder", ["swin", "resnet"])
def test_graphs_give_the_authors_features_and_embeddings(case: Any, converted: Converted, encoder: str) -> None:
    golden, bundle = case.golden(encoder), converted(encoder)
    data = golden["pixels"]
    running = Encoder(bundle, DevicePlan())
    for batch in (1, len(data)):
        pixels = Pixels(data[:batch], (Placement((1.0, 1.0), (0.0, 0.0), (224, 224)),) * batch)
        np.testing.assert_allclose(running.features(pixels)[:, 0], golden["features"][:batch], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(running.encode(pixels).data, golden["embeddings"][:batch], rtol=0, atol=TOLERANCE)
    running.close()


def test_swin_gives_the_authors_patches_and_pooled_row(shared: Path) -> None:
    import torch

    oracle = shared / "data" / "oracle"
    inputs = {"vision": oracle / "medclip_vit_pytorch_model.bin", "checkpoint": oracle / "xraygpt_paper_checkpoint.pth"}
    golden = np.load(oracle / "xraygpt_paper_golden.npz")
    parts = loader("xraygpt-paper")(inputs, 128, {"vision.num_heads": "1,2,4,8"})
    seen = parts.vision.model(torch.from_numpy(golden["pixels"]))
    np.testing.assert_allclose(seen.last_hidden_state.numpy(), golden["patches"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(seen.pooler_output.numpy(), golden["pooled"], rtol=0, atol=TOLERANCE)


def test_the_bundle_passes_verification_and_records_agreement(converted: Converted) -> None:
    bundle = converted("swin")
    assert [
        (check.name, check.detail) for check in verify.run(bundle.folder, device="cpu") if check.status != "ok"
    ] == []
    assert set(bundle.manifest.agreement) == {"features_max_difference", "embeddings_max_difference"}
    assert max(bundle.manifest.agreement.values()) <= TOLERANCE
    roles = {source.role for source in bundle.manifest.sources}
    assert roles == {"vision", "checkpoint", "llm"}


def test_token_ids_are_the_slow_tokenizers(case: Any, converted: Converted) -> None:
    processor = SentencePieceProcessor(model_file=str(case.llm / "tokenizer.model"))
    texts = [
        "Is the heart enlarged?",
        "  two  spaces\n\ttab",
        "é ü 心 🫀 <s> [INST] </s> <unk>",
        "###Doctor: x###",
        "1e-5",
    ]
    with Engine(converted("swin").llm, PLAN) as engine:
        variant = converted("swin").manifest.prompt.variants["paper"]
        texts += [variant.before, variant.after]
        for text in texts:
            assert list(engine.tokenize(text, leading_space=True)) == processor.encode(text)


def test_an_added_token_written_by_a_user_stays_plain_text(made: Path, tmp_path: Path) -> None:
    folder = LlamaFolder(made / "llm")
    folder.write(tmp_path / "llm.gguf", "f32", "made")
    with Engine(tmp_path / "llm.gguf", PLAN) as engine:
        ids = engine.tokenize("[PAD]", leading_space=True)
        assert engine.vocab == folder.sizes.rows
        assert folder.vocabulary.pieces[-1] == b"[PAD]"
        assert engine.vocab - 1 not in ids


def test_our_float32_file_gives_the_reference_logits_and_greedy_ids(made: Path, tmp_path: Path) -> None:
    golden = np.load(made / "golden.npz")
    segments = _segments(golden["before"], golden["swin_linear_embeddings"][0], golden["after"])
    for folder in ("llm", "llm_safe"):  # shards of .bin with an index, one safetensors file
        LlamaFolder(made / folder).write(tmp_path / f"{folder}.gguf", "f32", "made")
        logits = _trace(tmp_path / f"{folder}.gguf", segments, golden["greedy"])
        np.testing.assert_allclose(logits[0], golden["logits"], rtol=0, atol=TOLERANCE)
        assert list(logits.argmax(-1)) == list(golden["greedy"])
    assert (tmp_path / "llm.gguf").read_bytes() == (tmp_path / "llm_safe.gguf").read_bytes()


def test_every_prompt_of_the_oracle(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oracle = shared / "data" / "oracle"
    prompts = json.loads((oracle / "meta.json").read_bytes())["prompts"]
    golden = np.load(oracle / "llm_golden.npz")
    folder = LlamaFolder(oracle / "llm")
    for kind in ("f32", "f16"):
        folder.write(tmp_path / f"{kind}.gguf", "f32" if kind == "f32" else "f16", "oracle")
    quantize(tmp_path / "f32.gguf", tmp_path / "q8_0.gguf", "q8_0")
    change = dict.fromkeys(LARGEST_LOGIT_CHANGE, 0.0)
    with Engine(tmp_path / "f32.gguf", PLAN) as engine:
        for name, entry in prompts.items():
            before, after = entry["prompt"].split("<ImageHere>")
            assert [BOS, *_slow_ids(engine, before)] == entry["before_ids"], name
            assert _slow_ids(engine, after) == entry["after_ids"], name
    for name, entry in prompts.items():
        if "lora" in entry:  # merged into other weights than these
            continue
        rows = np.load(oracle / f"{'minigpt_med' if 'minigpt-med' in name else 'xraygpt'}_golden.npz")["embeddings"][0]
        segments = _segments(entry["before_ids"], rows, entry["after_ids"])
        ids = entry["greedy_ids"][1:]
        exact = _trace(tmp_path / "f32.gguf", segments, ids)
        np.testing.assert_allclose(exact[0], golden[f"{name}_logits"], rtol=0, atol=TOLERANCE, err_msg=name)
        assert list(exact.argmax(-1)) == ids, name
        for kind, most in change.items():
            seen = _trace(tmp_path / f"{kind}.gguf", segments, ids[:1])
            change[kind] = max(most, float(np.abs(seen[0] - golden[f"{name}_logits"]).max()))
    with capsys.disabled():
        spread = golden["minigpt4_logits"].std()
        print(f"\nlargest change of a logit against float32, where logits deviate by {spread:.2f}: {change}")
    for kind, most in LARGEST_LOGIT_CHANGE.items():
        assert 0 < change[kind] < most


def test_the_paper_prompt_is_built_as_two_pieces_around_the_image(converted: Converted) -> None:
    bundle = converted("swin")
    question = bundle.manifest.prompt.default_question
    rows = np.zeros((bundle.manifest.image_tokens, bundle.manifest.width), np.float32)
    with Engine(bundle.llm, PLAN) as engine:
        variant = bundle.manifest.prompt.variants["paper"]
        first, image, last = prompt.build(variant, question, rows, engine.tokenize)
        assert isinstance(first, TokenSegment)
        assert isinstance(last, TokenSegment)
        assert list(first.ids) == [BOS, *engine.tokenize(variant.before, leading_space=True)]
        assert len(image) == bundle.manifest.image_tokens
        assert list(last.ids) == list(engine.tokenize(f"{question} ###Assistant:", leading_space=True))


def _slow_ids(engine: Engine, text: str) -> list[int]:
    """Ids of template text, in which <s> is the control token; each piece starts with the tokenizer's space."""
    first, *rest = text.split("<s>")
    ids = list(engine.tokenize(first, leading_space=True)) if first else []
    for part in rest:
        ids += [BOS, *engine.tokenize(part, leading_space=True)]
    return [int(value) for value in ids]


def _segments(before: Any, rows: npt.NDArray[np.float32], after: Any) -> list[Segment]:
    tokens = [TokenSegment(np.asarray(ids, np.int32)) for ids in (before, after)]
    return [tokens[0], EmbeddingSegment(np.ascontiguousarray(rows)), tokens[1]]


def _trace(path: Path, segments: list[Segment], ids: Any) -> npt.NDArray[np.float32]:
    with Engine(path, replace(PLAN)) as engine, engine.open() as slot:
        return slot.trace(segments, [int(value) for value in ids])
