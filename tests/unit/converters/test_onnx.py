"""What is written into an exported graph beforehand: what is the same for every image, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx as onnx_format
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from xraygpt_lite.converters import onnx

SIZE = 6


class Masked(nn.Module):
    """As window attention does it: a mask and positions from the image's size, both of them traced."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(SIZE * SIZE, dtype=torch.float32))

    def forward(self, pixels: Tensor) -> Tensor:
        batch, _, height, width = pixels.shape
        mask = torch.zeros(height, width)
        mask[: height // 2, : width // 2] = 1
        position = self.table[torch.arange(height * width, device=pixels.device)].view(height, width)
        rows = (pixels * mask + position.flip(0)).reshape(batch, height * 3, width)
        return rows + torch.full((batch, 1, 1), 2.0).cumsum(0)  # differs by the place in the batch


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).normal(size=(batch, 3, SIZE, SIZE)).astype(np.float32)


def run(path: Path, pixels: np.ndarray) -> np.ndarray:
    features: np.ndarray = onnxruntime.InferenceSession(str(path)).run(["features"], {"pixels": pixels})[0]
    return features


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx_format.load(path).graph.node)


def test_what_follows_from_the_size_is_constant_and_what_follows_from_the_batch_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        onnx.export(Masked(), torch.zeros(2, 3, SIZE, SIZE), tmp_path / "folded.onnx", "pixels", "features")
        monkeypatch.setattr(onnx, "_fold", lambda _: None)
        onnx.export(Masked(), torch.zeros(2, 3, SIZE, SIZE), tmp_path / "plain.onnx", "pixels", "features")
        for batch in (1, 2, 5, 16):
            expected = Masked()(torch.from_numpy(images(batch))).numpy()
            np.testing.assert_array_equal(run(tmp_path / "folded.onnx", images(batch)), expected)
    folded, plain = nodes(tmp_path / "folded.onnx"), nodes(tmp_path / "plain.onnx")
    assert folded.keys() & {"ScatterND", "Range", "Constant"} == set()
    assert plain.keys() >= {"ScatterND", "Constant"}
    assert folded["CumSum"] == 1
    assert folded.total() < plain.total() / 3
    assert {path.name for path in tmp_path.iterdir()} == {"folded.onnx", "plain.onnx"}


def graph_of(made: list[onnx_format.NodeProto], weights: dict[str, np.ndarray], path: Path) -> None:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
        for name in ("pixels", "features")
    ]
    graph = helper.make_graph(
        made, "g", values[:1], values[1:], [numpy_helper.from_array(data, name) for name, data in weights.items()]
    )
    onnx_format.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", onnx.OPSET)], ir_version=8), path)


def test_a_node_of_which_only_one_result_is_constant_stays(tmp_path: Path) -> None:
    """Of the shape (batch, 3, size, size), split in two: the first half differs, the second does not."""
    graph_of(
        [
            helper.make_node("Shape", ["pixels"], ["shape"]),
            helper.make_node("Split", ["shape"], ["front", "back"], axis=0),
            helper.make_node("Concat", ["front", "back"], ["again"], axis=0),
            helper.make_node("Reshape", ["pixels", "again"], ["features"]),
        ],
        {},
        tmp_path / "g.onnx",
    )
    onnx._fold(tmp_path / "g.onnx")
    assert nodes(tmp_path / "g.onnx")["Split"] == 1
    for batch in (1, 4):
        np.testing.assert_array_equal(run(tmp_path / "g.onnx", images(batch)), images(batch))


def test_what_is_large_is_computed_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
    made = [helper.make_node("Neg", ["weight"], ["less"]), helper.make_node("Add", ["pixels", "less"], ["features"])]
    graph_of(made, {"weight": weight}, tmp_path / "small.onnx")
    onnx._fold(tmp_path / "small.onnx")
    monkeypatch.setattr(onnx, "MOST_VALUES", weight.size - 1)
    graph_of(made, {"weight": weight}, tmp_path / "large.onnx")
    onnx._fold(tmp_path / "large.onnx")
    assert nodes(tmp_path / "small.onnx") == {"Add": 1}
    assert nodes(tmp_path / "large.onnx") == {"Neg": 1, "Add": 1}
    for name in ("small.onnx", "large.onnx"):
        np.testing.assert_array_equal(run(tmp_path / name, images(2)), images(2) - weight)


def test_a_graph_with_branches_is_left_alone(tmp_path: Path) -> None:
    branches = {
        f"{kind}_branch": helper.make_graph(
            [helper.make_node("Add", ["pixels", "two"], [kind])], kind, [],
            [helper.make_tensor_value_info(kind, TensorProto.FLOAT, None)],
        )
        for kind in ("then", "else")
    }  # fmt: skip
    graph_of(
        [
            helper.make_node("Add", ["one", "one"], ["two"]),
            helper.make_node("ReduceSum", ["pixels"], ["sum"], keepdims=0),
            helper.make_node("Greater", ["sum", "one"], ["positive"]),
            helper.make_node("If", ["positive"], ["features"], **branches),
        ],
        {"one": np.float32(1)},
        tmp_path / "g.onnx",
    )
    before = (tmp_path / "g.onnx").read_bytes()
    onnx._fold(tmp_path / "g.onnx")
    assert (tmp_path / "g.onnx").read_bytes() == before
    np.testing.assert_array_equal(run(tmp_path / "g.onnx", images(2)), images(2) + 2)
