"""A language model that was published as what must be added to another one, as Vicuna was: base + delta.

Knows the rule of the tool that made those deltas (FastChat): every tensor of the result is the sum of both, and a row
that the base's vocabulary lacks counts as zeros.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from xraygpt_lite.converters.checkpoint import BUFFERS
from xraygpt_lite.converters.llama_config import Sizes
from xraygpt_lite.converters.tensors import Tensors, is_finite
from xraygpt_lite.errors import ConversionError

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""The tensors with a row for each token: a delta made with a padding token has one row more than its base."""


class Sum:
    """Two models' tensors, added in float32 while they are read.

    Rounded to float16 afterwards, the sum of two float16 values is exactly what adding them in float16 gives.

    Attributes
    ----------
    path, shapes, extras
        The delta's; see `Tensors`.
    half
        Whether both are stored in 16 bits.

    Raises
    ------
    ConversionError
        Names or shapes do not belong together.
    """

    def __init__(self, base: Tensors, delta: Tensors) -> None:
        self.path, self.shapes = delta.path, delta.shapes
        self.extras = (*base.extras, *delta.extras)
        self.half = base.half and delta.half
        self._base, self._delta = base, delta
        _check_names(base, delta)
        for name in _weights(delta):
            _check_shape(name, base, delta)

    def read(self, name: str) -> Tensor:
        """One tensor of the result, float32."""
        values, change = self._base.read(name).float(), self._delta.read(name)
        if len(change) > len(values):
            values = torch.cat([values, values.new_zeros(len(change) - len(values), *values.shape[1:])])
        total = values + change
        if not is_finite(total):
            raise ConversionError(
                f"tensor {name!r} of {self._base.path} and of {self._delta.path} add up beyond float32; one of them is "
                "damaged"
            )
        return total


def check_sizes(base: Path, ours: Sizes, delta: Path, theirs: Sizes) -> None:
    """Hold both configurations against each other; LLaMA and Llama 2, whose shapes agree, differ in these.

    Parameters
    ----------
    base, delta
        Their `config.json`.

    Raises
    ------
    ConversionError
        They describe different networks.
    """
    for name, value in asdict(ours).items():
        other = getattr(theirs, name)
        if name != "rows" and value != other:
            raise ConversionError(
                f"{base} and {delta} describe different networks ({name}: {value} and {other}); give --llm-base the "
                "model that the delta was made from"
            )


def _weights(source: Tensors) -> set[str]:
    return {name for name in source.shapes if not any(re.search(pattern, name) for pattern in BUFFERS)}


def _check_names(base: Tensors, delta: Tensors) -> None:
    for has, lacks in ((base, delta), (delta, base)):
        if missing := _weights(has) - _weights(lacks):
            raise ConversionError(
                f"tensor {min(missing)!r} is in {has.path} and not in {lacks.path}; base and delta do not belong "
                "together, or one is incomplete"
            )


def _check_shape(name: str, base: Tensors, delta: Tensors) -> None:
    ours, theirs = base.shapes[name], delta.shapes[name]
    if ours == theirs or (name in TABLES and theirs == (ours[0] + 1, *ours[1:])):
        return
    if name in TABLES and ours == (theirs[0] + 1, *theirs[1:]):
        hint = "the base has the larger vocabulary: base and delta may be swapped"
    else:
        hint = "the delta was made for another base"
    raise ConversionError(f"tensor {name!r} has shape {ours} in {base.path} and {theirs} in {delta.path}; {hint}")
