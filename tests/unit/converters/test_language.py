"""Base + delta, LoRA and existing GGUF files: what they become, and what does not belong together is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_llama_files as files
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xraygpt_lite.converters import language
from xraygpt_lite.converters.checkpoint import Checkpoint
from xraygpt_lite.converters.lora import Lora, Merged
from xraygpt_lite.converters.tensors import is_finite
from xraygpt_lite.errors import ConversionError, UsageError
from xraygpt_lite.llm.quantize import quantize

HEAD = files.CONFIG["hidden_size"] // files.CONFIG["num_attention_heads"]
LARGER = files.CONFIG | {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 6}
Q = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_"


@given(
    at=st.integers(0, 299),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf"), 60000.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_extremes_tell_what_is_not_finite(at: int, value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(300, dtype=dtype)
    tensor[at] = value
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())
    assert is_finite(tensor[:0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [files.CONFIG, LARGER], ids=["grouped-query", "other sizes"])
def test_values_are_rounded_once_and_rows_put_in_order(tmp_path: Path, dtype: torch.dtype, config: Any) -> None:
    """Against an obvious reference: one head at a time, in float32."""
    state = {name: value.to(dtype) for name, value in files.weights(config, seed=5).items()}
    model = language.read({"llm": files.folder(tmp_path / "llm", state, config, shards=3)})
    model.write(tmp_path / "x.gguf", "f16", "x")
    written = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert len(written) == len(state)
    for ours, theirs in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("ffn_up", "mlp.up_proj")):
        values = state[f"model.layers.1.{theirs}.weight"].float().numpy()
        if ours != "ffn_up":
            heads = values.reshape(-1, HEAD, config["hidden_size"])
            values = np.concatenate([head[np.arange(HEAD).reshape(2, -1).T.ravel()] for head in heads])
        np.testing.assert_array_equal(written[f"blk.1.{ours}.weight"], values.astype(np.float16))


@pytest.mark.parametrize("extra", [0, 1], ids=["same rows", "one row more, of a padding token"])
def test_a_delta_is_added_whatever_the_file_forms(tmp_path: Path, extra: int) -> None:
    """In float16, rounding the float32 sum once is what adding in float16, as FastChat does, gives."""
    base = {name: value.half() for name, value in files.weights(seed=1).items()}
    change = {
        name: value.half() for name, value in files.weights(seed=2, scale=0.01, rows=files.PIECES + extra).items()
    }
    total = {
        name: torch.cat([value, value.new_zeros(len(change[name]) - len(value), *value.shape[1:])]) + change[name]
        for name, value in base.items()
    }
    base["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # a buffer of older libraries
    inputs = {
        "llm-base": files.folder(tmp_path / "base", base, shards=2),
        "llm-delta": files.folder(tmp_path / "delta", change, vocabulary=False),
    }
    language.read(inputs).write(tmp_path / "sum.gguf", "f16", "x")
    language.read({"llm": files.folder(tmp_path / "whole", total)}).write(tmp_path / "whole.gguf", "f16", "x")
    seen, expected = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("sum", "whole"))
    assert {name: field.contents() for name, field in seen.fields.items()} == {
        name: field.contents() for name, field in expected.fields.items()
    }
    for ours, theirs in zip(seen.tensors, expected.tensors, strict=True):
        if len(ours.shape) > 1:
            assert ours.data.tobytes() == theirs.data.tobytes(), ours.name
        else:  # vectors stay float32, and are not rounded at all
            np.testing.assert_allclose(ours.data, theirs.data, rtol=2**-11, err_msg=ours.name)


def _base(path: Path, **changes: Any) -> Path:
    config = files.CONFIG | changes
    return files.folder(path, files.weights(config), config)


def _other_words(folder: Path) -> Path:
    from tiny_llama import train_vocabulary

    (folder / "tokenizer.model").write_bytes(train_vocabulary(340))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: _base(p, rms_norm_eps=1e-5),
            r"base.config.json and .* \(epsilon: 1e-05 and 1e-06\); give --llm-base",
        ),
        (lambda p: _base(p, max_position_embeddings=4096), r"different networks \(context: 4096 and 512\)"),
        (lambda p: _base(p, hidden_size=96), r"different networks \(width: 96 and 64\)"),
        (lambda p: _base(p, num_hidden_layers=3), r"different networks \(layers: 3 and 2\)"),
        (
            lambda p: files.folder(p, files.weights(rows=files.PIECES + 1)),
            r"'lm_head.weight' .*|'model.embed_tokens.weight' has shape \(385, 64\).* swapped",
        ),
        (
            lambda p: files.folder(p, files.weights(rows=files.PIECES - 2), vocabulary=False),
            r"weight' has shape \(382, 64\) in .*base and \(384, 64\) in .*delta; the delta was made for another base",
        ),
        (
            lambda p: files.folder(p, files.weights() | {"model.extra.weight": torch.ones(2)}),
            r"'model.extra.weight' is in .*base and not in .*delta",
        ),
        (lambda p: _other_words(_base(p)), r"are different vocabularies"),
    ],
)
def test_a_delta_for_another_base_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    inputs = {
        "llm-delta": files.folder(tmp_path / "delta", files.weights(scale=0.01)),
        "llm-base": make(tmp_path / "base"),
    }
    with pytest.raises(ConversionError, match=message):
        language.read(inputs)


def test_damaged_values_of_a_base_name_their_file_and_tensor(tmp_path: Path) -> None:
    state = files.weights()
    state["model.norm.weight"][3] = float("nan")
    inputs = {
        "llm-delta": files.folder(tmp_path / "delta", files.weights()),
        "llm-base": files.folder(tmp_path / "base", state),
    }
    with pytest.raises(ConversionError, match=r"'model.norm.weight' of .*base.model.safetensors .*not finite"):
        language.read(inputs).write(tmp_path / "x.gguf", "f32", "x")


def test_a_tokenizer_is_found_or_given(tmp_path: Path) -> None:
    state = files.weights()
    bare = files.folder(tmp_path / "bare", state, vocabulary=False)
    with pytest.raises(ConversionError, match=r"no tokenizer.model in .*bare, .* --tokenizer FILE"):
        language.read({"llm": bare})
    with pytest.raises(ConversionError, match=r"no tokenizer.model in .*bare or .*bare,"):
        language.read({"llm-base": bare, "llm-delta": bare})
    words = files.folder(tmp_path / "full", state) / "tokenizer.model"
    model = language.read({"llm": bare, "tokenizer": words})
    assert ("tokenizer", words) in model.files
    assert ("llm-delta", words) in language.read({"llm-base": bare, "llm-delta": words.parent}).files
    (tmp_path / "other").mkdir()
    with pytest.raises(ConversionError, match=r"384 pieces and the embedding table of .* 1000 rows"):
        language.read({"llm": files.folder(tmp_path / "large", files.weights(rows=1000))})


@pytest.mark.parametrize("roles", [(), ("llm-base",), ("llm-delta",), ("llm", "llm-base", "llm-delta")])
def test_options_that_do_not_go_together(tmp_path: Path, roles: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="either --llm, or --llm-base and --llm-delta together"):
        language.read(dict.fromkeys(roles, tmp_path))


def _merged(tmp_path: Path, state: dict[str, Tensor], alpha: float = 16) -> Merged:
    llm = files.folder(tmp_path / "llm", {name: value.half() for name, value in files.weights().items()})
    torch.save({"model": {"llama_proj.weight": torch.ones(2, 2), **state}}, tmp_path / "med.pth")
    return Merged(Checkpoint(llm), Lora(Checkpoint(tmp_path / "med.pth"), alpha))


@pytest.mark.parametrize("style", ["", ".default"])
def test_a_lora_is_merged_in_float32_with_the_rank_of_its_shapes(tmp_path: Path, style: str) -> None:
    state = files.lora(rank=2, style=style)
    merged = _merged(tmp_path, state, alpha=5)
    stored = files.weights()
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj"):
        expected = stored[f"model.layers.1.{name}.weight"].half().double()
        if "k_proj" not in name:
            at = f"llama_model.base_model.model.model.layers.1.{name}.lora_"
            expected += 5 / 2 * state[f"{at}B{style}.weight"].double() @ state[f"{at}A{style}.weight"].double()
        seen = merged.read(f"model.layers.1.{name}.weight")
        assert seen.dtype == (torch.float16 if "k_proj" in name else torch.float32)
        torch.testing.assert_close(seen.double(), expected, rtol=0, atol=1e-6)


def _spoilt(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    state = files.lora()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (files.lora(LARGER), r"have different numbers of layers"),
        (
            files.lora(files.CONFIG | {"num_hidden_layers": 1}),
            r"med.pth lacks 'model.layers.1.self_attn.q_proj.weight'",
        ),
        (files.lora(files.CONFIG | {"num_hidden_layers": 3}), r"llm lacks 'model.layers.2.self_attn.q_proj.weight'"),
        (
            files.lora(files.CONFIG | {"hidden_size": 96}),
            r"q_proj.lora_A.default.weight' \(4, 96\) and .* of .*med.pth .* another width",
        ),
        (
            _spoilt(lambda s: s.pop(f"{Q}B.default.weight")),
            r"med.pth holds '.*lora_A.*' without '.*q_proj.lora_B.default",
        ),
        (
            _spoilt(lambda s: s.pop(f"{Q}A.default.weight")),
            r"med.pth holds '.*lora_B.*' without '.*q_proj.lora_A.default",
        ),
        (_spoilt(lambda s: s.update({f"{Q}A.weight": torch.ones(4, 64)})), r"two adapters for one matrix"),
        (
            _spoilt(lambda s: s.update({Q.replace("self_attn.q_proj", "mlp.router") + "A.weight": torch.ones(4, 64)})),
            r"'.*mlp.router.lora_A.weight' of .*med.pth changes what no LoRA",
        ),
        (
            _spoilt(lambda s: s.update({f"{Q}magnitude_vector.default.weight": torch.ones(4)})),
            r"magnitude_vector.default.weight' of .*med.pth changes what no LoRA",
        ),
        (_spoilt(lambda s: s.update({f"{Q}A.default.weight": torch.ones(3, 64)})), r"\(3, 64\) and .*\(64, 4\)"),
        ({}, r"med.pth holds no LoRA tensors"),
    ],
)
def test_a_lora_for_another_model_is_refused(tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        _merged(tmp_path, state)


def test_damaged_values_of_a_lora_name_their_file_and_tensor(tmp_path: Path) -> None:
    merged = _merged(tmp_path, _spoilt(lambda state: state[f"{Q}B.default.weight"].fill_(float("inf"))))
    with pytest.raises(ConversionError, match=r"q_proj.lora_B.default.weight' of .*med.pth .*not finite"):
        merged.read("model.layers.0.self_attn.q_proj.weight")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 GGUF and a Q8_0 one beside it; not to be changed."""
    path = tmp_path_factory.mktemp("gguf")
    model = language.read({"llm": files.folder(path / "llm", files.weights())})
    model.write(path / "f32.gguf", "f32", "x")
    model.write(path / "f16.gguf", "f16", "x")
    quantize(path / "f16.gguf", path / "q8_0.gguf", "q8_0")
    return path


