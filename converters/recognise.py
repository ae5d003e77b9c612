"""Tells what a checkpoint is by the names of its tensors, so that another model's file is refused by name.

Knows which command takes which sort of file at which option; what a file's numbers must be is for the families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from xraygpt_lite.converters.checkpoint import Checkpoint
from xraygpt_lite.errors import ConversionError


@dataclass(frozen=True)
class Kind:
    """A sort of published file.

    Attributes
    ----------
    key
        What converters ask for.
    title
        What messages call it.
    mark
        Pattern of a tensor name that only such files hold. Trainers store buffers of frozen parts, so no buffer may
        bear it.
    """

    key: str
    title: str
    mark: str


KINDS = (
    Kind("medclip-swin", "MedCLIP with its Swin encoder", r"^vision_model\.model\.embeddings\.patch_embeddings\."),
    Kind("medclip-resnet", "MedCLIP with its ResNet-50 encoder", r"^vision_model\.model\.conv1\.weight$"),
    Kind(
        "eva", "the EVA-CLIP ViT of the released XrayGPT, MiniGPT-4 and MiniGPT-Med", r"^blocks\.0\.attn\.qkv\.weight$"
    ),
    Kind("qformer", "BLIP-2's Q-Former of the released XrayGPT and MiniGPT-4", r"^Qformer\.bert\.encoder\."),
    Kind("minigpt-med", "MiniGPT-Med's checkpoint", r"\.lora_A\.|^ln_vision\."),
    Kind("linear", "the linear layer of XrayGPT or MiniGPT-4", r"^llama_proj\.weight$"),
    Kind("grid", "nih-tiny's encoder", r"^blocks\.0\.depthwise\.0\.weight$"),
    Kind("grid-projector", "nih-tiny's projector", r"^projector\.weight$"),
    Kind("llama", "a Llama language model", r"^model\.embed_tokens\.weight$"),
)

_Q_FORMER_FED = {"--vision": ("eva",), "--qformer": ("qformer",), "--checkpoint": ("linear",)}
TAKES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "xraygpt": _Q_FORMER_FED,
    "minigpt4": _Q_FORMER_FED,
    "minigpt-med": {"--vision": ("eva",), "--checkpoint": ("minigpt-med", "linear")},
    "xraygpt-paper": {"--vision": ("medclip-swin", "medclip-resnet"), "--checkpoint": ("linear",)},
    "nih-tiny": {"--vision": ("grid",), "--checkpoint": ("grid-projector",)},
}
"""Family → option → the kinds of file that it takes there, the usual one first."""


def kind_of(source: Checkpoint) -> Kind | None:
    """The first kind whose mark one of the tensor names bears; None for a file of no known kind."""
    return next((kind for kind in KINDS if any(re.search(kind.mark, name) for name in source.shapes)), None)


def expect(source: Checkpoint, option: str, family: str) -> str:
    """The key of the file's kind, which must be one that the family takes at this option.

    Raises
    ------
    ConversionError
        It is of another kind; the message names both, the option that it was given to, and where it belongs.
    """
    kind = kind_of(source)
    keys = TAKES[family][option]
    if kind is not None and kind.key in keys:
        return kind.key
    wanted = " or ".join(each.title for each in KINDS if each.key in keys)
    seen = "of no known kind" if kind is None else kind.title
    hint = "" if kind is None else _belongs(kind.key, family)
    raise ConversionError(f"{option} {source.path} is {seen}; {family} expects {wanted} there{hint}")


def commands(*families: str) -> str:
    """The commands to use instead, for a message."""
    names = [f"`convert {family}`" for family in families]
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _belongs(key: str, family: str) -> str:
    """Where a file of this kind belongs: another option of this command, or other commands."""
    if key == "llama":
        return ". It belongs to --llm"
    own = [option for option, keys in TAKES[family].items() if key in keys]
    if own:
        return f". It belongs to {own[0]}"
    usual = [name for name, options in TAKES.items() if any(keys[0] == key for keys in options.values())]
    others = usual or [name for name, options in TAKES.items() if any(key in keys for keys in options.values())]
    return f". To convert the model that it belongs to, use {commands(*others)}"
