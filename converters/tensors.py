"""Named tensors that are read one at a time: what files, sums of files and merged files have in common.

Knows neither files nor models. `checkpoint`, `delta` and `lora` each have a class of this form, and what reads one
reads them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Tensors(Protocol):
    """Tensors whose names and shapes are known before any value is read."""

    @property
    def path(self) -> Path:
        """What messages name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape."""

    @property
    def extras(self) -> tuple[str, ...]:
        """Entries beside the weights, by name."""

    @property
    def half(self) -> bool:
        """Whether the matrices are stored in 16 bits."""

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, all of whose values are finite; a ConversionError names file and tensor."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: the extremes tell, twenty times faster than `torch.isfinite` for float16."""
    return tensor.numel() == 0 or all(math.isfinite(value) for value in torch.aminmax(tensor))
