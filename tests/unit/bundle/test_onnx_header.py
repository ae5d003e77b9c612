"""Which files a graph reads its weights from: found wherever a tensor can stand, and nothing crashes on other bytes."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from xraygpt_lite.bundle import onnx_header
from xraygpt_lite.errors import BundleError


def tensor(location: str) -> TensorProto:
    """A tensor whose bytes lie in another file."""
    made = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    made.ClearField("raw_data")
    made.data_location = TensorProto.EXTERNAL
    made.external_data.add(key="offset", value="0")
    made.external_data.add(key="location", value=location)
    return made


def in_an_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(tensor("w.bin"))


def in_a_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor("w.bin")))


def in_a_list_of_tensors(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("many", [tensor("w.bin")]))


def in_a_branch(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], initializer=[tensor("w.bin")])
    outer = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=inner)], "outer", [], [])
    model.graph.node.append(helper.make_node("Loop", ["x"], ["y"], body=outer))


def in_a_list_of_branches(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], initializer=[tensor("w.bin")])
    model.graph.node[0].attribute.append(helper.make_attribute("many", [inner]))


def in_a_sparse_tensor(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor("w.bin"), dims=[2, 2]))


def in_a_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=tensor("w.bin"))
    model.functions.append(helper.make_function("own", "f", [], ["c"], [node], model.opset_import))


def in_training(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.initializer.append(tensor("w.bin"))


@pytest.mark.parametrize(
    "put",
    [
        in_an_initializer,
        in_a_constant,
        in_a_list_of_tensors,
        in_a_branch,
        in_a_list_of_branches,
        in_a_sparse_tensor,
        in_a_function,
        in_training,
    ],
)
def test_finds(made_bundle: Path, tmp_path: Path, put: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(made_bundle / "vision.onnx")
    put(model)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    assert onnx_header.external_files(tmp_path / "x.onnx") == {"w.bin"}


def test_a_graph_with_its_weights_inside_names_none(made_bundle: Path) -> None:
    assert onnx_header.external_files(made_bundle / "vision.onnx") == set()


def test_of_a_field_that_stands_twice_the_last_counts_as_for_protobuf(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.graph.initializer.append(tensor("first.bin"))
    entry = onnx.StringStringEntryProto(key="location", value="first.bin").SerializeToString()
    doubled = entry + b"\x12\x08last.bin"
    data = model.SerializeToString().replace(b"\x6a" + bytes([len(entry)]) + entry, b"")
    assert b"first.bin" not in data
    initializer = onnx.TensorProto(name="w").SerializeToString() + b"\x6a" + bytes([len(doubled)]) + doubled
    graph = b"\x2a" + bytes([len(initializer)]) + initializer
    data = b"\x3a" + bytes([len(graph)]) + graph
    (tmp_path / "x.onnx").write_bytes(data)
    seen = onnx.load_model_from_string(data).graph.initializer[0].external_data[0].value
    assert onnx_header.external_files(tmp_path / "x.onnx") == {"last.bin"} == {seen}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot mmap an empty file"),
        (b"\x3a\x05\x2a", "ends behind its message"),
        (b"\x3a", "does not end"),
        (b"\x3a" + b"\xff" * 11, "does not end"),
        (b"\x3b\x00", "unknown kind 3"),
        (b"\xba\x80\x80\x80\x10\x00", "number before byte 5 is too large"),  # field 7 where a tag has 32 bits
        (b"\x3a\x02\x2d\x00", "ends behind its message"),
    ],
)
def test_refuses(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=rf"x.onnx is not a readable ONNX graph: .*{message}"):
        onnx_header.external_files(tmp_path / "x.onnx")


def test_refuses_graphs_in_graphs_without_end(tmp_path: Path) -> None:
    graph = b""
    for _ in range(60):
        attribute = b"\x32" + _length(graph) + graph
        node = b"\x2a" + _length(attribute) + attribute
        graph = b"\x0a" + _length(node) + node
    (tmp_path / "x.onnx").write_bytes(b"\x3a" + _length(graph) + graph)
    with pytest.raises(BundleError, match=r"more than 100 deep"):
        onnx_header.external_files(tmp_path / "x.onnx")


@settings(max_examples=50, deadline=None)
@given(at=st.integers(0, 1 << 20), value=st.integers(0, 255))
def test_a_changed_byte_gives_an_answer_or_a_bundle_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    path = folder / "x.onnx"
    tiny_bundle.write_vision(path, np.random.default_rng(0))
    data = bytearray(path.read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(BundleError):
        assert all(isinstance(name, str) for name in onnx_header.external_files(path))


def _length(data: bytes) -> bytes:
    """A length in base 128."""
    size, digits = len(data), b""
    while size > 0x7F:
        digits += bytes([size & 0x7F | 0x80])
        size >>= 7
    return digits + bytes([size])
