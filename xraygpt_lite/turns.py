"""The cores, for the encoder or the language model in turn: the threads of two libraries slow each other down.

The encoder goes first: a step of the language model costs nearly the same with fewer answers in it, so it is better to
have them all there before. Knows neither of the two.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType


class Turns(AbstractContextManager["Turns"]):
    """As a context manager it is the language model's turn, for one call. Any thread."""

    def __init__(self) -> None:
        self._gate, self._cores = threading.RLock(), threading.RLock()

    def __enter__(self) -> Turns:
        with self._gate:
            self._cores.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cores.release()

    @contextmanager
    def first(self) -> Iterator[None]:
        """The encoder's turn: after the call that is running, and before any other; may be nested."""
        with self._gate, self._cores:
            yield
