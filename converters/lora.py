"""LoRA: low-rank changes of a language model's matrices, merged into them as they are read.

Knows the two ways in which PEFT names its tensors; knows nothing of what surrounds them in a family's file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from xraygpt_lite.converters.checkpoint import Checkpoint
from xraygpt_lite.converters.tensors import Tensors, is_finite
from xraygpt_lite.errors import ConversionError

MARK = r"\.lora_"
"""Searched in a tensor's name: it belongs to the LoRA and to nothing else of its file."""

_NAME = re.compile(
    r"(?:.*\.)?base_model\.model\.(?P<target>model\.layers\.(?P<layer>\d+)\.(?P<module>[\w.]+))"
    r"\.lora_(?P<factor>[AB])(?:\.default)?\.weight"  # PEFT names the adapter ("default") since 0.3
)
_MODULES = frozenset(
    {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
)


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


class Merged:
    """A language model's tensors with a LoRA merged into them, in float32, while they are read.

    Attributes
    ----------
    path, shapes, extras, half
        The language model's own; see `Tensors`.

    Raises
    ------
    ConversionError
        The LoRA belongs to another model: another width, number of layers or kind of module, or half of it is missing.
    """

    def __init__(self, weights: Tensors, lora: Lora) -> None:
        self.path, self.shapes, self.extras, self.half = weights.path, weights.shapes, weights.extras, weights.half
        self._weights = weights
        self._lora = lora
        self._factors = _factors(lora.source)
        _check_layers(self._factors, weights, lora.source)
        for target, (a, b) in self._factors.items():
            _check_shapes(target, a, b, weights, lora.source)

    def read(self, name: str) -> Tensor:
        """One tensor: as it is stored, or float32 where the LoRA changes it."""
        values = self._weights.read(name)
        if name not in self._factors:
            return values
        a, b = (self._lora.source.read(factor).float() for factor in self._factors[name])
        merged = torch.addmm(values.float(), b, a, alpha=self._lora.alpha / a.shape[0])
        if not is_finite(merged):
            raise ConversionError(
                f"tensor {name!r} of {self.path} is beyond float32 once the LoRA of {self._lora.source.path} is merged "
                f"with alpha {self._lora.alpha:g}; one of them is damaged"
            )
        return merged


def _factors(source: Checkpoint) -> dict[str, tuple[str, str]]:
    """The language model's tensor → the names of A and B."""
    found: dict[str, dict[str, str]] = {}
    for name in (name for name in source.shapes if re.search(MARK, name)):
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in _MODULES:
            raise ConversionError(
                f"tensor {name!r} of {source.path} changes what no LoRA of these families does; expected "
                f"lora_A and lora_B of {', '.join(sorted(_MODULES))}"
            )
        pair = found.setdefault(f"{match['target']}.weight", {})
        if match["factor"] in pair:
            raise ConversionError(
                f"{source.path} holds both {pair[match['factor']]!r} and {name!r}: two adapters for one matrix; "
                "keep the one that was trained"
            )
        pair[match["factor"]] = name
    if not found:
        raise ConversionError(f"{source.path} holds no LoRA tensors")
    for pair in found.values():
        if len(pair) != 2:
            (have,) = pair.values()
            missing = have.replace(*(("lora_A", "lora_B") if "A" in pair else ("lora_B", "lora_A")))
            raise ConversionError(f"{source.path} holds {have!r} without {missing!r}; it is incomplete")
    return {target: (pair["A"], pair["B"]) for target, pair in found.items()}


def _check_layers(factors: dict[str, tuple[str, str]], weights: Tensors, source: Checkpoint) -> None:
    """Hold every kind of module that the LoRA changes to be changed in every layer."""
    modules = {re.sub(r"\.\d+\.", ".*.", target) for target in factors}
    wanted = {name for name in weights.shapes if re.sub(r"\.\d+\.", ".*.", name) in modules}
    for names, without in ((factors.keys() - wanted, weights.path), (wanted - factors.keys(), source.path)):
        if names:
            raise ConversionError(
                f"the LoRA of {source.path} changes {len(factors)} matrices and the language model {weights.path} has "
                f"{len(wanted)} of those kinds ({without} lacks {min(names)!r}); they have different numbers of layers"
            )


def _check_shapes(target: str, a: str, b: str, weights: Tensors, source: Checkpoint) -> None:
    expected = weights.shapes[target]
    first, second = source.shapes[a], source.shapes[b]
    if len(first) != 2 or len(second) != 2 or first[0] != second[1] or (second[0], first[1]) != expected:
        raise ConversionError(
            f"tensors {a!r} {first} and {b!r} {second} of {source.path} do not make a change of {target!r} {expected} "
            f"of {weights.path}; the LoRA was trained for a language model of another width"
        )
