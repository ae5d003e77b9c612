"""The default model's own network: an EfficientNet-Lite over a grey radiograph, whose features stay on a grid.

Knows the torch modules, how their sizes are read off a checkpoint, and nothing of training, prompts or bundles.
The layers are those of EfficientNet (arXiv 1905.11946) in its Lite variant: ReLU6, no squeeze-and-excitation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from xraygpt_lite.converters.checkpoint import Checkpoint, fill
from xraygpt_lite.converters.families import Parts, Projector, Settings
from xraygpt_lite.converters.recognise import expect
from xraygpt_lite.errors import ConversionError

STRIDES = (1, 2, 2, 2, 1, 2, 1)
"""Stride of the first block of each stage, which tensors do not tell."""
REGION = 0.25
"""How much of what sets a region apart from the others stays in its token; the rest is the mean over all of them."""


@dataclass(frozen=True)
class Stage:
    """Blocks of one width, and by how much their middle is wider than what enters."""

    width: int
    blocks: int
    kernel: int
    expansion: int


LITE0 = (
    Stage(16, 1, 3, 1), Stage(24, 2, 3, 6), Stage(40, 2, 5, 6), Stage(80, 3, 3, 6), Stage(112, 3, 5, 6),
    Stage(192, 4, 5, 6), Stage(320, 1, 3, 6),
)  # fmt: skip


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its norm; epsilon as in the published weights."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.05)]


class Block(nn.Module):
    """An inverted residual: widen, filter each channel by itself, narrow. (B, C, H, W) → (B, C', H / s, W / s)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, expansion: int, stride: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = nn.Sequential(*([*_layer(inputs, middle, 1), nn.ReLU6()] if expansion > 1 else []))
        self.depthwise = nn.Sequential(*_layer(middle, middle, kernel, stride, groups=middle), nn.ReLU6())
        self.project = nn.Sequential(*_layer(middle, outputs, 1))
        self.residual = stride == 1 and inputs == outputs
        self.drop = 0.0  # how often training leaves the block's own part out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        if not self.residual:
            return y
        if self.training and self.drop:
            y = y * (torch.rand(len(x), 1, 1, 1) >= self.drop) / (1 - self.drop)
        return x + y


class GridEncoder(nn.Module):
    """Radiograph → features on a coarse grid, row by row, each token mostly the mean of all.

    A language model attends to the tokens unevenly, and would not read from them quite what the classifier, which takes
    their mean, has found: the more alike they are, the less it misreads.

    Pixels (B, 3, S, S), of which only the first channel is read (the three are equal), → features (B, N, F).

    Parameters
    ----------
    stages
        Sizes of the stages; with all seven, N = (S / 32)².
    stem
        Channels of the first layer, which halves the image.
    features
        F, the width of the last layer.
    findings
        Outputs of the classifier that trains the encoder; not part of the exported graph.
    auxiliary
        Further outputs of that classifier (view, sex, age).
    """

    def __init__(
        self,
        stages: tuple[Stage, ...] = LITE0,
        stem: int = 32,
        features: int = 1280,
        findings: int = 15,
        auxiliary: int = 3,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_layer(1, stem, 3, stride=2), nn.ReLU6())
        blocks = []
        inputs = stem
        for stage, stride in zip(stages, STRIDES[: len(stages)], strict=True):
            for n in range(stage.blocks):
                blocks.append(Block(inputs, stage.width, stage.kernel, stage.expansion, 1 if n else stride))
                inputs = stage.width
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_layer(inputs, features, 1), nn.ReLU6())
        self.head = nn.Linear(features, findings + auxiliary)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) float32 → (B, N, F) float32."""
        grid: Tensor = self.last(self.blocks(self.stem(pixels[:, :1])))
        regions = grid.flatten(2).transpose(1, 2)
        mean = regions.mean(1, keepdim=True)
        return mean + REGION * (regions - mean)


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
    encoder = _sized(vision)
    names = {name: name for name in encoder.state_dict() if not re.search(r"^head\.|num_batches_tracked$", name)}
    ignored = fill(encoder, vision, names, ignored=(r"^head\.",), own=(r"^head\.",))
    features = encoder.head.in_features
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


def _sized(source: Checkpoint) -> GridEncoder:
    """An encoder of the checkpoint's sizes; a block whose width is another than the one before it begins a stage."""

    def shape(name: str) -> tuple[int, ...]:
        found = source.shapes.get(name)
        if found is None or len(found) != 4:
            raise ConversionError(f"{source.path}: '{name}' should be a convolution's weight; it has {found or 'none'}")
        return found

    stem = inputs = shape("stem.0.weight")[0]
    stages: list[Stage] = []
    number = 0
    while not number or f"blocks.{number}.project.0.weight" in source:
        middle, _, kernel, _ = shape(f"blocks.{number}.depthwise.0.weight")
        outputs = shape(f"blocks.{number}.project.0.weight")[0]
        if stages and stages[-1].width == outputs:
            stages[-1] = Stage(outputs, stages[-1].blocks + 1, kernel, stages[-1].expansion)
        else:
            stages.append(Stage(outputs, 1, kernel, max(1, middle // max(1, inputs))))
        inputs = outputs
        number += 1
    if len(stages) > len(STRIDES):
        raise ConversionError(f"{source.path} has {len(stages)} stages; an EfficientNet-Lite has {len(STRIDES)}")
    return GridEncoder(tuple(stages), stem, shape("last.0.weight")[0])
