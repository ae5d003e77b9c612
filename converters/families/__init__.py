"""What the converters know of each model family: one file a family, one line of `FAMILIES`.

A family's `load` turns its files into two torch modules; everything after that is the same for all.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from xraygpt_lite.converters.checkpoint import Checkpoint
from xraygpt_lite.converters.lora import Lora
from xraygpt_lite.errors import UsageError

FAMILIES = {
    "xraygpt": "xraygpt",
    "minigpt4": "minigpt4",
    "minigpt-med": "minigpt_med",
    "xraygpt-paper": "xraygpt_paper",
    "nih-tiny": "nih_tiny",
}
"""Family → its module here."""


@dataclass(frozen=True)
class Parts:
    """A family's image path, loaded.

    Attributes
    ----------
    vision
        pixels float32 (B, 3, S, S) → features (B, N, F).
    projector
        features → embeddings (B, N, E).
    sources
        Role → the checkpoint that was read.
    ignored
        Entries of those files that nothing uses, by name.
    lora
        What changes the language model, for a family whose checkpoint carries it.
    image_size
        Side of the square input that the networks were made for, pixels; None is the template's.
    notes
        What whoever converts has to know, a sentence each.
    """

    vision: nn.Module
    projector: nn.Module
    sources: Mapping[str, Checkpoint]
    ignored: tuple[str, ...]
    lora: Lora | None = None
    image_size: int | None = None
    notes: tuple[str, ...] = ()

    def unloaded(self) -> Parts:
        """The same without its networks, whose memory is free once nothing else holds them."""
        return replace(self, vision=nn.Identity(), projector=nn.Identity())


class Settings:
    """`--set KEY=VALUE` pairs: what tensors cannot tell, or what must be confirmed.

    Raises
    ------
    UsageError
        A family has no such setting (on construction), or a value is not of its form (on reading).
    """

    def __init__(self, given: Mapping[str, str], known: tuple[str, ...]) -> None:
        self._given = dict(given)
        for key in self._given:
            if key not in known:
                raise UsageError(f"--set {key}: this family has no such setting; it has: {', '.join(known) or 'none'}")

    def integers(self, key: str) -> tuple[int, ...] | None:
        """Comma-separated positive integers, or None where the key was not given."""
        if key not in self._given:
            return None
        try:
            values = tuple(int(part) for part in self._given[key].split(","))
        except ValueError:
            values = ()
        if not values or min(values) < 1:
            raise UsageError(
                f"--set {key}={self._given[key]}: expected positive integers with commas between, as in 3,6,12,24"
            )
        return values

    def integer(self, key: str) -> int | None:
        """One positive integer, or None where the key was not given."""
        values = self.integers(key)
        if values is not None and len(values) != 1:
            raise UsageError(f"--set {key}={self._given[key]}: expected one positive integer")
        return None if values is None else values[0]

    def number(self, key: str) -> float | None:
        """One positive number, or None where the key was not given."""
        if key not in self._given:
            return None
        try:
            value = float(self._given[key])
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf:
            raise UsageError(f"--set {key}={self._given[key]}: expected one positive number, as in 16")
        return value


class Projector(nn.Module):
    """One linear layer; a layer wider than the language model gives several image tokens for each feature row.

    features (B, M, F) → embeddings (B, N, E).
    """

    def __init__(self, linear: nn.Linear, width: int) -> None:
        super().__init__()
        self.linear = linear
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        rows: Tensor = self.linear(features)
        if self.linear.out_features == self.width:
            return rows
        tokens = features.shape[1] * self.linear.out_features // self.width
        return rows.reshape(-1, int(tokens), self.width)


Load = Callable[[Mapping[str, Path], int, Mapping[str, str]], Parts]


def loader(family: str) -> Load:
    """A family's `load(inputs, width, settings) → Parts`.

    `inputs` is role → path as given on the command line, `width` the language model's.
    """
    module = importlib.import_module(f"{__name__}.{FAMILIES[family]}")
    load: Load = module.load
    return load
