"""The command line over a model that is made of nothing: `python with_fake_model.py summarize a.png …`.

The stand-in answers in words that depend on image and question only, and does on request what a real model does rarely:
it is slow, it fails, it has a bug. Questions and options are checked by the package's own code.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import xraygpt_lite
from xraygpt_lite import errors, prompt
from xraygpt_lite.options import resolve
from xraygpt_lite.values import (
    GenerationOptions,
    ImageSpec,
    Manifest,
    PromptSpec,
    PromptVariant,
    Sampling,
    SelfTest,
    Summary,
    TaskSpec,
    Timings,
)

MANIFEST = Manifest(
    schema=3,
    name="fake",
    family="fake",
    licence="none",
    intended_use="tests",
    disclaimer="Research use only, not a medical device.",
    sources=(),
    image=ImageSpec(8, "stretch", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    image_tokens=1,
    width=8,
    prompt=PromptSpec(
        variants={"demo": PromptVariant("", "{question}", "{question}", (1,))},
        default_variant="demo",
        stops=("###",),
        stop_ids=(2,),
        keep_after="",
        refused=("###Doctor:",),
        default_question="What does it show?",
        tasks={
            "vqa": TaskSpec("[vqa] {question}", ""),
            "identify": TaskSpec("[identify] {question} {box}", "What is it?"),
        },
        box_grid=100,
    ),
    defaults=Sampling(max_tokens=300),
    presets={"authors": GenerationOptions(temperature=1.0, top_p=0.9)},
    weight_types={},
    agreement={},
    warnings=(),
    files=(),
    self_test=SelfTest(0, (), (), 0.0, "", (), (), 0.0),
)


class Stream(contextlib.AbstractContextManager["Stream"]):
    radiograph = None  # of files that are no images

    def __init__(self, summary: Summary, turns: list[Summary] | None = None) -> None:
        self._result, self._turns = summary, turns
        self.summary: Summary

    def __iter__(self) -> Iterator[str]:
        words = self._result.raw_text.split(" ")
        for n, word in enumerate(words):
            if "slow" in self._result.question:
                time.sleep(0.1)
            if "native" in self._result.question and n == 2:
                raise errors.NativeError("llama.cpp returned -3 while decoding; run xraygpt-lite doctor")
            if "bug" in self._result.question:
                raise ValueError("something about a patient")
            yield word if n == 0 else f" {word}"
        self.summary = self._result
        if self._turns is not None:
            self._turns.append(self._result)

    def __exit__(self, *_: object) -> None:
        pass


class Chat:
    def __init__(self, model: Model, image: str | bytes) -> None:
        self._model, self._image = model, image
        self.radiograph = SimpleNamespace(warnings=model.warnings(image))
        self.turns: list[Summary] = []

    def stream(self, question: str | None, options: GenerationOptions | None, *, task: Any, box: Any) -> Stream:
        summary = self._model.answer(self._image, question, options, task, box)
        return Stream(replace(summary, raw_text=f"[{len(self.turns)} before] {summary.raw_text}",
                              text=f"[{len(self.turns)} before] {summary.text}"), self.turns)  # fmt: skip

    def restart(self) -> None:
        self.turns.clear()

    def close(self) -> None:
        pass


class Model:
    bundle = SimpleNamespace(manifest=MANIFEST, id="0" * 64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(
        self, question: str | None, options: Any, *, task: Any = None, box: Any = None, variant: str | None
    ) -> prompt.Asked:
        prompt.variant_of(MANIFEST.prompt, variant)
        resolve(options, MANIFEST)
        return prompt.ask(MANIFEST.prompt, question, task, box)

    def stream(
        self, image: str | bytes, question: str | None, options: Any, *, task: Any, box: Any, variant: str | None
    ) -> Stream:
        return Stream(self.answer(image, question, options, task, box))

    def chat(self, image: str, *, variant: str | None) -> Chat:
        self._read(image)
        return Chat(self, image)

    def answer(
        self, image: str | bytes, question: str | None, options: GenerationOptions | None, task: Any, box: Any
    ) -> Summary:
        size = self._read(image)
        request = prompt.ask(MANIFEST.prompt, question, task, box)
        asked = request.question
        text = f"{size} bytes, asked: {prompt.wording(MANIFEST.prompt, request, str(request.box))}"
        text = " ".join(["word"] * 60) if "slow" in asked else text
        return Summary(
            source=image if isinstance(image, str) else "bytes",
            sha256="a" * 64,
            sop_instance_uid=None,
            question=asked,
            prompt_variant="demo",
            text=text.strip(),
            raw_text=text,
            finish="length" if "long" in asked else "stop",
            warnings=(*self.warnings(image), *(["cut off"] if "long" in asked else [])),
            options=resolve(options, MANIFEST),
            device="cpu",
            bundle_id="0" * 64,
            bundle_name="fake",
            timings=Timings(read=0.12345678),
            prompt_tokens=3,
            image_tokens=1,
            answer_tokens=4,
            disclaimer=MANIFEST.disclaimer,
            task=request.task,
            asked_box=request.box,
        )

    def warnings(self, image: str | bytes) -> tuple[str, ...]:
        return ("only the first of 2 frames was read",) if self._read(image) == 7 else ()

    def _read(self, image: str | bytes) -> int:
        if isinstance(image, bytes):
            if not image:
                raise errors.ImageError("the image has no bytes")
            return len(image)
        if not Path(image).is_file():
            raise errors.ImageError(f"{image} does not exist")
        return Path(image).stat().st_size


def load(bundle: str | None, *, device: str, threads: int | None, context: Any = None) -> Model:
    if bundle == "altered":
        raise errors.BundleError("llm.gguf has the sha256 00…, but bundle.json lists 11…; copy the bundle again")
    if device == "cuda":
        raise errors.DeviceError("--device cuda cannot be met: llama.cpp sees no GPU")
    return Model()


if __name__ == "__main__":
    xraygpt_lite.load = load  # type: ignore[assignment]  # the stand-in
    from xraygpt_lite.cli import main

    main(sys.argv[1:])
