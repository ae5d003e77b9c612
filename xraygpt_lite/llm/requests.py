"""Requests on their way through the engine: what each still has to decode, and what it tells its caller.

A request is driven by the engine thread alone: `work` names the rows to decode, `advance` takes the logits. The caller
only reads `events` and sets `cancelled`. Knows nothing of threads or of other requests.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import Protocol

import numpy as np

from ..values import Finish, Float32, Int32, Sampling, Segment
from .native import Context
from .sampling import Sampler
from .sequence import Chunk, Held, chunks, count


class Reader(Protocol):
    """Turns the bytes of generated tokens into text that may be shown, and knows where an answer stops.

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


@dataclass(frozen=True)
class Generation:
    """One finished generation.

    Attributes
    ----------
    ids
        Every token chosen, in order: those that a stop string cut off and the stop id that ended it among them.
    finish
        "stop": a stop string or stop id came. "length": max_tokens were chosen.
    prompt_rows
        Rows prefilled in this call.
    cached_rows
        Rows in the slot's cache afterwards: the prompt and the tokens wholly before the stop.
    prefill_s, generate_s
        Seconds until the first token's logits, and from there to the end.
    carry
        Text of the answer that belongs to a token which was cut; goes before the next turn's text.
    """

    ids: tuple[int, ...]
    finish: Finish
    prompt_rows: int
    cached_rows: int
    prefill_s: float
    generate_s: float
    carry: str


Outcome = Generation | Float32 | BaseException


class Request:
    """Segments to prefill into one sequence, and what follows them."""

    def __init__(self, held: Held, segments: Sequence[Segment], chunk: int) -> None:
        self.held = held
        self.start = (held.rows, held.tail)
        self.prompt_rows = count(segments)
        self.chunks: deque[Chunk] = deque(chunks(segments, chunk))
        self.events: SimpleQueue[str | Outcome] = SimpleQueue()
        self.done = Event()
        self.cancelled = False

    def advance(self, context: Context, rows: Sequence[int]) -> None:
        """Take the logits of the rows just decoded (indices into the batch); engine thread only."""
        raise NotImplementedError

    def end(self, outcome: Outcome) -> None:
        """Tell the caller how it ended."""
        self.close()
        # First: who has read the outcome may use the slot again at once.
        self.done.set()
        self.events.put(outcome)

    def close(self) -> None:
        """Free what is native."""


class Trace(Request):
    """Logits that predict each of some given ids, after the segments."""

    def __init__(self, held: Held, segments: Sequence[Segment], chunk: int, ids: Int32) -> None:
        super().__init__(held, segments, chunk)
        self._kept = held.rows + self.prompt_rows
        self._logits: list[Float32] = []
        if not self.chunks and held.tail is not None:
            self._logits.append(held.tail)
        self._wanted = len(ids)
        for start in range(0, len(ids) - 1, chunk):
            part = ids[start : min(start + chunk, len(ids) - 1)]
            self.chunks.append(Chunk(part, len(part)))

    def advance(self, context: Context, rows: Sequence[int]) -> None:
        """Keep the logits; after the last, cut the given ids off again."""
        self._logits += [context.logits(row) for row in rows]
        if not self.chunks:
            context.cut(self.held.id, self._kept)
            self.held.rows, self.held.tail = self._kept, self._logits[0]
            self.end(np.stack(self._logits[: self._wanted]))


class Cut(Request):
    """Forget the newest rows of a sequence."""

    def __init__(self, held: Held, rows: int) -> None:
        super().__init__(held, (), 1)
        self._rows = rows

    def advance(self, context: Context, rows: Sequence[int]) -> None:
        """Cut the cache, and report that there are no logits."""
        del rows  # nothing was decoded
        context.cut(self.held.id, self._rows)
        self.held.rows, self.held.tail = self._rows, None
        self.end(np.empty((0, 0), np.float32))


class Generate(Request):
    """Tokens chosen one by one after the segments, until a stop or the limit."""

    def __init__(
        self,
        held: Held,
        segments: Sequence[Segment],
        chunk: int,
        *,
        sampler: Sampler,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        reader: Reader,
    ) -> None:
        super().__init__(held, segments, chunk)
        self._sampler = sampler
        self._limit = sampling.max_tokens
        self._stop_ids = frozenset(stop_ids)
        self._reader = reader
        self._base = held.rows + self.prompt_rows
        self._ids: list[int] = []
        self._ends: list[int] = []
        self._bytes = bytearray()
        self._finish: Finish | None = None
        self._born = time.perf_counter()
        self._prefilled = self._born

    @property
    def next_token(self) -> int:
        """The token whose row is to be decoded next."""
        return self._ids[-1]

    @property
    def wants_logits(self) -> bool:
        """False for the row of the very last token, which only has to enter the cache."""
        return self._finish is None

    def advance(self, context: Context, rows: Sequence[int]) -> None:
        """Choose the next token, show its text, and end where it stops."""
        if self._finish is not None:
            self._complete(context)
            return
        if not rows:
            return
        if not self._ids:
            self._prefilled = time.perf_counter()
        context.logits(rows[0])
        token = self._sampler.sample(context, rows[0])
        self._ids.append(token)
        if token in self._stop_ids:
            self._finish = "stop"
            self._complete(context)
            return
        piece = context.model.piece(token)
        self._bytes += piece
        self._ends.append(len(self._bytes))
        text = self._reader.feed(piece)
        if text:
            self.events.put(text)
        if self._reader.stopped:
            self._finish = "stop"
            if self._kept_tokens() < len(self._ids):
                self._complete(context)
        elif len(self._ids) == self._limit:
            self._finish = "length"

    def _kept_bytes(self) -> int:
        return min(self._reader.kept_bytes, len(self._bytes)) if self._reader.stopped else len(self._bytes)

    def _kept_tokens(self) -> int:
        return bisect_right(self._ends, self._kept_bytes())

    def _complete(self, context: Context) -> None:
        """Cut the cache to the tokens wholly before the stop, and report."""
        rest = self._reader.finish()
        if rest:
            self.events.put(rest)
        kept = self._kept_tokens()
        held = self.held
        if held.rows > self._base + kept:
            context.cut(held.id, self._base + kept)
        held.rows, held.tail = self._base + kept, None
        carried = self._bytes[self._ends[kept - 1] if kept else 0 : self._kept_bytes()]
        now = time.perf_counter()
        assert self._finish is not None
        self.end(
            Generation(
                ids=tuple(self._ids),
                finish=self._finish,
                prompt_rows=self.prompt_rows,
                cached_rows=held.rows,
                prefill_s=self._prefilled - self._born,
                generate_s=now - self._prefilled,
                carry=carried.decode("utf-8", "replace"),
            )
        )

    def close(self) -> None:
        """Free the sampler."""
        self._sampler.close()
