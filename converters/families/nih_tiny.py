"""The default model's own network: a radiograph encoder whose features stay on a grid.

Knows the torch modules, how their sizes are read off a checkpoint, and nothing of training, prompts or bundles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xraygpt_lite.converters.checkpoint import Checkpoint, fill
from xraygpt_lite.converters.families import Parts, Projector, Settings
from xraygpt_lite.converters.recognise import expect
from xraygpt_lite.errors import ConversionError


class SqueezeExcite(nn.Module):
    """Channel gates computed from the mean over the map: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(8, channels // 8), 1)
        self.expand = nn.Conv2d(max(8, channels // 8), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Block(nn.Module):
    """A basic residual block with squeeze-and-excitation; the shortcut pools before it projects."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.gate = SqueezeExcite(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride) if stride != 1 else nn.Identity()
            self.shortcut = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.gate(self.norm2(self.conv2(y)))
        return F.relu(y + self.shortcut(x))


class Tower(nn.Module):
    """One residual network over a grey image, a quarter after the stem, halved by each further stage.

    (B, 1, S, S) → (B, C, S / 32, S / 32) with four stages.
    """

    def __init__(self, widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0] // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0] // 2), nn.ReLU(),
            nn.Conv2d(widths[0] // 2, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(),
        )  # fmt: skip
        stages = []
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for n in range(count):
                stages.append(Block(inputs, width, 2 if stage and not n else 1))
                inputs = width
        self.stages = nn.Sequential(*stages)

    def forward(self, grey: Tensor) -> Tensor:
        return self.stages(self.stem(grey))  # type: ignore[no-any-return]


class GridEncoder(nn.Module):
    """Radiograph → features on a coarse grid, row by row.

    Several towers look at the same pixels and their channels stand side by side: pixels (B, 3, S, S), of which only
    the first channel is read (the three are equal), → features (B, N, F).

    Parameters
    ----------
    widths, blocks
        Channels and residual blocks of each of a tower's stages.
    towers
        How many towers; F = towers · widths[-1].
    findings
        Outputs of the classifier that trains the encoder; not part of the exported graph.
    auxiliary
        Further outputs of that classifier (view, sex, age).
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128, 256),
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        towers: int = 2,
        findings: int = 15,
        auxiliary: int = 3,
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleList(Tower(widths, blocks) for _ in range(towers))
        self.heads = nn.ModuleList(nn.Linear(widths[-1], findings + auxiliary) for _ in range(towers))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) float32 → (B, N, F) float32."""
        grey = pixels[:, :1]
        maps = [tower(grey) for tower in self.towers]
        return torch.cat(maps, 1).flatten(2).transpose(1, 2)


def load(inputs: Mapping[str, Path], width: int, settings: Mapping[str, str]) -> Parts:
    """Read the encoder (`vision`) and the projector (`checkpoint`) for a language model of this width.

    Raises
    ------
    ConversionError
        A file is of another family, or its names, shapes or values do not fit.
    UsageError
        Any setting: this family has none.
    """
    Settings(settings, ())
    vision, checkpoint = Checkpoint(inputs["vision"]), Checkpoint(inputs["checkpoint"])
    expect(vision, "--vision", "nih-tiny")
    expect(checkpoint, "--checkpoint", "nih-tiny")
    widths, blocks, towers = _sizes(vision)
    encoder = GridEncoder(widths, blocks, towers)
    names = {name: name for name in encoder.state_dict() if not re.search(r"^heads\.|num_batches_tracked$", name)}
    ignored = fill(encoder, vision, names, ignored=(r"^heads\.",), own=(r"^heads\.",))
    features = towers * widths[-1]
    shape = checkpoint.shapes["projector.weight"]
    if shape != (width, features):
        raise ConversionError(
            f"'projector.weight' of {checkpoint.path} has shape {shape}; encoder and language model ask for "
            f"{(width, features)}"
        )
    linear = nn.Linear(features, width)
    unused = fill(linear, checkpoint, {"weight": "projector.weight", "bias": "projector.bias"})
    sources = {"vision": vision, "checkpoint": checkpoint}
    return Parts(encoder, Projector(linear, width), sources, (*ignored, *unused))


def _sizes(source: Checkpoint) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Widths and blocks of the stages, and the number of towers; each later stage begins with a projected shortcut."""
    towers = len({name.split(".")[1] for name in source.shapes if name.startswith("towers.")})
    widths: list[int] = []
    blocks: list[int] = []
    number = 0
    while (shape := source.shapes.get(f"towers.0.stages.{number}.conv1.weight")) is not None:
        if not widths or f"towers.0.stages.{number}.shortcut.1.weight" in source:
            widths.append(shape[0])
            blocks.append(0)
        blocks[-1] += 1
        number += 1
    if not widths:
        raise ConversionError(f"{source.path} lacks 'towers.0.stages.0.conv1.weight'; it is incomplete")
    return tuple(widths), tuple(blocks), towers
