"""Tells what a checkpoint is by the names of its tensors, so that another model's file is refused by name."""

from __future__ import annotations

import re
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
        Pattern of a tensor name that only such files hold.
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
    Kind("qformer", "BLIP-2's Q-Former of the released XrayGPT and MiniGPT-4", r"^Qformer\.bert\."),
    Kind("minigpt-med", "MiniGPT-Med's checkpoint", r"\.lora_A\.|^ln_vision\."),
    Kind("linear", "the linear layer of XrayGPT or MiniGPT-4", r"^llama_proj\.weight$"),
    Kind("grid", "nih-tiny's encoder", r"^towers\.0\.stem\.0\.weight$"),
    Kind("grid-projector", "nih-tiny's projector", r"^projector\.weight$"),
    Kind("llama", "a Llama language model", r"^model\.embed_tokens\.weight$"),
)


def kind_of(source: Checkpoint) -> Kind | None:
    """The first kind whose mark one of the tensor names bears; None for a file of no known kind."""
    return next((kind for kind in KINDS if any(re.search(kind.mark, name) for name in source.shapes)), None)


def expect(source: Checkpoint, option: str, family: str, *keys: str) -> str:
    """The key of the file's kind, which must be one of `keys`.

    Raises
    ------
    ConversionError
        It is of another kind; the message names both, and the option that it was given to.
    """
    kind = kind_of(source)
    if kind is not None and kind.key in keys:
        return kind.key
    wanted = " or ".join(each.title for each in KINDS if each.key in keys)
    seen = "of no known kind" if kind is None else kind.title
    raise ConversionError(f"{option} {source.path} is {seen}; {family} expects {wanted} there")
