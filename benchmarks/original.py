"""The published models' shapes as their authors run them: PyTorch and transformers, greedy, one process.

    python -m benchmarks.original [--family F] [--dtype T] [--rows N] [--tokens N] [--repeats N] [--small]

Vision by the converters' own torch modules, the prompt through `inputs_embeds`, then `generate` with its KV cache; a
stopping criterion, as in the authors' code, takes the time of each token and stops nothing. Weights are random numbers,
drawn in their type one tensor at a time; layers after the first are copies of it, and making them is not in the times.
The prompt is as long as that of the bundles of `benchmarks.shapes`. It knows nothing of the runtime.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    SwinConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks import full_size
from benchmarks.full_size import Sizes
from xraygpt_lite.converters.families import eva, minigpt_med, qformer, xraygpt, xraygpt_paper
from xraygpt_lite.converters.families.linear import JOINED

FAMILIES = ("xraygpt", "xraygpt-paper", "minigpt-med")
ROOM = 10**9
"""Bytes beside the weights and the KV cache: libraries, activations."""


class Clock(StoppingCriteria):
    """The time of each token; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002 - as it is called
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def vision(family: str, s: Sizes) -> tuple[nn.Module, int, int, int]:
    """The encoder without values, its image size, and the rows and columns of its features."""
    if family == "xraygpt-paper":
        config = SwinConfig(
            embed_dim=s.swin_width, depths=list(s.swin_depths), num_heads=list(s.swin_heads), window_size=7
        )
        return xraygpt_paper.SwinEncoder(config, s.swin_features), 224, 1, s.swin_features
    size = minigpt_med.IMAGE_SIZE if family == "minigpt-med" else xraygpt.IMAGE_SIZE
    with torch.device("meta"):
        vit = eva.EvaViT(
            Blip2VisionConfig(
                hidden_size=s.vit_width, intermediate_size=s.vit_mlp, num_hidden_layers=s.vit_depth,
                num_attention_heads=s.vit_width // eva.HEAD_WIDTH, image_size=size, patch_size=s.patch,
                attn_implementation="eager",
            )
        )  # fmt: skip
        if family == "minigpt-med":
            return minigpt_med.JoinedPatches(vit), size, vit.patches // JOINED, JOINED * vit.width
        former = qformer.QFormer(
            Blip2QFormerConfig(
                hidden_size=s.hidden, num_hidden_layers=s.qformer_layers, intermediate_size=4 * s.hidden,
                num_attention_heads=s.hidden // qformer.HEAD_WIDTH, encoder_hidden_size=s.vit_width,
            ),
            s.queries,
        )  # fmt: skip
        return xraygpt.QueryEncoder(vit, former), size, s.queries, s.hidden


def language_model(s: Sizes) -> LlamaForCausalLM:
    """A Llama without values but for its rotary table."""
    config = LlamaConfig(
        vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.feed_forward, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, max_position_embeddings=2048, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


def fill(module: nn.Module, dtype: torch.dtype) -> None:
    """Put random values of `dtype` in place of the parameters, at which every layer gives about as much as it takes."""
    first: dict[str, Tensor] = {}
    for name, old in list(module.named_parameters()):
        owner, _, own = name.rpartition(".")
        values = torch.empty(old.shape, dtype=dtype)
        kind = re.sub(r"\.\d+\.", ".N.", name) + str(tuple(old.shape))
        if kind in first:
            values.copy_(first[kind])
        elif old.ndim > 1:
            values.normal_(0, 1 / math.sqrt(math.prod(old.shape[1:])))
        else:
            values.fill_(0 if own == "bias" else 1)
        first.setdefault(kind, values)
        setattr(module.get_submodule(owner), own, nn.Parameter(values, requires_grad=False))
    module.eval()


def prompt_rows(family: str, s: Sizes, image_tokens: int) -> int:
    """Rows of the family's prompt with its default question, in the vocabulary of the random language models."""
    spec = json.loads((resources.files("xraygpt_lite.models") / family / "template.json").read_bytes())["prompt"]
    wording = spec["variants"][spec["default_variant"]]
    words = SentencePieceProcessor(model_proto=full_size.vocabulary(s.vocabulary))
    texts = (wording["before"], wording["after"].replace("{question}", spec["default_question"]))
    return len(wording["before_ids"]) + image_tokens + sum(len(words.encode(text)) for text in texts)


def measure(family: str, dtype: torch.dtype, s: Sizes, rows: int | None, tokens: int, repeats: int) -> dict[str, Any]:
    """Every figure; ends the program if there is too little memory."""
    encoder, size, image_tokens, features = vision(family, s)
    projector, llm = nn.Linear(features, s.width, device="meta"), language_model(s)
    rows = rows or prompt_rows(family, s, image_tokens)
    if rows < image_tokens:
        sys.exit(f"--rows {rows}: the image alone has {image_tokens} rows; give more")
    numbers = sum(each.numel() for part in (encoder, projector, llm) for each in part.parameters())
    cache = 2 * s.layers * s.width * (rows + tokens)
    needed, free = (numbers + cache) * dtype.itemsize + ROOM, _available()
    if needed > free:
        sys.exit(f"{family} in {dtype} takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free")
    for part in (encoder, projector, llm):
        fill(part, dtype)
    pixels = torch.randn(1, 3, size, size).to(dtype)
    ids = torch.randint(3, s.vocabulary, (1, rows - image_tokens))

    def once(count: int) -> dict[str, float]:
        began, clock = time.perf_counter(), Clock()
        image = projector(encoder(pixels))
        seen = time.perf_counter()
        text = llm.get_input_embeddings()(ids)
        before = text.shape[1] * 2 // 3
        embeddings = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
        llm.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=count, do_sample=False, use_cache=True, stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        assert len(clock.times) == count
        each = (clock.times[-1] - clock.times[0]) / max(1, count - 1)
        return {"vision_s": seen - began, "prefill_s": clock.times[0] - seen, "token_s": each,
                "total_s": time.perf_counter() - began}  # fmt: skip

    with torch.inference_mode():
        once(2)
        runs = [once(tokens) for _ in range(repeats)]
    return {
        "family": family, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "tokens": tokens,
        "repeats": repeats, "threads": torch.get_num_threads(), "weights_gb": numbers * dtype.itemsize / 1e9,
        **{name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "total_spread_s": [min(run["total_s"] for run in runs), max(run["total_s"] for run in runs)],
        "peak_rss_mb": _status("VmHWM") / 1024, "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(),
    }  # fmt: skip


def _status(name: str) -> int:
    """A line of this process's status, in KiB."""
    return int(re.findall(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[0])


def _available() -> int:
    """Bytes of memory that can be had without swapping."""
    return 1024 * int(re.findall(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="xraygpt")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, help="of the prompt, the image's among them; default: the family's prompt")
    parser.add_argument("--tokens", type=int, default=120, help="exactly so many new ones")
    parser.add_argument("--repeats", type=int, default=3, help="the median is given")
    parser.add_argument("--small", action="store_true", help="few layers, to try it")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = full_size.SMALL if options.small else full_size.PUBLISHED
    dtype: torch.dtype = getattr(torch, options.dtype)
    figures = measure(options.family, dtype, sizes, options.rows, options.tokens, options.repeats)
    for name, value in figures.items():
        print(f"{name:16} {value:.3f}" if isinstance(value, float) else f"{name:16} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
