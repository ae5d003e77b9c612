"""Doctor names what is there, and what is wrong in words that help; it never raises."""

import shutil
from pathlib import Path

import pytest
import tiny_bundle

from xraygpt_lite import device, doctor, vision
from xraygpt_lite.bundle import store
from xraygpt_lite.llm import native, selftest
from xraygpt_lite.values import Check

NAMES = ["program", "packages", "CPU", "onnxruntime", "llama-cpp-python", "default bundle", "llama.cpp self-test",
         "llama.cpp build", "GPU", "cache folder", "installed bundles", "weight types"]  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, made_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle in the place of the default one, and folders of its own."""
    folder = tmp_path / "models" / store.DEFAULT / "bundle"
    shutil.copytree(made_bundle, folder)
    tiny_bundle.seal(folder, tiny_bundle.plain_manifest(store.DEFAULT))
    monkeypatch.setattr(store.resources, "files", lambda name: tmp_path / "models")
    monkeypatch.setattr(store, "user_folder", lambda: tmp_path / "user")
    monkeypatch.setenv("XRAYGPT_LITE_CACHE", str(tmp_path / "cache"))
    return folder


def checks(bundle: str | None = None) -> dict[str, Check]:
    found = doctor.run(bundle)
    assert [check.name for check in found] == NAMES
    assert all(check.detail and "\n" not in check.detail for check in found)
    return {check.name: check for check in found}


def test_a_healthy_machine(package: Path, tmp_path: Path) -> None:
    found = checks()
    assert {check.status for check in found.values()} == {"ok"}
    assert "CPUExecutionProvider" in found["onnxruntime"].detail
    assert "0.3.36" in found["llama-cpp-python"].detail
    assert found["llama.cpp build"].detail == native.system_info()
    assert found["cache folder"].detail == str(tmp_path / "cache")
    assert "nih-tiny (bundled)" in found["installed bundles"].detail


@pytest.mark.parametrize(
    ("installed", "advice"),
    [({}, "xraygpt-lite[cpu]"), ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, "pip uninstall")],
)
def test_no_runtime_or_two(
    package: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], advice: str
) -> None:
    monkeypatch.setattr(vision, "installed_runtimes", lambda: installed)
    if not installed:
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    found = checks()
    assert found["onnxruntime"].status == "failed"
    assert advice in found["onnxruntime"].detail
    assert found["GPU"].status == "skipped"


def test_a_build_that_crashes_is_named_and_never_opened_here(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = selftest.Verdict(False, True, "an illegal instruction", "build", "cpu", 0.1)
    monkeypatch.setattr(selftest, "probe", lambda gguf: crash)
    monkeypatch.setattr(native, "system_info", lambda: pytest.fail("opened a library that crashes"))
    found = checks()
    assert found["llama.cpp self-test"].status == "failed"
    assert "an illegal instruction" in found["llama.cpp self-test"].detail
    assert "reinstall" in found["llama.cpp self-test"].detail
    assert found["llama.cpp build"].status == found["GPU"].status == "skipped"


def test_a_spoilt_default_bundle(package: Path) -> None:
    (package / "vision.onnx").unlink()
    found = checks()
    assert found["default bundle"].status == "failed"
    assert "vision.onnx is missing" in found["default bundle"].detail
    assert found["llama.cpp self-test"].status == "skipped"


def test_a_cache_that_cannot_be_written(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XRAYGPT_LITE_CACHE", str(tmp_path / "file" / "cache"))
    assert checks()["cache folder"].status == "skipped"


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("flags\t\t: fpu avx2 amx_tile zzz\n", ("avx2", "amx_tile")),
        ("Features\t: fp asimd asimddp\n", ("asimd", "asimddp")),
        ("nothing here\n", ()),
    ],
)
def test_cpu_features(tmp_path: Path, text: str, features: tuple[str, ...]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert device.cpu_features(tmp_path / "cpuinfo") == features
    assert device.cpu_features(tmp_path / "absent") == ()


def test_slow_weights_are_named_where_the_cpu_is_known(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_features", lambda: ("avx2",))
    assert "which this is not" in checks()["weight types"].detail
    monkeypatch.setattr(device, "cpu_features", lambda: ("avx512f", "amx_int8"))
    assert "no bundle has a slow one" in checks()["weight types"].detail
    monkeypatch.setattr(device, "cpu_features", lambda: ("avx512_vnni",))
    assert "AVX-512 VNNI and no AMX" in checks()["weight types"].detail
    monkeypatch.setattr(device, "SPEEDS", {device.VECTORS: {"f32": (1.0, 0.4, 0.9), "q4_0": (0.9, 1.0, 1.0)}})
    # A small model is fast anyway.
    assert "no bundle has a slow one" in (detail := checks()["weight types"].detail)
    assert "--quant auto takes q4_0" in detail
    monkeypatch.setattr(doctor, "LARGE", 1)
    assert (
        "nih-tiny (f32) is 0.4 times as fast as the fastest type for eight answers at once; "
        "convert with --quant q4_0, the fastest in all"
    ) in checks()["weight types"].detail


def test_the_bundle_in_use_is_looked_at_too(
    package: Path, made_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cpu_features", lambda: ("avx512_vnni",))
    monkeypatch.setattr(device, "SPEEDS", {device.VECTORS: {"f32": (1.0, 0.4, 0.9), "q4_0": (0.9, 1.0, 1.0)}})
    monkeypatch.setattr(doctor, "LARGE", 1)
    detail = checks(str(made_bundle))["weight types"].detail
    assert f"{made_bundle} (f32) is 0.4 times as fast" in detail
    assert checks(str(package))["weight types"].detail.count("times as fast") == 1  # not named twice
    other = package.parents[2] / "user" / "other"
    other.mkdir(parents=True)
    (other / "bundle.json").write_text("{}")
    unread = checks()["weight types"]  # it hinders no radiograph
    assert (unread.status, "other cannot be read" in unread.detail) == ("ok", True)
    assert checks(str(other))["weight types"].status == "failed"  # it is the one in use
    absent = checks(str(tmp_path / "nowhere"))["weight types"]
    assert (absent.status, "nowhere" in absent.detail) == ("failed", True)
