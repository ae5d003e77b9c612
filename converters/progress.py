"""What a conversion tells whoever waits for it; knows nothing of how that is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Is told how a conversion goes on."""

    def step(self, text: str, *, kept: bool = False) -> None:
        """A step begins, or is one that an earlier run has finished."""

    def counting(self, done: Callable[[], int], expected: int, unit: str) -> None:
        """Until the next step, `done()` of about `expected` "bytes" or other things are done; asked by a thread."""


class Quiet:
    """Keeps it to itself."""

    def step(self, text: str, *, kept: bool = False) -> None:
        """Say nothing."""

    def counting(self, done: Callable[[], int], expected: int, unit: str) -> None:
        """Count nothing."""


QUIET = Quiet()
