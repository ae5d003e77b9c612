"""Many radiographs at once are answered as each alone, with real processes, graphs and weights of every type."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundle
import tiny_llama
from PIL import Image

from xraygpt_lite import model as models
from xraygpt_lite.batch import pipeline as pipeline_room
from xraygpt_lite.batch.inputs import Input, find
from xraygpt_lite.batch.pipeline import Ask, Job, Pipeline
from xraygpt_lite.batch.workers import Pool
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import NativeError
from xraygpt_lite.llm.library import exact
from xraygpt_lite.llm.quantize import quantize
from xraygpt_lite.model import XrayModel
from xraygpt_lite.values import Bundle, Failure, GenerationOptions, Radiograph, Summary

COUNT = 14
OPTIONS = GenerationOptions(max_tokens=20)
QUESTIONS = ("Is the heart enlarged?", "What is seen?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Radiographs made of noise, and one file that is none."""
    made = tmp_path_factory.mktemp("radiographs")
    rng = np.random.default_rng(3)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (40 + number, 48), dtype=np.uint8)
        Image.fromarray(pixels).save(made / f"{number}.png")
    (made / "none.png").write_bytes(b"none")
    return made


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles that differ in the language model's weight type; 256 wide, so that every type can be had."""
    made = tmp_path_factory.mktemp("types")
    full = tiny_llama.make(made, width=256).gguf
    found = {}
    for kind in ("f32", "q4_0", "q4_k_m", "q8_0"):
        path = tiny_bundle.make(made / kind, width=256)
        if kind == "f32":
            shutil.copyfile(full, path / "llm.gguf")
        else:
            quantize(full, path / "llm.gguf", kind)
        tiny_bundle.seal(path, replace(tiny_bundle.plain_manifest("tiny"), width=256))
        found[kind] = store.load(path, Cache(None))
    return found


def opened(bundle: Bundle, sequences: int) -> XrayModel:
    exact = bundle.folder.name == "f32"
    return models.open_bundle(bundle, threads=2, context=256, sequences=sequences, float32_cache=exact)


def answered(model: XrayModel, ask: Ask, inputs: Sequence[Input], timeout: float = 60) -> dict[str, list[Summary]]:
    """Texts and tokens by name, from a pipeline; closes the model."""
    asked = [model.check(question) for question in ask.questions]
    found: dict[str, list[Summary]] = {}
    ended: list[str] = []
    with Pool(model.bundle.manifest.image, 2, 60) as pool, Pipeline(model, ask, pool, timeout) as pipeline:
        for job in pipeline.run(Job(one, asked) for one in inputs):
            if job is not None:
                while job.records:
                    found.setdefault(job.input.name, []).append(job.records.popleft())  # type: ignore[arg-type]
                ended += [job.input.name] * job.last
    assert sorted(ended) == sorted(one.name for one in inputs)
    return found


def said(summary: Summary) -> tuple[object, ...]:
    return summary.question, summary.raw_text, summary.prompt_tokens, summary.answer_tokens, summary.sha256


@pytest.fixture(scope="module")
def alone(bundles: dict[str, Bundle], folder: Path) -> Iterator[dict[str, dict[str, list[tuple[object, ...]]]]]:
    """What `summarize` says of each file, by weight type and name."""
    found = {}
    for kind, bundle in bundles.items():
        with opened(bundle, 1) as model:
            found[kind] = {
                path.name: [said(model.summarize(path, question, OPTIONS)) for question in QUESTIONS]
                for path in sorted(folder.glob("?*.png"))
                if path.stem.isdigit()
            }
        texts = {answers[0][1] for answers in found[kind].values()}
        assert len(texts) > COUNT / 2  # or equality would say nothing
    return found


