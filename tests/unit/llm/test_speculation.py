"""Guessing changes no answer, whatever is guessed; it saves calls where texts repeat, and ends where it does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xraygpt_lite.llm import speculation
from xraygpt_lite.llm.library import EXACT, exact
from xraygpt_lite.llm.quantize import quantize
from xraygpt_lite.llm.requests import Generation
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.llm.speculation import Speculation
from xraygpt_lite.values import DevicePlan, EmbeddingSegment, Sampling, Segment, TokenSegment

TEXT = [5, 6, 7, 8, 9, 10, 11, 12]


def priced(guesser: Speculation, prices: Sequence[float]) -> Speculation:
    """With calls of 1, 4, 8 and 16 rows that take so many seconds here."""
    for rows, seconds in zip((1, *speculation.SIZES), prices, strict=True):
        guesser.called(rows - 1, 0, seconds)
    guesser._hoped = guesser._right = 0.0
    return guesser


FLAT = (1.0, 1.0, 1.0, 1.0)


def test_nothing_is_guessed_from_nothing() -> None:
    assert Speculation().guess([], 8) == []
    assert Speculation([[]]).guess([1, 2], 8) == []


def test_an_answer_goes_on_as_the_last_did() -> None:
    guesser = priced(Speculation([TEXT]), FLAT)
    assert guesser.guess([], 20) == TEXT
    assert guesser.guess(TEXT[:3], 20) == TEXT[3:]
    assert guesser.guess([99, 98, 6, 7], 2) == TEXT[3:5]  # in the middle of another text, as far as may be
    assert guesser.guess([99, 98, 97], 20) == []


def test_what_came_more_often_is_guessed() -> None:
    guesser = priced(Speculation([[1, 2, 3], [1, 2, 4], [1, 2, 4]]), FLAT)
    assert guesser.guess([1, 2], 1) == [4]
    for _ in range(2):
        guesser.learn([1, 2, 3])
    assert guesser.guess([1, 2], 1) == [3]


def test_an_answer_is_learned_as_it_grows() -> None:
    pieces, whole = Speculation(), Speculation([TEXT])
    for end in range(len(TEXT)):
        pieces.learn(TEXT[: end + 1], end)
    assert pieces._followers == whole._followers


def test_dear_calls_are_not_filled() -> None:
    assert priced(Speculation([TEXT]), (1.0, 9.0, 18.0, 36.0)).guess([], 20) == []
    assert len(priced(Speculation([TEXT]), (1.0, 1.2, 9.0, 18.0)).guess([], 20)) == 3


def test_wrong_guesses_end_by_themselves_and_are_tried_again() -> None:
    guesser = priced(Speculation([TEXT] * 9), (1.0, 1.5, 2.0, 4.0))

    def calls() -> Iterator[int]:
        while True:
            guesses = guesser.guess([], 20)
            guesser.called(len(guesses), 0, {0: 1.0, 3: 1.5, 7: 2.0}.get(len(guesses), 4.0))
            yield len(guesses)

    sizes = list(itertools.islice(calls(), 400))
    assert sizes[0] > 0
    quiet = sizes.index(0)
    assert quiet < 20
    tries = sum(size > 0 for size in sizes[quiet:])
    assert 0 < tries < 60


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "_MOST_CONTEXTS", 50)
    guesser = Speculation(np.random.default_rng(0).integers(0, 999, (30, 20)).tolist())
    assert len(guesser._followers) == 50


@pytest.fixture(scope="module", params=EXACT)
def quantized(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not exact(request.param):
        pytest.skip(f"{request.param} is not said to be exact on this CPU, and nothing is guessed then")
    path = tmp_path_factory.mktemp("quantized") / f"{request.param}.gguf"
    quantize(tiny.gguf, path, request.param)
    return path


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if calls cost nothing: whatever can be guessed is."""
    monkeypatch.setattr(Speculation, "_cost", lambda self, size: 1.0)


@pytest.fixture(scope="module")
def segments(tiny: Any) -> Callable[[int], list[Segment]]:
    def make(number: int) -> list[Segment]:
        return [
            TokenSegment(np.arange(20, 32, dtype=np.int32)),
            EmbeddingSegment(tiny.token_embeddings[100 + number : 109 + number]),
            TokenSegment(np.arange(40, 45, dtype=np.int32)),
        ]

    return make


