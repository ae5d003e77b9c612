"""Beam search the slow and obvious way: every hypothesis from its ids alone, every step to the limit of tokens.

Shares nothing with the search that it is compared with, and never stops early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xraygpt_lite.values import Sampling

REACH = 100


@dataclass(frozen=True)
class Found:
    """The winner; `margin` is the smallest difference of scores or sums that decided anything."""

    ids: tuple[int, ...]
    score: float
    finish: str
    margin: float


def log_probabilities(
    logits: np.ndarray, ids: tuple[int, ...], sampling: Sampling, stop_ids: Sequence[int]
) -> np.ndarray:
    """Log-probabilities (V,) after the penalty on generated tokens and without barred stops."""
    values = logits.astype(np.float64)
    last = sampling.penalty_last_n
    for token in set(ids if last == -1 else ids[max(0, len(ids) - last) :]):
        values[token] *= 1 / sampling.repeat_penalty if values[token] > 0 else sampling.repeat_penalty
    if len(ids) < sampling.min_tokens:
        values[list(stop_ids)] = -np.inf
    probabilities = np.exp(values - values.max())
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(probabilities / probabilities.sum()))


def search(
    logits: Callable[[tuple[int, ...]], np.ndarray],
    piece: Callable[[int], bytes],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int] = (),
    stop: str = "",
) -> Found:
    """Find the answer; `logits` gives (V,) for the token that follows the ids, `piece` a token's bytes."""
    still: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[float, tuple[int, ...], str]] = []
    margin = math.inf
    for length in range(1, sampling.max_tokens + 1):
        candidates = []
        for place, (ids, total) in enumerate(still):
            logs = log_probabilities(logits(ids), ids, sampling, stop_ids)
            # no more of one beam can matter: stops and the beams that go on
            ranked = np.argsort(-logs, kind="stable")[:REACH]
            candidates += [(-total - logs[token], place, int(token)) for token in ranked if logs[token] > -np.inf]
        candidates.sort()
        grown = []
        left = sampling.beams
        for rank, (cost, place, token) in enumerate(candidates):
            if not left:
                margin = min(margin, cost - candidates[rank - 1][0])
                break
            assert rank < REACH
            ids = (*still[place][0], token)
            text = b"".join(piece(each) for each in ids if each not in stop_ids)
            if token in stop_ids or (stop and stop.encode() in text):
                finished.append((-cost / length, ids, "stop"))
                continue
            left -= 1
            if length == sampling.max_tokens:
                finished.append((-cost / length, ids, "length"))
            else:
                grown.append((ids, -cost))
        still = grown
    # max takes the earliest of equal ones
    best = max(finished, key=lambda each: each[0])
    others = [score for score, ids, _ in finished if ids != best[1]]
    return Found(best[1], best[0], best[2], min([margin, *(best[0] - score for score in others)]))
