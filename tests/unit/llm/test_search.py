"""Beam search on the real native library, against the slow reference; and that it leaves nothing behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import beam_reference
import numpy as np
import pytest

from xraygpt_lite import prompt as prompts
from xraygpt_lite.answer import AnswerReader
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import CancelledError, ClosedError, ContextError, NativeError, UsageError
from xraygpt_lite.llm import search
from xraygpt_lite.llm.scheduler import Engine, Generation, Slot
from xraygpt_lite.model import XrayModel, open_bundle
from xraygpt_lite.values import DevicePlan, GenerationOptions, PromptSpec, Sampling, Segment, TokenSegment

# Where sums differ by less, float32 rows that are decoded together or alone may decide otherwise.
CLOSE_CALL = 1e-4
LONG = Sampling(max_tokens=150, beams=3)


def segment(*ids: int) -> TokenSegment:
    return TokenSegment(np.array(ids, np.int32))


@pytest.fixture
def short(prompt: TokenSegment) -> TokenSegment:
    return TokenSegment(prompt.ids[:12])


def answer(
    slot: Slot, segments: list[Segment], sampling: Sampling, stop_ids: tuple[int, ...] = (), stop: str = ""
) -> tuple[str, Generation]:
    stream = slot.generate(segments, sampling, stop_ids=stop_ids, reader=AnswerReader([stop]))
    return "".join(stream), stream.result


def expected(
    engine: Engine, segments: list[Segment], sampling: Sampling, stop_ids: tuple[int, ...] = (), stop: str = ""
) -> beam_reference.Found:
    """The reference; every hypothesis is prefilled anew into an empty sequence."""
    with engine.open() as slot:

        def logits(ids: tuple[int, ...]) -> np.ndarray:
            slot.truncate(0)
            return slot.trace([*segments, segment(*ids)], [0])[0]

        return beam_reference.search(logits, engine._core.model.piece, sampling, stop_ids=stop_ids, stop=stop)


@pytest.mark.parametrize("beams", range(2, 11))
def test_it_equals_the_reference_token_by_token(engine: Engine, prompt: TokenSegment, beams: int) -> None:
    """With a stop id and a stop string that lie on the way of the greedy answer, barred for a while or not."""
    rng = np.random.default_rng(beams)
    begun = [TokenSegment(prompt.ids[: int(rng.integers(3, 20))])]
    given = Sampling(max_tokens=int(rng.integers(4, 10)), beams=beams)
    with engine.open() as slot:
        ids = answer(slot, begun, replace(given, beams=1))[1].ids
    stop = next(
        (piece.decode() for piece in map(engine._core.model.piece, ids[2:]) if len(piece) > 1 and piece.isascii()),
        "the",
    )
    cases: list[tuple[Sampling, tuple[int, ...], str]] = [
        (given, (), ""),
        (given, (ids[1],), ""),
        (replace(given, min_tokens=3, repeat_penalty=1.2, penalty_last_n=-1), (ids[1], ids[-1]), ""),
        (given, (), stop),
    ]
    compared = 0
    for options, stop_ids, text in (cases[beams % 4], cases[(beams + 1) % 4], cases[(beams + 2) % 4]):
        if compared == 2:
            break
        found = expected(engine, begun, options, stop_ids, text)
        if found.margin < CLOSE_CALL:
            continue
        compared += 1
        with engine.open() as slot:
            shown, result = answer(slot, begun, options, stop_ids, text)
        assert (result.ids, result.finish) == (found.ids, found.finish)
        whole = b"".join(engine._core.model.piece(each) for each in found.ids if each not in stop_ids)
        assert shown == (whole.split(text.encode())[0] if text else whole).decode("utf-8", "replace")
    assert compared


def test_one_beam_is_the_greedy_answer(engine: Engine, prompt: TokenSegment, greedy: Sampling) -> None:
    with engine.open() as slot:
        plain = answer(slot, [prompt], greedy)
    with engine.open() as slot:
        assert answer(slot, [prompt], replace(greedy, beams=1))[1].ids == plain[1].ids


def test_the_text_comes_whole_at_the_end(engine: Engine, short: TokenSegment) -> None:
    with engine.open() as slot:
        stream = slot.generate([short], Sampling(max_tokens=20, beams=3), stop_ids=(), reader=AnswerReader(["###"]))
        assert len(list(stream)) == 1
        assert stream.result.prefill_s > 0
        assert stream.result.generate_s > 0


@pytest.mark.parametrize("ending", ["length", "stop id", "stop string"])
def test_a_next_turn_goes_on_from_the_winner(engine: Engine, short: TokenSegment, ending: str) -> None:
    given = Sampling(max_tokens=9, beams=4)
    with engine.open() as slot:
        free = answer(slot, [short], given)[1].ids
    stop_ids, stop = (), ""
    if ending == "stop id":
        stop_ids = (free[4],)
    if ending == "stop string":
        stop = next(
            piece.decode() for piece in map(engine._core.model.piece, free[2:]) if len(piece) > 1 and piece.isascii()
        )[1:]
    with engine.open() as slot:
        _, result = answer(slot, [short], given, stop_ids, stop)
        kept = slot.rows - len(short)
        assert result.cached_rows == slot.rows == engine._core.context.length(slot._held.id)
        assert kept == len(result.ids) if ending == "length" else kept < len(result.ids)
        following = slot.trace([segment(9)], [5, 6])
        slot.truncate(slot.rows - 1)
        second = answer(slot, [segment(9)], given, stop_ids, stop)
    whole = segment(*short.ids, *result.ids[:kept], 9)
    with engine.open() as slot:
        np.testing.assert_allclose(following, slot.trace([whole], [5, 6]), atol=2e-4)
        slot.truncate(0)
        assert answer(slot, [whole], given, stop_ids, stop)[1].ids == second[1].ids


@pytest.fixture(scope="module")
def default_model() -> Iterator[XrayModel]:
    """The default bundle, Q8_0, with two sequences and the cache that users have."""
    with open_bundle(store.load(store.find(None), Cache(None)), device="cpu", threads=1, sequences=2) as model:
        yield model


def test_quantized_beams_are_what_single_rows_are(default_model: XrayModel, shared: Path) -> None:
    """Real images; the winner's rows in the slot are what single rows would have left there.

    Bit for bit where it was measured; another build's kernels may take several rows in another order of sums.
    """
    engine, spec = default_model._engine, default_model.bundle.manifest.prompt
    images = sorted((shared / "data" / "png1024").glob("*.png"))[:3]
    assert len(images) == 3
    _, variant = prompts.variant_of(spec, None)
    for image, beams in zip(images, (2, 4, 10), strict=True):
        rows = default_model.study(image).rows
        segments = prompts.build(variant, spec.default_question, rows, engine.tokenize)
        given = Sampling(max_tokens=12, beams=beams)
        with engine.open() as slot, engine.open() as other:
            found = one_by_one(slot, engine._core.model.piece, segments, given, spec)
            result = answer(other, segments, given, spec.stop_ids, spec.stops[0])[1]
            assert result.ids == found.ids
            slot.truncate(result.prompt_rows)
            for token in result.ids[: other.rows - result.prompt_rows]:
                slot.trace([segment(token)], [0])
            np.testing.assert_allclose(slot.trace([segment(5)], [5]), other.trace([segment(5)], [5]), atol=0.05)


def one_by_one(
    slot: Slot, piece: Any, segments: list[Segment], sampling: Sampling, spec: PromptSpec
) -> beam_reference.Found:
    """The reference on rows that are decoded one by one, each hypothesis alone."""
    first = slot.trace(segments, [0])[0]
    begun = slot.rows

    def logits(ids: tuple[int, ...]) -> np.ndarray:
        slot.truncate(begun)
        last = first
        for token in ids:
            last = slot.trace([segment(token)], [0])[0]
        return last

    return beam_reference.search(logits, piece, sampling, stop_ids=spec.stop_ids, stop=spec.stops[0])


def test_a_preset_that_samples_gives_way_and_the_record_says_so(default_model: XrayModel) -> None:
    image = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    drawn = GenerationOptions(preset="sample", beams=3, max_tokens=20)
    first, again = (default_model.summarize(image, options=replace(drawn, seed=seed)) for seed in (1, 2))
    plain = default_model.summarize(image, options=replace(drawn, preset="greedy"))
    assert first.raw_text == again.raw_text == plain.raw_text
    assert (first.options.beams, first.options.temperature) == (3, 0.0)
    assert any("beam search here draws nothing" in warning for warning in first.warnings)
    assert not any("beam search" in warning for warning in plain.warnings)


def test_a_chat_goes_on_after_beams(default_model: XrayModel) -> None:
    image = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    beams = GenerationOptions(beams=4, max_tokens=40)
    with default_model.chat(image) as chat:
        first = chat.ask(options=beams)
        second = chat.ask("Is the heart enlarged?", options=beams)
        third = chat.ask("Is there an effusion?")
    assert first.raw_text == default_model.summarize(image, options=beams).raw_text
    assert all((second.text, third.text))
    assert third.prompt_tokens < first.prompt_tokens


def test_overflow_is_told_before_anything_is_decoded(engine: Engine, short: TokenSegment) -> None:
    with engine.open() as slot:
        with pytest.raises(ContextError, match=r"12 of the prompt \+ up to 245 of the answer = 257 do not fit"):
            slot.generate([short], replace(LONG, max_tokens=245), stop_ids=(), reader=AnswerReader([]))
        assert slot.rows == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Sampling(9, beams=11), "beams is 11; it must lie between 1 and 10"),
        (Sampling(9, beams=0), "beams is 0; it must lie between 1 and 10"),
        (Sampling(9, beams=2, temperature=0.7), "temperature is 0.7; expected 0 with beam search"),
    ],
)
def test_what_cannot_be_meant(engine: Engine, short: TokenSegment, given: Sampling, words: str) -> None:
    with engine.open() as slot, pytest.raises(UsageError, match=words):
        slot.generate([short], given, stop_ids=(), reader=AnswerReader([]))


class Signalling(AnswerReader):
    """Tells when its answer is under way: it was fed, the beams have their context."""

    begun = threading.Event()

    def feed(self, piece: bytes) -> str:
        if self.kept_bytes > 10:
            self.begun.set()
        return super().feed(piece)


@pytest.mark.parametrize("way", ["close", "forget", "slot"])
def test_cancelling_mid_way_leaves_the_slot_as_before(engine: Engine, short: TokenSegment, way: str) -> None:
    slot = engine.open()
    before = slot.trace([short], [5])
    Signalling.begun.clear()
    stream = slot.generate([segment(9)], LONG, stop_ids=(), reader=Signalling([]))
    request = stream._request
    assert Signalling.begun.wait(20)
    if way == "close":
        stream.close()
    elif way == "forget":
        del stream
        gc.collect()
    else:
        slot.close()
        with pytest.raises(CancelledError):
            list(stream)
    assert request.done.wait(10)
    assert isinstance(request, search.Search)
    assert request._own is None
    assert engine._core.model._contexts == 1
    if way != "slot":
        assert slot.rows == len(short) == engine._core.context.length(slot._held.id)
        np.testing.assert_array_equal(slot.trace([], [5]), before)
        slot.close()


@pytest.mark.parametrize("broken", ["decode", "context", "reader"])
def test_an_error_ends_the_search_alone(
    engine: Engine, short: TokenSegment, greedy: Sampling, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(AnswerReader):
        def feed(self, piece: bytes) -> str:
            if self.kept_bytes > 8:
                raise NativeError("made to fail")
            return super().feed(piece)

    class Poor(search.Context):
        def __init__(self, *given: Any) -> None:
            if broken == "context":
                raise NativeError("made to fail")
            super().__init__(*given)

        def decode(self, batch: Any) -> None:
            if broken == "decode" and self.length(0) > len(short) + 3:
                raise NativeError("made to fail")
            super().decode(batch)

    monkeypatch.setattr(search, "Context", Poor)
    with engine.open() as slot, engine.open() as other:
        neighbour = other.generate([short], greedy, stop_ids=(), reader=AnswerReader([]))
        reader = Failing([]) if broken == "reader" else AnswerReader([])
        with pytest.raises(NativeError, match="made to fail"):
            list(slot.generate([short], LONG, stop_ids=(), reader=reader))
        assert len("".join(neighbour)) > 0
        assert slot.rows == 0
        assert engine._core.model._contexts == 1
        assert answer(slot, [short], greedy)[1].ids == neighbour.result.ids


def test_searches_and_answers_at_once_equal_each_alone(engine: Engine, prompt: TokenSegment) -> None:
    jobs = [
        ([TokenSegment(prompt.ids[: 10 + 9 * n])], Sampling(max_tokens=12 + n, beams=beams))
        for n, beams in enumerate((4, 1, 2, 10, 1, 3))
    ]

    def work(n: int, into: dict[int, tuple[int, ...]]) -> None:
        with engine.open() as slot:
            into[n] = answer(slot, *jobs[n])[1].ids

    alone: dict[int, tuple[int, ...]] = {}
    together: dict[int, tuple[int, ...]] = {}
    for n in range(len(jobs)):
        work(n, alone)
    threads = [threading.Thread(target=work, args=(n, together)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone
    assert engine._core.model._contexts == 1


def test_closing_the_engine_ends_a_search(tiny: Any, plan: DevicePlan, short: TokenSegment) -> None:
    engine = Engine(tiny.gguf, plan)
    slot = engine.open()
    Signalling.begun.clear()
    stream = slot.generate([short], LONG, stop_ids=(), reader=Signalling([]))
    assert Signalling.begun.wait(20)
    engine.close()
    with pytest.raises(ClosedError):
        list(stream)
    assert not engine._core._thread.is_alive()
