"""Requests on their way through the engine: what each still has to decode, and what it tells its caller.

A request is driven by the engine thread alone: `chunks` are the rows to decode, `advance` takes the logits. The caller
only reads `events` and sets `cancelled`. Knows nothing of threads or of other requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event

import numpy as np

from ..values import Finish, Float32, Int32, Sampling, Segment
from .draft import Draft, Reader
from .native import Context
from .sampling import Sampler
from .sequence import Chunk, Held, chunks, count


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
        Rows of the segments; those that the cache held already are counted too.
    cached_rows
        Rows in the slot's cache afterwards: the prompt and the tokens wholly before the stop.
    prefill_s, generate_s
        Seconds until the first token's logits, and from there to the end.
    carry
        Text of the answer that belongs to a token which was cut; goes before the next turn's text.
    calls
        Decode calls after the prompt's: fewer than tokens where guesses were right.
    """

    ids: tuple[int, ...]
    finish: Finish
    prompt_rows: int
    cached_rows: int
    prefill_s: float
    generate_s: float
    carry: str
    calls: int


Outcome = Generation | Float32 | BaseException


class Request:
    """Segments to prefill into one sequence, and what follows them.

    Attributes
    ----------
    opening
        The token ids that an empty sequence begins with, where rows of another kind follow them: a prompt's fixed text
        before the image. None for any other request.
    """

    def __init__(self, held: Held, segments: Sequence[Segment], chunk: int) -> None:
        self.held = held
        self.start = (held.rows, held.tail)
        self.prompt_rows = count(segments)
        self.chunks: deque[Chunk] = deque(chunks(segments, chunk))
        self.opening = None if held.rows else _opening(self.chunks)
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


def _opening(parts: Sequence[Chunk]) -> bytes | None:
    """The first chunk's token ids, if rows of another kind follow it."""
    if len(parts) < 2 or parts[0].content.ndim != 1 or parts[1].content.ndim == 1:
        return None
    return parts[0].content.tobytes()


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
    """Forget the newest rows of a sequence; `tail` is the logits after the last that stays, where they are known."""

    def __init__(self, held: Held, rows: int, tail: Float32 | None = None) -> None:
        super().__init__(held, (), 1)
        self._rows, self._tail = rows, tail

    def advance(self, context: Context, rows: Sequence[int]) -> None:
        """Cut the cache, and report that there are no logits."""
        del rows  # nothing was decoded
        context.cut(self.held.id, self._rows)
        self.held.rows, self.held.tail = self._rows, self._tail
        self.end(np.empty((0, 0), np.float32))


class Answer(Request):
    """A request that ends in a `Generation`."""

    def __init__(self, held: Held, segments: Sequence[Segment], chunk: int) -> None:
        super().__init__(held, segments, chunk)
        self._base = held.rows + self.prompt_rows
        self._born = time.perf_counter()
        self._prefilled = self._born
        self._calls = 0

    def _complete(self, context: Context, draft: Draft, unseen: str = "") -> None:
        """Show the rest of the text after `unseen`, cut the cache to the tokens wholly before the stop, and report."""
        text = unseen + draft.rest()
        if text:
            self.events.put(text)
        held, rows = self.held, self._base + draft.kept
        if held.rows > rows:
            context.cut(held.id, rows)
        held.rows, held.tail = rows, None
        now = time.perf_counter()
        assert draft.finish is not None
        self.end(
            Generation(
                ids=tuple(draft.ids),
                finish=draft.finish,
                prompt_rows=self.prompt_rows,
                cached_rows=rows,
                prefill_s=self._prefilled - self._born,
                generate_s=now - self._prefilled,
                carry=draft.carry,
                calls=self._calls,
            )
        )


class Generate(Answer):
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
        pieces: bool,
    ) -> None:
        super().__init__(held, segments, chunk)
        self._pieces = pieces
        self._sampler = sampler
        self._limit = sampling.max_tokens
        self._draft = Draft(reader, stop_ids, sampling.max_tokens)

    @property
    def ids(self) -> Sequence[int]:
        """The tokens so far. The row of the last one is to be decoded next."""
        return self._draft.ids

    @property
    def wants_logits(self) -> bool:
        """False for the row of the very last token, which only has to enter the cache."""
        return self._draft.finish is None

    @property
    def guessable(self) -> int:
        """How many tokens after the next row's may be guessed at: none where choosing is not just the likeliest."""
        return self._limit - len(self._draft.ids) - 1 if self._sampler.greedy and self.wants_logits else 0

    def advance(self, context: Context, rows: Sequence[int], guesses: Sequence[int] = ()) -> None:
        """Choose the next token, show its text, and end where it stops.

        A row may be followed by those of guesses: each gives a further token for as long as the guess before was right.
        The others are cut off again.
        """
        draft = self._draft
        self._calls += bool(draft.ids)
        if not self.wants_logits:
            self._complete(context, draft, self._unseen)
            return
        if not rows:
            return
        if not draft.ids:
            self._prefilled = time.perf_counter()
        for used, row in enumerate(rows, 1):
            token = self._sampler.sample(context, row)
            text = draft.add(token, context.model.piece(token))
            if text and self._pieces:
                self.events.put(text)
            if draft.finish is not None or used > len(guesses) or token != guesses[used - 1]:
                break
        if used < len(rows):
            self.held.rows -= len(rows) - used
            context.cut(self.held.id, self.held.rows)
        if draft.finish is not None and draft.kept < len(draft.ids):
            self._complete(context, draft, self._unseen)

    @property
    def _unseen(self) -> str:
        return "" if self._pieces else self._draft.text

    def close(self) -> None:
        """Free the sampler."""
        self._sampler.close()
