"""Beam search on the engine: a context of its own for the beams of one answer, freed when the answer ends.

Knows native contexts and requests; which beams live is decided by `beams`. The prompt is prefilled once, into the
slot's own sequence, and shared with the beams by copying its rows. The rows of the best finished beam are put back
there, so that a next turn goes on from them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..values import DevicePlan, Float32, Sampling, Segment
from .beams import Beam, Beams
from .draft import Draft, Reader
from .native import Batch, Context
from .requests import Answer
from .sampling import check
from .sequence import Chunk, Held


class Search(Answer):
    """The best answer that beam search finds after the segments. Its text comes whole, at the end.

    Each beam has a sequence with room for what the slot holds, the prompt and `max_tokens`, rounded up to 256 rows by
    llama.cpp: at 7 billion parameters and a float16 cache half a megabyte a row. Sequences are streams of their own,
    because rows decoded together are then bit for bit what each is alone, also with quantized weights. In one common
    stream they are not.
    """

    def __init__(
        self,
        held: Held,
        segments: Sequence[Segment],
        chunk: int,
        *,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        reader: Reader,
        plan: DevicePlan,
    ) -> None:
        check(sampling)
        super().__init__(held, segments, chunk)
        self._beams = Beams(Draft(reader, stop_ids, sampling.max_tokens), sampling, stop_ids)
        self._plan = replace(
            plan, sequences=sampling.beams, batch=sampling.beams, context=self._base + sampling.max_tokens
        )
        self._own: Context | None = None
        self._batch = Batch(sampling.beams)
        self._sequences = [0]

    def advance(self, context: Context, rows: Sequence[int]) -> None:
        """Take one step of the search; the first one follows the prompt's last row."""
        if self.chunks:
            return
        if not self._beams.done:
            self._step(context, rows)
        if self._beams.done:
            self._end(context)
        else:
            self._arrange(context)

    def close(self) -> None:
        """Free the beams' context."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _step(self, context: Context, rows: Sequence[int]) -> None:
        if rows:
            self._prefilled = time.perf_counter()
            logits = context.logits(rows[0])[None]
        else:
            logits = self._decode()
        if self._beams.step(logits, context.model.piece):
            self._keep(context)

    def _decode(self) -> Float32:
        """Decode the last token of every open beam in one call; return logits (beams, V) in the beams' order."""
        assert self._own is not None
        beams = self._beams.open
        # Rows of neighbouring sequences, in their order, share a micro-batch.
        order = np.argsort(self._sequences)
        tokens = np.array([beams[index].draft.ids[-1] for index in order], np.int32)
        position = self._base + len(beams[0].draft.ids) - 1
        self._batch.put(tokens, position, np.array(self._sequences)[order], True)
        self._own.decode(self._batch)
        return np.stack([self._own.logits(int(row)) for row in np.argsort(order)])

    def _keep(self, context: Context) -> None:
        """Put the rows of the new best, all but its last token's, into the slot's own sequence."""
        best = self._best
        if self._own is not None:
            context.restore(self.held.id, self._own.save(self._sequences[best.parent]))
        self.held.rows = self._base + len(best.draft.ids) - 1

    def _arrange(self, context: Context) -> None:
        """Give every open beam a sequence with its rows: its parent's, or a copy where a sibling has taken that."""
        if self._own is None:
            self._own = Context(context.model, self._plan, self._plan.context)
            self._own.restore(0, context.save(self.held.id))
        parents = [self._sequences[beam.parent] for beam in self._beams.open]
        free = iter(sorted(set(range(self._plan.sequences)) - set(parents)))
        self._sequences = []
        for parent in parents:
            sequence = parent if parent not in self._sequences else next(free)
            if sequence != parent:
                self._own.copy(parent, sequence)
            self._sequences.append(sequence)

    def _end(self, context: Context) -> None:
        """Report the best; first, the row of a last token that belongs to the answer has to enter the cache."""
        self.close()
        draft = self._best.draft
        if self.held.rows < self._base + draft.kept:
            self.chunks.append(Chunk(np.array(draft.ids[-1:], np.int32), 0))
        else:
            self._complete(context, draft, draft.text)

    @property
    def _best(self) -> Beam:
        assert self._beams.best is not None
        return self._beams.best
