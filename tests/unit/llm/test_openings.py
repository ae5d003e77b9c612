"""What prompts begin with is prefilled once, and prompts of one form in common calls; no answer changes by it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xraygpt_lite.errors import NativeError
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.values import DevicePlan, EmbeddingSegment, Sampling, Segment, TokenSegment

SAMPLING = Sampling(max_tokens=6)
Prompt = tuple[int, int, int]
"""Which opening, which image, how long a question."""


@pytest.fixture
def calls(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every decode call from here on."""
    rows: list[int] = []
    decode = engine._core.context.decode

    def counted(batch: Any) -> None:
        rows.append(batch.rows)
        decode(batch)

    monkeypatch.setattr(engine._core.context, "decode", counted)
    return rows


@pytest.fixture(scope="module")
def segments(tiny: Any) -> Callable[[Prompt], list[Segment]]:
    def make(prompt: Prompt) -> list[Segment]:
        opening, image, question = prompt
        return [
            TokenSegment(np.arange(20 + opening, 32 + opening, dtype=np.int32)),
            EmbeddingSegment(tiny.token_embeddings[100 + 9 * image : 109 + 9 * image]),
            TokenSegment(np.arange(40, 45 + question, dtype=np.int32)),
        ]

    return make


@pytest.fixture(scope="module")
def alone(tiny: Any, plan: DevicePlan, segments: Any, reader: Any) -> Iterator[Callable[[Prompt], tuple[int, ...]]]:
    """The ids of a prompt on an engine that holds nothing yet."""
    known: dict[Prompt, tuple[int, ...]] = {}

    def ids(prompt: Prompt) -> tuple[int, ...]:
        if prompt not in known:
            with Engine(tiny.gguf, plan) as fresh:
                known[prompt] = answer(fresh, segments(prompt), reader())
        return known[prompt]

    yield ids
    assert len(set(known.values())) > 1  # or nothing that follows says anything


def answer(engine: Engine, given: list[Segment], reader: Any) -> tuple[int, ...]:
    with engine.open() as slot:
        stream = slot.generate(given, SAMPLING, stop_ids=(), reader=reader, pieces=False)
        list(stream)
        return stream.result.ids


def test_an_opening_is_prefilled_once(engine: Engine, calls: list[int], segments: Any, alone: Any, reader: Any) -> None:
    prompts = [(3, 0, 0), (3, 1, 2), (3, 0, 0)]
    assert [answer(engine, segments(prompt), reader()) for prompt in prompts] == [alone(prompt) for prompt in prompts]
    assert calls.count(12) == 1
    assert [rows for rows in calls if rows > 1] == [12, 14, 16, 14]  # the image with the question behind it


def test_prompts_of_one_form_share_their_calls(
    engine: Engine, calls: list[int], segments: Any, alone: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [(4, image, 1) for image in range(2)]
    expected = [alone(prompt) for prompt in prompts]
    slots = [engine.open() for _ in prompts]
    held, hold = threading.Event(), threading.Event()
    collect = engine._core._collect

    def together() -> None:
        """The thread takes nothing until all have been submitted."""
        held.set()
        hold.wait(10)
        collect()

    monkeypatch.setattr(engine._core, "_collect", together)
    engine._core.wake()
    assert held.wait(10)
    streams = [
        slot.generate(segments(prompt), SAMPLING, stop_ids=(), reader=reader())
        for slot, prompt in zip(slots, prompts, strict=True)
    ]
    hold.set()
    for stream in streams:
        list(stream)
    for slot in slots:
        slot.close()
    assert [stream.result.ids for stream in streams] == expected
    assert calls.count(12) == 1  # the opening
    assert calls.count(30) == 1  # two images, each with its question


def test_a_failed_call_keeps_no_opening(
    engine: Engine, segments: Any, alone: Any, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = (5, 2, 0)

    def failing(batch: Any) -> None:
        raise NativeError(f"no {batch.rows}")

    with monkeypatch.context() as patch:
        patch.setattr(engine._core.context, "decode", failing)
        with pytest.raises(NativeError, match="no 12"):
            answer(engine, segments(prompt), reader())
    assert answer(engine, segments(prompt), reader()) == alone(prompt)


def test_the_text_may_come_whole(engine: Engine, segments: Any, reader: Any) -> None:
    texts = []
    for pieces in (True, False):
        with engine.open() as slot:
            stream = slot.generate(segments((0, 0, 0)), SAMPLING, stop_ids=(), reader=reader(), pieces=pieces)
            texts.append(list(stream))
    assert len(texts[0]) > 1
    assert texts[1] == ["".join(texts[0])]


ACTIONS = st.tuples(
    st.sampled_from(["answer", "cancel", "truncate", "turn", "plain"]),
    st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 1)),
    st.integers(0, 20),
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ACTIONS, min_size=2, max_size=8))
def test_no_history_changes_an_answer(
    engine: Engine, segments: Any, alone: Any, reader: Any, actions: list[tuple[str, Prompt, int]]
) -> None:
    """Whatever sequences held before (cancelled, cut, longer, without an image), each prompt is answered as alone."""
    for what, prompt, number in actions:
        with engine.open() as slot:
            if what == "plain":  # tokens only, which overwrite an opening
                stream = slot.generate([segments(prompt)[2]], SAMPLING, stop_ids=(), reader=reader())
                list(stream)
                continue
            stream = slot.generate(segments(prompt), SAMPLING, stop_ids=(), reader=reader())
            if what == "cancel":
                stream.close()
                assert slot.rows == 0
                continue
            list(stream)
            assert stream.result.ids == alone(prompt)
            if what == "truncate":  # also into the opening, and something else put there
                slot.truncate(min(number, slot.rows))
                turn = slot.generate([segments(prompt)[2]], SAMPLING, stop_ids=(), reader=reader())
                list(turn)
            elif what == "turn":
                list(slot.generate([segments(prompt)[2]], SAMPLING, stop_ids=(), reader=reader()))
    held = {seq: len(ids) // 4 for seq, ids in engine._core._beginnings._known.items()}
    assert all(engine._core.context.length(sequence) >= rows for sequence, rows in held.items())
