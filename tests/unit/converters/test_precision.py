"""Smaller weight types of a vision graph: what they write, and that float32 in and out stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from xraygpt_lite.converters import precision
from xraygpt_lite.errors import ConversionError

WIDTH = 64


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """pixels (B, 64) → features (B, 64): two linear layers with a bend between, their channels of unequal scale."""
    rng = np.random.default_rng(0)
    first, second = (rng.normal(0, 0.2, (WIDTH, WIDTH)).astype(np.float32) for _ in range(2))
    first *= np.geomspace(0.01, 10, WIDTH, dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["pixels", "first"], ["hidden"]),
        helper.make_node("Tanh", ["hidden"], ["bent"]),
        helper.make_node("MatMul", ["bent", "second"], ["features"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("pixels", "features")
    ]
    weights = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], weights),
                              opset_imports=[helper.make_opsetid("", 17)], ir_version=8)  # fmt: skip
    path = tmp_path / "vision.onnx"
    onnx.save(model, path)
    return path


def run(path: Path) -> np.ndarray:
    pixels = np.random.default_rng(1).normal(size=(8, WIDTH)).astype(np.float32)
    features: np.ndarray = onnxruntime.InferenceSession(str(path)).run(["features"], {"pixels": pixels})[0]
    return features


def types(path: Path) -> set[int]:
    return {weight.data_type for weight in onnx.load(path).graph.initializer if np.prod(weight.dims) >= WIDTH**2}


@pytest.mark.parametrize(
    ("kind", "stored", "error"),
    [("f16", TensorProto.FLOAT16, 2e-3), ("int8", TensorProto.INT8, 6e-2)],
)
def test_each_type(graph: Path, tmp_path: Path, kind: str, stored: int, error: float) -> None:
    precision.shrink(graph, tmp_path / "small.onnx", kind)
    seen, expected = run(tmp_path / "small.onnx"), run(graph)
    assert types(tmp_path / "small.onnx") == {stored}
    assert seen.dtype == np.float32
    difference = np.abs(seen - expected).max() / np.abs(expected).max()
    assert 0 < difference <= error


@pytest.mark.parametrize(
    ("kind", "stored", "error"),
    [("f16", TensorProto.FLOAT16, 2e-3), ("int8", TensorProto.INT8, 6e-2)],
)
def test_a_graph_whose_weights_lie_apart(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stored: int, error: float
) -> None:
    """As above protobuf's limit: no shapes are inferred, and float16 is written in two files again."""
    monkeypatch.setattr(precision, "LARGEST_GRAPH", 10_000)
    expected = run(graph)
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="vision.onnx_data", size_threshold=1024)
    assert graph.stat().st_size < 1024
    (tmp_path / "small").mkdir()
    target = tmp_path / "small" / "vision.onnx"
    precision.shrink(graph, target, kind)
    names = {"vision.onnx", "vision.onnx_data"} if kind == "f16" else {"vision.onnx"}
    assert {path.name for path in target.parent.iterdir()} == names
    assert types(target) == {stored}
    assert 0 < np.abs(run(target) - expected).max() / np.abs(expected).max() <= error


def test_int8_of_a_network_without_matrices_is_refused(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(graph)
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.op_type = "Mul"
    onnx.save(model, graph)
    with pytest.raises(ConversionError, match=r"int8 .* this encoder has none; use f32"):
        precision.shrink(graph, tmp_path / "small.onnx", "int8")
    assert not (tmp_path / "small.onnx").exists()
