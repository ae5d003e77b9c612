"""The engine in turn with what bounds it: a bare loop over the same rows, and the speed at which memory is read.

Knows an opened model, and what was said with it before; no process and no image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from xraygpt_lite import prompt
from xraygpt_lite.answer import AnswerReader
from xraygpt_lite.bench import machine
from xraygpt_lite.bundle import gguf_header
from xraygpt_lite.llm import rates
from xraygpt_lite.llm.scheduler import Engine, Generation
from xraygpt_lite.model import XrayModel
from xraygpt_lite.options import resolve
from xraygpt_lite.values import GenerationOptions, Sampling, Segment

ENOUGH_S, MOST_ROUNDS = 2.0, 100
"""Answers of a small model are short: its rounds go on for so long, and at most so often."""


@dataclass(frozen=True)
class Prompt:
    """The first turn about one image, as `summarize` asks it.

    Where an answer has to go on behind what would end it, nothing ends it but its length: that chooses tokens as a bare
    loop does, while barring them takes time.
    """

    segments: list[Segment]
    sampling: Sampling
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, model: XrayModel, image: str, options: GenerationOptions) -> Prompt:
        """The bundle's default question about an image."""
        spec = model.bundle.manifest.prompt
        _, variant = prompt.variant_of(spec, None)
        segments = prompt.build(variant, spec.default_question, model.study(image).rows, model._engine.tokenize)
        sampling = resolve(options, model.bundle.manifest)
        if sampling.min_tokens:
            return cls(segments, replace(sampling, min_tokens=0, stops=()), ())
        return cls(segments, sampling, spec.stop_ids)

    def answer(self, engine: Engine) -> Generation:
        """One answer, straight from the engine, whose result tells in how many calls."""
        reader, stop_ids = AnswerReader(self.sampling.stops), self.stop_ids
        with engine.open() as slot:
            stream = slot.generate(self.segments, self.sampling, stop_ids=stop_ids, reader=reader, pieces=False)
            for _ in stream:
                pass
            return stream.result


def rows(said: Generation) -> int:
    """Rows decoded for an answer: its first token comes of the prompt, one that stops it is never decoded."""
    return len(said.ids) - (said.finish == "stop")


def compare(
    model: XrayModel,
    prompts: Sequence[Prompt],
    guessed: Sequence[Generation],
    repeats: int,
    samples: dict[str, list[float]],
    doing: Callable[[str], object],
) -> dict[str, Any]:
    """Add the samples of every ratio to a bound; return the number of rounds, and whether the same tokens came of all.

    Parameters
    ----------
    model
        Opened without guessing and without the prompt cache: a bare loop has neither.
    guessed
        What was answered to the prompts by a model as its user has it.

    Raises
    ------
    NativeError
        llama.cpp failed, or there is no memory for a second context.
    """
    engine, forget = model._engine, rates.forgetting(model._engine)
    gigabytes = gguf_header.read(model.bundle.llm).token_bytes / 1e9
    with ExitStack() as opened:
        bare = opened.enter_context(rates.Bare(engine))
        # Of a GPU's memory nothing is known here.
        memory = opened.enter_context(machine.Memory(model.plan.threads)) if model.plan.gpu_layers == 0 else None
        doing("warming up the bare loop")
        plain = [each.answer(engine) for each in prompts]
        loops = [bare.run(each.segments, said.calls) for each, said in zip(prompts, plain, strict=True)]
        began, rounds = time.perf_counter(), 0
        while rounds < repeats or (time.perf_counter() - began < ENOUGH_S and rounds < MOST_ROUNDS):
            rounds += 1
            if rounds <= repeats:
                doing(f"comparing with a bare loop, {rounds} of {repeats}{' or more' if rounds == repeats else ''}")
            speed = memory.gigabytes_per_second() if memory else None
            for each, before in zip(prompts, plain, strict=True):
                forget()
                # The one and the other first, in turn, so that neither has an advantage of it.
                loop = bare.run(each.segments, before.calls) if rounds % 2 else None
                said = each.answer(engine)
                loop = loop or bare.run(each.segments, before.calls)
                for name, value in _ratios(said, loop, speed, gigabytes).items():
                    samples.setdefault(name, []).append(value)
    same = all(
        loop.ids[: len(said.ids)] == said.ids == other.ids
        for said, other, loop in zip(plain, guessed, loops, strict=True)
    )
    return {"rounds": rounds, "same_tokens": same}


def _ratios(said: Generation, loop: rates.BareRun, speed: float | None, gigabytes: float) -> dict[str, float]:
    """Samples of one round; `speed` in GB a second of memory, `gigabytes` of weights that are read for one token."""
    ours, theirs = said.generate_s / said.calls, loop.decode_s / said.calls
    found = {
        "tokens_per_s_plain": 1 / ours,
        "tokens_per_s_bare": 1 / theirs,
        "decode_vs_bare": theirs / ours,
        "prefill_vs_bare": loop.prefill_s / said.prefill_s,
    }
    if speed is not None:
        least = gigabytes / speed
        found |= {"bandwidth_gb_s": speed, "tokens_per_s_bandwidth": 1 / least, "decode_vs_bandwidth": least / ours}
    return found
