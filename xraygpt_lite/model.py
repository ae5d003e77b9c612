"""The main path: a radiograph in, a summary out. Start reading here.

    read → transform → encoder → projector → prompt → prefill → decode → answer → Summary

`load` checks a bundle, decides where it runs and opens it; an `XrayModel` answers about one radiograph after another.
It knows every room's front door and no room's inside.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np

from xraygpt_lite import device as devices
from xraygpt_lite import prompt, scoring, vision
from xraygpt_lite.answer import AnswerReader
from xraygpt_lite.bundle import gguf_header, store
from xraygpt_lite.cache import Cache
from xraygpt_lite.chat import AnswerStream, ChatSession, Study
from xraygpt_lite.closing import Closing
from xraygpt_lite.errors import ClosedError
from xraygpt_lite.imaging.read import read
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.llm import native, selftest
from xraygpt_lite.llm.openings import Openings
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.options import resolve
from xraygpt_lite.turns import Turns
from xraygpt_lite.values import (
    Bundle,
    DevicePlan,
    Finding,
    Float32,
    GenerationOptions,
    ImageTokens,
    Manifest,
    Pixels,
    Radiograph,
    Sampling,
    Segment,
    Summary,
    Timings,
)

Image = str | os.PathLike[str] | bytes | np.ndarray | Radiograph
"""What every method takes: a path, a file's bytes, an array (H, W), or a `Radiograph` that was read before."""


def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    context: int | Callable[[Manifest], int] | None = None,
    sequences: int = 1,
    speculation: bool = True,
    prompt_cache: bool = True,
) -> XrayModel:
    """Check a bundle and open it.

    Parameters
    ----------
    bundle
        A name of a bundled or installed bundle, or a folder; None is the default bundle.
    device
        "auto", "cpu" or "cuda".
    threads, context
        None lets `device.plan` choose. A function is given the manifest and names the rows that are needed.
    sequences
        Conversations and answers that may be open at once; further ones wait for their turn.
    speculation
        Guess at next tokens, where one greedy answer is written alone and it pays; no answer changes.
    prompt_cache
        Keep the rows of the prompt's fixed text in the user's cache folder, for the next process.

    Raises
    ------
    BundleError
        The bundle fails a check.
    DeviceError, MissingPackageError, NativeError
        What it needs to run is absent, or llama.cpp's build does not run on this machine.
    """
    found = checked(bundle)
    if callable(context):
        context = fitting(found, context(found.manifest))
    return open_bundle(
        found,
        device=device,
        threads=threads,
        context=context,
        sequences=sequences,
        speculation=speculation,
        prompt_cache=prompt_cache,
    )


def checked(bundle: str | os.PathLike[str] | None) -> Bundle:
    """Find a bundle and check its files, and once a machine this build of llama.cpp; raises as `load`."""
    cache = Cache(devices.cache_folder())
    found = store.load(store.find(os.fspath(bundle) if bundle is not None else None), cache)
    # Always the default bundle's: it is small, and no other may decide what is remembered of this build of llama.cpp.
    selftest.check(store.load(store.find(None), cache).llm, cache)
    return found


def open_bundle(
    bundle: Bundle,
    *,
    device: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    sequences: int = 1,
    float32_cache: bool = False,
    speculation: bool = False,
    prompt_cache: bool = False,
) -> XrayModel:
    """Open a bundle whose files were checked; takes and raises what `load` does, and leaves out what makes it faster.

    `float32_cache` is for parity with float32 references.
    """
    chosen = plan(bundle, device=device, threads=threads, context=context, sequences=sequences)
    chosen = replace(chosen, float32_cache=float32_cache)
    return XrayModel(bundle, chosen, speculation=speculation, prompt_cache=prompt_cache)


def plan(
    bundle: Bundle,
    *,
    device: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    sequences: int = 1,
    llm_threads: int | None = None,
    because: Sequence[str] = (),
) -> DevicePlan:
    """Where and how a bundle would run; takes what `device.plan` takes, raises as `load`."""
    header = gguf_header.read(bundle.llm)
    cells = context or min(devices.DEFAULT_CONTEXT, header.context_length)
    return devices.plan(
        device,
        providers=vision.available_providers(),
        llama_gpu=native.supports_gpu(),
        trained_context=header.context_length,
        threads=threads,
        context=context,
        sequences=sequences,
        llm_threads=llm_threads,
        because=because,
        token_bytes=header.token_bytes,
        load=_gpu_load(bundle, header, cells * sequences),
        gpu_free=native.gpu_memory() if device != "cpu" else None,
    )


