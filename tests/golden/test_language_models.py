"""Language models put together from several files: base and delta, LoRA in both key styles, an existing GGUF."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from xraygpt_lite.converters import language
from xraygpt_lite.converters.checkpoint import Checkpoint
from xraygpt_lite.converters.lora import Lora
from xraygpt_lite.llm.quantize import quantize
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.values import DevicePlan, EmbeddingSegment, TokenSegment

TOLERANCE = 1e-4
PLAN = DevicePlan(context=512, threads=2, float32_cache=True)
PROMPT = "minigpt-med+lora"


@pytest.fixture(scope="module")
def oracle(shared: Path) -> Path:
    return shared / "data" / "oracle"


@pytest.mark.parametrize("file", ["minigpt_med_checkpoint.pth", "minigpt_med_checkpoint_peft03.pth"])
def test_a_merged_lora_gives_the_authors_logits_and_greedy_ids(oracle: Path, tmp_path: Path, file: str) -> None:
    golden = np.load(oracle / "llm_golden.npz")[f"{PROMPT}_logits"]
    entry = json.loads((oracle / "meta.json").read_bytes())["prompts"][PROMPT]
    model = language.read({"llm": oracle / "llm"})
    model.merge(Lora(Checkpoint(oracle / file), entry["lora"]["alpha"]))
    model.write(tmp_path / "llm.gguf", "f32", "merged")
    ids = entry["greedy_ids"][1:]
    logits = _trace(tmp_path / "llm.gguf", oracle, entry, ids)
    np.testing.assert_allclose(logits[0], golden, rtol=0, atol=TOLERANCE)
    assert list(logits.argmax(-1)) == ids


def test_a_base_and_its_delta_are_the_whole_model(oracle: Path, tmp_path: Path) -> None:
    """To float32's rounding: llm - llm_base was rounded once when the delta was made, and the sum once here."""
    from gguf import GGUFReader

    parts = {"llm-base": oracle / "llm_base", "llm-delta": oracle / "llm_delta"}
    whole = language.read({"llm": oracle / "llm"})
    added = language.read(parts | {"tokenizer": oracle / "llm" / "tokenizer.model"})
    assert {role for role, _ in added.files} == {"llm-base", "llm-delta", "tokenizer"}
    assert set(whole.ignored) == set(added.ignored)
    for model, name in ((whole, "whole"), (added, "added")):
        model.write(tmp_path / f"{name}.gguf", "f32", "same")
    expected, seen = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("whole", "added"))
    assert {name: field.contents() for name, field in seen.fields.items()} == {
        name: field.contents() for name, field in expected.fields.items()
    }
    for ours, theirs in zip(seen.tensors, expected.tensors, strict=True):
        assert (ours.name, ours.tensor_type) == (theirs.name, theirs.tensor_type)
        np.testing.assert_allclose(ours.data, theirs.data, rtol=0, atol=5e-7, err_msg=ours.name)


def test_an_existing_gguf_is_kept_byte_for_byte_or_made_smaller(oracle: Path, tmp_path: Path) -> None:
    folder = language.read({"llm": oracle / "llm"})
    folder.write(tmp_path / "f16.gguf", "f16", "oracle")
    folder.write(tmp_path / "stored.gguf", folder.own_type, "oracle")
    quantize(tmp_path / "stored.gguf", tmp_path / "straight.gguf", "q8_0")
    existing = language.read({"llm": tmp_path / "f16.gguf"})
    assert (existing.width, existing.bos, existing.eos) == (folder.width, folder.bos, folder.eos)
    assert (existing.default_type, existing.weight_type("q8_0")) == ("f16", "q8_0")
    existing.write(tmp_path / "kept.gguf", "f16", "other")
    assert (tmp_path / "kept.gguf").read_bytes() == (tmp_path / "f16.gguf").read_bytes()
    existing.write(tmp_path / "smaller.gguf", "q8_0", "other")
    smaller = language.read({"llm": tmp_path / "smaller.gguf"})
    assert smaller.default_type == "q8_0"
    smaller.write(tmp_path / "again.gguf", "q8_0", "other")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "smaller.gguf").read_bytes()


def _trace(path: Path, oracle: Path, entry: dict[str, Any], ids: list[int]) -> npt.NDArray[np.float32]:
    rows = np.load(oracle / "minigpt_med_golden.npz")["embeddings"][0]
    before, after = (TokenSegment(np.asarray(entry[name], np.int32)) for name in ("before_ids", "after_ids"))
    with Engine(path, replace(PLAN)) as engine, engine.open() as slot:
        return slot.trace([before, EmbeddingSegment(np.ascontiguousarray(rows)), after], ids)
