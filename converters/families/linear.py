"""`llama_proj`, the linear layer that all published families train, and whose layer it is by its width.

Knows the layer's tensors and how wide each family's features are; knows nothing of what gives them.
"""

from __future__ import annotations

from torch import nn

from xraygpt_lite.converters.checkpoint import Checkpoint, fill
from xraygpt_lite.converters.families import Projector
from xraygpt_lite.converters.recognise import commands
from xraygpt_lite.errors import ConversionError

WEIGHT, BIAS = "llama_proj.weight", "llama_proj.bias"
JOINED = 4
"""Neighbouring patches that MiniGPT-Med joins: its layer is so many times as wide as the ViT."""

FED_BY = {
    "xraygpt-paper": "MedCLIP (512 wide)",
    "xraygpt": "a Q-Former (768 wide)",
    "minigpt4": "a Q-Former (768 wide)",
    "minigpt-med": "four joined patches (5632 wide)",
}
"""Family → what its layer takes, with the published width."""


def projector(
    source: Checkpoint,
    family: str,
    features: int,
    width: int,
    *,
    joined: int | None = None,
    several: bool = False,
    ignored: tuple[str, ...] = (),
) -> tuple[Projector, tuple[str, ...]]:
    """Read the layer for `features` that the vision file really gives and a language model of `width`.

    Parameters
    ----------
    joined
        How wide MiniGPT-Med's features would be with this vision file, where that is known.
    several
        Whether the layer may give several image tokens for each row of features, side by side.
    ignored
        Patterns of further tensors that the file may hold.

    Returns
    -------
    tuple
        The projector, and the entries of the file that nothing uses.

    Raises
    ------
    ConversionError
        The layer is of another family, which the message names with its command, or of another language model.
    """
    shape = source.shapes.get(WEIGHT)
    if shape is None:
        raise ConversionError(f"{source.path} lacks {WEIGHT!r}; it is incomplete or of another model")
    if len(shape) != 2 or shape[1] != features:
        raise ConversionError(
            f"{WEIGHT!r} of {source.path} has shape {shape} and the vision file gives {features} features: this is the "
            f"layer of another model than {family}, which is fed by {FED_BY[family]}. {_instead(family, shape, joined)}"
        )
    if shape[0] % width if several else shape[0] != width:
        raise ConversionError(
            f"{WEIGHT!r} of {source.path} gives {shape[0]} values and the language model is {width} wide; "
            "the layer belongs to a language model of another size"
        )
    bias = BIAS in source
    linear = nn.Linear(features, shape[0], bias=bias)
    names = {"weight": WEIGHT} | ({"bias": BIAS} if bias else {})
    return Projector(linear, width), fill(linear, source, names, ignored=ignored)


def _instead(family: str, shape: tuple[int, ...], joined: int | None) -> str:
    """The commands that may take a layer of this shape."""
    seen = shape[-1] if shape else 0
    others = [name for name, fed in FED_BY.items() if fed != FED_BY[family]]
    sure = ["minigpt-med"] if seen == joined else [name for name in others if f"({seen} wide)" in FED_BY[name]]
    if sure:
        return f"It is fed by {FED_BY[sure[0]]}: use {commands(*sure)}"
    fed = {FED_BY[name]: [each for each in others if FED_BY[each] == FED_BY[name]] for name in others}
    return "Use the command of the family that it is fed by: " + ", ".join(
        f"{commands(*names)} for {what}" for what, names in fed.items()
    )
