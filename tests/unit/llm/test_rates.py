"""The bare loop does the engine's work, and an engine can forget it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.errors import ClosedError
from xraygpt_lite.llm import native, rates
from xraygpt_lite.llm.scheduler import Engine, Generation
from xraygpt_lite.values import DevicePlan, EmbeddingSegment, Sampling, Segment, TokenSegment

ALONE = DevicePlan(threads=1, context=256, batch=32, float32_cache=True)
STEPS = 24


@pytest.fixture
def mixed(prompt: TokenSegment, engine: Engine) -> list[Segment]:
    """20 tokens, 40 rows of embeddings, 50 tokens: an opening, and five chunks of at most 32 rows."""
    rows = np.random.default_rng(0).normal(0, 1, (40, engine.width)).astype(np.float32)
    return [TokenSegment(prompt.ids[:20]), EmbeddingSegment(rows), TokenSegment(prompt.ids[20:])]


@pytest.fixture
def ask(mixed: list[Segment], reader: Any) -> Callable[..., Generation]:
    def answer(engine: Engine, tokens: int = STEPS) -> Generation:
        with engine.open() as slot:
            stream = slot.generate(mixed, Sampling(max_tokens=tokens), stop_ids=(), reader=reader(), pieces=False)
            list(stream)
            return stream.result

    return answer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each decode call that goes through a context."""
    seen: list[int] = []
    real = native.Context.decode

    def counted(self: native.Context, batch: native.Batch) -> None:
        seen.append(batch.rows)
        real(self, batch)

    monkeypatch.setattr(native.Context, "decode", counted)
    return seen


def test_a_bare_loop_chooses_what_the_engine_chooses(
    tiny: Any, mixed: list[Segment], ask: Callable[..., Generation]
) -> None:
    with Engine(tiny.gguf, ALONE) as engine, rates.Bare(engine) as bare:
        said = ask(engine)
        assert len(set(said.ids)) > 3  # not one token for ever
        first = bare.run(mixed, STEPS)
        assert first.ids[:STEPS] == said.ids
        assert min(first.prefill_s, first.decode_s) > 0
        other = bare.run([TokenSegment(np.arange(3, 40, dtype=np.int32))], 3)
        assert len(other.ids) == 4
        assert bare.run(mixed, STEPS).ids == first.ids  # nothing of the run before is left
        assert ask(engine).ids == said.ids


def test_its_rows_are_the_engine_s(
    tiny: Any, mixed: list[Segment], ask: Callable[..., Generation], calls: list[int]
) -> None:
    with Engine(tiny.gguf, ALONE) as engine:
        said = ask(engine)
        ours, calls[:] = calls[:], []
        with rates.Bare(engine) as bare:
            bare.run(mixed, said.calls)
    assert calls == ours[: -said.calls] == [20, 32, 32, 26]
    assert ours[-said.calls :] == [1] * said.calls  # a bare loop's steps do not pass the context's own call


def test_the_loop_has_the_engine_s_thread_and_measuring_one_that_ends(
    tiny: Any, mixed: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP's threads stay with the one that calls: with a second set of them, both would be measured too slow."""
    names: set[str] = set()
    real = native.Context.decode

    def watched(self: native.Context, batch: native.Batch) -> None:
        names.add(threading.current_thread().name)
        real(self, batch)

    monkeypatch.setattr(native.Context, "decode", watched)
    with Engine(tiny.gguf, ALONE) as engine, rates.Bare(engine) as bare:
        bare.run(mixed, 2)
        assert names == {engine._core._thread.name}
    names.clear()
    rates.step_seconds(tiny.gguf, ALONE, (1, 2))
    assert len(names) == 1
    assert not names & {thread.name for thread in threading.enumerate()}


def test_its_context_is_closed_before_the_engine(tiny: Any) -> None:
    with Engine(tiny.gguf, ALONE) as engine:
        bare = rates.Bare(engine)
        bare.close()
        bare.close()
        with pytest.raises(ClosedError):
            bare.run([TokenSegment(np.ones(1, np.int32))], 1)


def test_an_engine_forgets_the_opening(tiny: Any, ask: Callable[..., Generation], calls: list[int]) -> None:
    with Engine(tiny.gguf, ALONE) as engine:
        forget = rates.forgetting(engine)
        first, rows = ask(engine, 3), sum(calls)
        calls.clear()
        ask(engine, 3)
        assert sum(calls) == rows - 20  # its opening was in the cache
        forget()
        calls.clear()
        assert ask(engine, 3).ids == first.ids
        assert sum(calls) == rows


def test_an_engine_forgets_what_it_said(tiny: Any, ask: Callable[..., Generation]) -> None:
    with Engine(tiny.gguf, ALONE, phrases=()) as engine:
        forget = rates.forgetting(engine)
        said = ask(engine).ids
        assert _guesses(engine, said)
        forget()
        assert not _guesses(engine, said)
        assert ask(engine).ids == said
        forget()
        assert not _guesses(engine, said)


def _guesses(engine: Engine, said: tuple[int, ...]) -> list[int]:
    with engine.open() as slot:
        slot.trace([TokenSegment(np.ones(1, np.int32))], [1])  # what was asked before is done with
    speculation = engine._core._speculation
    assert speculation
    return speculation.guess(said[:1], 4)