def _gpu_load(bundle: Bundle, header: gguf_header.GgufHeader, cells: int) -> devices.Load | None:
    """What a GPU would have to hold; vision graphs take about half more than their files while they run."""
    if not header.layers:
        return None
    layers = header.layers + 1
    graphs = sum(entry.size for entry in bundle.manifest.files if entry.name != bundle.llm.name)
    return devices.Load(layers, (bundle.llm.stat().st_size + cells * header.cache_row) // layers, graphs * 3 // 2)


def fitting(bundle: Bundle, rows: int) -> int:
    """A context for so many rows, at most what the model was trained for: then each answer says what is too long."""
    return max(16, min(rows, gguf_header.read(bundle.llm).context_length))


class XrayModel(Closing):
    """An opened bundle. Safe to call from several threads; close it, or use it as a context manager.

    Attributes
    ----------
    bundle, plan, providers
        What is loaded, where it runs and why, and what ONNX Runtime really uses.
    exact
        Rows decoded together have the very logits that each has alone: no answer depends on those written beside it.
    """

    def __init__(
        self, bundle: Bundle, plan: DevicePlan, *, speculation: bool = False, prompt_cache: bool = False
    ) -> None:
        self.bundle, self.plan = bundle, plan
        self._encoder = vision.Encoder(bundle, plan)
        on_cpu = plan.gpu_layers == 0 and plan.providers[0] == devices.CPU
        self._turns = Turns() if on_cpu and not plan.encoder_threads else None
        self.exact = on_cpu and not plan.float32_cache and native.exact(bundle.manifest.weight_types["llm"])
        part = replace(plan, sequences=-(-plan.sequences // plan.engines))
        phrases = bundle.manifest.prompt.phrases if speculation and self.exact else None
        openings = Openings(Cache(devices.cache_folder()), bundle.id, part) if prompt_cache else None
        self._engines = [
            Engine(bundle.llm, part, self._turns, phrases=phrases, openings=openings) for _ in range(plan.engines)
        ]
        self._engine = self._engines[0]
        self._closed = False

    @property
    def providers(self) -> tuple[str, ...]:
        return self._encoder.providers

    def summarize(
        self,
        image: Image,
        question: str | None = None,
        options: GenerationOptions | None = None,
        *,
        task: str | None = None,
        box: Sequence[float] | None = None,
        variant: str | None = None,
    ) -> Summary:
        """One answer about one radiograph.

        Parameters
        ----------
        image
            A path, a file's bytes, an array (H, W) with 0 = dark, or a `Radiograph`.
        question
            None asks the bundle's default question, or the task's.
        options
            What is None in it is decided by the preset, else by the bundle.
        task
            One of the bundle's forms of question (`bundle.manifest.prompt.tasks`); None asks the question as it is.
        box
            (x0, y0, x1, y1) in pixels of the original image, for a task that asks about a rectangle.
        variant
            One of the bundle's prompt wordings; None is its default.

        Raises
        ------
        ImageError
            The image cannot be read as a radiograph.
        UsageError
            The question contains a turn marker, the bundle has no such task, a box is missing, superfluous or outside
            the image, or an option makes no sense.
        ContextError
            Prompt and longest answer do not fit the context.
        """
        asked = self.check(question, options, task=task, box=box, variant=variant)
        return self._turn(image, asked, options, variant, pieces=False).summary

    def stream(
        self,
        image: Image,
        question: str | None = None,
        options: GenerationOptions | None = None,
        *,
        task: str | None = None,
        box: Sequence[float] | None = None,
        variant: str | None = None,
    ) -> AnswerStream:
        """As `summarize`, with the text as it comes and the record in `.summary` at the end."""
        asked = self.check(question, options, task=task, box=box, variant=variant)
        return self._turn(image, asked, options, variant, pieces=True)

    def chat(self, image: Image, *, variant: str | None = None) -> ChatSession:
        """A conversation about one radiograph, which is encoded once."""
        return self.converse(self.study(image), variant=variant)

    def check(
        self,
        question: str | None = None,
        options: GenerationOptions | None = None,
        *,
        task: str | None = None,
        box: Sequence[float] | None = None,
        variant: str | None = None,
    ) -> prompt.Asked:
        """What would be asked; raises the UsageError that `summarize` would raise for any image."""
        prompt.variant_of(self.bundle.manifest.prompt, variant)
        resolve(options, self.bundle.manifest)
        return prompt.ask(self.bundle.manifest.prompt, question, task, box)

    def score(self, image: Image, question: str, choices: Sequence[str]) -> dict[str, float]:
        """How likely each choice is as the answer: probabilities that sum to 1.

        The softmax over the choices of each one's summed token log-probabilities; a choice is tokenized as a
        continuation of the prompt, and its sum is not divided by its length. So spell it as the model begins its
        answers: "Yes", where "yes" may hardly ever come.

        Raises
        ------
        UsageError
            Fewer than two choices, or one that is empty or given twice; or as `summarize`.
        """
        asked = prompt.check_question(self.bundle.manifest.prompt, question)
        with self.chat(image) as chat:
            return chat.score([(asked, choices)])[0]

    def findings(self, image: Image) -> tuple[Finding, ...]:
        """The probability of "yes" for every finding that the bundle's manifest lists, by its own questions.

        Raises
        ------
        UsageError
            The bundle lists no findings.
        """
        scoring.listed(self.bundle.manifest)
        with self.chat(image) as chat:
            return chat.findings()

    def study(self, image: Image) -> Study:
        """Read, transform and encode one radiograph."""
        self._open()
        began = time.perf_counter()
        radiograph = image if isinstance(image, Radiograph) else read(image)
        was_read = time.perf_counter()
        pixels = transform([radiograph], self.bundle.manifest.image)
        return self.encode([radiograph], pixels, [was_read - began])[0]

    @property
    def usable(self) -> bool:
        """False once it was closed, or the language model has stopped working."""
        return not self._closed and all(engine.usable for engine in self._engines)

    def encoder_first(self) -> AbstractContextManager[None]:
        """While this is held the language model begins no step, where the two take turns; for several `encode`s."""
        return self._turns.first() if self._turns else nullcontext()

    @property
    def takes_turns(self) -> bool:
        """Whether encoder and language model share their threads, and so never work at the same time."""
        return self._turns is not None

    @property
    def encoder_batch(self) -> int:
        """Most radiographs that `encode` takes."""
        return self._encoder.batch

    def encode(self, radiographs: Sequence[Radiograph], pixels: Pixels, read_s: Sequence[float]) -> list[Study]:
        """Encode radiographs that were read and transformed before, in so many seconds each."""
        self._open()
        with self.encoder_first():
            began = time.perf_counter()
            tokens = self._encoder.encode(pixels)
        each = (time.perf_counter() - began) / len(radiographs)
        parts = zip(radiographs, tokens.data, pixels.placements, read_s, strict=True)
        return [Study(radiograph, rows, place, Timings(read=s, vision=each)) for radiograph, rows, place, s in parts]

    def converse(self, study: Study, *, variant: str | None = None) -> ChatSession:
        """A conversation about a radiograph that was encoded before."""
        self._open()
        freest = max(self._engines, key=lambda engine: engine.free)
        return ChatSession(freest, self.bundle, study, variant, self.plan.device)

    def tokens_of(self, image: Image) -> ImageTokens:
        """The image tokens (1, N, E) of one radiograph."""
        return ImageTokens(self.study(image).rows[None])

    def trace(self, tokens: ImageTokens, question: str | None, ids: Sequence[int]) -> Float32:
        """Logits float32 (len(ids), V) that predict each of `ids` as the answer, teacher-forced."""
        segments = self._segments(question, tokens.data[0])
        with self._engine.open() as slot:
            return slot.trace(segments, ids)

    def generate_ids(self, image: Image, question: str | None, max_tokens: int) -> tuple[int, ...]:
        """Token ids of the greedy answer."""
        segments, spec = self._segments(question, self.study(image).rows), self.bundle.manifest.prompt
        with self._engine.open() as slot:
            stream = slot.generate(
                segments, Sampling(max_tokens=max_tokens), stop_ids=spec.stop_ids, reader=AnswerReader(spec.stops)
            )
            for _ in stream:
                pass
            return stream.result.ids

    def close(self) -> None:
        """Stop the engine and free everything. Safe to call twice."""
        if not self._closed:
            self._closed = True
            for engine in self._engines:
                engine.close()
            self._encoder.close()

    def _turn(
        self, image: Image, asked: prompt.Asked, options: GenerationOptions | None, variant: str | None, *, pieces: bool
    ) -> AnswerStream:
        """A conversation of one turn."""
        chat = self.chat(image, variant=variant)
        try:
            return chat._ask(asked, options, turn_only=True, pieces=pieces)
        except BaseException:
            chat.close()
            raise

    def _segments(self, question: str | None, rows: Float32) -> list[Segment]:
        """The first turn in the bundle's own wording."""
        _, variant = prompt.variant_of(self.bundle.manifest.prompt, None)
        asked = prompt.check_question(self.bundle.manifest.prompt, question)
        return prompt.build(variant, asked, rows, self._open().tokenize)

    def _open(self) -> Engine:
        if self._closed:
            raise ClosedError("this model was closed; load it again")
        return self._engine