def test_a_gguf_is_quantized_once_and_takes_no_lora(whole: Path, tmp_path: Path) -> None:
    model = language.read({"llm": whole / "q8_0.gguf"})
    assert (model.width, model.default_type) == (64, "q8_0")
    with pytest.raises(
        ConversionError, match=r"quantized already \(q8_0\) and cannot become q4_0 .* leave --quant out"
    ):
        model.weight_type("q4_0")
    torch.save(files.lora(), tmp_path / "lora.pth")
    with pytest.raises(ConversionError, match=r"lora.pth cannot be merged into .*q8_0.gguf, .* Hugging Face folder"):
        model.merge(Lora(Checkpoint(tmp_path / "lora.pth"), 16))
    with pytest.raises(UsageError, match="leave --tokenizer out"):
        language.read({"llm": whole / "q8_0.gguf", "tokenizer": whole / "llm" / "tokenizer.model"})


@pytest.mark.parametrize("kept", [3, 40, 5000, 0.5, 0.999])
def test_a_truncated_gguf_is_refused(whole: Path, tmp_path: Path, kept: float) -> None:
    data = (whole / "f32.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(ConversionError, match=r"x\.gguf"):
        language.read({"llm": tmp_path / "x.gguf"})


@pytest.mark.parametrize(("file", "name"), [("f32.gguf", "blk.1.attn_v.weight"), ("q8_0.gguf", "blk.0.ffn_up.weight")])
def test_values_of_a_gguf_that_are_not_finite_name_their_tensor(
    whole: Path, tmp_path: Path, file: str, name: str
) -> None:
    path = Path(shutil.copy(whole / file, tmp_path / "x.gguf"))
    at = next(int(tensor.data_offset) for tensor in GGUFReader(path).tensors if tensor.name == name)
    nan = np.float32("nan").tobytes() if file == "f32.gguf" else np.float16("nan").tobytes()
    data = bytearray(path.read_bytes())
    data[at : at + len(nan)] = nan
    path.write_bytes(data)
    model = language.read({"llm": path})
    with pytest.raises(ConversionError, match=rf"tensor '{name}' of .*x\.gguf holds values that are not finite"):
        model.write(tmp_path / "y.gguf", model.default_type, "x")
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gpt2"}, r"architecture 'gpt2'; these families use 'llama'"),
        ({"tokenizer": "gpt2"}, r"vocabulary of kind 'gpt2'"),
        ({"eos": None}, r"does not say its EOS token"),
        ({"layers": 2}, r"lacks tensor 'blk\.1\."),
        ({"layers": 9000}, r"says 9000 layers; it is damaged"),
        ({"parts": 3}, r"one of 3 parts; join them"),
        ({"kind": "TQ1_0"}, r"'blk.0.attn_q.weight' of .* is stored as TQ1_0; known are F32"),
    ],
)
def test_a_gguf_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _write_gguf(tmp_path / "x.gguf", **change)
    with pytest.raises(ConversionError, match=message):
        language.read({"llm": tmp_path / "x.gguf"})


