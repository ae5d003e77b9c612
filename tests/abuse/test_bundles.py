"""Bundles that are damaged or made to deceive: each is refused with one clear BundleError, and nothing crashes."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_bundle
from onnx import TensorProto, helper

from xraygpt_lite import verify
from xraygpt_lite.bundle import manifest, store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import BundleError
from xraygpt_lite.model import open_bundle

NAMES = manifest.REQUIRED_FILES
ALTERED = r"{} has the sha256 \w{{12}}…, but bundle.json lists \w{{12}}…"


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        store.load(folder, Cache(None))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def reseal(folder: Path) -> None:
    """Make hashes and sizes true again, as someone who means harm would."""
    tiny_bundle.seal(folder, manifest.parse((folder / "bundle.json").read_bytes()))


@pytest.mark.parametrize("name", NAMES)
def test_missing(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    refuse(bundle_copy, f"{name} is missing from the bundle")


@pytest.mark.parametrize("name", NAMES)
def test_altered(bundle_copy: Path, name: str) -> None:
    data = bytearray((bundle_copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_copy / name).write_bytes(data)
    refuse(bundle_copy, ALTERED.format(name))


@pytest.mark.parametrize("name", NAMES)
def test_truncated_and_emptied(bundle_copy: Path, name: str) -> None:
    data = (bundle_copy / name).read_bytes()
    for part in (data[:-1], b""):
        (bundle_copy / name).write_bytes(part)
        refuse(bundle_copy, f"{name} has {len(part)} bytes, but bundle.json lists {len(data)}")


@pytest.mark.parametrize("name", NAMES)
def test_swapped_with_another_model_s(bundle_copy: Path, tmp_path: Path, name: str) -> None:
    other = tiny_bundle.make(tmp_path / "other", seed=9)
    shutil.copy(other / name, bundle_copy / name)
    refuse(bundle_copy, ALTERED.format(name))


def test_two_files_exchanged(bundle_copy: Path) -> None:
    a, b, c = bundle_copy / "vision.onnx", bundle_copy / "projector.onnx", bundle_copy / "x"
    a.rename(c), b.rename(a), c.rename(b)
    refuse(bundle_copy, "has .* bytes, but bundle.json lists")


def test_no_manifest(bundle_copy: Path) -> None:
    (bundle_copy / "bundle.json").unlink()
    refuse(bundle_copy, "holds no bundle.json")


def test_no_projector(bundle_copy: Path) -> None:
    (bundle_copy / "projector.onnx").unlink()
    text = (bundle_copy / "bundle.json").read_text().replace('"projector.onnx"', '"reflector.onnx"')
    (bundle_copy / "bundle.json").write_text(text)
    (bundle_copy / "reflector.onnx").write_bytes(b"x")
    refuse(bundle_copy, "never see the image")


def test_not_a_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "cannot be read: No such file")
    (tmp_path / "file").write_text("{}")
    refuse(tmp_path / "file", "is not a folder")


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", "vision.onnx.data", "bundle.json~"])
def test_unlisted_file(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).write_text("x")
    refuse(bundle_copy, "is not listed in its bundle.json")


def test_folder_inside(bundle_copy: Path) -> None:
    (bundle_copy / "more").mkdir()
    refuse(bundle_copy, "is a link, folder or device")


@pytest.mark.parametrize("name", ["bundle.json", *NAMES])
def test_link_to_a_file(bundle_copy: Path, tmp_path: Path, name: str) -> None:
    shutil.move(bundle_copy / name, tmp_path / name)
    (bundle_copy / name).symlink_to(tmp_path / name)
    refuse(bundle_copy, f"'{name}' in .* is a link")


def test_link_to_nothing(bundle_copy: Path) -> None:
    (bundle_copy / "more").symlink_to("/nowhere")
    refuse(bundle_copy, "'more' in .* is a link")


def test_linked_folder(bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle_copy, target_is_directory=True)
    refuse(tmp_path / "link", "is not a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_does_not_hang(bundle_copy: Path) -> None:
    (bundle_copy / "bundle.json").unlink()
    os.mkfifo(bundle_copy / "bundle.json")
    refuse(bundle_copy, "'bundle.json' in .* is a link, folder or device")


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "sub/file", "..\\\\outside.bin"])
def test_path_that_leaves_the_folder(bundle_copy: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.bin").write_bytes(b"x")
    text = (bundle_copy / "bundle.json").read_text().replace('"llm.gguf"', f'"{name}"')
    (bundle_copy / "bundle.json").write_text(text)
    refuse(bundle_copy, r"files\[0\].name is not a flat file name")


def test_newer_schema(bundle_copy: Path) -> None:
    text = (
        (bundle_copy / "bundle.json")
        .read_text()
        .replace(f'"schema": {manifest.SCHEMA}', f'"schema": {manifest.SCHEMA + 1}')
    )
    (bundle_copy / "bundle.json").write_text(text)
    refuse(bundle_copy, "newer schema.*upgrade xraygpt-lite")


def test_projector_of_another_width(tmp_path: Path) -> None:
    folder = tiny_bundle.make(tmp_path / "b", width=48)
    refuse(folder, "llm.gguf takes rows of width 32, but the projector gives 48")


def test_token_id_outside_the_vocabulary(bundle_copy: Path) -> None:
    parsed = manifest.parse((bundle_copy / "bundle.json").read_bytes())
    tiny_bundle.seal(bundle_copy, replace(parsed, prompt=replace(parsed.prompt, stop_ids=(352,))))
    refuse(bundle_copy, "uses the token id 352, but llm.gguf has 352 tokens")


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "text": lambda _: b"this is no model\n" * 100,
    "zeros": lambda data: bytes(len(data)),
    "one byte": lambda _: b"x",
    "first half": lambda data: data[: len(data) // 2],
    "random": lambda data: np.random.default_rng(0).bytes(len(data)),
    "random after the first bytes": lambda data: data[:8] + np.random.default_rng(0).bytes(len(data) - 8),
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("name", NAMES)
def test_garbage_with_a_true_hash(bundle_copy: Path, name: str, kind: str) -> None:
    """Whatever gets past the hashes ends in a BundleError of the library that opens it."""
    path = bundle_copy / name
    path.write_bytes(GARBAGE[kind](path.read_bytes()))
    reseal(bundle_copy)
    with (
        pytest.raises(BundleError, match=name) as caught,
        open_bundle(store.load(bundle_copy, Cache(None)), device="cpu"),
    ):
        pass
    assert "\n" not in str(caught.value)


def weights_elsewhere(folder: Path, location: str) -> bytes:
    """Let the projector's graph name another file for its weights, and return them."""
    model = onnx.load(folder / "projector.onnx")
    weight = model.graph.initializer[0]
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    (folder / "projector.onnx").write_bytes(model.SerializeToString())
    return data


