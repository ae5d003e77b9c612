"""Small random Llama folders in any size and file form, deltas and LoRAs of them, for tests of converters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_llama import train_vocabulary
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PIECES = 384


def folder(
    path: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] = CONFIG,
    *,
    shards: int = 0,
    vocabulary: bool = True,
) -> Path:
    """Write a folder: one safetensors file, or so many `.bin` shards with their index."""
    path.mkdir(parents=True)
    rows = len(state["model.embed_tokens.weight"])
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    if vocabulary:
        (path / "tokenizer.model").write_bytes(_vocabulary())
    if not shards:
        save_file(dict(state), path / "model.safetensors")
        return path
    where = {name: f"pytorch_model-{n % shards + 1:05}-of-{shards:05}.bin" for n, name in enumerate(state)}
    for shard in sorted(set(where.values())):
        torch.save({name: value for name, value in state.items() if where[name] == shard}, path / shard)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


@cache
def _vocabulary() -> bytes:
    return train_vocabulary()


def weights(
    config: Mapping[str, Any] = CONFIG, *, seed: int = 0, rows: int = PIECES, scale: float = 1.0
) -> dict[str, Tensor]:
    """Random float32 tensors under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv = width // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (kv, width) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, inner)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, width)
    return {
        name: scale * torch.randn(shape, generator=generator) / shape[-1] ** 0.5 + (len(shape) == 1) * scale
        for name, shape in shapes.items()
    }


def lora(
    config: Mapping[str, Any] = CONFIG, *, seed: int = 0, rank: int = 4, style: str = ".default"
) -> dict[str, Tensor]:
    """A LoRA on q_proj and v_proj under PEFT's names, with the language model's prefix; `style` is "" before 0.3."""
    generator = torch.Generator().manual_seed(seed)
    width = config["hidden_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    found = {}
    for n in range(config["num_hidden_layers"]):
        for name, rows in (("q", width), ("v", kv)):
            at = f"llama_model.base_model.model.model.layers.{n}.self_attn.{name}_proj.lora_"
            found[f"{at}A{style}.weight"] = torch.randn(rank, width, generator=generator) * 0.2
            found[f"{at}B{style}.weight"] = torch.randn(rows, rank, generator=generator) * 0.2
    return found