def test_a_file_that_is_neither_folder_nor_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConversionError, match=r"--llm .*x.bin is not a folder .* no GGUF file"):
        language.read({"llm": tmp_path / "x.bin"})
    with pytest.raises(ConversionError, match=r"--llm-base .*x.bin is not a folder"):
        language.read({"llm-base": tmp_path / "x.bin", "llm-delta": tmp_path})


def _write_gguf(
    path: Path, *, architecture: str = "llama", tokenizer: str = "llama", eos: int | None = 2, layers: int = 1,
    parts: int = 1, kind: str = "F32",
) -> None:  # fmt: skip
    """A header, a vocabulary of three tokens and one layer of zeros."""
    from gguf import GGMLQuantizationType

    from xraygpt_lite.converters.llama import BLOCK

    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(layers)
    writer.add_uint16("split.count", parts)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"])
    writer.add_bos_token_id(1)
    if eos is not None:
        writer.add_eos_token_id(eos)
    for name in ("token_embd", "output_norm", *(f"blk.0.{part}" for part in BLOCK.values())):
        if name == "blk.0.attn_q" and kind != "F32":
            data, raw = np.zeros((3, 54), np.uint8), GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", data, raw_dtype=raw)
        else:
            writer.add_tensor(f"{name}.weight", np.zeros((3, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
