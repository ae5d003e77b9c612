"""What a long command says on stderr while it works."""

from __future__ import annotations

import sys
import time

import pytest

from xraygpt_lite.cli import progress


@pytest.mark.parametrize(
    ("written", "expected", "fresh", "seconds", "text"),
    [
        (0, 2e9, 0, 0.5, "    0%  0.00 of about 2.00 GB"),
        (5e8, 2e9, 5e8, 25.0, "   25%  0.50 of about 2.00 GB, about 1 min 15 s left"),
        (15e8, 2e9, 5e8, 10.0, "   75%  1.50 of about 2.00 GB, about 0 min 10 s left"),
        (3e9, 2e9, 3e9, 10.0, "   99%  3.00 of about 2.00 GB"),
        (1, 0, 1, 10.0, "   99%  0.00 of about 0.00 GB"),
    ],
)
def test_the_line(written: float, expected: float, fresh: float, seconds: float, text: str) -> None:
    assert progress.line(int(written), int(expected), int(fresh), seconds) == text


def test_a_pipe_gets_the_steps_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar() as bar:
        bar.step("reading")
        bar.writing(lambda: pytest.fail("was counted"), 1)
        bar.step("writing")
    assert capsys.readouterr().err == "reading …\nwriting …\n"


def test_a_terminal_sees_the_count(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    looks = iter([0, None, 10**9])

    def written() -> int:
        size = next(looks, 10**9)
        if size is None:
            raise FileNotFoundError("went away under the count")
        return size

    with progress.Bar() as bar:
        bar.writing(written, 2 * 10**9)
        deadline = time.monotonic() + 10
        shown = ""
        while "50%" not in shown and time.monotonic() < deadline:
            time.sleep(0.01)
            shown += capsys.readouterr().err
    assert "   50%  1.00 of about 2.00 GB" in shown
