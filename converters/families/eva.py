"""EVA-CLIP's ViT-g, the image encoder of the released XrayGPT, of MiniGPT-4 and of MiniGPT-Med.

Knows its tensor names and which of its sizes they tell. `transformers`' `Blip2VisionModel` is the same network under
other names, with a norm at its end that the authors keep apart (`ln_vision`, of another epsilon): it is left out here.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel

from xraygpt_lite.converters.checkpoint import Checkpoint, Derived, fill, shape
from xraygpt_lite.errors import ConversionError

HEAD_WIDTH = 88
"""1408 columns over 16 heads, as published."""

NORM_EPSILON = 1e-5
"""Of `ln_vision`; the ViT's own norms have 1e-6."""

IGNORED = (r"^norm\.", r"^fc_norm\.", r"^head\.")
_BLOCK = {
    "layer_norm1": "norm1",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Names within a block: `transformers`' → the authors'."""


class EvaViT(nn.Module):
    """pixels (B, 3, S, S) → class token and patches (B, 1 + P, W), without a norm at the end.

    Attributes
    ----------
    width
        W.
    patches
        P, at the image size that it was made for.
    """

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.width = int(config.hidden_size)
        self.patches = int(config.image_size // config.patch_size) ** 2
        self.model = Blip2VisionModel(config)
        self.model.add_module("post_layernorm", nn.Identity())  # in place of a norm of the ViT's epsilon

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state  # type: ignore[no-any-return]


def load(source: Checkpoint, size: int, heads: int | None) -> tuple[EvaViT, tuple[str, ...]]:
    """Read the ViT for images of `size` × `size` pixels; its table of positions is resized to them if need be.

    Parameters
    ----------
    heads
        Attention heads; None is one for each 88 columns.

    Returns
    -------
    tuple
        The network, and the entries of the file that nothing uses.

    Raises
    ------
    ConversionError
        Names, shapes or values do not fit, or the sizes asked for do not.
    """
    width, channels, patch, _ = shape(source, "patch_embed.proj.weight", 4)
    depth = 1 + max(
        (int(found[1]) for name in source.shapes if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1
    )
    if size % patch:
        raise ConversionError(
            f"--set vision.image_size={size} is no multiple of {patch}, the patches' size in {source.path}"
        )
    stored = shape(source, "pos_embed", 3)[1] - 1
    if math.isqrt(stored) ** 2 != stored or channels != 3:
        raise ConversionError(
            f"{source.path} has {channels} channels and {stored} positions beside the class token; expected 3 and a "
            "square number"
        )
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=shape(source, "blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=depth,
        num_attention_heads=head_count(source, "vision", width, HEAD_WIDTH, heads),
        image_size=size,
        patch_size=patch,
        layer_norm_eps=1e-6,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        vit = EvaViT(config)
    return vit, fill(vit, source, _names(depth, width, stored, size // patch), ignored=IGNORED)


def head_count(source: Checkpoint, part: str, width: int, head: int, given: int | None) -> int:
    """Attention heads of a network `width` wide: as given with `--set`, or of the published width `head`.

    Raises
    ------
    ConversionError
        They do not divide the width.
    """
    if given is None and width % head == 0:
        return width // head
    if given is None:
        raise ConversionError(
            f"{source.path} is {width} wide, which heads of the published {head} columns do not divide; say how many "
            f"there are with --set {part}.num_heads=N"
        )
    if width % given:
        raise ConversionError(f"--set {part}.num_heads={given} does not divide {width}, the width of {source.path}")
    return given


def _names(depth: int, width: int, stored: int, grid: int) -> dict[str, str | Derived]:
    """The network's names → the file's. `stored` patches have a position there, `grid`² are wanted."""
    names: dict[str, str | Derived] = {
        "model.embeddings.class_embedding": "cls_token",
        "model.embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "model.embeddings.patch_embedding.bias": "patch_embed.proj.bias",
        "model.embeddings.position_embedding": Derived(
            {"pos_embed": (1, 1 + stored, width)}, lambda table: resize_positions(table, grid)
        ),
    }
    for n in range(depth):
        ours, theirs = f"model.encoder.layers.{n}.", f"blocks.{n}."
        names |= {
            f"{ours}{own}.{kind}": f"{theirs}{their}.{kind}"
            for own, their in _BLOCK.items()
            for kind in ("weight", "bias")
        }
        biases = {f"{theirs}attn.q_bias": (width,), f"{theirs}attn.v_bias": (width,)}
        names[f"{ours}self_attn.qkv.bias"] = Derived(biases, _joined_bias)
    return names


def _joined_bias(q: Tensor, v: Tensor) -> Tensor:
    """Keys have no bias."""
    return torch.cat([q, torch.zeros_like(v), v])


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Positions (1, 1 + P, W) → (1, 1 + grid², W): bicubic, as the authors resize it; the class token's stays."""
    own = math.isqrt(table.shape[1] - 1)
    if own == grid:
        return table
    square = table[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
