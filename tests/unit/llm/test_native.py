"""One test a native call, and what happens to files that are no models."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from xraygpt_lite.errors import BundleError, ClosedError, DeviceError, NativeError, UsageError
from xraygpt_lite.llm import native
from xraygpt_lite.llm.library import ERROR, WARNING, Log, devices, library, set_fields
from xraygpt_lite.values import DevicePlan


@pytest.fixture(scope="module")
def model(tiny: Any) -> Iterator[native.Model]:
    model = native.Model(tiny.gguf)
    yield model
    model.close()


@pytest.fixture
def context(model: native.Model, plan: DevicePlan) -> Iterator[native.Context]:
    context = native.Context(model, plan, 512)
    yield context
    context.close()


def put(batch: native.Batch, ids: list[int], start: int = 0, sequence: int = 0, outputs: Any = True) -> native.Batch:
    batch.put(np.array(ids, np.int32), np.arange(start, start + len(ids)), sequence, outputs)
    return batch


def test_facts(model: native.Model, tiny_llama: Any) -> None:
    assert (model.width, model.bos, model.eos) == (tiny_llama.WIDTH, 1, 2)
    assert model.trained_context == tiny_llama.TRAINED_CONTEXT
    assert model.vocab > 256


def test_a_misspelt_field_is_refused() -> None:
    params = library().llama_model_default_params()
    set_fields(params, load_mode=0)
    with pytest.raises(NativeError, match="llama_model_params has no field 'use_mmap'"):
        set_fields(params, use_mmap=False)


@pytest.mark.parametrize(
    "text", ["the heart", " the heart", "  two  spaces ", "a", "###Doctor:", "<s>[INST] é 漢 \n\t\u0301 x", "\x00"]
)
def test_tokens_are_sentencepieces(model: native.Model, tiny: Any, text: str) -> None:
    slow = sentencepiece.SentencePieceProcessor(model_proto=tiny.sentencepiece)
    ids = model.tokenize(text, leading_space=True)
    assert ids.dtype == np.int32
    assert ids.tolist() == slow.encode(text)
    assert b"".join(model.piece(i) for i in ids) == b" " + text.encode()


@pytest.mark.parametrize("text", ["###Patient: is it", " The chest", "\nx", "effusion"])
def test_a_continuation_has_no_leading_space(model: native.Model, text: str) -> None:
    ids = model.tokenize(text, leading_space=False)
    assert b"".join(model.piece(i) for i in ids) == text.encode()


def test_token_ids_equal_the_authors(tiny_llama: Any, shared: Path, tmp_path: Path) -> None:
    oracle = shared / "data" / "oracle"
    prompts = json.loads((oracle / "meta.json").read_text())["prompts"]
    vocabulary = (oracle / "llm" / "tokenizer.model").read_bytes()
    model = native.Model(tiny_llama.make(tmp_path, vocabulary=vocabulary).gguf)

    def piece(text: str) -> list[int]:
        """The authors' way: control tokens are parsed, and what stands between them is tokenized apart."""
        parts = [model.tokenize(part, leading_space=True).tolist() for part in text.split("<s>")]
        return [i for n, part in enumerate(parts) for i in ([model.bos] if n else []) + part]

    for name, prompt in prompts.items():
        before, after = prompt["prompt"].split("<ImageHere>")
        assert [model.bos, *piece(before)] == prompt["before_ids"], name
        assert piece(after) == prompt["after_ids"], name
    second = prompts["xraygpt-demo, second turn"]
    turn = second["prompt"].split(second["first_answer"])[1]
    parts = [model.tokenize(text, leading_space=False).tolist() for text in (" " + second["first_answer"], turn)]
    assert prompts["xraygpt-demo"]["after_ids"] + parts[0] + parts[1] == second["after_ids"]
    model.close()


