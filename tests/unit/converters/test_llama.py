"""Llama folders: sizes, row order, vocabularies, and what is refused. Values are held to references in tests/golden."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from xraygpt_lite.converters.llama import LlamaFolder, rotary_order
from xraygpt_lite.errors import ConversionError


@pytest.fixture
def llm(made: Path, tmp_path: Path) -> Path:
    """A copy of the made safetensors folder, to be spoilt."""
    return Path(shutil.copytree(made / "llm_safe", tmp_path / "llm"))


def test_rotary_order_pairs_the_halves_of_each_head() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four rows: halves (0 1 | 2 3) and (4 5 | 6 7)
    assert rotary_order(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_types_shapes_and_metadata(llm: Path, tmp_path: Path) -> None:
    folder = LlamaFolder(llm)
    assert folder.own_type == "f32"
    folder.write(tmp_path / "x.gguf", "f16", "name")
    reader = GGUFReader(tmp_path / "x.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == kinds["blk.1.attn_k.weight"] == "F16"
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert len(kinds) == 3 + 2 * 9
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["llama.attention.head_count_kv"] == 2
    assert facts["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert facts["tokenizer.ggml.add_space_prefix"] is True
    assert facts["general.file_type"] == 1


def test_half_precision_sources_start_the_quantizer_from_half(llm: Path) -> None:
    state = load_file(llm / "model.safetensors")
    save_file({name: value.half() for name, value in state.items()}, llm / "model.safetensors")
    assert LlamaFolder(llm).own_type == "f16"


def test_tied_embeddings_have_no_output_matrix(llm: Path, tmp_path: Path) -> None:
    _edit(llm, tie_word_embeddings=True)
    folder = LlamaFolder(llm)
    assert folder.ignored == ("lm_head.weight",)
    folder.write(tmp_path / "x.gguf", "f32", "x")
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(tmp_path / "x.gguf").tensors}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "type 'mistral'; only 'llama'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": "x"}, "rope_scaling is 'x'; expected an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' is not known"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope_scaling.factor is -1"),
        ({"num_hidden_layers": 3}, r"lacks 'model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"holds 'model\.layers\.1"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight' .* has shape \(32, 64\); config.json asks for \(64, 64\)"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"intermediate_size": None}, "intermediate_size is None"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(llm: Path, changes: dict[str, Any], message: str) -> None:
    _edit(llm, **changes)
    with pytest.raises(ConversionError, match=message):
        LlamaFolder(llm)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _piece(content: bytes) -> Callable[[Path], None]:
    """Put other bytes of the same length in the place of a piece's text."""

    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.model"
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(path.read_bytes())
        text = next(p.piece.encode() for p in model.pieces if len(p.piece) == len(p.piece.encode()) == len(content))
        field = bytes([10, len(text)])  # number 1, a text
        path.write_bytes(path.read_bytes().replace(field + text, field + content))

    return spoil


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove("config.json"), "config.json cannot be read"),
        (_write("config.json", b"{"), "is not JSON"),
        (_write("config.json", b"[]"), "only 'llama'"),
        (_remove("tokenizer.model"), "there is no tokenizer.model in .*llm, .* --tokenizer FILE"),
        (_write("tokenizer.model", b"\xff" * 40), "is not a SentencePiece model"),
        (_write("tokenizer.model", b""), "holds no pieces"),
        (_piece(b"\xff\xfe"), "holds pieces that are no text in UTF-8"),
        (_write("added_tokens.json", b'{"\\ud800": 40}'), "added_tokens.json is not a tokenizer's JSON file"),
        (_write("added_tokens.json", b"[" * 100_000), "added_tokens.json is not a tokenizer's JSON file"),
        (_write("config.json", b"[" * 100_000), "config.json is not JSON"),
        (_remove("model.safetensors"), "holds no weights"),
        (_write("added_tokens.json", b'{"<x>": 5000}'), "'<x>' with id 5000, which is beyond the 385 rows"),
        (_write("added_tokens.json", b'{"<x>": 5}'), "'<x>' with id 5, which is '<0x02>'"),
        (_write("added_tokens.json", b"[3]"), "not a tokenizer's JSON file"),
    ],
)
def test_a_spoilt_folder_is_refused(llm: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(llm)
    with pytest.raises(ConversionError, match=message):
        LlamaFolder(llm)


def test_a_vocabulary_larger_than_the_table_is_refused(llm: Path) -> None:
    state = load_file(llm / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:300].clone()
    save_file(state, llm / "model.safetensors")
    with pytest.raises(ConversionError, match=r"384 pieces and the embedding table of .* only 300 rows"):
        LlamaFolder(llm)


def test_rows_without_a_piece_become_unused_tokens(llm: Path) -> None:
    state = load_file(llm / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(3, 64)])
    save_file(state, llm / "model.safetensors")
    padded = LlamaFolder(llm)
    assert padded.vocabulary.pieces[-3:] == (b"[PAD385]", b"[PAD386]", b"[PAD387]")
    assert padded.notes == ("3 rows of the embedding table stand for no piece of the vocabulary (padding)",)


def test_rows_with_a_piece_are_not_spoken_of(llm: Path) -> None:
    assert LlamaFolder(llm).notes == ()
    (llm / "tokenizer_config.json").unlink()
    assert LlamaFolder(llm).notes == ("1 row of the embedding table stands for no piece of the vocabulary (padding)",)


@pytest.mark.parametrize("kind", ["unigram", "nmt_nfkc"])
def test_vocabularies_that_llama_cpp_would_read_otherwise_are_refused(llm: Path, kind: str) -> None:
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the chest x-ray shows no effusion and clear lungs"] * 20),
        model_writer=model, vocab_size=300, byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
        model_type="unigram" if kind == "unigram" else "bpe",
        normalization_rule_name="identity" if kind == "unigram" else "nmt_nfkc",
    )  # fmt: skip
    (llm / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ConversionError, match=r"not a BPE model" if kind == "unigram" else "normalizes text"):
        LlamaFolder(llm)


def test_what_does_not_fit_half_precision_names_its_tensor(llm: Path, tmp_path: Path) -> None:
    state = load_file(llm / "model.safetensors")
    state["lm_head.weight"][3, 3] = 1e6
    save_file(state, llm / "model.safetensors")
    with pytest.raises(ConversionError, match=r"'lm_head.weight' .* beyond float16; use --quant f32"):
        LlamaFolder(llm).write(tmp_path / "x.gguf", "f16", "x")


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
