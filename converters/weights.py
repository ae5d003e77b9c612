"""A bundle's graphs and language model in the weight types that were chosen, and how far they moved by it.

What lost nothing lies beside them, for the comparison: the float32 graphs, and the language model as it is stored.
Knows weight types and their sizes; knows no family and no source file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from xraygpt_lite import compare, device
from xraygpt_lite.converters import precision
from xraygpt_lite.converters.families import Parts
from xraygpt_lite.converters.language import LanguageModel
from xraygpt_lite.converters.progress import Progress
from xraygpt_lite.converters.staging import Staging
from xraygpt_lite.errors import ConversionError
from xraygpt_lite.llm.quantize import quantize
from xraygpt_lite.model import open_bundle
from xraygpt_lite.values import Bundle, Manifest, Radiograph

AUTO = "auto"
QUANTS = (AUTO, "f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")
BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7,
    "q4_k_m": 4.9, "q4_0": 4.6, "iq4_xs": 4.4,
}  # fmt: skip
"""Of one weight on the disk, about."""

LARGE = 1e9
"""Weights from which on "auto" takes four bits: smaller models lose more by them, and gain little."""

ANSWERS = ("first_token_kl", "first_token_top1", "texts_identical")
"""The figures of `compare` that need the language model as it is stored."""


class Room(NamedTuple):
    """Bytes that each step writes, about.

    Attributes
    ----------
    graphs
        The float32 ones.
    encoder
        The bundle's, where it is smaller.
    llm
        The language model as it is stored, and a smaller one beside it.
    """

    graphs: int
    encoder: int
    llm: int


def llm_type(llm: LanguageModel, asked: str | None) -> str:
    """The language model's weight type in the bundle; "auto" and None are decided. Raises as `LanguageModel`."""
    asked = asked or llm.default_type
    if asked != AUTO:
        return llm.weight_type(asked)
    if llm.own_type not in ("f32", "f16"):
        return llm.own_type
    large = _source_bytes(llm) * 8 / BITS[llm.own_type] >= LARGE
    return llm.weight_type(device.best_weights() if large else "q8_0")


def _source_bytes(llm: LanguageModel) -> int:
    """Of the whole language model, be it one file, several, or a base and a delta of the same size."""
    sizes: dict[str, int] = {}
    for role, path in llm.files:
        sizes[role] = sizes.get(role, 0) + path.stat().st_size
    return max(sizes.values())


def _llm_bytes(llm: LanguageModel, draft: Manifest) -> tuple[int, int]:
    """Of the model as it is stored, and of the smaller one beside it."""
    kind, source = draft.weight_types["llm"], _source_bytes(llm)
    if kind == llm.own_type:
        return source, 0
    smaller = int(source * BITS[kind] / BITS[llm.own_type])
    return (0 if kind == "f32" else source), smaller


def room(parts: Parts, llm: LanguageModel, draft: Manifest) -> Room:
    """What making the bundle takes on the disk, about; what lies there under two names counts once."""
    weights = sum(each.numel() for each in (*parts.vision.parameters(), *parts.projector.parameters()))
    smaller = {"f32": 0, "f16": 2, "int8": 1}[draft.weight_types["vision"]]  # float32 is shared with the reference
    return Room(4 * weights, smaller * weights, sum(_llm_bytes(llm, draft)))


def check_space(output: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises
    ------
    ConversionError
        Says how much is free and how much is needed.
    """
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ConversionError(
            f"the disk of {output.parent} has {free / 1e9:.1f} GB free and making {output.name} takes about "
            f"{needed / 1e9:.1f} GB; free some, or choose another place"
        )


def write_vision(draft: Manifest, staging: Staging) -> None:
    """The bundle's graphs, from the float32 ones."""
    kind = draft.weight_types["vision"]
    if kind == "f32":
        graphs = list(staging.reference.glob("*.onnx*"))
    else:
        precision.shrink(staging.reference / "vision.onnx", staging.bundle / "vision.onnx", kind)
        graphs = [staging.reference / "projector.onnx"]
    for path in graphs:
        _share(path, staging.bundle / path.name)


def write_llm(llm: LanguageModel, draft: Manifest, staging: Staging) -> None:
    """The bundle's language model, and beside the graphs' reference the one that lost nothing."""
    kind, target, reference = draft.weight_types["llm"], staging.bundle / "llm.gguf", staging.reference / "llm.gguf"
    files = ["bundle/llm.gguf"]
    if kind in (llm.own_type, "f32"):
        staging.step("language model", files, lambda: llm.write(target, kind, draft.name))
        _share(target, reference)
        return
    staging.step("as stored", ["reference/llm.gguf"], lambda: llm.write(reference, llm.own_type, draft.name))
    if kind == "f16":
        staging.step("language model", files, lambda: llm.write(target, kind, draft.name))
    else:
        staging.step("language model", files, lambda: len(quantize(reference, target, kind)))


def measure(
    draft: Manifest, llm: LanguageModel, staging: Staging, radiographs: Sequence[Radiograph], progress: Progress
) -> dict[str, float]:
    """The figures of `compare`; none where nothing was made smaller, and none of answers where memory is too small."""
    types = draft.weight_types
    lossless = types["llm"] in (llm.own_type, "f32")
    if lossless and types["vision"] == "f32":
        return {}
    reference = staging.reference / "llm.gguf"
    graphs = sum(path.stat().st_size for path in staging.reference.glob("*.onnx*"))
    too_large = _physical_memory() < 1.1 * (reference.stat().st_size + graphs)  # both are in memory at once
    held = staging.reference
    if too_large:  # beside the reference, which is a finished step's
        held = staging.folder / "held"
        held.mkdir(exist_ok=True)
        for path in staging.reference.glob("*.onnx*"):
            _share(path, held / path.name)
        _share(staging.bundle / "llm.gguf", held / "llm.gguf")
    expected: list[compare.Observation] = []
    seen: list[compare.Observation] = []
    progress.counting(lambda: len(expected) + len(seen), 2 * len(radiographs), "radiographs")
    for folder, observed in ((held, expected), (staging.bundle, seen)):
        with open_bundle(Bundle(folder, draft, ""), device="cpu") as model:
            observed.extend(compare.observe(model, radiographs))  # one by one: they are being counted
    figures = compare.agreement(seen, expected)
    return {name: value for name, value in figures.items() if not (too_large and name in ANSWERS)}


def _share(source: Path, target: Path) -> None:
    """The same content under another name, on the disk once where it can be."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _physical_memory() -> float:
    """Bytes of this machine; infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