def test_tokenizing_nothing_and_half_a_character(model: native.Model) -> None:
    assert model.tokenize("", leading_space=True).tolist() == []
    with pytest.raises(UsageError, match="half a character"):
        model.tokenize("\ud800", leading_space=True)


def test_control_tokens_in_text_stay_text_and_render_as_nothing(model: native.Model) -> None:
    ids = model.tokenize("<s></s><unk>", leading_space=False)
    assert not {0, 1, 2} & set(ids.tolist())
    assert model.piece(model.eos) == b""
    assert model.piece(3 + 0xE9) == b"\xe9"
    with pytest.raises(NativeError, match="outside the vocabulary"):
        model.piece(model.vocab)


def test_decode_logits_cut_length(context: native.Context) -> None:
    batch = put(native.Batch(8), [1, 5, 9], outputs=[False, False, True])
    context.decode(batch)
    first = context.logits(2)
    assert first.shape == (context.model.vocab,)
    assert context.length(0) == 3
    context.cut(0, 2)
    assert context.length(0) == 2
    context.decode(put(batch, [9], start=2))
    np.testing.assert_allclose(context.logits(0), first, atol=1e-5)
    with pytest.raises(NativeError, match="row 1 of the last batch has no logits"):
        context.logits(1)


def test_a_batch_keeps_its_embedding_rows_and_frees_those_before_at_once(context: native.Context) -> None:
    batch = native.Batch(8)
    rows = np.ones((2, context.model.width), np.float32)
    seen = weakref.ref(rows)
    gc.disable()
    try:
        batch.put(rows, [0, 1], 0, True)
        del rows
        assert seen() is not None
        context.decode(batch)
        put(batch, [1, 5])
        assert seen() is None
    finally:
        gc.enable()


def test_embedding_rows_that_may_not_be_written_to_are_taken_too(context: native.Context) -> None:
    batch, rows = native.Batch(8), np.full((1, context.model.width), 0.5, np.float32)
    batch.put(rows, 0, 0, True)
    context.decode(batch)
    expected = context.logits(0)
    context.cut(0, 0)
    rows.setflags(write=False)
    batch.put(rows, 0, 0, True)
    context.decode(batch)
    np.testing.assert_array_equal(context.logits(0), expected)


def test_sequences_do_not_see_each_other(context: native.Context) -> None:
    batch = native.Batch(8)
    context.decode(put(batch, [1, 5]))
    alone = context.logits(1)
    batch.put(np.array([1, 7, 1, 5], np.int32), [0, 1, 0, 1], [1, 1, 2, 2], True)
    context.decode(batch)
    np.testing.assert_allclose(context.logits(3), alone, atol=1e-5)
    assert np.abs(context.logits(1) - alone).max() > 0.1


def test_one_token_and_the_ones_that_follow_several_are_decoded_as_any(model: native.Model, plan: DevicePlan) -> None:
    context, batch = native.Context(model, replace(plan, sequences=3), 64), native.Batch(8)

    def seen() -> list[Any]:
        context.decode(batch)
        return [context.logits(row) for row in np.flatnonzero(batch.outputs)]

    batch.put(np.array([5, 6, 7], np.int32), 0, [0, 1, 2], True)
    seen()
    batch.follow([8, 9, 10])
    together = seen()
    batch.put(model.embed(np.array([11], np.int32)), 2, 1, True)
    seen()
    batch.put_token(12, 3, 1, False)  # rows of another kind, and more of them, were in it
    assert seen() == []
    batch.put_token(13, 4, 1, True)
    alone = seen()
    context.cut(1, 0)
    batch.put(np.array([6, 9, 11, 12, 13], np.int32), np.arange(5), 1, [False, True, False, False, True])
    np.testing.assert_allclose(seen(), [together[1], alone[0]], atol=1e-5)
    context.close()


