"""Beam search as bookkeeping: which hypotheses stay open, which has won, and when no other can win any more.

Deterministic: nothing is drawn. The score of a hypothesis is the sum of its tokens' log-probabilities divided by their
number. All generated tokens count in both, the stop id or the tokens of the stop string that ended it among them. The
probabilities are the model's after the repeat penalty and without the barred stop ids, made to sum to 1 again: those
that sampling at temperature 1 would draw from.

In each step every open beam is grown by every token, and the results are looked at by falling sum of
log-probabilities; equal ones by the earlier beam, then by the lower token id. One that has stopped is finished: it is
the best if its score is higher than that of all finished before. The others are the next step's open beams, until there
are as many as wanted; at the limit of tokens these are finished too.

Knows logits as arrays and answers as drafts. Knows no cache, no context and no thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..values import Float32, Sampling
from .draft import Draft

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Beam:
    """One hypothesis.

    Attributes
    ----------
    draft
        Its tokens and text.
    total
        Sum of its tokens' log-probabilities, at most 0.
    parent
        Index, among the open beams of the step before, of the one that it continues.
    """

    draft: Draft
    total: float
    parent: int

    @property
    def score(self) -> float:
        """Mean log-probability of its tokens, of which there is at least one."""
        return self.total / len(self.draft.ids)


class Beams:
    """The hypotheses about one answer.

    Parameters
    ----------
    root
        The empty answer.
    sampling
        `beams` is the width; `max_tokens`, `min_tokens`, `repeat_penalty` and `penalty_last_n` are honoured.
    stop_ids
        Barred until `min_tokens` others were chosen.

    Attributes
    ----------
    open
        Beams that go on, all of one length, by falling total.
    best
        The finished beam with the highest score, the earliest of equal ones.
    """

    def __init__(self, root: Draft, sampling: Sampling, stop_ids: Sequence[int]) -> None:
        self._sampling = sampling
        self._stop_ids = list(stop_ids)
        self.open = [Beam(root, 0.0, 0)]
        self.best: Beam | None = None

    @property
    def done(self) -> bool:
        """Whether no open beam can win any more.

        A log-probability is at most 0. So a total can only fall, and the most that it can be divided by is the limit of
        tokens: total / max_tokens bounds the score of all that an open beam can become. An equal score does not win.
        """
        if self.best is None or not self.open:
            return not self.open
        return self.best.score >= self.open[0].total / self._sampling.max_tokens

    def step(self, logits: Float32, piece: Callable[[int], bytes]) -> bool:
        """Grow every open beam by one token.

        Parameters
        ----------
        logits
            (len(open), V): what predicts each open beam's next token.
        piece
            Gives a token's bytes.

        Returns
        -------
        bool
            Whether there is a new best, whose parent is an index into the beams that were open until now.
        """
        before, best = self.open, self.best
        rows = zip(before, logits, strict=True)
        totals = np.stack([beam.total + self._log_probabilities(beam.draft.ids, row) for beam, row in rows])
        self.open = []
        unstopped = 0
        for parent, token in _ranked(totals):
            total = float(totals[parent, token])
            if unstopped == self._sampling.beams or total == -math.inf:
                break
            draft = before[parent].draft.branch()
            draft.add(token, piece(token))
            beam = Beam(draft, total, parent)
            unstopped += draft.finish != "stop"
            if draft.finish is None:
                self.open.append(beam)
            elif self.best is None or beam.score > self.best.score:
                self.best = beam
        return self.best is not best

    def _log_probabilities(self, ids: Sequence[int], logits: Float32) -> Float64:
        """Log-probabilities (V,) of what follows `ids`; -inf for what is barred."""
        given = self._sampling
        weighed = logits.copy()
        if len(ids) < given.min_tokens:
            weighed[self._stop_ids] = -np.inf
        if given.repeat_penalty != 1.0 and given.penalty_last_n != 0:
            recent = list(set(ids if given.penalty_last_n == -1 else ids[-given.penalty_last_n :]))
            penalty, seen = np.float32(given.repeat_penalty), weighed[recent]
            weighed[recent] = np.where(seen > 0, seen / penalty, seen * penalty)
        shifted: Float64 = weighed.astype(np.float64) - weighed.max()
        logs: Float64 = shifted - np.log(np.exp(shifted).sum())
        return logs


def _ranked(totals: Float64) -> Iterator[tuple[int, int]]:
    """Rows and columns by falling value, equal ones in their order; few are asked for, so few are sorted at a time."""
    flat = totals.ravel()
    done, size = 0, 64
    while done < flat.size:
        place = max(0, flat.size - size)
        among = np.flatnonzero(flat >= np.partition(flat, place)[place])
        order = among[np.argsort(-flat[among], kind="stable")]
        for at in order[done:]:
            row, column = divmod(int(at), totals.shape[1])
            yield row, column
        done = len(order)
        size = 16 * done
