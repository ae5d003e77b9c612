"""Encoder and projector are held to the graph contract, and a runtime that is absent or doubled is named."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from xraygpt_lite import vision
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import BundleError, DeviceError, MissingPackageError, NativeError
from xraygpt_lite.values import Bundle, DevicePlan, Pixels, Placement


@pytest.fixture
def bundle(bundle_copy: Path) -> Bundle:
    """A checked bundle whose files may be spoiled afterwards."""
    return store.load(bundle_copy, Cache(None))


def pixels(count: int) -> Pixels:
    data = np.random.default_rng(1).normal(size=(count, 3, 32, 32)).astype(np.float32)
    return Pixels(data, (Placement((1.0, 1.0), (0.0, 0.0), (32, 32)),) * count)


def test_a_batch_gives_what_each_image_gives_alone(bundle: Bundle) -> None:
    encoder, images = vision.Encoder(bundle, DevicePlan()), pixels(3)
    together = encoder.encode(images).data
    assert together.shape == (3, 4, 32)
    assert together.dtype == np.float32
    assert together.flags.c_contiguous
    for n in range(3):
        alone = encoder.encode(Pixels(images.data[n : n + 1], images.placements[:1])).data
        np.testing.assert_allclose(together[n], alone[0], atol=1e-5)


def test_the_providers_are_those_of_the_session(bundle: Bundle) -> None:
    assert vision.Encoder(bundle, DevicePlan()).providers == ("CPUExecutionProvider",)


@pytest.mark.skipif("CUDAExecutionProvider" in vision.available_providers(), reason="CUDA is there")
def test_a_planned_gpu_that_the_session_does_not_get_is_an_error(bundle: Bundle) -> None:
    with pytest.raises((DeviceError, BundleError), match="CUDAExecutionProvider"):
        vision.Encoder(bundle, DevicePlan(device="cuda", providers=("CUDAExecutionProvider", "CPUExecutionProvider")))


PLACES = ["cpu", *(["cuda"] if "CUDAExecutionProvider" in vision.available_providers() else [])]


@pytest.mark.parametrize("place", PLACES)
def test_features_that_stay_where_they_were_made_give_what_copied_ones_give(bundle: Bundle, place: str) -> None:
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider") if place == "cuda" else ("CPUExecutionProvider",)
    encoder = vision.Encoder(bundle, DevicePlan(providers=providers))
    assert encoder._between == place
    projector = vision.open_graph(bundle.projector, DevicePlan(providers=providers))
    for images in (pixels(2), pixels(1), pixels(3)):
        copied = projector.run(["embeddings"], {"features": encoder.features(images)})[0]
        np.testing.assert_array_equal(encoder.encode(images).data, copied)
    backwards = Pixels(images.data[..., ::-1], images.placements)  # not contiguous
    expected = encoder.encode(replace(images, data=images.data[..., ::-1].copy()))
    np.testing.assert_array_equal(encoder.encode(backwards).data, expected.data)


def test_what_onnx_runtime_refuses_is_named(bundle: Bundle) -> None:
    encoder, images = vision.Encoder(bundle, DevicePlan()), pixels(1)
    small = replace(images, data=images.data[..., :8])
    with pytest.raises(NativeError, match=r"ONNX Runtime failed on this bundle's vision graphs: .*pixels"):
        encoder.encode(small)
    with pytest.raises(NativeError, match=r"ONNX Runtime failed on this bundle's vision graphs: .*pixels"):
        encoder.features(small)


@pytest.mark.parametrize(("sequences", "spinning"), [(1, "1"), (2, "0")])
def test_threads_wait_spinning_for_each_other_where_one_radiograph_is_waited_for(
    bundle: Bundle, sequences: int, spinning: str
) -> None:
    plan = DevicePlan(threads=3, encoder_threads=2, sequences=sequences)
    options = vision.open_graph(bundle.vision, plan).get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spinning
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_threads_sleep_between_images(bundle: Bundle) -> None:
    session = vision.open_graph(bundle.vision, DevicePlan(threads=2))
    spent = []
    for _ in range(3):
        session.run(["features"], {"pixels": pixels(1).data})
        began = time.process_time()
        time.sleep(0.1)
        spent.append(time.process_time() - began)
    assert min(spent) < 0.01  # of processor time; they would spin for 0.03 s


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_without_glibc_nothing_is_given_back_and_nothing_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def absent(_: object) -> None:
        raise error

    monkeypatch.setattr(vision.ctypes, "CDLL", absent)
    assert vision.Encoder(bundle, DevicePlan()).encode(pixels(1)).data.shape == (1, 4, 32)


def linear(name: str, source: list[str | int], result: list[str | int], weight: np.ndarray) -> onnx.ModelProto:
    """features → `name`: one matrix product."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["features", "weight"], [name])],
        "projector",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, source)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, result)],
        [numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


GOOD = np.ones((8, 32))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: linear("embeddings", [1, 4, 8], [1, 4, 32], GOOD), "batch axis of 'features' is fixed at 1"),
        (lambda: linear("tokens", ["b", 4, 8], ["b", 4, 32], GOOD), "expected one tensor 'embeddings'"),
        (lambda: linear("embeddings", ["b", 4, 8], ["b", 4, 48], np.ones((8, 48))), r"manifest wants \(4, 32\)"),
        (lambda: linear("embeddings", ["b", 5, 8], ["b", 5, 32], GOOD), r"manifest wants \(4, 32\)"),
        (lambda: linear("embeddings", ["b", 4, 9], ["b", 4, 32], np.ones((9, 32))), r"manifest wants \(None, 8\)"),
    ],
)
def test_a_graph_outside_the_contract_is_refused(
    bundle: Bundle, spoil: Callable[[], onnx.ModelProto], message: str
) -> None:
    onnx.save(spoil(), bundle.projector)
    with pytest.raises(BundleError, match=message):
        vision.Encoder(bundle, DevicePlan())