def answers(
    engine: Engine, prompts: Sequence[list[Segment]], reader: Any, sampling: Sampling, stop_ids: tuple[int, ...] = ()
) -> list[tuple[str, Generation, int]]:
    """Text, how it came about and rows held, of each prompt and of a second turn after it."""
    found = []
    for prompt in prompts:
        with engine.open() as slot:
            for turn in (prompt, prompt[2:]):
                stream = slot.generate(turn, sampling, stop_ids=stop_ids, reader=reader())
                text = "".join(stream)
                found.append((text, replace(stream.result, prefill_s=0, generate_s=0), slot.rows))
    return found


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("flash", [True, False])
def test_texts_are_those_of_the_plain_loop(
    quantized: Path, plan: DevicePlan, segments: Any, reader: Any, flash: bool
) -> None:
    """Guesses come from the first round's own answers, and from a text that is never right for long."""
    plan = replace(plan, float32_cache=not flash)
    prompts = [segments(number) for number in (0, 3, 0, 7, 3)]
    for sampling in (Sampling(max_tokens=40), Sampling(max_tokens=23)):
        with Engine(quantized, plan) as engine:
            expected = answers(engine, prompts, reader, sampling)
            wrong = ["".join(reversed(text)) for text, _, _ in expected]
        with Engine(quantized, plan, phrases=wrong) as engine:
            seen = answers(engine, prompts, reader, sampling)
        assert [(text, one.ids, one.finish, one.cached_rows, rows) for text, one, rows in seen] == [
            (text, one.ids, one.finish, one.cached_rows, rows) for text, one, rows in expected
        ]
        assert sum(one.calls for _, one, _ in seen) < 0.8 * sum(one.calls for _, one, _ in expected)


@pytest.mark.usefixtures("eager")
def test_a_stop_among_guesses_ends_the_answer_there(tiny: Any, plan: DevicePlan, segments: Any, reader: Any) -> None:
    sampling, prompt = Sampling(max_tokens=30), segments(1)
    with Engine(tiny.gguf, plan) as engine:
        ids = answers(engine, [prompt], reader, sampling)[0][1].ids
        stops = (ids[11],)
        expected = answers(engine, [prompt, prompt], reader, sampling, stops)
    with Engine(tiny.gguf, plan, phrases=[]) as engine:
        engine._core._speculation.learn(ids)  # type: ignore[union-attr]
        seen = answers(engine, [prompt, prompt], reader, sampling, stops)
    strip = [(text, replace(one, calls=0), rows) for text, one, rows in expected]
    assert [(text, replace(one, calls=0), rows) for text, one, rows in seen] == strip
    assert seen[0][1].calls < expected[0][1].calls


@pytest.mark.usefixtures("eager")
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12), st.booleans()), min_size=1, max_size=5))
def test_whatever_is_guessed_and_cancelled(
    guessing: tuple[Engine, Engine], segments: Any, reader: Any, history: list[tuple[int, int, bool]]
) -> None:
    plain, engine = guessing
    for number, limit, cancel in history:
        sampling = Sampling(max_tokens=limit)
        if cancel:
            with engine.open() as slot:
                stream = slot.generate(segments(number), sampling, stop_ids=(), reader=reader())
                next(stream, None)
                stream.close()
            continue
        one, other = (answers(each, [segments(number)], reader, sampling) for each in (plain, engine))
        assert [(text, result.ids, rows) for text, result, rows in one] == [
            (text, result.ids, rows) for text, result, rows in other
        ]


@pytest.fixture(scope="module")
def guessing(tiny: Any, tmp_path_factory: pytest.TempPathFactory, plan: DevicePlan) -> Iterator[tuple[Engine, Engine]]:
    """The same model twice, plain and guessing."""
    path = tmp_path_factory.mktemp("guessing") / "q4_0.gguf"
    quantize(tiny.gguf, path, "q4_0")
    with Engine(path, plan) as plain, Engine(path, plan, phrases=["the heart is normal"]) as engine:
        yield plain, engine


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("option", [{"temperature": 0.7}, {"min_tokens": 3}, {"repeat_penalty": 1.3}, {"beams": 2}])
def test_only_what_is_simply_likeliest_is_guessed(
    guessing: tuple[Engine, Engine], segments: Any, reader: Any, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> list[int]:
        raise AssertionError

    monkeypatch.setattr(Speculation, "guess", never)
    with guessing[1].open() as slot:
        list(slot.generate(segments(0), Sampling(max_tokens=8, **option), stop_ids=(2,), reader=reader()))


@pytest.mark.usefixtures("eager")
def test_several_at_once_are_not_guessed(
    guessing: tuple[Engine, Engine], segments: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that several answers fill has no room to spare; the last one left alone may be guessed again."""
    engine = guessing[1]
    alone: list[int] = []
    step = engine._core._step_alone

    def watched(request: Any) -> None:
        alone.append(sum(not each.done.is_set() for each in engine._core._active))
        step(request)

    monkeypatch.setattr(engine._core, "_step_alone", watched)
    slots = [engine.open() for _ in range(2)]
    streams = [
        slot.generate(segments(n), Sampling(max_tokens=30), stop_ids=(), reader=reader())
        for n, slot in enumerate(slots)
    ]
    for stream in streams:
        list(stream)
    for slot in slots:
        slot.close()
    assert set(alone) <= {1}
