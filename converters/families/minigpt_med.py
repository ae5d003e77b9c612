"""MiniGPT-Med (arXiv 2407.04106): ViT-g at 448 pixels, every four neighbouring patches joined, then one linear layer.

Knows its files. The LoRA for the language model, which lies in the same checkpoint, is passed on unread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from xraygpt_lite.converters import lora
from xraygpt_lite.converters.checkpoint import Checkpoint, fill
from xraygpt_lite.converters.families import Parts, Settings, eva
from xraygpt_lite.converters.families.linear import JOINED, projector
from xraygpt_lite.converters.recognise import expect
from xraygpt_lite.errors import ConversionError, UsageError

FAMILY = "minigpt-med"
SETTINGS = ("vision.num_heads", "vision.image_size", "lora.alpha")
IMAGE_SIZE = 448
ALPHA = 16.0
NORM = {"weight": "ln_vision.weight", "bias": "ln_vision.bias"}


class JoinedPatches(nn.Module):
    """pixels (B, 3, S, S) → features (B, P / 4, 4 · W): the class token is dropped after the norm.

    The norm starts from ones and zeros, as in training, and keeps them unless it is filled.
    """

    def __init__(self, vit: eva.EvaViT) -> None:
        super().__init__()
        self.vit = vit
        self.norm = nn.LayerNorm(vit.width, eps=eva.NORM_EPSILON)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self.norm(self.vit(pixels))[:, 1:]
        return patches.reshape(-1, self.vit.patches // JOINED, JOINED * self.vit.width)


def load(inputs: Mapping[str, Path], width: int, settings: Mapping[str, str]) -> Parts:
    """Read the ViT (`vision`) and MiniGPT-Med's file (`checkpoint`) for a language model of this width.

    Raises
    ------
    ConversionError
        A file is of another family, or its names, shapes or values do not fit.
    UsageError
        A setting that this family does not have, or that this checkpoint has no use for.
    """
    chosen = Settings(settings, SETTINGS)
    sources = {role: Checkpoint(inputs[role]) for role in ("vision", "checkpoint")}
    for role, source in sources.items():
        expect(source, f"--{role}", FAMILY)
    checkpoint = sources["checkpoint"]
    size = chosen.integer("vision.image_size") or IMAGE_SIZE
    vit, unused = eva.load(sources["vision"], size, chosen.integer("vision.num_heads"))
    if vit.patches % JOINED:
        raise ConversionError(
            f"images of {size} x {size} pixels have {vit.patches} patches, which are no multiple of {JOINED}; choose "
            "another --set vision.image_size"
        )
    encoder = JoinedPatches(vit)
    other = (r"^ln_vision\.", lora.MARK)
    layer, rest = projector(checkpoint, FAMILY, JOINED * vit.width, width, ignored=other)
    used = {name for name in checkpoint.shapes if re.search(lora.MARK, name)}
    alpha = chosen.number("lora.alpha")
    if alpha is not None and not used:
        raise UsageError(f"--set lora.alpha={alpha:g}: {checkpoint.path} holds no LoRA; leave it out")
    adapter = lora.Lora(checkpoint, alpha or ALPHA) if used else None
    notes = () if used else (f"{checkpoint.path} holds no LoRA: the language model stays as it is",)
    if any(name in checkpoint for name in NORM.values()):
        fill(encoder.norm, checkpoint, NORM, ignored=(r"^llama_proj\.", lora.MARK))
        used |= set(NORM.values())
    ignored = tuple(name for name in rest if name not in used)
    return Parts(encoder, layer, sources, (*unused, *ignored), lora=adapter, image_size=size, notes=notes)
