"""The engine by properties, on the real native library, against a slow and obvious reference."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.errors import CancelledError, ClosedError, ContextError, NativeError, UsageError
from xraygpt_lite.llm.requests import Generate
from xraygpt_lite.llm.sampling import Sampler
from xraygpt_lite.llm.scheduler import Engine, Generation, Slot
from xraygpt_lite.values import DevicePlan, EmbeddingSegment, Float32, Sampling, Segment, TokenSegment

LONG = Sampling(max_tokens=180, temperature=1.0)


def segment(ids: Sequence[int]) -> TokenSegment:
    return TokenSegment(np.array(ids, np.int32))


def run(
    engine: Engine, segments: Sequence[Segment], sampling: Sampling, reader: Any, stop_ids: tuple[int, ...] = ()
) -> tuple[str, Generation]:
    with engine.open() as slot:
        stream = slot.generate(segments, sampling, stop_ids=stop_ids, reader=reader)
        return "".join(stream), stream.result


def reference(engine: Engine, prompt: TokenSegment, n: int) -> tuple[list[int], Float32]:
    """Greedy ids and logits, each step prefilling everything anew into an empty sequence."""
    ids: list[int] = []
    logits = []
    for _ in range(n):
        with engine.open() as slot:
            logits.append(slot.trace([segment([*prompt.ids, *ids])], [0])[0])
        ids.append(int(logits[-1].argmax()))
    return ids, np.stack(logits)


def in_threads(jobs: Sequence[Any]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_facts(engine: Engine, tiny_llama: Any) -> None:
    assert (engine.width, engine.context, engine.bos, engine.eos) == (256, 256, 1, 2)
    assert engine._core.model.piece(engine.tokenize("heart", leading_space=False)[0])


def test_greedy_equals_the_reference_token_by_token(
    engine: Engine, prompt: TokenSegment, greedy: Sampling, reader: Any
) -> None:
    text, result = run(engine, [prompt], greedy, reader())
    ids, logits = reference(engine, prompt, greedy.max_tokens)
    assert list(result.ids) == ids
    assert len(set(ids)) > 5
    assert text == b"".join(engine._core.model.piece(i) for i in ids).decode("utf-8", "replace")
    assert (result.finish, result.prompt_rows, result.cached_rows) == ("length", 70, 70 + 24)
    assert result.prefill_s > 0
    assert result.generate_s > 0
    with engine.open() as slot:
        np.testing.assert_allclose(slot.trace([prompt], ids), logits, atol=2e-4)
        assert slot.rows == 70
        np.testing.assert_allclose(slot.trace([], ids[:1]), logits[:1], atol=2e-4)
        np.testing.assert_allclose(slot.trace([], ids), logits, atol=2e-4)


def test_chunked_prefill_equals_unchunked(tiny: Any, engine: Engine, plan: DevicePlan, prompt: TokenSegment) -> None:
    with engine.open() as slot, Engine(tiny.gguf, replace(plan, batch=256)) as whole, whole.open() as other:
        np.testing.assert_allclose(slot.trace([prompt], [5]), other.trace([prompt], [5]), atol=2e-4)


def test_embedding_rows_between_tokens_equal_the_tokens(engine: Engine, tiny: Any, prompt: TokenSegment) -> None:
    ids = prompt.ids
    rows = EmbeddingSegment(tiny.token_embeddings[ids[10:50]])
    with engine.open() as slot, engine.open() as other:
        mixed = slot.trace([TokenSegment(ids[:10]), rows, TokenSegment(ids[50:])], [5, 6])
        np.testing.assert_allclose(mixed, other.trace([prompt], [5, 6]), atol=2e-4)
        assert slot.rows == 70


def test_same_seed_same_text_and_another_seed_another(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    drawn = Sampling(max_tokens=30, temperature=1.0, top_k=50, top_p=0.9, seed=4)
    first = run(engine, [prompt], drawn, reader())
    again = run(engine, [prompt], drawn, reader())
    assert (first[0], first[1].ids) == (again[0], again[1].ids)
    assert run(engine, [prompt], replace(drawn, seed=5), reader())[1].ids != first[1].ids


def test_greedy_ignores_the_seed(engine: Engine, prompt: TokenSegment, greedy: Sampling, reader: Any) -> None:
    texts = {run(engine, [prompt], replace(greedy, seed=seed), reader())[0] for seed in range(3)}
    assert len(texts) == 1


@pytest.mark.parametrize("limit", [1, 2, 31])
def test_the_limit_holds(engine: Engine, prompt: TokenSegment, reader: Any, limit: int) -> None:
    _, result = run(engine, [prompt], Sampling(max_tokens=limit), reader())
    assert (len(result.ids), result.finish, result.cached_rows) == (limit, "length", 70 + limit)


def test_many_slots_at_once_equal_each_alone(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    jobs = [
        ([TokenSegment(prompt.ids[: 20 + 7 * n])], Sampling(max_tokens=15 + n, temperature=float(n % 2), seed=n))
        for n in range(8)
    ]
    alone = [run(engine, *job, reader()) for job in jobs]
    together: dict[int, tuple[str, Generation]] = {}

    def work(n: int) -> None:
        together[n] = run(engine, *jobs[n], reader())

    in_threads([lambda n=n: work(n) for n in range(len(jobs))])
    assert len(together) == len(jobs)
    for n, (text, result) in enumerate(alone):
        assert (together[n][0], together[n][1].ids) == (text, result.ids)


def test_slots_generate_in_the_same_calls(
    engine: Engine, prompt: TokenSegment, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = engine._core.context.decode

    def counted(batch: Any) -> None:
        sizes.append(batch.rows)
        decode(batch)

    monkeypatch.setattr(engine._core.context, "decode", counted)
    slots = [engine.open() for _ in range(3)]
    streams = [s.generate([prompt], Sampling(max_tokens=40), stop_ids=(), reader=reader()) for s in slots]
    assert len({"".join(stream) for stream in streams}) == 1
    assert sizes.count(3) > 20
    for slot in slots:
        slot.close()


@pytest.mark.parametrize(("held", "calls_of"), [(0, 3), (30, 3), (256, 2)])
def test_a_slot_between_two_that_write_goes_along_and_stays_as_it_is(
    engine: Engine, prompt: TokenSegment, reader: Any, monkeypatch: pytest.MonkeyPatch, held: int, calls_of: int
) -> None:
    """A gap would cost another pass through the weights; what is full has no room for a row more."""
    sizes: list[int] = []
    core, writing = engine._core, Sampling(max_tokens=40)
    decode = core.context.decode

    def counted(batch: Any) -> None:
        sizes.append(batch.rows)
        decode(batch)

    alone = run(engine, [prompt], writing, reader())[1].ids
    slots = [engine.open() for _ in range(3)]
    first, middle, last = sorted(slots, key=lambda slot: slot._held.id)
    if held:
        content = segment(np.resize(prompt.ids, held - 5).tolist())
        list(middle.generate([content], Sampling(max_tokens=5), stop_ids=(), reader=reader()))
        assert core.context.length(1) == held
    monkeypatch.setattr(core.context, "decode", counted)
    streams = [slot.generate([prompt], writing, stop_ids=(), reader=reader()) for slot in (first, last)]
    for stream in streams:
        list(stream)
        assert stream.result.ids == alone
    assert sizes.count(calls_of) > 20
    assert core.context.length(1) == held
    if held == 30:
        more = middle.generate([segment([5, 6])], Sampling(max_tokens=9), stop_ids=(), reader=reader())
        list(more)
        for slot in slots:
            slot.close()
        with engine.open() as slot:
            list(slot.generate([content], Sampling(max_tokens=5), stop_ids=(), reader=reader()))
            again = slot.generate([segment([5, 6])], Sampling(max_tokens=9), stop_ids=(), reader=reader())
            list(again)
        assert again.result.ids == more.result.ids
    for slot in slots:
        slot.close()


def test_a_turn_is_appended_and_equals_one_long_prompt(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    turn = segment([5, 6, 7, 8])
    with engine.open() as slot:
        first = slot.generate([prompt], Sampling(max_tokens=10), stop_ids=(), reader=reader())
        list(first)
        second = slot.generate([turn], Sampling(max_tokens=10), stop_ids=(), reader=reader())
        list(second)
    assert (second.result.prompt_rows, second.result.cached_rows) == (4, 70 + 10 + 4 + 10)
    whole = segment([*prompt.ids, *first.result.ids, *turn.ids])
    assert run(engine, [whole], Sampling(max_tokens=10), reader())[1].ids == second.result.ids


def test_a_stop_string_cuts_text_and_cache(engine: Engine, prompt: TokenSegment, greedy: Sampling, reader: Any) -> None:
    _, free = run(engine, [prompt], greedy, reader())
    pieces = [engine._core.model.piece(i) for i in free.ids]
    # A stop that begins inside token k (at least two bytes, of plain text) and ends in the next.
    k = next(k for k in range(4, 23) if len(pieces[k]) > 1 and (pieces[k] + pieces[k + 1]).isascii() and pieces[k + 1])
    stop = (pieces[k][1:] + pieces[k + 1][:1]).decode()
    joined = b"".join(pieces)
    at = joined.find(stop.encode())
    ends = np.cumsum([len(piece) for piece in pieces])
    kept = int((ends <= at).sum())
    with engine.open() as slot:
        stream = slot.generate([prompt], greedy, stop_ids=(), reader=reader(stop))
        text = "".join(stream)
        result = stream.result
        assert text == joined[:at].decode("utf-8", "replace")
        assert (result.finish, result.cached_rows, slot.rows) == ("stop", 70 + kept, 70 + kept)
        assert result.ids == free.ids[: int((ends < at + len(stop)).sum()) + 1]
        assert result.carry.encode() == joined[int(ends[kept - 1]) : at]
        assert engine._core.context.length(slot._held.id) == slot.rows
        following = slot.trace([segment([9])], [5])
    with engine.open() as slot:
        expected = slot.trace([segment([*prompt.ids, *free.ids[:kept], 9])], [5])
    np.testing.assert_allclose(following, expected, atol=2e-4)


def test_a_stop_id_ends_and_min_tokens_delays_it(
    engine: Engine, prompt: TokenSegment, greedy: Sampling, reader: Any
) -> None:
    _, free = run(engine, [prompt], greedy, reader())
    stop = free.ids[6]
    first = free.ids.index(stop)
    text, result = run(engine, [prompt], greedy, reader(), stop_ids=(stop,))
    assert (result.ids, result.finish, result.cached_rows) == (free.ids[: first + 1], "stop", 70 + first)
    assert text == b"".join(engine._core.model.piece(i) for i in free.ids[:first]).decode("utf-8", "replace")
    delayed = run(engine, [prompt], replace(greedy, min_tokens=20), reader(), stop_ids=(stop,))[1]
    assert stop not in delayed.ids[:20]


def test_text_comes_piece_by_piece_and_whole_characters_only(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    with engine.open() as slot:
        stream = slot.generate([prompt], Sampling(max_tokens=60), stop_ids=(), reader=reader())
        pieces = list(stream)
        assert list(stream) == []
    assert len(pieces) > 20
    assert "".join(pieces) == b"".join(engine._core.model.piece(i) for i in stream.result.ids).decode(
        "utf-8", "replace"
    )


def test_overflow_gives_the_numbers_before_anything_is_decoded(
    engine: Engine, prompt: TokenSegment, reader: Any
) -> None:
    with engine.open() as slot:
        slot.trace([prompt], [5])
        words = r"70 rows so far \+ 70 of the prompt \+ up to 180 of the answer = 320 do not fit .* context of 256"
        with pytest.raises(ContextError, match=words):
            slot.generate([prompt], LONG, stop_ids=(), reader=reader())
        with pytest.raises(ContextError):
            slot.trace([segment([1] * 184)], [5, 6, 7])
        assert slot.rows == 70
        full = slot.generate([prompt], Sampling(max_tokens=256 - 140), stop_ids=(), reader=reader())
        assert sum(map(len, full)) > 0
        assert slot.rows == 256


def test_truncate_drops_the_last_rows(engine: Engine, prompt: TokenSegment) -> None:
    with engine.open() as slot:
        whole = slot.trace([prompt], [5])
        slot.truncate(40)
        assert slot.rows == 40
        np.testing.assert_allclose(slot.trace([TokenSegment(prompt.ids[40:])], [5]), whole, atol=2e-4)
        with pytest.raises(UsageError, match="cannot keep 71 rows of a cache that holds 70"):
            slot.truncate(71)


def test_requests_that_cannot_be_meant(engine: Engine, prompt: TokenSegment, greedy: Sampling, reader: Any) -> None:
    with engine.open() as slot:
        with pytest.raises(UsageError, match="no rows"):
            slot.generate([], greedy, stop_ids=(), reader=reader())
        with pytest.raises(UsageError, match="at least one token id"):
            slot.trace([prompt], [])
        with pytest.raises(UsageError, match="another trace before"):
            slot.trace([], [5])
        with pytest.raises(NativeError, match=r"\(n, 256\)"):
            slot.trace([EmbeddingSegment(np.zeros((2, 8), np.float32))], [5])
        with pytest.raises(NativeError, match="token ids"):
            slot.trace([prompt], [engine.vocab])
        assert slot.rows == 0


def test_closing_a_stream_mid_way_leaves_the_slot_as_before(
    engine: Engine, prompt: TokenSegment, greedy: Sampling, reader: Any
) -> None:
    with engine.open() as slot:
        before = slot.trace([prompt], [5])
        stream = slot.generate([segment([9])], LONG, stop_ids=(), reader=reader())
        next(stream)
        with pytest.raises(UsageError, match="has not ended"):
            slot.generate([prompt], greedy, stop_ids=(), reader=reader())
        stream.close()
        stream.close()
        assert slot.rows == 70
        assert list(stream) == []
        with pytest.raises(CancelledError):
            _ = stream.result
        np.testing.assert_allclose(slot.trace([], [5]), before, atol=0)


def test_so_does_closing_one_that_the_engine_had_finished(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    with engine.open() as slot:
        before = slot.trace([prompt], [5])
        stream = slot.generate([segment([9, 8])], Sampling(max_tokens=4), stop_ids=(), reader=reader())
        assert stream._request.done.wait(30)  # read by nobody
        stream.close()
        assert slot.rows == 70
        np.testing.assert_array_equal(slot.trace([], [5]), before)
        again = slot.generate([segment([9, 8])], Sampling(max_tokens=4), stop_ids=(), reader=reader())
        list(again)
        assert again.result.cached_rows == 70 + 2 + 4


def test_what_is_asked_of_a_sequence_that_was_given_back_is_refused(
    engine: Engine, prompt: TokenSegment, reader: Any
) -> None:
    """Another thread may close the slot between the check that it is open and the request."""
    slot = engine.open()
    late = slot.generate([prompt], Sampling(max_tokens=1), stop_ids=(), reader=reader())
    list(late)
    request = Generate(
        slot._held, [prompt], 32, sampler=Sampler(engine._core.model, LONG, ()), sampling=LONG, stop_ids=(),
        reader=reader(), pieces=True,
    )  # fmt: skip
    slot.close()
    with engine.open() as other:
        before = other.trace([prompt], [5])
        engine._core.submit(request)
        assert isinstance(request.events.get(timeout=30), CancelledError)
        assert other.rows == 70
        np.testing.assert_array_equal(other.trace([], [5]), before)


def test_a_forgotten_stream_is_cancelled(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    with engine.open() as slot:
        stream = slot.generate([prompt], LONG, stop_ids=(), reader=reader())
        next(stream)
        request = stream._request
        del stream
        gc.collect()
        assert request.done.wait(10)
        assert slot.rows == 0


def test_an_interrupt_while_waiting_cancels(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    with engine.open() as slot:
        asked = threading.Event()

        class Slow(reader):  # type: ignore[misc]
            def feed(self, piece: bytes) -> str:
                asked.wait(10)
                return ""

        stream = slot.generate([prompt], LONG, stop_ids=(), reader=Slow())
        main = threading.get_ident()

        def interrupt() -> None:
            signal.pthread_kill(main, signal.SIGINT)
            asked.set()

        timer = threading.Timer(0.1, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        timer.join()
        assert stream._request.done.is_set()
        assert slot.rows == 0


def test_a_stream_that_nobody_reads_blocks_nobody(
    engine: Engine, prompt: TokenSegment, greedy: Sampling, reader: Any
) -> None:
    slots = [engine.open(), engine.open()]
    unread = [slot.generate([prompt], LONG, stop_ids=(), reader=reader()) for slot in slots]
    assert len(run(engine, [prompt], greedy, reader())[1].ids) == 24
    assert unread[0]._request.done.wait(30)
    assert len(list(unread[0])) > 10
    for slot in slots:
        slot.close()


def test_open_waits_for_a_free_sequence(engine: Engine) -> None:
    slots = [engine.open() for _ in range(3)]
    got: list[Slot] = []
    waiting = threading.Thread(target=lambda: got.append(engine.open()))
    waiting.start()
    time.sleep(0.05)
    assert not got
    slots[1].close()
    waiting.join(10)
    assert got[0].rows == 0
    for slot in (*slots, *got):
        slot.close()


def test_a_thread_that_would_wait_for_itself_is_told(engine: Engine) -> None:
    slots = [engine.open() for _ in range(3)]
    with pytest.raises(UsageError, match="all 3 sequences of the model are held by this thread"):
        engine.open()
    for slot in slots:
        slot.close()
    engine.open().close()


def test_a_closed_slot(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    slot = engine.open()
    stream = slot.generate([prompt], LONG, stop_ids=(), reader=reader())
    slot.close()
    slot.close()
    with pytest.raises(CancelledError):
        list(stream)
    with pytest.raises(ClosedError):
        slot.trace([prompt], [5])


def test_a_failing_decode_ends_its_requests_alone(
    engine: Engine, prompt: TokenSegment, greedy: Sampling, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = engine._core.context.decode

    def fail(batch: Any) -> None:
        if batch.rows == 1:
            raise NativeError("llama.cpp could not decode 1 rows (returned 1)")
        decode(batch)

    expected = run(engine, [prompt], greedy, reader())[0]
    with engine.open() as slot:
        with monkeypatch.context() as patch:
            patch.setattr(engine._core.context, "decode", fail)
            with pytest.raises(NativeError, match="returned 1"):
                list(slot.generate([prompt], greedy, stop_ids=(), reader=reader()))
        assert slot.rows == 0
        assert "".join(slot.generate([prompt], greedy, stop_ids=(), reader=reader())) == expected


def test_a_failing_reader_ends_its_request_alone(engine: Engine, prompt: TokenSegment, reader: Any) -> None:
    class Failing(reader):  # type: ignore[misc]
        def feed(self, piece: bytes) -> str:
            raise ValueError("no")

    with engine.open() as slot:
        with pytest.raises(ValueError, match="no"):
            list(slot.generate([prompt], LONG, stop_ids=(), reader=Failing()))
        assert slot.trace([prompt], [5]).shape == (1, engine.vocab)


def test_an_engine_that_cannot_go_on_says_so(
    tiny: Any, plan: DevicePlan, prompt: TokenSegment, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny.gguf, plan)
    slot = engine.open()
    monkeypatch.setattr(engine._core.context, "decode", lambda batch: 1 / 0)
    with pytest.raises(NativeError, match=r"stopped working \(division by zero\); load it again"):
        list(slot.generate([prompt], LONG, stop_ids=(), reader=reader()))
    with pytest.raises(NativeError, match="stopped working"):
        slot.trace([prompt], [5])
    engine.close()


def test_closing_while_generating(tiny: Any, plan: DevicePlan, prompt: TokenSegment, reader: Any) -> None:
    engine = Engine(tiny.gguf, plan)
    slots = [engine.open() for _ in range(3)]
    streams = [slot.generate([prompt], LONG, stop_ids=(), reader=reader()) for slot in slots]
    failures: list[BaseException] = []

    def wait_for_a_slot() -> None:
        try:
            engine.open()
        except ClosedError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait_for_a_slot)
    waiting.start()
    next(streams[0])
    engine.close()
    engine.close()
    waiting.join(10)
    assert len(failures) == 1
    for stream in streams:
        with pytest.raises(ClosedError):
            list(stream)
    for call in (engine.open, lambda: slots[0].trace([prompt], [5]), lambda: engine.tokenize("x", leading_space=True)):
        with pytest.raises(ClosedError):
            call()
    assert not engine._core._thread.is_alive()


def test_a_forgotten_engine_ends_its_thread(tiny: Any, plan: DevicePlan) -> None:
    engine = Engine(tiny.gguf, plan)
    thread = engine._core._thread
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "next(stream)"])
def test_the_interpreter_exits_while_an_answer_is_generated(tiny: Any, ending: str) -> None:
    code = f"""
from pathlib import Path
import numpy as np
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.values import DevicePlan, Sampling, TokenSegment
class Reader:
    stopped, kept_bytes = False, 0
    def feed(self, piece): return "x"
    def finish(self): return ""
engine = Engine(Path({str(tiny.gguf)!r}), DevicePlan())
slot = engine.open()
prompt = [TokenSegment(np.array([1, 5], np.int32))]
stream = slot.generate(prompt, Sampling(max_tokens=500), stop_ids=(), reader=Reader())
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_nothing_is_printed(tiny: Any, plan: DevicePlan, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Engine(tiny.gguf, replace(plan, float32_cache=False)) as engine, engine.open() as slot:
        slot.trace([segment([1, 5])], [5])
    assert capfd.readouterr() == ("", "")
