"""Every choice of a device carries its reason; an order that cannot be met is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xraygpt_lite import device
from xraygpt_lite.errors import DeviceError, UsageError
from xraygpt_lite.values import DevicePlan


def plan(name: str, *, vision: bool = False, llama: bool = False, **more: Any) -> DevicePlan:
    providers = (device.CUDA, device.CPU) if vision else (device.CPU,)
    return device.plan(name, providers=providers, llama_gpu=llama, trained_context=4096, **more)


def test_auto_without_a_gpu_runs_on_the_cpu_and_says_why() -> None:
    chosen = plan("auto")
    assert (chosen.device, chosen.providers, chosen.gpu_layers) == ("cpu", (device.CPU,), 0)
    assert "vision on the CPU: ONNX Runtime's CUDA provider was not found" in chosen.reasons
    assert chosen.threads == device.cores()


def test_threads_wait_for_each_other_where_each_has_enough_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cores", lambda: 6)
    small = plan("cpu", token_bytes=2_000_000)
    assert (small.threads, small.step_threads) == (6, 1)
    assert "1 of them for one answer's steps, which read 2.0 MB each" in small.reasons
    assert plan("cpu", token_bytes=13_000_000).step_threads == 3
    large = plan("cpu", token_bytes=4_000_000_000)
    assert (large.step_threads, len(large.reasons)) == (6, 3)
    assert plan("cpu").step_threads == 6
    assert plan("cpu", threads=4, token_bytes=2_000_000).step_threads == 4  # as was asked for


def test_auto_takes_what_gpu_there_is_and_names_the_rest() -> None:
    chosen = plan("auto", llama=True)
    assert (chosen.device, chosen.providers, chosen.gpu_layers) == ("cuda", (device.CPU,), -1)
    assert chosen.reasons[0].startswith("vision on the CPU")
    assert chosen.reasons[1].startswith("language model on the GPU")


GB = 10**9
LOAD = device.Load(layers=33, layer_bytes=GB // 8, vision_bytes=GB)


@pytest.mark.parametrize(
    ("free", "layers", "vision"),
    [(80 * GB, -1, True), (6 * GB, -1, True), (5 * GB + GB // 2, -1, False), (3 * GB, 17, False), (GB // 2, 0, False)],
)
def test_what_does_not_fit_a_gpu_stays_on_the_cpu_layers_first(free: int, layers: int, vision: bool) -> None:
    chosen = plan("auto", vision=True, llama=True, load=LOAD, gpu_free=free)
    assert (chosen.gpu_layers, chosen.providers[0] == device.CUDA) == (layers, vision)
    assert chosen.device == ("cuda" if layers else "cpu")
    short = [reason for reason in chosen.reasons if "of the GPU's memory are free" in reason]
    assert len(short) == (layers not in (-1,)) + (not vision)


def test_a_gpu_of_one_library_only_is_shared_with_nobody() -> None:
    chosen = plan("auto", vision=True, load=LOAD, gpu_free=2 * GB)
    assert (chosen.gpu_layers, chosen.providers[0]) == (0, device.CUDA)
    assert plan("auto", vision=True, load=LOAD, gpu_free=GB).providers[0] == device.CPU


def test_an_order_for_a_gpu_that_is_full_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"0\.5 GB of the GPU's memory are free.*--device auto"):
        plan("cuda", vision=True, llama=True, load=LOAD, gpu_free=GB // 2)
    assert plan("cuda", vision=True, llama=True, load=LOAD, gpu_free=3 * GB).gpu_layers == 17


def test_without_figures_everything_goes_to_the_gpu() -> None:
    chosen = plan("auto", vision=True, llama=True, load=LOAD, gpu_free=None)
    assert (chosen.gpu_layers, chosen.providers[0]) == (-1, device.CUDA)


def test_cpu_is_obeyed_where_a_gpu_is_there() -> None:
    chosen = plan("cpu", vision=True, llama=True)
    assert (chosen.device, chosen.providers, chosen.gpu_layers) == ("cpu", (device.CPU,), 0)


@pytest.mark.parametrize(
    ("there", "named"),
    [({}, "ONNX Runtime has no CUDA provider and llama.cpp"), ({"vision": True}, "llama.cpp sees no GPU")],
)
def test_cuda_that_cannot_be_met_names_what_is_lacking(there: dict[str, bool], named: str) -> None:
    with pytest.raises(DeviceError, match=named):
        plan("cuda", **there)


def test_context_defaults_to_what_the_model_was_trained_for() -> None:
    assert plan("cpu").context == device.DEFAULT_CONTEXT
    assert device.plan("cpu", providers=(device.CPU,), llama_gpu=False, trained_context=512).context == 512
    with pytest.raises(UsageError, match="context is 5000; this language model takes 16 to 4096"):
        plan("cpu", context=5000)


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        plan("cpu", threads=0)
    with pytest.raises(UsageError, match="'tpu' is unknown"):
        plan("tpu")


def test_the_cache_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XRAYGPT_LITE_CACHE", str(tmp_path))
    assert device.cache_folder() == tmp_path
    monkeypatch.delenv("XRAYGPT_LITE_CACHE")
    assert device.cache_folder().name == "xraygpt-lite"
