"""How far a run over many radiographs is, on stderr: a live line on a terminal, a plain one now and then, or JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from types import TracebackType
from typing import Any

import click

_PAUSE_S = {"plain": 10.0, "json": 1.0}
MODES = ("auto", "plain", "json", "none")


class Tally:
    """Counts; use it in a `with`.

    Parameters
    ----------
    mode
        One of `MODES`; auto is live on a terminal and plain elsewhere.
    total
        Inputs of the run; None where nobody knows.
    """

    def __init__(self, mode: str, total: int | None) -> None:
        live = mode == "auto" and sys.stderr.isatty()
        self._mode = "live" if live else "plain" if mode == "auto" else mode
        self._total = total
        self._began = self._shown = time.monotonic()
        self._bar: Any = None
        self.done = self.failed = self.skipped = 0

    def __enter__(self) -> Tally:
        if self._mode == "live":
            self._bar = _bar(self._total)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif self._mode == "json":
            self._say()

    @property
    def rate(self) -> float:
        """Images a minute since the start."""
        return 60 * (self.done + self.failed) / max(time.monotonic() - self._began, 1e-3)

    def show(self, done: int, failed: int, skipped: int) -> None:
        """Inputs so far: answered for, failed, and found done by an earlier run."""
        self.done, self.failed, self.skipped = done, failed, skipped
        if self._bar:
            ended = done + failed + skipped
            self._bar.update(0, completed=ended, failed=failed, rate=f"{self.rate:.0f}", left=self._left)
        elif time.monotonic() - self._shown > _PAUSE_S.get(self._mode, math.inf):
            self._say()

    def _say(self) -> None:
        self._shown = time.monotonic()
        if self._mode == "json":
            seconds = self._seconds
            state = {
                "done": self.done, "failed": self.failed, "skipped": self.skipped, "total": self._total,
                "images_per_minute": round(self.rate, 1), "seconds_left": None if seconds is None else round(seconds),
            }  # fmt: skip
            click.echo(json.dumps(state), err=True)
            return
        of = "" if self._total is None else f" of {self._total}"
        parts = [
            f"{self.done + self.failed + self.skipped}{of}",
            f"{self.failed} failed",
            f"{self.rate:.0f} images a minute",
        ]
        click.echo(", ".join([*parts, *([f"{self._left} left"] if self._left else [])]), err=True)

    @property
    def _seconds(self) -> float | None:
        """Until all are done, at the pace so far."""
        if self._total is None or not self.done + self.failed:
            return None
        return 60 * (self._total - self.done - self.failed - self.skipped) / self.rate

    @property
    def _left(self) -> str:
        seconds = self._seconds
        if seconds is None:
            return ""
        minutes = round(seconds / 60)
        return (
            f"{seconds:.0f} s"
            if seconds < 90
            else f"{minutes // 60} h {minutes % 60:02} min"
            if minutes > 59
            else f"{minutes} min"
        )


def _bar(total: int | None) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    bar = Progress(
        SpinnerColumn(), BarColumn(bar_width=None), MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"), TextColumn("{task.fields[rate]} images/min"),
        TextColumn("{task.fields[left]} left" if total is not None else ""),
        console=Console(stderr=True), transient=True, expand=True,
    )  # fmt: skip
    bar.add_task("", total=total, failed=0, rate="–", left="–")
    return bar
