"""Smaller weight types of a vision graph: what they write, and that float32 in and out stay."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

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


def run(path: Path, options: onnxruntime.SessionOptions | None = None) -> np.ndarray:
    pixels = np.random.default_rng(1).normal(size=(8, WIDTH)).astype(np.float32)
    features: np.ndarray = onnxruntime.InferenceSession(str(path), options).run(["features"], {"pixels": pixels})[0]
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
    """As above protobuf's limit: no shapes are inferred; the weights of what is written lie apart again."""
    monkeypatch.setattr(precision, "LARGEST_GRAPH", 10_000)
    monkeypatch.setattr(precision, "APART", 5_000)
    expected = run(graph)
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="vision.onnx_data", size_threshold=1024)
    assert graph.stat().st_size < 1024
    (tmp_path / "small").mkdir()
    target = tmp_path / "small" / "vision.onnx"
    precision.shrink(graph, target, kind)
    assert {path.name for path in target.parent.iterdir()} == {"vision.onnx", "vision.onnx_data"}
    assert target.stat().st_size < 4096
    assert types(target) == {stored}
    assert 0 < np.abs(run(target) - expected).max() / np.abs(expected).max() <= error


def test_int8_is_stored_optimized(graph: Path, tmp_path: Path) -> None:
    """The four nodes that a quantizer makes of a product are one, and nothing in the file is made for one CPU."""
    target = tmp_path / "small.onnx"
    precision.shrink(graph, target, "int8")
    assert {path.name for path in tmp_path.iterdir()} == {"vision.onnx", "small.onnx"}
    model = onnx.load(target)
    assert [node.op_type for node in model.graph.node] == ["DynamicQuantizeMatMul", "Tanh", "DynamicQuantizeMatMul"]
    assert {each.domain for each in model.opset_import} >= {"", "com.microsoft"}
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input] == ["batch"]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = tmp_path / "plain.onnx"
    quantize_dynamic(graph, plain, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    np.testing.assert_allclose(run(target), run(plain, options), rtol=0, atol=1e-5)


def test_a_full_disk_is_told_as_one(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match="No space left") as caught:
        precision.shrink(graph, tmp_path / "small.onnx", "int8")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["vision.onnx"]


def test_int8_of_a_network_without_matrices_is_refused(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(graph)
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.op_type = "Mul"
    onnx.save(model, graph)
    with pytest.raises(ConversionError, match=r"int8 .* this encoder has none; use f32"):
        precision.shrink(graph, tmp_path / "small.onnx", "int8")
    assert not (tmp_path / "small.onnx").exists()
