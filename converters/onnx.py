"""Torch modules → ONNX graphs with a free batch axis, and the proof that they compute the same.

A network that is one of `transformers`' goes through `optimum`, which patches what cannot be traced; modules that are
made of several parts go to torch's exporter directly. Weights above protobuf's limit lie in one further file. What a
graph would compute anew for every image, and is the same for all of them, is written into it.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from optimum.exporters.onnx import export as export_with_optimum
from optimum.exporters.onnx.config import VisionOnnxConfig
from optimum.utils import NormalizedVisionConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from xraygpt_lite.converters.families import Parts
from xraygpt_lite.errors import ConversionError
from xraygpt_lite.values import Bundle, DevicePlan, Float32, Pixels, Placement
from xraygpt_lite.vision import Encoder, open_graph

OPSET = 17
LARGEST_GRAPH = 2**31 - 2**24
"""Bytes of a graph with its weights in it: protobuf ends at 2 GiB, and a quantizer needs some room."""

SMALL, PAGE = 1024, 4096
"""Bytes: smaller tensors stay in the graph; larger ones begin at a multiple of `PAGE`, so that they can be mapped."""

MOST_VALUES = 2**22
"""In a tensor that is computed beforehand, and in those that it is computed from."""

PROBES = (1, 2)
"""Sizes of batches: what is the same in both is taken for constant, and `agreement` then looks at a third."""

TOLERANCE = 1e-4
"""Largest |graph - torch|, relative to the largest |torch| where that exceeds 1."""

BATCHES = (1, 3)
SEED = 20230613


class _GraphConfig(VisionOnnxConfig):  # type: ignore[misc]
    """One input and one output, named by the graph contract, with a free batch axis."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig

    def __init__(self, config: Any, example: Tensor, source: str, result: str) -> None:
        super().__init__(config, task="feature-extraction")
        self._example, self._source, self._result = example, source, result

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {self._source: {0: "batch"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {self._result: {0: "batch"}}

    def generate_dummy_inputs(self, **_: Any) -> dict[str, Tensor]:
        return {self._source: self._example}


def export(module: nn.Module, example: Tensor, path: Path, source: str, result: str) -> None:
    """Write one module's graph; `source` and `result` name its input, which `forward` names alike, and its output.

    What exceeds `LARGEST_GRAPH` has its weights in one file beside it, named after it with "_data".

    Raises
    ------
    ConversionError
        The exporter failed.
    OSError
        The file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        try:
            with quiet():
                _export(module, example, draft, source, result)
        except RuntimeError as error:
            raise ConversionError(
                f"{path.name} could not be exported: {(str(error).splitlines() or [''])[0][:300]}"
            ) from error
        _place(draft, path)
    _fold(path)


def _export(module: nn.Module, example: Tensor, path: Path, source: str, result: str) -> None:
    if isinstance(module, PreTrainedModel):
        export_with_optimum(module, _GraphConfig(module.config, example, source, result), path, opset=OPSET)
        return
    torch.onnx.export(
        module,
        (example,),
        str(path),
        input_names=[source],
        output_names=[result],
        dynamic_axes={source: {0: "batch"}, result: {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,
    )


def _place(draft: Path, path: Path) -> None:
    """Move a graph out of the folder it was exported to, which an exporter may have filled with a file a tensor."""
    if list(draft.parent.iterdir()) == [draft] and draft.stat().st_size <= LARGEST_GRAPH:
        draft.rename(path)
        return
    model = onnx.load(draft, load_external_data=False)
    attributes = [each for node in model.graph.node for each in node.attribute]
    data = path.with_name(f"{path.name}_data")
    with data.open("wb") as target:
        for tensor in [*model.graph.initializer, *(each.t for each in attributes if each.HasField("t"))]:
            _move(tensor, draft.parent, target, data.name)
    onnx.save(model, path)


def _move(tensor: onnx.TensorProto, folder: Path, target: BinaryIO, name: str) -> None:
    """Append a tensor's bytes to the one file, which is called `name`, unless it is small."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    if "location" not in where and len(tensor.raw_data) < SMALL:
        return
    target.write(bytes(-target.tell() % PAGE))
    offset = target.tell()
    if "location" in where:
        stored = folder / where["location"]
        with stored.open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 24)
        stored.unlink()  # each holds one tensor, and the disk need not hold all of them twice
    else:
        target.write(tensor.raw_data)
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", name), ("offset", str(offset)), ("length", str(target.tell() - offset))):
        tensor.external_data.add(key=key, value=value)


def _fold(path: Path) -> None:
    """Write into a graph what it computes from sizes and weights alone, where that is the same for every batch.

    Sizes of tensors are traced as values, and all that follows from them as nodes: of Swin-T's 8,700 nodes 970 stay,
    and its session takes 0.7 s to create instead of 4.5 s. It gives the same numbers.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # branches and loops take values that their nodes do not name
    values = _constants(model, path)
    needed = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed & set(node.output) - values.keys():
            nodes.insert(0, node)
            needed |= set(node.input)
    needed -= {name for node in nodes for name in node.output}
    weights = [weight for weight in graph.initializer if weight.name in needed]
    weights += [numpy_helper.from_array(value, name) for name, value in values.items() if name in needed]
    for field, content in ((graph.node, nodes), (graph.initializer, weights)):
        del field[:]  # the messages themselves live on
        field.extend(content)
    onnx.save(model, path)


def _constants(model: onnx.ModelProto, path: Path) -> dict[str, npt.NDArray[Any]]:
    """Values between nodes that no input reaches, but by its shape, and that are the same in batches of any size."""
    graph = model.graph
    reached = {value.name for value in graph.input}
    reached |= {weight.name for weight in graph.initializer if math.prod(weight.dims) > MOST_VALUES}
    for node in graph.node:
        if node.op_type != "Shape" and reached & set(node.input):
            reached |= set(node.output)
    made = {name for node in graph.node for name in node.output} - reached
    names = sorted({name for node in graph.node for name in node.input if name} & made)
    if not names:
        return {}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    draft = path.with_name(f".{path.name}.probe")  # beside its weights
    try:
        onnx.save(probe, draft)
        session = open_graph(draft, DevicePlan(threads=os.cpu_count() or 1))
    finally:
        draft.unlink(missing_ok=True)
    (given,) = session.get_inputs()
    runs = [session.run(names, {given.name: np.zeros((batch, *given.shape[1:]), np.float32)}) for batch in PROBES]
    return {
        name: first
        for name, first, *others in zip(names, *runs, strict=True)
        if first.size <= MOST_VALUES and all(np.array_equal(first, other) for other in others)
    }


def export_parts(parts: Parts, size: int, folder: Path) -> None:
    """Write `vision.onnx` and `projector.onnx` into a folder, for pixels of `size` × `size`."""
    pixels = torch.zeros(2, 3, size, size)
    export(parts.vision, pixels, folder / "vision.onnx", "pixels", "features")
    export(parts.projector, parts.vision(pixels), folder / "projector.onnx", "features", "embeddings")


def shape_of_tokens(parts: Parts, size: int) -> tuple[int, int]:
    """N and E of the embeddings that the torch modules give for one image.

    Raises
    ------
    ConversionError
        The network does not take images of this size.
    """
    try:
        shape = parts.projector(parts.vision(torch.zeros(1, 3, size, size))).shape
    except (RuntimeError, ValueError) as error:
        raise ConversionError(f"the encoder does not take images of {size} x {size} pixels: {error}") from error
    return int(shape[1]), int(shape[2])


@dataclass(frozen=True)
class Reference:
    """What torch gives for the fixed inputs: pixels (B, 3, S, S) → features (B, N, F) → embeddings (B, N, E)."""

    pixels: Pixels
    features: Float32
    embeddings: Float32


def reference(parts: Parts, size: int) -> tuple[Reference, ...]:
    """Run torch on fixed inputs, one image and three together; the networks can be unloaded then."""
    found = []
    for batch in BATCHES:
        pixels = _pixels(batch, size)
        features = parts.vision(torch.from_numpy(pixels.data))
        found.append(Reference(pixels, features.numpy(), parts.projector(features).numpy()))
    return tuple(found)


def agreement(references: tuple[Reference, ...], bundle: Bundle) -> dict[str, float]:
    """Run the graphs on the inputs that torch was run on.

    Returns
    -------
    dict
        The largest relative differences of features and embeddings: for the manifest.

    Raises
    ------
    ConversionError
        One of them exceeds `TOLERANCE`.
    """
    worst = {"features_max_difference": 0.0, "embeddings_max_difference": 0.0}
    encoder = Encoder(bundle, DevicePlan())
    try:
        for each in references:
            features, embeddings = encoder.features(each.pixels), encoder.encode(each.pixels).data
            for name, seen, expected in (
                ("features", features, each.features),
                ("embeddings", embeddings, each.embeddings),
            ):
                key = f"{name}_max_difference"
                worst[key] = max(worst[key], _difference(seen, expected))
    finally:
        encoder.close()
    for key, value in worst.items():
        if not value <= TOLERANCE:
            raise ConversionError(
                f"the exported graphs differ from torch: {key} is {value:.2e}; at most {TOLERANCE:.0e} is right"
            )
    return worst


def _pixels(batch: int, size: int) -> Pixels:
    data = np.random.default_rng(SEED + batch).normal(size=(batch, 3, size, size)).astype(np.float32)
    return Pixels(data, (Placement((1.0, 1.0), (0.0, 0.0), (size, size)),) * batch)


def _difference(seen: Float32, expected: Float32) -> float:
    if seen.shape != expected.shape:
        raise ConversionError(f"the exported graphs give shape {seen.shape}; torch gives {expected.shape}")
    return float(np.abs(seen - expected).max() / max(1.0, float(np.abs(expected).max())))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' advice to developers off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("", "optimum", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
