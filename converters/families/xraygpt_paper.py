"""The paper's XrayGPT (arXiv 2306.07971, eq. 1 and 2): MedCLIP's encoder, then one linear layer.

Knows MedCLIP's two encoders (Swin, ResNet-50) and their tensor names, and nothing of prompts, graphs or bundles. The
features are not normalised: the authors' linear layer takes them as the projection head gives them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ResNetPreTrainedModel, SwinConfig, SwinModel, SwinPreTrainedModel

from xraygpt_lite.converters.checkpoint import Checkpoint, fill, shape
from xraygpt_lite.converters.families import Parts, Settings
from xraygpt_lite.converters.families.linear import projector
from xraygpt_lite.converters.recognise import expect
from xraygpt_lite.errors import ConversionError

FAMILY = "xraygpt-paper"
SETTINGS = ("vision.num_heads", "vision.image_size")
IGNORED = (r"^text_model\.", r"^logit_scale$")
ENCODER = "vision_model.model."
HEAD = "vision_model.projection_head.weight"


class SwinEncoder(SwinPreTrainedModel):
    """MedCLIP's Swin: the mean over the last stage's tokens, projected without bias. (B, 3, S, S) → (B, 1, F)."""

    def __init__(self, config: SwinConfig, features: int) -> None:
        super().__init__(config)
        self.model = SwinModel(config)
        self.head = nn.Linear(config.hidden_size, features, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.model(pixels).pooler_output
        return self.head(pooled).unsqueeze(1)  # type: ignore[no-any-return]


class ResNetEncoder(ResNetPreTrainedModel):
    """MedCLIP's ResNet, whose last layer is the projection. (B, 3, S, S) → (B, 1, F)."""

    def __init__(self, config: ResNetConfig, features: int) -> None:
        super().__init__(config)
        self.model = ResNetModel(config)
        self.head = nn.Linear(config.hidden_sizes[-1], features, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.model(pixels).pooler_output.flatten(1)
        return self.head(pooled).unsqueeze(1)  # type: ignore[no-any-return]


def load(inputs: Mapping[str, Path], width: int, settings: Mapping[str, str]) -> Parts:
    """Read MedCLIP's file (`vision`) and the linear layer's (`checkpoint`) for a language model of this width.

    Raises
    ------
    ConversionError
        A file is of another family, or its names, shapes or values do not fit.
    UsageError
        A setting that this family does not have.
    """
    chosen = Settings(settings, SETTINGS)
    vision, checkpoint = Checkpoint(inputs["vision"]), Checkpoint(inputs["checkpoint"])
    kind = expect(vision, "--vision", FAMILY)
    expect(checkpoint, "--checkpoint", FAMILY)
    heads, size = chosen.integers("vision.num_heads"), chosen.integer("vision.image_size")
    encoder, features, ignored = _swin(vision, heads, size) if kind == "medclip-swin" else _resnet(vision, heads)
    layer, unused = projector(checkpoint, FAMILY, features, width, several=True)
    sources = {"vision": vision, "checkpoint": checkpoint}
    return Parts(encoder, layer, sources, (*ignored, *unused), image_size=size)


def _swin(
    source: Checkpoint, heads: tuple[int, ...] | None, size: int | None
) -> tuple[nn.Module, int, tuple[str, ...]]:
    patch = shape(source, f"{ENCODER}embeddings.patch_embeddings.projection.weight", 4)
    layer = f"{ENCODER}encoder.layers."
    depths = _counts(source, re.escape(layer) + r"(\d+)\.blocks\.(\d+)\.")
    tables = [
        shape(source, f"{layer}{n}.blocks.0.attention.self.relative_position_bias_table", 2) for n in range(len(depths))
    ]
    stored = tuple(table[1] for table in tables)
    if heads is not None and heads != stored:
        raise ConversionError(
            f"--set vision.num_heads={_list(heads)} contradicts {source.path}, whose tables have {_list(stored)}"
        )
    window = (math.isqrt(tables[0][0]) + 1) // 2
    smallest = patch[2] * 2 ** (len(depths) - 1) * (window - 1) + 1  # each stage halves the patches, rounded up
    if size is not None and size < smallest:
        raise ConversionError(
            f"--set vision.image_size={size} leaves the last stage of {source.path} fewer patches than one of its "
            f"windows of {window} x {window} has; it takes {smallest} pixels or more"
        )
    first = f"{layer}0.blocks.0."
    config = SwinConfig(
        patch_size=patch[2],
        num_channels=patch[1],
        embed_dim=patch[0],
        depths=list(depths),
        num_heads=list(stored),
        window_size=window,
        mlp_ratio=shape(source, f"{first}intermediate.dense.weight", 2)[0] / patch[0],
        qkv_bias=f"{first}attention.self.query.bias" in source,
    )
    features = shape(source, HEAD, 2)[0]
    encoder = SwinEncoder(config, features)
    names = {f"model.{name}": ENCODER + name for name in encoder.model.state_dict() if not name.endswith("_index")}
    names["head.weight"] = HEAD
    return encoder, features, fill(encoder, source, names, ignored=IGNORED)


def _resnet(source: Checkpoint, heads: tuple[int, ...] | None) -> tuple[nn.Module, int, tuple[str, ...]]:
    if heads is not None:
        raise ConversionError(f"--set vision.num_heads was given and {source.path} is a ResNet, which has no heads")
    depths = _counts(source, re.escape(ENCODER) + r"layer(\d+)\.(\d+)\.", start=1)
    config = ResNetConfig(
        num_channels=shape(source, f"{ENCODER}conv1.weight", 4)[1],
        embedding_size=shape(source, f"{ENCODER}conv1.weight", 4)[0],
        hidden_sizes=[shape(source, f"{ENCODER}layer{n}.0.conv3.weight", 4)[0] for n in range(1, len(depths) + 1)],
        depths=list(depths),
        layer_type="bottleneck",
    )
    features = shape(source, f"{ENCODER}fc.weight", 2)[0]
    encoder = ResNetEncoder(config, features)
    names = {
        f"model.{name}": ENCODER + _torchvision(name)
        for name in encoder.model.state_dict()
        if not name.endswith("num_batches_tracked")
    }
    names["head.weight"] = f"{ENCODER}fc.weight"
    return encoder, features, fill(encoder, source, names, ignored=IGNORED)


def _torchvision(name: str) -> str:
    """torchvision's name of a tensor of `transformers`' ResNetModel."""
    stem = re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name)
    if stem:
        return f"{'conv1' if stem[1] == 'convolution' else 'bn1'}.{stem[2]}"
    block = re.fullmatch(
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(shortcut|layer\.(\d))\.(convolution|normalization)\.(\w+)", name
    )
    if block is None:
        raise ConversionError(f"this version of transformers names a ResNet's tensor {name!r}, which is not known here")
    stage, layer, _, number, part, value = block.groups()
    where = f"layer{int(stage) + 1}.{layer}."
    if number is None:
        return f"{where}downsample.{'0' if part == 'convolution' else '1'}.{value}"
    return f"{where}{'conv' if part == 'convolution' else 'bn'}{int(number) + 1}.{value}"


def _counts(source: Checkpoint, pattern: str, start: int = 0) -> tuple[int, ...]:
    """Blocks of each stage, from names that number stage and block."""
    found = {(int(match[1]), int(match[2])) for name in source.shapes if (match := re.match(pattern, name))}
    stages = max((stage for stage, _ in found), default=start - 1) + 1 - start
    counts = tuple(sum(each == stage for each, _ in found) for stage in range(start, start + stages))
    if not counts or min(counts) < 1:
        raise ConversionError(f"{source.path} has no whole encoder: blocks of its stages are {counts}")
    return counts


def _list(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
