"""How far a long command is, on stderr: a line a step, and on a terminal one that counts."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import click

EVERY = 0.5
"""Seconds between two looks."""


class Bar:
    """Steps, and below the newest the bytes on the disk with an estimate of the time left; use it in a `with`."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def step(self, text: str) -> None:
        """Begin a new line with the step's name."""
        with self._lock:
            self._clear()
            click.echo(f"{text} …", err=True)

    def writing(self, written: Callable[[], int], expected: int) -> None:
        """Count from here on, on a terminal: `written()` of about `expected` bytes."""
        if self._live:
            self._thread = threading.Thread(target=self._count, args=(written, expected), daemon=True)
            self._thread.start()

    def _count(self, written: Callable[[], int], expected: int) -> None:
        began, first = time.monotonic(), _or_none(written) or 0
        while not self._done.wait(EVERY):
            now = _or_none(written)
            if now is not None:
                with self._lock:
                    self._clear()
                    click.echo(line(now, expected, now - first, time.monotonic() - began), err=True, nl=False)
        self._clear()

    def _clear(self) -> None:
        if self._live:
            click.echo("\r\x1b[K", err=True, nl=False)


def line(written: int, expected: int, fresh: int, seconds: float) -> str:
    """`written` of `expected` bytes, and the time left at the pace of the `fresh` ones in so many seconds."""
    share = min(written / max(expected, 1), 0.99)
    text = f"  {share:4.0%}  {written / 1e9:.2f} of about {expected / 1e9:.2f} GB"
    if fresh <= 0 or seconds < 2 or written >= expected:
        return text
    left = round((expected - written) / fresh * seconds)
    return f"{text}, about {left // 60} min {left % 60:02} s left"


def _or_none(written: Callable[[], int]) -> int | None:
    """None while files come and go under the count."""
    try:
        return written()
    except OSError:
        return None
