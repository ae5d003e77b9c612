"""The cores, for the encoder and the language model: the threads of two libraries slow each other down.

Either they take turns, or each has threads of its own. Knows neither of the two.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType


class Turns(AbstractContextManager[int]):
    """As a context manager it is the language model's turn, for one call with so many threads. Any thread.

    The encoder goes first: a step of the language model costs nearly the same with fewer answers in it, so it is better
    to have them all there before.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._gate, self._cores = threading.RLock(), threading.RLock()

    def __enter__(self) -> int:
        with self._gate:
            self._cores.acquire()
        return self._threads

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cores.release()

    @contextmanager
    def first(self) -> Iterator[None]:
        """The encoder's turn: after the call that is running, and before any other; may be nested."""
        with self._gate, self._cores:
            yield


class Sides(AbstractContextManager[int]):
    """Both work at the same time. As a context manager it says how many threads the language model's next call has.

    While the encoder has nothing to do, its threads are the language model's. One thread encodes.
    """

    def __init__(self, threads: int, encoder_threads: int) -> None:
        self._threads, self._all = threads, threads + encoder_threads
        self._encoding = False

    def __enter__(self) -> int:
        return self._threads if self._encoding else self._all

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    @contextmanager
    def first(self) -> Iterator[None]:
        """The encoder works; may be nested."""
        before, self._encoding = self._encoding, True
        try:
            yield
        finally:
            self._encoding = before


def sharing(threads: int, encoder_threads: int) -> Turns | Sides:
    """How the two share the cores: in turn where the encoder has no threads of its own."""
    return Sides(threads, encoder_threads) if encoder_threads else Turns(threads)
