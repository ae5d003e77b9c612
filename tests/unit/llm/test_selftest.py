"""The self-test in its child process: a healthy build, a child that really dies, and what is remembered."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import NativeError
from xraygpt_lite.llm import library, selftest
from xraygpt_lite.llm.quantize import quantize

needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture(scope="module")
def quantized(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("selftest") / "llm.gguf"
    quantize(tiny.gguf, path, "q8_0", threads=1)
    return path


def dying(number: int) -> list[str]:
    return [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]


def count_probes(monkeypatch: pytest.MonkeyPatch, command: list[str] | None = None) -> list[Path]:
    seen: list[Path] = []
    probe = selftest.probe

    def counted(gguf: Path) -> selftest.Verdict:
        seen.append(gguf)
        return probe(gguf, command)

    monkeypatch.setattr(selftest, "probe", counted)
    return seen


def test_this_build_is_healthy_and_asked_once(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_probes(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    cache = Cache(tmp_path / "cache")
    selftest.check(quantized, cache)
    selftest.check(quantized, cache)
    assert seen == [quantized]


@needs_signals
def test_a_crash_is_told_with_the_cure_remembered_and_forgotten_after_reinstalling(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_probes(monkeypatch, dying(signal.SIGILL))
    cache = Cache(tmp_path)
    for _ in range(2):
        with pytest.raises(
            NativeError, match="illegal instruction on this CPU; reinstall it with: CMAKE_ARGS="
        ) as error:
            selftest.check(quantized, cache)
        assert f"llama-cpp-python=={library.VERSION}" in str(error.value)
        assert "\n" not in str(error.value)
    assert len(seen) == 1
    monkeypatch.setattr(selftest, "build_id", lambda: "another build")
    with pytest.raises(NativeError):
        selftest.check(quantized, cache)
    assert len(seen) == 2


@needs_signals
@pytest.mark.parametrize(("number", "words"), [(signal.SIGSEGV, "a segmentation fault"), (signal.SIGABRT, "an abort")])
def test_other_crashes(quantized: Path, number: int, words: str) -> None:
    verdict = selftest.probe(quantized, dying(number))
    assert (verdict.healthy, verdict.crashed, verdict.cause) == (False, True, words)
    assert verdict.seconds > 0


def test_a_real_illegal_instruction(quantized: Path) -> None:
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("runs x86-64 machine code")
    code = (
        "import ctypes, mmap; m = mmap.mmap(-1, 4096, prot=7); m.write(b'\\x0f\\x0b'); "
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
    )
    assert selftest.probe(quantized, [sys.executable, "-c", code]).cause == "an illegal instruction"


def test_a_failure_that_is_no_crash_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_probes(monkeypatch)
    garbage = tmp_path / "llm.gguf"
    garbage.write_bytes(b"garbage")
    cache = Cache(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(NativeError, match=r"self-test of llama.cpp failed: llm.gguf is not a GGUF file"):
            selftest.check(garbage, cache)
    assert len(seen) == 2


def test_a_child_that_cannot_start_or_does_not_end(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "could not be started" in selftest.probe(quantized, [str(tmp_path / "absent")]).cause
    monkeypatch.setattr(selftest, "_TIMEOUT_S", 0.2)
    assert "did not end within" in selftest.probe(quantized, [sys.executable, "-c", "import time; time.sleep(9)"]).cause


def test_the_exercise_runs_here_too(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main([str(quantized)]) == 0
    assert selftest.main([__file__]) == 3
    assert "not a GGUF" in capsys.readouterr().err
