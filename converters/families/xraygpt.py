"""The released XrayGPT and MiniGPT-4: ViT-g, `ln_vision` and Q-Former, then one linear layer.

The two have the same layout, and their files look alike: they differ in what their weights were trained on, in the
prompt and in the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from xraygpt_lite.converters.checkpoint import Checkpoint
from xraygpt_lite.converters.families import Parts, Settings, eva, qformer
from xraygpt_lite.converters.families.linear import JOINED, projector
from xraygpt_lite.converters.recognise import expect

FAMILY = "xraygpt"
SETTINGS = ("vision.num_heads", "qformer.num_heads", "vision.image_size")
IMAGE_SIZE = 224


class QueryEncoder(nn.Module):
    """pixels (B, 3, S, S) → features (B, Q, H)."""

    def __init__(self, vit: eva.EvaViT, former: qformer.QFormer) -> None:
        super().__init__()
        self.vit = vit
        self.qformer = former

    def forward(self, pixels: Tensor) -> Tensor:
        return self.qformer(self.vit(pixels))  # type: ignore[no-any-return]


def load(inputs: Mapping[str, Path], width: int, settings: Mapping[str, str], family: str = FAMILY) -> Parts:
    """Read the ViT (`vision`), BLIP-2's file (`qformer`) and the linear layer (`checkpoint`).

    Raises
    ------
    ConversionError
        A file is of another family, or its names, shapes or values do not fit.
    UsageError
        A setting that this family does not have.
    """
    chosen = Settings(settings, SETTINGS)
    sources = {role: Checkpoint(inputs[role]) for role in ("vision", "qformer", "checkpoint")}
    for role, source in sources.items():
        expect(source, f"--{role}", family)
    size = chosen.integer("vision.image_size") or IMAGE_SIZE
    vit, unused = eva.load(sources["vision"], size, chosen.integer("vision.num_heads"))
    former, features, more = qformer.load(sources["qformer"], vit.width, chosen.integer("qformer.num_heads"))
    layer, rest = projector(sources["checkpoint"], family, features, width, joined=JOINED * vit.width)
    return Parts(QueryEncoder(vit, former), layer, sources, (*unused, *more, *rest), image_size=size)
