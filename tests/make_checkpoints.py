"""Writes small random checkpoints in the published layouts; for the paper's model also what `transformers` answers.

    python tests/make_checkpoints.py FOLDER

Other sizes than the published ones on purpose: grouped-query attention, another MLP ratio, an added token, two image
tokens from one feature row. Weights are scaled so that every layer, bias and norm matters. The same call writes the
same weights; nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from tiny_llama import train_vocabulary
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetModel, SwinConfig, SwinModel


class Eva(NamedTuple):
    """Sizes of the released families' ViT."""

    width: int
    depth: int
    feed_forward: int


class Queries(NamedTuple):
    """Sizes of the Q-Former; every `frequency`-th layer looks at the patches."""

    hidden: int
    layers: int
    frequency: int
    queries: int
    feed_forward: int


EVA, QFORMER = Eva(40, 2, 100), Queries(32, 5, 3, 7, 72)
PATCH, GRID, LARGE = 8, 4, 6
"""Pixels of a patch; patches of a side in the table of positions, and in MiniGPT-Med's larger images."""

WIDTH, FEATURES, ADDED, STEPS = 64, 40, "[PAD]", 12
TEXTS = (
    "the chest x-ray shows mild cardiomegaly.",
    "###Doctor:  two  spaces\nand é",
    "no pleural effusion ###Patient:",
)


def make(folder: Path) -> Path:
    """Write everything into `folder` and return it.

    medclip_swin.bin, medclip_resnet.bin: the encoders; linear.pth: one image token; linear_wide.pth: two;
    llm/: sharded .bin; llm_safe/: the same as one safetensors file; golden.npz: expected values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(2, 3, 224, 224, generator=generator)
    golden: dict[str, Tensor] = {"pixels": pixels}
    golden["swin_features"] = _swin(folder / "medclip_swin.bin", pixels, generator)
    golden["resnet_features"] = _resnet(folder / "medclip_resnet.bin", pixels, generator)
    for name, tokens in (("linear", 1), ("linear_wide", 2)):
        linear = nn.Linear(FEATURES, tokens * WIDTH)
        _scale(linear, generator)
        state = {f"llama_proj.{key}": value for key, value in linear.state_dict().items()}
        torch.save({"model": state, "optimizer": {"state": {0: torch.zeros(3)}}, "epoch": 2}, folder / f"{name}.pth")
        for encoder in ("swin", "resnet"):
            rows = linear(golden[f"{encoder}_features"]).reshape(2, tokens, WIDTH)
            golden[f"{encoder}_{name}_embeddings"] = rows
    golden |= _llm(folder, golden["swin_linear_embeddings"][0], generator)
    np.savez(folder / "golden.npz", **{name: value.detach().numpy() for name, value in golden.items()})
    return folder


def released(folder: Path, width: int, seed: int = 5) -> Path:
    """Write the released families' files for a language model of `width` into `folder` and return it.

    eva.pth, qformer.pth; linear.pth: XrayGPT's and MiniGPT-4's layer; med.pth: MiniGPT-Med's with norm and LoRA,
    med_plain.pth: the layer alone; paper.pth, published.pth, medclip.bin, llama.pth, grid.pth: other models' files, as
    far as recognising them needs.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.save(_filled(_eva_shapes(), generator), folder / "eva.pth")
    unused = {
        "Qformer.cls.predictions.bias": (9,),
        "Qformer.bert.embeddings.word_embeddings.weight": (9, QFORMER.hidden),
    }
    torch.save({"model": _filled(_qformer_shapes() | unused, generator)}, folder / "qformer.pth")
    lora = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    changes = {lora.format(n, part, end): (4, width) if end == "A" else (width, 4)
               for n in range(2) for part in "qv" for end in "AB"}  # fmt: skip
    norm = {f"ln_vision.{name}": (EVA.width,) for name in ("weight", "bias")}
    layers = {
        "linear": QFORMER.hidden,
        "med": 4 * EVA.width,
        "med_plain": 4 * EVA.width,
        "paper": 512,
        "published": 768,
    }
    for name, features in layers.items():
        shapes = {"llama_proj.weight": (width, features), "llama_proj.bias": (width,)}
        state = _filled(shapes | (norm | changes if name == "med" else {}), generator)
        torch.save({"model": state, "epoch": 1}, folder / f"{name}.pth")
    patches = "vision_model.model.embeddings.patch_embeddings.projection.weight"
    grid = "blocks.0.depthwise.0.weight"
    marks = {"medclip.bin": patches, "llama.pth": "model.embed_tokens.weight", "grid.pth": grid}
    for name, mark in marks.items():
        torch.save({mark: torch.ones(2, 2)}, folder / name)
    return folder


def _eva_shapes() -> dict[str, tuple[int, ...]]:
    width = EVA.width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "pos_embed": (1, 1 + GRID * GRID, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH), "patch_embed.proj.bias": (width,),
    }  # fmt: skip
    for n in range(EVA.depth):
        shapes |= {f"blocks.{n}.attn.{name}_bias": (width,) for name in "qv"}
        shapes |= {f"blocks.{n}.attn.qkv.weight": (3 * width, width)}
        inner = {"mlp.fc1": (EVA.feed_forward, width), "mlp.fc2": (width, EVA.feed_forward)}
        shapes |= _pairs(f"blocks.{n}", {"norm1": (width,), "norm2": (width,), "attn.proj": (width, width), **inner})
    return shapes


