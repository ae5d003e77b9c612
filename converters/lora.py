"""LoRA: low-rank changes of a language model's matrices, merged into them as they are read.

Knows the two ways in which PEFT names its tensors; knows nothing of what surrounds them in a family's file.
"""

from __future__ import annotations

from dataclasses import dataclass

from xraygpt_lite.converters.checkpoint import Checkpoint

MARK = r"\.lora_"
"""Searched in a tensor's name: it belongs to the LoRA and to nothing else of its file."""


@dataclass(frozen=True)
class Lora:
    """A file that holds LoRA tensors, beside others perhaps, and what its shapes do not tell.

    Attributes
    ----------
    source
        Where the tensors whose names bear `MARK` are.
    alpha
        A matrix W becomes W + alpha / rank · B·A.
    """

    source: Checkpoint
    alpha: float