def test_what_ended_comes_at_once_where_the_encoder_is_the_slower_one(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it piles up: it would be on the disk minutes later, or never."""
    for number in range(160):
        shutil.copy(folder / "1.png", tmp_path / f"{number}.png")
    inputs = find([tmp_path])
    plan = models.plan(bundles["q8_0"], threads=2, context=256, sequences=8, llm_threads=1)
    with XrayModel(bundles["q8_0"], plan) as model:
        encode = model.encode

        def slow(*given: Any) -> Any:
            time.sleep(0.1)
            return encode(*given)

        monkeypatch.setattr(model, "encode", slow)
        ask = Ask(options=GenerationOptions(max_tokens=1))
        asked, most = [model.check(None)], 0
        with Pool(model.bundle.manifest.image, 2, 60) as pool, Pipeline(model, ask, pool, 60) as pipeline:
            for _ in pipeline.run(Job(one, asked) for one in inputs):
                most = max(most, pipeline.in_flight)
        assert 0 < most <= 4 * model.encoder_batch


@pytest.mark.parametrize(("kind", "sequences"), [("f32", 8), ("q4_0", 3), ("q4_k_m", 8), ("q8_0", 1), ("q8_0", 5)])
def test_together_equals_alone(
    bundles: dict[str, Bundle], alone: dict[str, dict[str, list[object]]], folder: Path, kind: str, sequences: int
) -> None:
    if kind != "f32" and not exact(kind):
        pytest.skip(f"{kind} is not said to be exact on this CPU")
    inputs = find([folder], exclude=["none*"])
    random.Random(sequences).shuffle(inputs)
    together = answered(opened(bundles[kind], sequences), Ask(QUESTIONS, options=OPTIONS), inputs)
    assert {name: [said(record) for record in records] for name, records in together.items()} == alone[kind]


def test_copies_of_a_model_say_the_same(bundles: dict[str, Bundle], folder: Path, alone: Any) -> None:
    plan = models.plan(bundles["q8_0"], threads=2, context=256, sequences=4, llm_threads=1)
    model = XrayModel(bundles["q8_0"], plan)
    steps = [0, 0]
    for number, engine in enumerate(model._engines):
        engine._core.context.decode = counting(engine._core.context.decode, steps, number)  # type: ignore[method-assign]
    together = answered(model, Ask(QUESTIONS, options=OPTIONS), find([folder], exclude=["none*"]))
    assert {name: [said(record) for record in records] for name, records in together.items()} == alone["q8_0"]
    assert min(steps) > 10
    assert not model.usable
    assert [engine.usable for engine in model._engines] == [False, False]


def counting(decode: Any, steps: list[int], number: int) -> Any:
    """The same call, counted."""

    def call(batch: Any) -> None:
        steps[number] += 1
        decode(batch)

    return call


def test_drawn_answers_do_not_depend_on_order(bundles: dict[str, Bundle], folder: Path) -> None:
    inputs = find([folder], exclude=["none*"])
    drawn = Ask(QUESTIONS, options=GenerationOptions(max_tokens=20, temperature=1.0, seed=5))
    first = answered(opened(bundles["q8_0"], 4), drawn, inputs)
    second = answered(opened(bundles["q8_0"], 3), drawn, inputs[::-1])
    assert {n: [said(r) for r in records] for n, records in first.items()} == {
        n: [said(r) for r in records] for n, records in second.items()
    }
    with opened(bundles["q8_0"], 1) as model:
        single = model.summarize(inputs[0].path, QUESTIONS[0], drawn.options)
    assert said(single) == said(first[inputs[0].name][0])


def test_no_state_leaks(bundles: dict[str, Bundle], folder: Path) -> None:
    """A, B, A: the second A is as the first."""
    a, b = folder / "0.png", folder / "1.png"
    inputs = [Input(f"{number}", path) for number, path in enumerate((a, b, a))]
    found = answered(opened(bundles["q4_0"], 1), Ask(options=OPTIONS), inputs)
    assert said(found["0"][0])[1:] == said(found["2"][0])[1:] != said(found["1"][0])[1:]


def test_one_bad_file_is_one_failure(bundles: dict[str, Bundle], folder: Path) -> None:
    found = answered(opened(bundles["q8_0"], 2), Ask(QUESTIONS, options=OPTIONS), find([folder]))
    bad = found.pop("none.png")
    assert [(one.question, one.stage, one.error) for one in bad] == [(q, "read", "ImageError") for q in QUESTIONS]  # type: ignore[attr-defined]
    assert all(isinstance(record, Summary) for records in found.values() for record in records)


def test_one_that_the_encoder_cannot_take_is_one_failure(
    bundles: dict[str, Bundle], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(bundles["q8_0"], 3) as model:
        encode = model.encode
        monkeypatch.setattr(model, "encode", lambda *given: refuse("5.png", encode, *given))
        found = answered(model, Ask(options=OPTIONS), find([folder], include=["?.png"]))
    kinds = {name: [type(record) for record in records] for name, records in found.items()}
    assert kinds == {f"{number}.png": [Failure if number == 5 else Summary] for number in range(10)}
    (failure,) = found["5.png"]
    assert isinstance(failure, Failure)
    assert (failure.stage, failure.error, failure.message) == ("vision", "NativeError", "no memory")
    assert failure.sha256


@pytest.mark.parametrize("names", ["?.png", "5.png"])
def test_an_encoder_that_takes_none_ends_the_run(
    bundles: dict[str, Bundle], folder: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    with opened(bundles["q8_0"], 3) as model:
        monkeypatch.setattr(model, "encode", lambda *given: refuse("", None, *given))
        with pytest.raises(NativeError, match="no memory"):
            answered(model, Ask(options=OPTIONS), find([folder], include=[names]))


def refuse(name: str, encode: Any, radiographs: Sequence[Radiograph], *given: Any) -> Any:
    """An encoder that fails on batches with an image of this name."""
    if any(one.source.endswith(name) for one in radiographs):
        raise NativeError("no memory")
    return encode(radiographs, *given)


def test_an_answer_that_takes_too_long_is_one_failure(
    bundles: dict[str, Bundle], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_room, "_PAUSE_S", 0)  # a tiny model's answer may end between two looks
    patient = Ask(options=GenerationOptions(max_tokens=200, min_tokens=200))
    found = answered(opened(bundles["q8_0"], 2), patient, find([folder], limit=4), timeout=0)
    late = [one for records in found.values() for one in records if isinstance(one, Failure)]
    assert late
    assert {(one.stage, one.error) for one in late} == {("generate", "Timeout")}
    assert "longer than 0 s" in late[0].message


def test_answers_beside_each_other_share_the_time(bundles: dict[str, Bundle]) -> None:
    model = opened(bundles["q8_0"], 3)
    with Pool(model.bundle.manifest.image, 1, 60) as pool, Pipeline(model, Ask(), pool, 20) as pipeline:
        assert pipeline._timeout == 60


def test_lanes_are_full_before_the_first_step(
    bundles: dict[str, Bundle], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where encoder and language model share the cores: a step costs nearly the same with few answers in it."""
    model = opened(bundles["q4_0"], 3)
    assert model.takes_turns
    monkeypatch.setattr(model._encoder, "batch", 1)
    happened: list[str] = []
    encode, decode = model._encoder.encode, model._engine._core.context.decode
    monkeypatch.setattr(model._encoder, "encode", lambda pixels: (happened.append("image"), encode(pixels))[1])
    monkeypatch.setattr(
        model._engine._core.context, "decode", lambda batch: (happened.append("call"), decode(batch))[1]
    )
    with Pool(model.bundle.manifest.image, 2, 60) as pool, Pipeline(model, Ask(options=OPTIONS), pool, 60) as pipeline:
        encode_some = pipeline._encode
        monkeypatch.setattr(pipeline, "_encode", lambda: len(pipeline._read) == 3 and encode_some())
        for _ in pipeline.run(Job(one, [model.check()]) for one in find([folder], limit=3)):
            pass
    assert happened[:3] == ["image"] * 3
    assert "call" in happened[3:]


def test_a_model_that_stopped_working_ends_the_run(
    bundles: dict[str, Bundle], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one failure for every file of the archive."""
    model = opened(bundles["q8_0"], 2)

    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(model._engine._core, "_step", broken)
    with pytest.raises(NativeError, match="stopped working"):
        answered(model, Ask(options=OPTIONS), find([folder]))


def test_files_are_pulled_as_needed(bundles: dict[str, Bundle], folder: Path) -> None:
    """Memory does not grow with the number of files: what waits anywhere is bounded."""
    model, asked = opened(bundles["q8_0"], 2), []
    pulled = 0

    def jobs() -> Iterator[Job]:
        nonlocal pulled
        for number in range(120):
            pulled += 1
            yield Job(Input(str(number), folder / f"{number % COUNT}.png"), asked)

    ask = Ask(options=GenerationOptions(max_tokens=4))
    asked = [model.check()]
    most = done = 0
    with Pool(model.bundle.manifest.image, 1, 60) as pool, Pipeline(model, ask, pool, 60) as pipeline:
        for job in pipeline.run(jobs()):
            done += job is not None and job.last
            most = max(most, pulled - done)
    assert done == 120
    assert most < 40