def test_the_likeliest_token_of_each_row_that_gives_logits(model: native.Model, plan: DevicePlan) -> None:
    """Rows of several sequences, in any order, as llama.cpp splits them and puts them together again."""
    context, batch = native.Context(model, replace(plan, sequences=5), 64), native.Batch(8)
    for start in range(2):
        order, wanted = np.array([3, 0, 4, 1, 2]), np.array([True, False, True, True, False])
        batch.put(np.arange(7, 12, dtype=np.int32) + start, start, order, wanted)
        context.decode(batch)
        for row in np.flatnonzero(wanted):
            assert context.likeliest(row) == context.logits(row).argmax()
        assert len({context.likeliest(row) for row in np.flatnonzero(wanted)}) > 1
        with pytest.raises(NativeError, match="row 1 of the last batch has no logits"):
            context.likeliest(1)
    batch.put(np.array([5], np.int32), 2, 0, False)
    context.decode(batch)
    with pytest.raises(NativeError, match="row 0 of the last batch has no logits"):
        context.likeliest(0)
    context.close()


def test_a_row_of_damaged_weights_fails_alone(context: native.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    context.decode(put(native.Batch(8), [5, 6, 7]))
    healthy = context.likeliest(0)
    monkeypatch.setattr(context, "_likeliest", {})
    values = np.ctypeslib.as_array(library().llama_get_logits_ith(context.pointer, 1), (context.model.vocab,))
    values[3] = np.nan
    assert context.likeliest(0) == healthy
    with pytest.raises(NativeError, match="not finite"):
        context.likeliest(1)


@pytest.mark.parametrize("streams", [1, 2, 5])
@pytest.mark.parametrize("float32_cache", [True, False])
def test_a_sequence_goes_to_another_context_and_is_copied_there(
    model: native.Model, plan: DevicePlan, streams: int, float32_cache: bool
) -> None:
    plan = replace(plan, float32_cache=float32_cache)
    batch, other = native.Batch(8), native.Context(model, replace(plan, sequences=streams), 300)
    context = native.Context(model, plan, 512)
    ids = [1, 5, 9, 13, 17]
    context.decode(put(batch, [30, 31, 32], sequence=0))
    context.decode(put(batch, ids, sequence=1))
    last = streams - 1
    other.decode(put(batch, [40, 41, 42, 43, 44, 45], sequence=last))
    other.restore(last, context.save(1))
    for to in range(last):
        other.copy(last, to)
    context.decode(put(batch, [21], 5, 1))
    expected = context.logits(0)
    for sequence in range(streams):
        other.decode(put(batch, [21], 5, sequence))
        np.testing.assert_array_equal(other.logits(0), expected)
        assert other.length(sequence) == 6
    other.decode(put(batch, [22], 6, last))
    context.restore(0, other.save(last))
    assert (context.length(0), context.length(1)) == (7, 6)
    context.decode(put(batch, [22], 6, 1))
    context.decode(put(batch, [23], 7, 0))
    there = context.logits(0)
    context.decode(put(batch, [23], 7, 1))
    np.testing.assert_array_equal(there, context.logits(0))
    context.close()
    other.close()


def test_a_state_that_does_not_fit_is_refused(model: native.Model, plan: DevicePlan) -> None:
    batch, small = native.Batch(32), native.Context(model, replace(plan, sequences=1), 256)
    large = native.Context(model, replace(plan, float32_cache=False), 256)
    large.decode(put(batch, [1, 5, 9], sequence=2))
    with pytest.raises(NativeError, match="could not restore sequence 0"):
        small.restore(0, large.save(2))
    small.close()
    large.close()


def test_a_position_out_of_order_is_an_error_with_llamas_own_words(context: native.Context) -> None:
    batch = put(native.Batch(8), [1])
    context.decode(batch)
    with pytest.raises(NativeError, match=r"could not decode 1 rows \(returned -1\): .*position"):
        context.decode(put(batch, [5], start=7))


def test_embedding_rows_of_tokens_give_the_tokens_logits(context: native.Context, tiny: Any) -> None:
    batch = native.Batch(8)
    ids = np.array([1, 5, 9, 30], np.int32)
    context.decode(put(batch, ids.tolist()))
    expected = context.logits(3)
    batch.put(tiny.token_embeddings[ids], np.arange(4), 1, True)
    context.decode(batch)
    np.testing.assert_allclose(context.logits(3), expected, atol=1e-5)


def test_a_batch_takes_no_more_than_its_rows() -> None:
    with pytest.raises(NativeError, match="9 rows do not fit a batch of 8"):
        put(native.Batch(8), list(range(9)))


def test_close_order_and_use_after_close(tiny: Any, plan: DevicePlan) -> None:
    model = native.Model(tiny.gguf)
    context = native.Context(model, plan, 256)
    with pytest.raises(NativeError, match="before its context"):
        model.close()
    context.close()
    context.close()
    with pytest.raises(ClosedError):
        context.length(0)
    model.close()
    model.close()
    with pytest.raises(ClosedError):
        model.tokenize("x", leading_space=True)


def test_a_step_may_have_fewer_threads_than_a_prompt(model: native.Model, plan: DevicePlan) -> None:
    context = native.Context(model, replace(plan, threads=2, step_threads=1), 64)
    lib = library()
    assert (lib.llama_n_threads(context.pointer), lib.llama_n_threads_batch(context.pointer)) == (1, 2)
    context.close()


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_sleep_soon_unless_the_user_has_it_otherwise(
    given: dict[str, str], spins: str | None
) -> None:
    code = "import os; from xraygpt_lite.llm.library import library; library(); print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**plain, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(spins)


def test_system_facts() -> None:
    assert "CPU" in native.system_info()
    assert native.supports_gpu() in (True, False)
    assert len(native.build_id()) == 16


def test_layers_on_a_gpu_that_this_build_lacks(tiny: Any) -> None:
    if native.supports_gpu():
        pytest.skip("this build of llama.cpp has a GPU")
    with pytest.raises(DeviceError, match="built without one"):
        native.Model(tiny.gguf, gpu_layers=-1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF"),
        (b"GGUF", "not a GGUF"),
        (b"\x89PNG" + bytes(100), "not a GGUF"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(100), "version 2 or 3"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 200, "cannot load"),
        (b"GGUF" + (3).to_bytes(4, "little") + bytes(16), "cannot load"),
    ],
)
def test_garbage_is_refused_in_one_sentence(tmp_path: Path, content: bytes, words: str, capfd: Any) -> None:
    path = tmp_path / "llm.gguf"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=words) as caught:
        native.Model(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", [0.001, 0.01, 0.5, 0.999])
def test_a_truncated_model_is_refused(tiny: Any, tmp_path: Path, part: float) -> None:
    data = tiny.gguf.read_bytes()
    path = tmp_path / "llm.gguf"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(BundleError, match=r"cannot load llm\.gguf: "):
        native.Model(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        native.Model(tmp_path / "llm.gguf")


def test_the_log_joins_parts_of_a_line_and_keeps_levels_apart() -> None:
    log = Log()
    log.add(ERROR, b"old\n")
    mark = log.mark()
    log.add(WARNING, b"one ")
    log.add(WARNING, b"line\n")
    log.add(ERROR, b"cause\n")
    log.add(ERROR, b"consequence\n")
    assert log.since(mark, WARNING) == ["one line"]
    assert log.reason(mark) == ": cause"
    assert log.reason(log.mark()) == ""


def test_importing_the_room_loads_no_native_library() -> None:
    code = "import sys, xraygpt_lite.llm.scheduler, xraygpt_lite.llm.selftest; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_devices_are_listed_and_a_cpu_is_no_gpu() -> None:
    """Where ggml is asked through its own libraries: it knows one CPU at least, and its memory."""
    found = devices()
    assert any(kind == 0 and free > 10**8 for kind, free in found)
    if not native.supports_gpu():
        assert native.gpu_memory() is None