def _qformer_shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner = QFORMER.hidden, QFORMER.feed_forward
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, QFORMER.queries, hidden)}
    shapes |= _pairs("Qformer.bert.embeddings", {"LayerNorm": (hidden,)}) | _pairs("", {"ln_vision": (EVA.width,)})
    for n in range(QFORMER.layers):
        layer = f"Qformer.bert.encoder.layer.{n}"
        for part, source in (("attention", hidden), ("crossattention", EVA.width)):
            if part == "attention" or n % QFORMER.frequency == 0:
                looked = {"self.query": (hidden, hidden), "self.key": (hidden, source), "self.value": (hidden, source)}
                shapes |= _pairs(f"{layer}.{part}", looked)
                shapes |= _pairs(f"{layer}.{part}.output", {"dense": (hidden, hidden), "LayerNorm": (hidden,)})
        for part, width in (("intermediate_query.dense", (inner, hidden)), ("output_query.dense", (hidden, inner))):
            shapes |= _pairs(layer, {part: width})
        shapes |= _pairs(layer, {"output_query.LayerNorm": (hidden,), "intermediate.dense": (inner, hidden)})
    return shapes


def _pairs(where: str, weights: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Weight and bias of each named layer."""
    named = {f"{where}.{name}".lstrip("."): shape for name, shape in weights.items()}
    return {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
            for name, shape in named.items() for kind in ("weight", "bias")}  # fmt: skip


def _filled(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Random values at which no part is negligible; norms are about 1."""
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        one_row = len(shape) == 1 or shape[0] == 1
        state[name] = 0.3 * noise if one_row else noise * (1.4 / noise[0].numel() ** 0.5)
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1
    return state


@torch.no_grad()
def _scale(module: nn.Module, generator: torch.Generator) -> None:
    """Random values at which no part of a network is negligible."""
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(1 + 0.3 * noise.abs())
        elif value.ndim > 1:
            value.copy_(noise * (1.4 / value[0].numel() ** 0.5))
        else:
            value.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
    module.eval()


def _swin(path: Path, pixels: Tensor, generator: torch.Generator) -> Tensor:
    config = SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=7, mlp_ratio=3.0, drop_path_rate=0.0)
    model, head = SwinModel(config), nn.Linear(32, FEATURES, bias=False)
    for module in (model, head):
        _scale(module, generator)
    state = {f"vision_model.model.{name}": value for name, value in model.state_dict().items()}
    state["vision_model.projection_head.weight"] = head.weight.data
    torch.save(state | _text_tower(), path)
    return head(model(pixels).last_hidden_state.mean(1)).detach()


def _resnet(path: Path, pixels: Tensor, generator: torch.Generator) -> Tensor:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck")
    model, head = ResNetModel(config), nn.Linear(32, FEATURES, bias=False)
    for module in (model, head):
        _scale(module, generator)
    parts = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
    for stage, depth in enumerate(config.depths):
        for layer in range(depth):
            theirs, ours = f"encoder.stages.{stage}.layers.{layer}", f"layer{stage + 1}.{layer}"
            parts |= {f"{theirs}.shortcut.convolution": f"{ours}.downsample.0"}
            parts |= {f"{theirs}.shortcut.normalization": f"{ours}.downsample.1"}
            for n in range(3):
                parts |= {f"{theirs}.layer.{n}.convolution": f"{ours}.conv{n + 1}"}
                parts |= {f"{theirs}.layer.{n}.normalization": f"{ours}.bn{n + 1}"}
    state = {}
    for name, value in model.state_dict().items():
        part, _, kind = name.rpartition(".")
        state[f"vision_model.model.{parts[part]}.{kind}"] = value
    state["vision_model.model.fc.weight"] = head.weight.data
    torch.save(state | _text_tower(), path)
    return head(model(pixels).last_hidden_state.mean((2, 3))).detach()


def _text_tower() -> dict[str, Tensor]:
    positions = torch.arange(8)[None]
    weights = {"text_model.projection_head.weight": torch.zeros(4, 6), "logit_scale": torch.tensor(1.0)}
    return {"text_model.model.embeddings.position_ids": positions, **weights}


def _llm(folder: Path, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """A grouped-query Llama in both file forms; last-position logits and greedy ids for ids, image row, ids."""
    words = train_vocabulary()
    processor = SentencePieceProcessor(model_proto=words)
    rows = processor.get_piece_size() + 1
    config = LlamaConfig(
        vocab_size=rows, hidden_size=WIDTH, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False,
        pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    _scale(model, generator)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    before, after = ([1, *processor.encode(TEXTS[0])], processor.encode(TEXTS[2]))
    table = model.get_input_embeddings().weight
    ids: list[int] = []
    with torch.no_grad():
        context = torch.cat([table[before], image, table[after]])
        logits = model(inputs_embeds=context[None]).logits[0, -1]
        for _ in range(STEPS):
            ids.append(int(model(inputs_embeds=context[None]).logits[0, -1].argmax()))
            context = torch.cat([context, table[ids[-1:]]])
    for name in ("llm", "llm_safe"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config.to_dict() | {"model_type": "llama"}))
        (folder / name / "tokenizer.model").write_bytes(words)
        added = {"added_tokens_decoder": {str(rows - 1): {"content": ADDED, "special": True}}}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(added))
    _shards(folder / "llm", state)
    save_file(state, folder / "llm_safe" / "model.safetensors")
    integers = {"before": before, "after": after, "greedy": ids}
    return {"logits": logits, **{name: torch.tensor(value) for name, value in integers.items()}}


def _shards(folder: Path, state: dict[str, Tensor]) -> None:
    """Three .bin files and their index, with a buffer that old libraries stored."""
    entries = state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    where = {name: f"pytorch_model-0000{n % 3 + 1}-of-00003.bin" for n, name in enumerate(entries)}
    for shard in sorted(set(where.values())):
        torch.save({name: value for name, value in entries.items() if where[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
