"""The bookkeeping of beam search on made logits, against the slow reference, and what a draft is."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import beam_reference
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xraygpt_lite.answer import AnswerReader
from xraygpt_lite.llm.beams import Beams
from xraygpt_lite.llm.draft import Draft
from xraygpt_lite.values import Sampling

LETTERS = [b"", b"a", b"b", b"c", b"ab", b"ca"]
VOCAB = len(LETTERS)


def made_logits(seed: int, scale: float = 2.0) -> Any:
    """Logits that depend on every id before, the same for the same seed."""

    def logits(ids: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, len(ids), *ids])
        return (scale * rng.standard_normal(VOCAB)).astype(np.float32)

    return logits


def search(logits: Any, sampling: Sampling, stop_ids: tuple[int, ...] = (), stop: str = "") -> tuple[Beams, int]:
    beams = Beams(Draft(AnswerReader([stop]), stop_ids, sampling.max_tokens), sampling, stop_ids)
    steps = 0
    while not beams.done:
        rows = np.stack([logits(tuple(beam.draft.ids)) for beam in beams.open])
        before = beams.best
        assert beams.step(rows, LETTERS.__getitem__) == (beams.best is not before)
        assert [beam.total for beam in beams.open] == sorted((beam.total for beam in beams.open), reverse=True)
        assert len(beams.open) <= sampling.beams
        steps += 1
    return beams, steps


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    beams=st.integers(1, 10),
    max_tokens=st.integers(1, 9),
    min_tokens=st.integers(0, 3),
    stop_ids=st.sampled_from([(), (0,), (0, 3)]),
    stop=st.sampled_from(["", "b", "cab", "abc"]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    last_n=st.sampled_from([-1, 0, 1, 64]),
)
def test_it_finds_what_the_reference_finds(
    seed: int,
    beams: int,
    max_tokens: int,
    min_tokens: int,
    stop_ids: tuple[int, ...],
    stop: str,
    penalty: float,
    last_n: int,
) -> None:
    given = Sampling(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        beams=beams,
        repeat_penalty=penalty,
        penalty_last_n=last_n,
    )
    logits = made_logits(seed)
    expected = beam_reference.search(logits, LETTERS.__getitem__, given, stop_ids=stop_ids, stop=stop)
    assume(expected.margin > 1e-5)
    best = search(logits, given, stop_ids, stop)[0].best
    assert best is not None
    assert (tuple(best.draft.ids), best.draft.finish) == (expected.ids, expected.finish)
    assert best.score == pytest.approx(expected.score, abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_with_beams_enough_it_is_the_best_of_all_answers(seed: int) -> None:
    """Two tokens of six: at most 6 beams are open, so nothing is ever left out."""
    logits, stop = made_logits(seed), 0
    best = search(logits, Sampling(max_tokens=2, beams=10), (stop,))[0].best
    assert best is not None

    def score(ids: tuple[int, ...]) -> float:
        logs = [
            beam_reference.log_probabilities(logits(ids[:at]), ids[:at], Sampling(), ())[ids[at]]
            for at in range(len(ids))
        ]
        return math.fsum(logs) / len(ids)

    every = [(stop,), *itertools.product(range(1, VOCAB), range(VOCAB))]
    assert best.score == pytest.approx(max(map(score, every)), abs=1e-6)


def table(*rows: list[float]) -> Any:
    """Logits by length alone, given as probabilities of the first tokens."""

    def logits(ids: tuple[int, ...]) -> np.ndarray:
        row = rows[min(len(ids), len(rows) - 1)]
        return np.log(np.array([*row, *[1e-30] * (VOCAB - len(row))], np.float32))

    return logits


def test_the_stop_token_counts_in_sum_and_length() -> None:
    beams, _ = search(table([0.1, 0.9], [0.6, 0.4]), Sampling(max_tokens=2, beams=2), (0,))
    assert beams.best is not None
    assert beams.best.draft.ids == [1, 0]
    assert beams.best.score == pytest.approx((math.log(0.9) + math.log(0.6)) / 2, abs=1e-6)
    assert (beams.best.draft.text, beams.best.draft.finish) == ("a", "stop")


def test_it_stops_as_soon_as_no_open_beam_can_win_and_not_before() -> None:
    # finished: log 0.5; open: a sum of log 0.5 at once, over up to 3 tokens, so that it can still win
    long_shot = table([0.5, 0.5], [0.0001, 0.9999])
    beams, steps = search(long_shot, Sampling(max_tokens=3, beams=2), (0,))
    assert beams.best is not None
    assert (beams.best.draft.ids, beams.best.draft.finish, steps) == ([1, 1, 1], "length", 3)
    # finished: log 0.999; open: log 0.001 / 3 at the most
    beams, steps = search(table([0.999, 0.001]), Sampling(max_tokens=3, beams=2), (0,))
    assert beams.best is not None
    assert (beams.best.draft.ids, steps) == ([0], 1)


def test_ties_go_to_the_earlier_beam_and_the_lower_token() -> None:
    flat = Sampling(max_tokens=4, beams=3)
    beams = Beams(Draft(AnswerReader([]), (), 4), flat, ())
    beams.step(np.zeros((1, VOCAB), np.float32), LETTERS.__getitem__)
    assert [beam.draft.ids for beam in beams.open] == [[0], [1], [2]]
    beams.step(np.zeros((3, VOCAB), np.float32), LETTERS.__getitem__)
    assert [beam.draft.ids for beam in beams.open] == [[0, 0], [0, 1], [0, 2]]
    best = search(lambda ids: np.zeros(VOCAB, np.float32), flat)[0].best
    assert best is not None
    assert best.draft.ids == [0, 0, 0, 0]


def test_many_stops_before_the_first_beam_that_goes_on() -> None:
    vocab = 3000
    ending = tuple(range(0, vocab - 5))
    row = np.linspace(9, 0, vocab, dtype=np.float32)
    row[10:900] = row[10]
    beams = Beams(Draft(AnswerReader([]), ending, 9), Sampling(max_tokens=9, beams=3), ending)
    beams.step(row[None], lambda token: b"")
    assert [beam.draft.ids for beam in beams.open] == [[2995], [2996], [2997]]
    assert beams.best is not None
    assert beams.best.draft.ids == [0]


def test_barred_stops_leave_fewer_beams_rather_than_impossible_ones() -> None:
    given = Sampling(max_tokens=2, min_tokens=2, beams=10)
    beams = Beams(Draft(AnswerReader([]), (0, 1, 2, 3), 2), given, (0, 1, 2, 3))
    beams.step(np.zeros((1, VOCAB), np.float32), LETTERS.__getitem__)
    assert [beam.draft.ids for beam in beams.open] == [[4], [5]]


def test_what_concerns_draws_is_ignored() -> None:
    logits = made_logits(7, scale=6.0)
    given = Sampling(max_tokens=12, beams=4)
    first = search(logits, given, (0,))[0].best
    again = search(logits, replace(given, seed=5, top_k=3, top_p=0.5), (0,))[0].best
    assert first is not None
    assert again is not None
    assert (first.draft.ids, first.total) == (again.draft.ids, again.total)


def test_a_branch_of_a_draft_goes_on_by_itself() -> None:
    o, u = "ö".encode(), "ô".encode()
    assert o[0] == u[0]
    draft = Draft(AnswerReader(["xy"]), (0,), 3)
    draft.add(7, o[:1])
    twin = draft.branch()
    assert (draft.add(8, o[1:]), twin.add(9, u[1:] + b"x")) == ("ö", "ô")
    twin.add(4, b"yz")
    assert (draft.ids, draft.text, draft.finish, draft.kept) == ([7, 8], "ö", None, 2)
    assert (twin.ids, twin.text, twin.finish, twin.kept) == ([7, 9, 4], "ô", "stop", 1)
    assert twin.branch().finish == "stop"
    assert draft.add(5, b"x") == ""
    assert (draft.finish, draft.kept, draft.rest(), twin.rest()) == ("length", 3, "x", "")
