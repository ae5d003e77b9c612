"""A second turn on the cache of the first is what the authors' code makes of the whole conversation: ids and logits.

The engine and its cache are real; only the choice of the first answer's tokens is scripted, since the oracle's second
turns follow an answer of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundle

from xraygpt_lite.bundle import typed_json
from xraygpt_lite.chat import ChatSession, Study
from xraygpt_lite.converters.llama import LlamaFolder
from xraygpt_lite.llm import scheduler
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.values import (
    Bundle,
    DevicePlan,
    EmbeddingSegment,
    Placement,
    PromptSpec,
    Radiograph,
    Sampling,
    Segment,
    Timings,
)

PLAN = DevicePlan(context=512, threads=2, float32_cache=True)
QUESTION = {
    "xraygpt": "What are the main findings and impression of the given X-ray?",
    "minigpt-med": "is there a pleural effusion?",
}


@dataclass
class Told:
    """What the engine was given, and what it is to say: the ids of each answer in turn."""

    script: list[list[int]]
    ids: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)


@pytest.fixture(scope="module")
def oracle(shared: Path) -> Path:
    return shared / "data" / "oracle"


@pytest.fixture(scope="module")
def engine(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("turns") / "llm.gguf"
    LlamaFolder(oracle / "llm").write(path, "f32", "oracle")
    with Engine(path, PLAN) as opened:
        yield opened


@contextmanager
def conversation(
    engine: Engine, family: str, rows: np.ndarray, told: Told, patch: pytest.MonkeyPatch
) -> Iterator[ChatSession]:
    """A chat with the family's own prompt, which says what is `told` and notes the ids that enter the cache."""

    class Scripted:
        def __init__(self, *_: Any) -> None:
            self._left = iter(told.script.pop(0))
            self._first = True

        def sample(self, context: Any, row: int) -> int:
            if self._first:
                told.logits.append(context.logits(row).copy())
            self._first = False
            return next(self._left)

        def close(self) -> None:
            pass

    patch.setattr(scheduler, "Sampler", Scripted)
    template = resources.files("xraygpt_lite.models") / family / "template.json"
    spec = typed_json.build(PromptSpec, json.loads(template.read_text("utf-8"))["prompt"], family)
    plain = tiny_bundle.plain_manifest()
    bundle = Bundle(Path(), replace(plain, prompt=spec, defaults=Sampling(max_tokens=64)), "0" * 64)
    placement = Placement((1.0, 1.0), (0.0, 0.0), (32, 32))
    study = Study(Radiograph(np.zeros((32, 32), np.float32), "array", "0" * 64), rows, placement, Timings())
    with ChatSession(engine, bundle, study, None, "cpu") as chat:
        generate = chat._slot.generate

        def noting(segments: Sequence[Segment], *args: Any, **more: Any) -> Any:
            for segment in segments:
                told.ids += [-1] if isinstance(segment, EmbeddingSegment) else segment.ids.tolist()
            return generate(segments, *args, **more)

        patch.setattr(chat._slot, "generate", noting)
        yield chat


@pytest.mark.parametrize(
    ("family", "prompt", "space", "stop", "task", "embeddings"),
    [
        ("xraygpt", "xraygpt-demo", " ", "###Patient:", None, "xraygpt"),
        ("minigpt-med", "minigpt-med", "", None, "vqa", "minigpt_med"),
    ],
)
def test_a_second_turn_is_the_authors(
    engine: Engine,
    oracle: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    prompt: str,
    space: str,
    stop: str | None,
    task: str | None,
    embeddings: str,
) -> None:
    meta = json.loads((oracle / "meta.json").read_text("utf-8"))["prompts"]
    first, second = meta[prompt], meta[f"{prompt}, second turn"]
    golden = np.load(oracle / "llm_golden.npz")
    answer = engine.tokenize(space + second["first_answer"], leading_space=False).tolist()
    ending = engine.tokenize(stop, leading_space=False).tolist() if stop else [engine.eos]
    told = Told([[*answer, *ending], [engine.eos]])
    rows = np.load(oracle / f"{embeddings}_golden.npz")["embeddings"][0]
    question = second["prompt"].rsplit(": " if stop else "[INST] ", 1)[-1].split("###")[0].removesuffix(" [/INST]")
    with conversation(engine, family, rows, told, monkeypatch) as chat:
        one = chat.ask(QUESTION[family], task=task)
        assert (one.text, one.raw_text) == (second["first_answer"], space + second["first_answer"])
        assert told.ids == [*first["before_ids"], -1, *first["after_ids"]]
        told.ids += answer
        assert chat._slot.rows == len(told.ids) - 1 + len(rows)
        chat.ask(question)
        assert told.ids == [*second["before_ids"], -1, *second["after_ids"]]
        assert chat._slot.rows == len(told.ids) - 1 + len(rows)
    for name, logits in zip((prompt, f"{prompt}, second turn"), told.logits, strict=True):
        np.testing.assert_allclose(logits, golden[f"{name}_logits"], rtol=0, atol=1e-4)


def test_an_answer_without_the_authors_space_stays_as_the_model_said_it(
    engine: Engine, oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors put a space before it when they write the conversation down again; the cache is not rewritten."""
    meta = json.loads((oracle / "meta.json").read_text("utf-8"))["prompts"]["xraygpt-demo, second turn"]
    spaced = engine.tokenize(f" {meta['first_answer']}", leading_space=False).tolist()
    bare = engine.tokenize(meta["first_answer"], leading_space=False).tolist()
    assert spaced == [447, *bare]  # 447 is the space
    told = Told([[*bare, *engine.tokenize("###", leading_space=False).tolist()], [engine.eos]])
    rows = np.load(oracle / "xraygpt_golden.npz")["embeddings"][0]
    with conversation(engine, "xraygpt", rows, told, monkeypatch) as chat:
        assert chat.ask().text == meta["first_answer"]
        told.ids += bare
        chat.ask("Is the heart enlarged?")
    authors = meta["after_ids"]
    at = next(n for n in range(len(authors)) if authors[n : n + len(spaced)] == spaced)
    assert told.ids == [*meta["before_ids"], -1, *authors[:at], *authors[at + 1 :]]


def test_replaced_words_stay_the_models_own_in_the_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = engine.tokenize(" I am ChatDoctor.", leading_space=False).tolist()
    told = Told([[*said, engine.eos], [engine.eos]])
    with conversation(engine, "xraygpt", np.zeros((4, engine.width), np.float32), told, monkeypatch) as chat:
        summary = chat.ask("Who are you?")
        assert (summary.text, summary.raw_text) == ("I am XrayGPT.", " I am ChatDoctor.")
        before = chat._slot.rows
        expected = engine.tokenize("###Patient: And?###Doctor:", leading_space=False)
        assert chat.ask("And?").prompt_tokens == len(expected) == chat._slot.rows - before
