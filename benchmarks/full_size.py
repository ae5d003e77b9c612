"""Checkpoints of the published sizes in the authors' own layouts, with random weights of realistic scale.

Weights are drawn so that every layer gives about as much as it takes: with default initialisation these networks give
nearly nothing, and every comparison of precisions looks perfect. One tensor is in memory at a time, or one shard.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

Spec = tuple[str, tuple[int, ...], float, float]
"""Name, shape, mean and standard deviation."""

SHARD_BYTES = 2 * 10**9

WORDS = """You are an experienced Doctor give the following medical scan will be able to see once I provide it you
Please answer my questions What main findings and impression of X helpful healthcare virtual assistant describe this
image in detail"""
"""Pieces of their own, as in Llama's vocabulary: the families' prompts come out about as long as they are."""


@dataclass(frozen=True)
class Sizes:
    """EVA ViT-g, Q-Former, MedCLIP's Swin-T and Vicuna-7B as published; smaller ones to try the benchmark."""

    vit_width: int = 1408
    vit_depth: int = 39
    vit_mlp: int = 6144
    patch: int = 14
    grid: int = 16
    hidden: int = 768
    qformer_layers: int = 12
    queries: int = 32
    swin_width: int = 96
    swin_depths: tuple[int, ...] = (2, 2, 6, 2)
    swin_heads: tuple[int, ...] = (3, 6, 12, 24)
    swin_features: int = 512
    width: int = 4096
    layers: int = 32
    heads: int = 32
    feed_forward: int = 11008
    vocabulary: int = 32000


PUBLISHED = Sizes()
SMALL = Sizes(vit_depth=2, qformer_layers=2, width=512, layers=2, heads=4, feed_forward=1024)


def write(folder: Path, sizes: Sizes, seed: int = 0) -> dict[str, Path]:
    """Write `eva_vit_g.pth`, `blip2.pth`, `xraygpt.pth` and `vicuna/`; what is there already is kept.

    Returns
    -------
    dict
        Option of `convert xraygpt` → path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    paths = {
        "--vision": folder / "eva_vit_g.pth", "--qformer": folder / "blip2.pth",
        "--checkpoint": folder / "xraygpt.pth", "--llm": folder / "vicuna",
    }  # fmt: skip
    _save(paths["--vision"], dict(_drawn(_vit(sizes), torch.float16)))
    _save(paths["--qformer"], {"model": dict(_drawn(_qformer(sizes), torch.float32))})
    _save(paths["--checkpoint"], {"model": dict(_drawn(_head(sizes, sizes.hidden), torch.float32))})
    write_llama(paths["--llm"], sizes)
    return paths


def write_vision(folder: Path, family: str, sizes: Sizes, seed: int = 0) -> dict[str, Path]:
    """Write what a family's image path is converted from: "xraygpt", "xraygpt-paper" or "minigpt-med".

    Returns
    -------
    dict
        Role → path, as the family's `load` takes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    paths = {role: folder / f"{role}.pth" for role in ("vision", "checkpoint")}
    features = {"xraygpt": sizes.hidden, "xraygpt-paper": sizes.swin_features, "minigpt-med": 4 * sizes.vit_width}
    if family == "xraygpt-paper":
        _save(paths["vision"], dict(_drawn(_swin(sizes), torch.float32)))
    else:
        _save(paths["vision"], dict(_drawn(_vit(sizes), torch.float16)))
    if family == "xraygpt":
        paths["qformer"] = folder / "qformer.pth"
        _save(paths["qformer"], {"model": dict(_drawn(_qformer(sizes), torch.float32))})
    _save(paths["checkpoint"], {"model": dict(_drawn(_head(sizes, features[family]), torch.float32))})
    return paths


