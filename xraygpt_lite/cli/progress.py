"""How far a long command is, on stderr: a line a step, and on a terminal one below it that is drawn anew."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import click

EVERY = 0.5
"""Seconds between two looks."""

WIDTH = 20
"""Characters of a whole bar."""

SOON = 2.0
"""Seconds after which a pace can be told."""


class Bar:
    """Steps, and below the newest how far it is, with an estimate of the time left; use it in a `with`."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._lock = threading.Lock()
        self._count = Count()

    def __enter__(self) -> Bar:
        if self._live:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._done.set()
        if self._live:
            self._thread.join()

    def step(self, text: str, *, kept: bool = False) -> None:
        """Begin a new line with the step's name; `kept` is one that an earlier run has finished."""
        with self._lock:
            self._clear()
            click.echo(f"{text} …{' (kept)' if kept else ''}", err=True)
            self._count = Count()

    def counting(self, done: Callable[[], int], expected: int, unit: str) -> None:
        """Count from here to the step's end, on a terminal: `done()` of about `expected` "bytes", "radiographs" …"""
        if self._live:
            with self._lock:
                self._count = Count(done, expected, unit)

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            with self._lock:
                self._clear()
                click.echo(self._count.line()[: shutil.get_terminal_size().columns - 1], err=True, nl=False)
        self._clear()

    def _clear(self) -> None:
        if self._live:
            click.echo("\r\x1b[K", err=True, nl=False)


class Count:
    """How far one step is, at its own pace. Nothing is expected of a step that cannot be counted."""

    def __init__(self, done: Callable[[], int] = lambda: 0, expected: int = 0, unit: str = "") -> None:
        self._done, self._expected, self._unit = done, expected, unit
        self._first = self._latest = _or_none(done) or 0
        self._began = self._moved = time.monotonic()

    def line(self) -> str:
        """As it is now."""
        now, seen = time.monotonic(), _or_none(self._done)
        if seen is not None and seen != self._latest:
            self._latest, self._moved = seen, now
        left = remaining(self._latest - self._first, self._expected - self._latest, self._moved - self._began)
        return line(self._latest, self._expected, self._unit, now - self._began, left - (now - self._moved))


def remaining(fresh: int, missing: int, seconds: float) -> float:
    """Seconds that what is missing takes at the pace of the `fresh` ones in so many seconds; 0: nobody knows."""
    return missing / fresh * seconds if fresh > 0 and seconds >= SOON else 0.0


def line(done: int, expected: int, unit: str, seconds: float, left: float) -> str:
    """A bar of `done` of `expected`, and the time left, or where nobody knows that (0 or less) the time it took."""
    time_ = f"about {_minutes(left)} left" if left > 0 else f"{_minutes(seconds)} so far"
    if expected <= 0:
        return f"  {time_}"
    share = min(done / expected, 0.99)
    bar = "#" * int(share * WIDTH)
    return f"  [{bar:-<{WIDTH}}] {share:4.0%}  {_amount(done, expected, unit)}, {time_}"


def _amount(done: int, expected: int, unit: str) -> str:
    if unit != "bytes":
        return f"{done} of {expected} {unit}"
    size, name = (1e9, "GB") if expected >= 1e9 else (1e6, "MB")
    return f"{done / size:.2f} of about {expected / size:.2f} {name}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"


def _or_none(done: Callable[[], int]) -> int | None:
    """None while files come and go under the count."""
    try:
        return done()
    except OSError:
        return None