@pytest.mark.parametrize(
    "location", ["../secret.bin", "llm.gguf", "absent.bin", "./listed.bin", "*/_ORT_MEM_ADDR_/*", ""]
)
def test_graph_with_weights_that_the_bundle_does_not_list(bundle_copy: Path, tmp_path: Path, location: str) -> None:
    data = weights_elsewhere(bundle_copy, location)
    (tmp_path / "secret.bin").write_bytes(data)
    (bundle_copy / "listed.bin").write_bytes(data)
    reseal(bundle_copy)
    refuse(bundle_copy, rf"projector.onnx keeps weights in {re.escape(repr(location))}, which is not among")
    failed = [check for check in verify.run(bundle_copy, device="cpu") if check.status == "failed"]
    assert ["keeps weights in" in check.detail for check in failed] == [True]


def test_graph_with_weights_in_a_listed_file(bundle_copy: Path) -> None:
    (bundle_copy / "projector.onnx_data").write_bytes(weights_elsewhere(bundle_copy, "projector.onnx_data"))
    reseal(bundle_copy)
    with open_bundle(store.load(bundle_copy, Cache(None)), device="cpu"):
        pass
    data = bytearray((bundle_copy / "projector.onnx_data").read_bytes())
    data[0] ^= 1
    (bundle_copy / "projector.onnx_data").write_bytes(data)
    refuse(bundle_copy, ALTERED.format("projector.onnx_data"))
    (bundle_copy / "projector.onnx_data").write_bytes(data[:-4])
    reseal(bundle_copy)
    with (
        pytest.raises(BundleError, match=r"projector.onnx cannot be loaded"),
        open_bundle(store.load(bundle_copy, Cache(None)), device="cpu"),
    ):
        pass


def test_graph_of_another_contract(bundle_copy: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "other", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), bundle_copy / "vision.onnx"
    )
    reseal(bundle_copy)
    with (
        pytest.raises(BundleError, match=r"vision.onnx has"),
        open_bundle(store.load(bundle_copy, Cache(None)), device="cpu"),
    ):
        pass