def _drawn(specs: Iterable[Spec], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, shape, mean, deviation in specs:
        yield name, torch.empty(shape).normal_(mean, deviation).to(dtype)


def _save(path: Path, content: object) -> None:
    if not path.exists():
        part = path.with_suffix(".part")
        torch.save(content, part)
        part.replace(path)


def _head(s: Sizes, features: int) -> list[Spec]:
    return [("llama_proj.weight", (s.width, features), 0, 0.02), ("llama_proj.bias", (s.width,), 0, 0.01)]


def _linear(name: str, inputs: int, outputs: int, gain: float = 1.0) -> list[Spec]:
    return [(f"{name}.weight", (outputs, inputs), 0, gain / math.sqrt(inputs)), (f"{name}.bias", (outputs,), 0, 0.02)]


def _norm(name: str, width: int) -> list[Spec]:
    return [(f"{name}.weight", (width,), 1, 0.1), (f"{name}.bias", (width,), 0, 0.05)]


def _vit(s: Sizes) -> list[Spec]:
    w = s.vit_width
    specs: list[Spec] = [
        ("cls_token", (1, 1, w), 0, 0.5), ("pos_embed", (1, 1 + s.grid**2, w), 0, 0.3),
        ("patch_embed.proj.weight", (w, 3, s.patch, s.patch), 0, 1 / math.sqrt(3 * s.patch**2)),
        ("patch_embed.proj.bias", (w,), 0, 0.1),
    ]  # fmt: skip
    branch = 1 / math.sqrt(2 * s.vit_depth)  # so that the sum over all residual branches stays of the order of 1
    for n in range(s.vit_depth):
        block = f"blocks.{n}."
        specs += [*_norm(block + "norm1", w), *_norm(block + "norm2", w)]
        specs += [(block + f"attn.{kind}_bias", (w,), 0, 0.1) for kind in ("q", "v")]
        specs += [_linear(block + "attn.qkv", w, 3 * w)[0], *_linear(block + "attn.proj", w, w, branch)]
        specs += [*_linear(block + "mlp.fc1", w, s.vit_mlp), *_linear(block + "mlp.fc2", s.vit_mlp, w, 2 * branch)]
    return specs


def _qformer(s: Sizes) -> list[Spec]:
    h = s.hidden
    specs: list[Spec] = [
        ("query_tokens", (1, s.queries, h), 0, 1), *_norm("ln_vision", s.vit_width),
        *_norm("Qformer.bert.embeddings.LayerNorm", h),
    ]  # fmt: skip
    for n in range(s.qformer_layers):
        layer = f"Qformer.bert.encoder.layer.{n}."
        for kind, source in (("attention", h), ("crossattention", s.vit_width)):
            if kind == "crossattention" and n % 2:
                continue
            specs += _linear(f"{layer}{kind}.self.query", h, h)
            specs += [*_linear(f"{layer}{kind}.self.key", source, h), *_linear(f"{layer}{kind}.self.value", source, h)]
            specs += [*_linear(f"{layer}{kind}.output.dense", h, h), *_norm(f"{layer}{kind}.output.LayerNorm", h)]
        specs += _linear(f"{layer}intermediate_query.dense", h, 4 * h)
        specs += [*_linear(f"{layer}output_query.dense", 4 * h, h), *_norm(f"{layer}output_query.LayerNorm", h)]
    return specs


def _swin(s: Sizes) -> list[Spec]:
    root, w = "vision_model.model.", s.swin_width
    specs: list[Spec] = [
        (f"{root}embeddings.patch_embeddings.projection.weight", (w, 3, 4, 4), 0, 1 / math.sqrt(48)),
        (f"{root}embeddings.patch_embeddings.projection.bias", (w,), 0, 0.1),
        *_norm(f"{root}embeddings.norm", w),
    ]
    branch = 1 / math.sqrt(2 * sum(s.swin_depths))
    for stage, (depth, heads) in enumerate(zip(s.swin_depths, s.swin_heads, strict=True)):
        layer = f"{root}encoder.layers.{stage}."
        for n in range(depth):
            block = f"{layer}blocks.{n}."
            specs += [*_norm(f"{block}layernorm_before", w), *_norm(f"{block}layernorm_after", w)]
            specs += [(f"{block}attention.self.relative_position_bias_table", (13**2, heads), 0, 0.5)]
            for kind in ("query", "key", "value"):
                specs += _linear(f"{block}attention.self.{kind}", w, w)
            specs += _linear(f"{block}attention.output.dense", w, w, branch)
            specs += _linear(f"{block}intermediate.dense", w, 4 * w)
            specs += _linear(f"{block}output.dense", 4 * w, w, 2 * branch)
        if stage + 1 < len(s.swin_depths):
            specs += [*_norm(f"{layer}downsample.norm", 4 * w)]
            specs += [_linear(f"{layer}downsample.reduction", 4 * w, 2 * w)[0]]
            w *= 2
    head = _linear("vision_model.projection_head", w, s.swin_features)[0]
    return [*specs, *_norm(f"{root}layernorm", w), head]


def _llama(s: Sizes, layers: int) -> list[Spec]:
    w, branch = s.width, 1 / math.sqrt(2 * s.layers)
    specs: list[Spec] = [("model.embed_tokens.weight", (s.vocabulary, w), 0, 0.02)]
    for n in range(layers):
        layer = f"model.layers.{n}."
        specs += [(f"{layer}{name}.weight", (w,), 1, 0.1) for name in ("input_layernorm", "post_attention_layernorm")]
        specs += [_linear(f"{layer}self_attn.{kind}_proj", w, w)[0] for kind in "qkv"]
        specs += [_linear(f"{layer}self_attn.o_proj", w, w, branch)[0]]
        specs += [_linear(f"{layer}mlp.{kind}_proj", w, s.feed_forward)[0] for kind in ("gate", "up")]
        specs += [_linear(f"{layer}mlp.down_proj", s.feed_forward, w, branch)[0]]
    return [*specs, ("model.norm.weight", (w,), 1, 0.1), ("lm_head.weight", (s.vocabulary, w), 0, 1 / math.sqrt(w))]


def write_llama(folder: Path, s: Sizes, layers: int | None = None) -> None:
    """A Hugging Face folder with float16 shards of `.bin`, as Vicuna was published; `layers`: only so many of them."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(exist_ok=True)
    layers = s.layers if layers is None else layers
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in _llama(s, layers):
        size += 2 * math.prod(spec[1])
        if size > SHARD_BYTES:
            shards.append([])
            size = 2 * math.prod(spec[1])
        shards[-1].append(spec)
    where: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        name = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        where |= {spec[0]: name for spec in specs}
        _save(folder / name, dict(_drawn(specs, torch.float16)))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "tokenizer.model").write_bytes(vocabulary(s.vocabulary))
    config = {
        "model_type": "llama", "hidden_size": s.width, "num_hidden_layers": layers, "num_attention_heads": s.heads,
        "intermediate_size": s.feed_forward, "vocab_size": s.vocabulary, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))  # last: it says that the folder is whole


def vocabulary(size: int) -> bytes:
    """A SentencePiece BPE model with byte fallback whose pieces are short runs of letters."""
    messages: Any = sentencepiece_model_pb2  # its classes are made while it is imported
    model = messages.ModelProto()
    kinds = messages.ModelProto.SentencePiece
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.trainer_spec.pad_id = -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for text, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=text, score=0, type=kind)
    for value in range(256):
        model.pieces.add(piece=f"<0x{value:02X}>", score=0, type=kinds.BYTE)
    for order, text in zip(count(), _texts(), strict=False):
        if len(model.pieces) == size:
            break
        model.pieces.add(piece=text, score=-order, type=kinds.NORMAL)
    data: bytes = model.SerializeToString()
    return data


def _texts() -> Iterator[str]:
    """Every piece is made of two that came before it, so that merging can reach it."""
    yield from ("▁", *string.printable.strip())
    words = dict.fromkeys("▁" + word[:end] for word in WORDS.split() for end in range(1, len(word) + 1))
    yield from words
    for length in count(2):
        for letters in product(string.ascii_lowercase, repeat=length - 1):
            if (text := "▁" + "".join(letters)) not in words:
                yield text
        for letters in product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)