def test_a_token_count_that_only_a_run_shows_is_refused_then(bundle: Bundle) -> None:
    onnx.save(linear("embeddings", ["b", "n", 8], ["b", "n", 32], GOOD), bundle.projector)
    wrong = replace(bundle, manifest=replace(bundle.manifest, image_tokens=7))
    with pytest.raises(BundleError, match=r"\(1, 4, 32\); the manifest says \(1, 7, 32\)"):
        vision.Encoder(wrong, DevicePlan()).encode(pixels(1))


def test_values_that_are_not_finite_are_refused(bundle: Bundle) -> None:
    onnx.save(linear("embeddings", ["b", 4, 8], ["b", 4, 32], np.full((8, 32), np.nan)), bundle.projector)
    with pytest.raises(NativeError, match="not finite"):
        vision.Encoder(bundle, DevicePlan()).encode(pixels(1))


def test_without_a_runtime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(vision, "installed_runtimes", dict)
    with pytest.raises(MissingPackageError, match=r"pip install 'xraygpt-lite\[cpu\]'"):
        vision.available_providers()


class Importing:
    """An importer of onnxruntime that fails as its native module does."""

    def __init__(self, cause: BaseException | None) -> None:
        self._cause = cause

    def find_spec(self, name: str, *_: object) -> None:
        if name == "onnxruntime":
            raise ImportError("initialization failed\nsecret") from self._cause


def test_a_runtime_that_cannot_be_imported_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(vision, "installed_runtimes", lambda: {"onnxruntime": "1.2"})
    monkeypatch.setattr(sys, "meta_path", [Importing(None), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=r"onnxruntime 1.2 is installed .*: initialization failed; run: pip"):
        vision.available_providers()
    monkeypatch.setattr(sys, "meta_path", [Importing(KeyboardInterrupt()), *sys.meta_path[1:]])
    with pytest.raises(KeyboardInterrupt):
        vision.available_providers()


def test_with_both_runtimes_it_says_what_to_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision.metadata, "version", lambda _: "1.0")
    with pytest.raises(MissingPackageError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        vision.available_providers()
