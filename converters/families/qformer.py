"""BLIP-2's Q-Former and the norm before it, as the released XrayGPT and MiniGPT-4 use them: the query side alone.

Knows their tensor names in the published file and which sizes they tell. `transformers`' `Blip2QFormerModel` is the
same network under other names.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from xraygpt_lite.converters.checkpoint import Checkpoint, fill, shape
from xraygpt_lite.converters.families.eva import NORM_EPSILON, head_count
from xraygpt_lite.errors import ConversionError

HEAD_WIDTH = 64
"""768 columns over 12 heads, as published."""

LAYER = "Qformer.bert.encoder.layer."
IGNORED = (
    r"^Qformer\.cls\.",
    r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\.",
    r"^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.",  # the feed-forward for text
    r"^(t5|opt|vision|text|llm|llama)_proj\.",
    r"^(itm_head|visual_encoder)\.",
    r"^temp$",
)


class QFormer(nn.Module):
    """class token and patches (B, 1 + P, W) → one row for each query (B, Q, H).

    Attributes
    ----------
    norm
        `ln_vision`.
    """

    def __init__(self, config: Blip2QFormerConfig, queries: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.encoder_hidden_size, eps=NORM_EPSILON)
        self.queries = nn.Parameter(torch.empty(1, queries, config.hidden_size))
        self.model = Blip2QFormerModel(config)

    def forward(self, patches: Tensor) -> Tensor:
        queries = self.queries.expand(patches.shape[0], -1, -1)
        rows: Tensor = self.model(query_embeds=queries, encoder_hidden_states=self.norm(patches)).last_hidden_state
        return rows


def load(source: Checkpoint, width: int, heads: int | None) -> tuple[QFormer, int, tuple[str, ...]]:
    """Read the Q-Former for patches of `width`.

    Parameters
    ----------
    heads
        Attention heads; None is one for each 64 columns.

    Returns
    -------
    tuple
        The network, the width of its rows, and the entries of the file that nothing uses.

    Raises
    ------
    ConversionError
        Names, shapes or values do not fit, or it looks at an encoder of another width.
    """
    _, queries, hidden = shape(source, "query_tokens", 3)
    encoder = shape(source, f"{LAYER}0.crossattention.self.key.weight", 2)[1]
    if encoder != width:
        raise ConversionError(f"--qformer {source.path} looks at patches {encoder} wide; --vision gives {width}")
    config = Blip2QFormerConfig(
        hidden_size=hidden,
        num_hidden_layers=1 + max(_layers(source, r"attention\.")),
        num_attention_heads=head_count(source, "qformer", hidden, HEAD_WIDTH, heads),
        intermediate_size=shape(source, f"{LAYER}0.intermediate_query.dense.weight", 2)[0],
        cross_attention_frequency=_frequency(source),
        encoder_hidden_size=width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.device("meta"):
        network = QFormer(config, queries)
    names = {"norm.weight": "ln_vision.weight", "norm.bias": "ln_vision.bias", "queries": "query_tokens"}
    names |= {f"model.{name}": f"Qformer.bert.{_stored(name)}" for name in network.model.state_dict()}
    return network, hidden, fill(network, source, names, ignored=IGNORED)


def _layers(source: Checkpoint, part: str) -> list[int]:
    """Numbers of the layers that have a part of this name."""
    pattern = re.compile(re.escape(LAYER) + r"(\d+)\." + part)
    return sorted({int(found[1]) for name in source.shapes if (found := pattern.match(name))})


def _frequency(source: Checkpoint) -> int:
    """Every how many layers look at the patches, layer 0 first."""
    looking, layers = _layers(source, r"crossattention\."), 1 + max(_layers(source, r"attention\."), default=-1)
    frequency = looking[1] if len(looking) > 1 else max(1, layers)
    if looking != list(range(0, layers, frequency)):
        raise ConversionError(
            f"layers {looking} of the {layers} in {source.path} have crossattention; expected every so many, from 0"
        )
    return frequency


def _stored(name: str) -> str:
    """The published name of a tensor of `Blip2QFormerModel`, behind "Qformer.bert."."""
    if name.startswith("layernorm."):
        return f"embeddings.LayerNorm.{name.removeprefix('layernorm.')}"
    return name.replace("attention.attention.", "attention.self.")
