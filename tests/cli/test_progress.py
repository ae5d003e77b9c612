"""What a long command says on stderr while it works, and how it is interrupted."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import time

import pytest

from xraygpt_lite.cli import interrupt, progress

HALF = f"[{'#' * 10}{'-' * 10}]"


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def until(self, wanted: str) -> str:
        """What was written, once `wanted` is in it."""
        deadline = time.monotonic() + 10
        while wanted not in self.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.getvalue()


def on_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Put one in stderr's place; called in the test, before which pytest puts its own there."""
    screen = Screen()
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


@pytest.mark.parametrize(
    ("done", "expected", "unit", "seconds", "left", "text"),
    [
        (0, 0, "", 75.9, 0.0, "  1 min 15 s so far"),
        (0, 2e9, "bytes", 0.5, 0.0, f"  [{'-' * 20}]   0%  0.00 of about 2.00 GB, 0 min 00 s so far"),
        (1e9, 2e9, "bytes", 25.0, 75.0, f"  {HALF}  50%  1.00 of about 2.00 GB, about 1 min 15 s left"),
        (5e5, 1e6, "bytes", 25.0, -3.0, f"  {HALF}  50%  0.50 of about 1.00 MB, 0 min 25 s so far"),
        (3e9, 2e9, "bytes", 10.0, 0.0, f"  [{'#' * 19}-]  99%  3.00 of about 2.00 GB, 0 min 10 s so far"),
        (3, 6, "radiographs", 9.0, 9.0, f"  {HALF}  50%  3 of 6 radiographs, about 0 min 09 s left"),
    ],
)
def test_the_line(done: float, expected: float, unit: str, seconds: float, left: float, text: str) -> None:
    assert progress.line(int(done), int(expected), unit, seconds, left) == text


@pytest.mark.parametrize(
    ("fresh", "missing", "seconds", "left"),
    [(5, 10, 4.0, 8.0), (0, 10, 4.0, 0.0), (5, 10, 1.9, 0.0), (5, -1, 4.0, -0.8)],
)
def test_the_time_left(fresh: int, missing: int, seconds: float, left: float) -> None:
    assert progress.remaining(fresh, missing, seconds) == pytest.approx(left)


def test_an_estimate_counts_down_and_ends_where_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done = 100.0, 7
    monkeypatch.setattr(time, "monotonic", lambda: now)
    count = progress.Count(lambda: done, 11, "radiographs")  # 7 were there: they tell nothing of this run's pace
    done, shown = 9, []
    for seconds in (110.0, 114.0, 125.0):
        now = seconds
        shown.append(count.line())
    assert [line.rpartition(", ")[2] for line in shown] == [
        "about 0 min 10 s left", "about 0 min 06 s left", "0 min 25 s so far",
    ]  # fmt: skip


def test_a_pipe_gets_the_steps_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar() as bar:
        bar.step("reading")
        bar.counting(lambda: pytest.fail("was counted"), 1, "bytes")
        bar.step("writing", kept=True)
    assert capsys.readouterr().err == "reading …\nwriting … (kept)\n"


def test_a_terminal_sees_the_count_of_the_step_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    looks = iter([0, None, 10**9])

    def written() -> int:
        size = next(looks, 10**9)
        if size is None:
            raise FileNotFoundError("went away under the count")
        return size

    with progress.Bar() as bar:
        bar.step("writing")
        bar.counting(written, 2 * 10**9, "bytes")
        screen.until(f"  {HALF}  50%  1.00 of about 2.00 GB")
        bar.step("comparing")
        bar.counting(lambda: 1, 4, "radiographs")
        screen.until(" 25%  1 of 4 radiographs")
        bar.step("testing")
        shown = screen.until("testing …\n\r\x1b[K  0 min 00 s so far")
    assert shown.index(" 50%") < shown.index("comparing …") < shown.index(" 25%") < shown.index("testing …")
    assert " of " not in shown.partition("testing …")[2]
    assert screen.getvalue().endswith("\r\x1b[K")


def test_a_narrow_terminal_keeps_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    with progress.Bar() as bar:
        bar.step("writing")
        bar.counting(lambda: 1, 2, "radiographs")
        shown = screen.until("50%").replace("\r\x1b[K", "\n")
    assert max(len(line) for line in shown.splitlines()) == 29


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_are_heard_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interrupt.heard():
        signal.raise_signal(number)
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


@pytest.mark.skipif(os.name == "nt", reason="needs the C library's qsort")
def test_an_interruption_of_a_native_library_s_call_back_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    made = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    calls: list[bool] = []

    def compare(_one: int, _other: int) -> int:
        calls.append(True)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return 0

    def sort_and_wait() -> None:
        ctypes.CDLL(None).qsort((ctypes.c_int * 9)(), 9, 4, made(compare))
        time.sleep(10)
        pytest.fail("was not heard")

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupt.heard():
        sort_and_wait()
    assert len(calls) > 2
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err == ""
