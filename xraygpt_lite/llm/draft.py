"""An answer while it is written: its tokens, their bytes, its text, and where it stops.

Knows token ids, bytes and a reader of text. Knows no model, cache or probability.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Collection
from typing import Protocol

from ..values import Finish


class Reader(Protocol):
    """Turns the bytes of generated tokens into text that may be shown, and knows where an answer stops.

    Beam search makes a reader for every beam with `copy.deepcopy`.

    Attributes
    ----------
    stopped
        A stop string has come.
    kept_bytes
        Bytes of the answer before the stop string; valid once stopped.
    """

    stopped: bool

    @property
    def kept_bytes(self) -> int: ...

    def feed(self, piece: bytes) -> str:
        """Take one token's bytes; return the text that may be shown now, holding back partial stops and characters."""
        ...

    def finish(self) -> str:
        """Return the text still held back; called once, at the end."""
        ...


class Draft:
    """One answer so far.

    Parameters
    ----------
    reader
        Decodes the text and finds stop strings.
    stop_ids
        Token ids that end the answer and have no text.
    limit
        Most tokens of an answer.

    Attributes
    ----------
    ids
        Every token so far: what a stop string cuts off and the stop id that ended it among them.
    text
        What may be shown so far.
    finish
        None while the answer goes on.
    """

    def __init__(self, reader: Reader, stop_ids: Collection[int], limit: int) -> None:
        self._reader = reader
        self._stop_ids = frozenset(stop_ids)
        self._limit = limit
        self._bytes = bytearray()
        self._ends: list[int] = []
        self.ids: list[int] = []
        self.text = ""
        self.finish: Finish | None = None

    def add(self, token: int, piece: bytes) -> str:
        """Take the next token and its bytes; return the text that may be shown with it."""
        self.ids.append(token)
        if token in self._stop_ids:
            self.finish = "stop"
            return ""
        self._bytes += piece
        self._ends.append(len(self._bytes))
        text = self._reader.feed(piece)
        self.text += text
        if self._reader.stopped:
            self.finish = "stop"
        elif len(self.ids) == self._limit:
            self.finish = "length"
        return text

    def rest(self) -> str:
        """Return the text still held back; called once, at the end."""
        return self._reader.finish()

    @property
    def kept(self) -> int:
        """Tokens that lie wholly before the stop: those that a next turn goes on from."""
        return bisect_right(self._ends, self._kept_bytes())

    @property
    def carry(self) -> str:
        """Text of the answer that belongs to a token which is not kept."""
        kept = self.kept
        begin = self._ends[kept - 1] if kept else 0
        return self._bytes[begin : self._kept_bytes()].decode("utf-8", "replace")

    def branch(self) -> Draft:
        """Return a copy that goes on by itself."""
        twin = Draft(copy.deepcopy(self._reader), self._stop_ids, self._limit)
        twin._bytes, twin._ends = self._bytes[:], self._ends[:]
        twin.ids, twin.text, twin.finish = self.ids[:], self.text, self.finish
        return twin

    def _kept_bytes(self) -> int:
        return min(self._reader.kept_bytes, len(self._bytes)) if self._reader.stopped else len(self._bytes)
