"""A conversation about one radiograph: one sequence whose KV cache is kept, to which turns are appended.

Knows the engine's slots, the prompt's wording and the answer's clean-up. `model` makes it; a summary is its first turn.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from xraygpt_lite import boxes, prompt, scoring
from xraygpt_lite.answer import AnswerReader, clean, reworded
from xraygpt_lite.closing import Closing
from xraygpt_lite.errors import ClosedError
from xraygpt_lite.llm.scheduler import Engine, Generation, Slot, Stream
from xraygpt_lite.options import resolve, undrawn
from xraygpt_lite.values import (
    OPTION_RANGES,
    Bundle,
    Finding,
    Float32,
    GenerationOptions,
    Placement,
    Radiograph,
    Sampling,
    Segment,
    Summary,
    Timings,
)

LARGEST_SEED = int(OPTION_RANGES["seed"][1])


@dataclass(frozen=True)
class Study:
    """A radiograph that has been through the vision graphs, and how long each stage took.

    `rows` is float32 (N, E): the image tokens of this one radiograph; `placement` is where it lies in the encoder's
    input.
    """

    radiograph: Radiograph
    rows: Float32
    placement: Placement
    timings: Timings


class AnswerStream(Closing, Iterator[str]):
    """Text pieces of one answer as they come; `summary` once they have all come.

    Closing it early, or dropping it, cancels the generation. Pieces are the model's words before the final clean-up,
    save that white space at the start is left out; `summary.text` is what a reader should keep.

    Attributes
    ----------
    radiograph
        What the answer is about.
    """

    def __init__(
        self,
        chat: ChatSession,
        stream: Stream,
        asked: prompt.Asked,
        sampling: Sampling,
        prompt_rows: int,
        turn_only: bool,
    ) -> None:
        self.radiograph = chat.radiograph
        self._chat, self._stream, self._asked, self._sampling = chat, stream, asked, sampling
        self._prompt_rows, self._turn_only = prompt_rows, turn_only
        self._raw = ""
        self._summary: Summary | None = None
        self._ended = False

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        try:
            for piece in self._stream:
                started = bool(self._raw.strip())
                self._raw += piece
                shown = piece if started else piece.lstrip()
                if shown:
                    return shown
        except BaseException:
            self.close()
            raise
        self._finish()
        raise StopIteration

    @property
    def summary(self) -> Summary:
        """The finished record; reads the rest of the stream if there is any.

        Raises
        ------
        ClosedError
            The stream was closed before its end.
        """
        for _ in self:
            pass
        if self._summary is None:
            raise ClosedError("this answer was cancelled before its end, so there is no summary of it")
        return self._summary

    def close(self) -> None:
        """Cancel what has not come yet; the conversation goes on as if this question had not been asked."""
        if self._ended:
            return
        self._ended = True
        self._stream.close()
        if self._turn_only:
            self._chat.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self.close()

    def _finish(self) -> None:
        self._ended = True
        self._summary = self._chat._record(
            self._asked, self._sampling, self._prompt_rows, self._raw, self._stream.result
        )
        if self._turn_only:
            self._chat.close()


class ChatSession(Closing):
    """Questions about one radiograph, each answered with all earlier turns in the KV cache.

    No row is ever prefilled twice: a turn appends its own tokens to what the cache holds.

    Attributes
    ----------
    radiograph
        What the conversation is about.
    turns
        Finished records, oldest first.
    """

    def __init__(self, engine: Engine, bundle: Bundle, study: Study, variant: str | None, device: str) -> None:
        self._manifest, self._bundle_id = bundle.manifest, bundle.id
        self._engine, self._study, self._device = engine, study, device
        self.radiograph = study.radiograph
        self._variant_name, self._variant = prompt.variant_of(bundle.manifest.prompt, variant)
        self._slot: Slot = engine.open()
        self._carry = ""
        self._image_end = 0
        # Weak: an answer holds its conversation; a cycle of the two would keep the image until Python looks for cycles.
        self._open: weakref.ref[AnswerStream] | None = None
        self._closed = False
        self.turns: list[Summary] = []

    def ask(
        self,
        question: str | None = None,
        options: GenerationOptions | None = None,
        *,
        task: str | None = None,
        box: Sequence[float] | None = None,
    ) -> Summary:
        """Ask and wait for the whole answer. Takes and raises what `stream` does."""
        asked = prompt.ask(self._manifest.prompt, question, task, box)
        return self._ask(asked, options, turn_only=False, pieces=False).summary

    def stream(
        self,
        question: str | None = None,
        options: GenerationOptions | None = None,
        *,
        task: str | None = None,
        box: Sequence[float] | None = None,
    ) -> AnswerStream:
        """Ask, and read the answer as it comes; an earlier answer that is still open is cancelled first.

        Parameters
        ----------
        question, options, task, box
            As in `XrayModel.summarize`; each turn has its own.

        Raises
        ------
        UsageError
            The question is empty or contains a turn marker, the bundle has no such task, a box is missing, superfluous
            or outside the image, or an option makes no sense.
        ContextError
            The conversation and the longest answer would not fit the context; nothing was decoded.
        ClosedError
            The session, or its model, was closed.
        """
        asked = prompt.ask(self._manifest.prompt, question, task, box)
        return self._ask(asked, options, turn_only=False, pieces=True)

    def restart(self) -> None:
        """Forget every turn. The image stays in the cache, and the next question is a first one again."""
        self._check_open()
        self._keep_image()
        self.turns.clear()
        self._carry = ""

    def score(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[dict[str, float]]:
        """How likely each choice is as the answer to a first question; turns are forgotten, as by `restart`.

        Parameters
        ----------
        asked
            Pairs of a question, checked, and its choices.

        Returns
        -------
        list of dict
            For each question: choice → the softmax over the choices of their summed token log-probabilities.

        Raises
        ------
        UsageError
            Fewer than two choices, or one that is empty or given twice.
        """
        self.restart()
        results = []
        for question, choices in asked:
            sums = self._sums(question, scoring.choice_ids(choices, self._engine.tokenize))
            results.append(dict(zip(choices, scoring.softmax(sums), strict=True)))
        self._keep_image()
        return results

    def findings(self) -> tuple[Finding, ...]:
        """The probability of "yes" for every finding that the bundle's manifest lists; turns are forgotten.

        Raises
        ------
        UsageError
            The bundle lists no findings.
        """
        specs = scoring.listed(self._manifest)
        scores = self.score([(spec.question, (spec.yes, spec.no)) for spec in specs])
        return tuple(
            Finding(spec.name, score[spec.yes] >= 0.5, score[spec.yes])
            for spec, score in zip(specs, scores, strict=True)
        )

    def close(self) -> None:
        """Give the sequence back to the engine. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._slot.close()

    def _ask(
        self, asked: prompt.Asked, options: GenerationOptions | None, *, turn_only: bool, pieces: bool
    ) -> AnswerStream:
        self._check_open()
        spec, placement, side = self._manifest.prompt, self._study.placement, self._manifest.image.size
        markup = "" if asked.box is None else boxes.markup(asked.box, placement, side, spec.box_grid)
        text = prompt.wording(spec, asked, markup)
        sampling = resolve(options, self._manifest)
        held = self._slot.rows
        segments: list[Segment]
        if self.turns:
            segments = [prompt.next_turn(self._variant, text, self._carry, self._engine.tokenize)]
        else:
            segments = self._first(text)
        reader = AnswerReader(sampling.stops)
        seed = _seed(sampling.seed, self.radiograph.sha256, text, len(self.turns))
        drawn = replace(sampling, seed=seed)
        stream = self._slot.generate(segments, drawn, stop_ids=spec.stop_ids, reader=reader, pieces=pieces)
        prompt_rows = sum(map(len, segments)) + (0 if self.turns else held)
        answer = AnswerStream(self, stream, asked, sampling, prompt_rows, turn_only)
        self._open = weakref.ref(answer)
        return answer

    def _check_open(self) -> None:
        """Cancel an answer that is still open."""
        if self._closed:
            raise ClosedError("this conversation was closed; start another with XrayModel.chat")
        answer = self._open() if self._open else None
        if answer is not None:
            answer.close()

    def _first(self, text: str) -> list[Segment]:
        """What a first turn adds to the cache: all of it, or the question alone where the image is there already."""
        tokenize = self._engine.tokenize
        part = prompt.question_part(self._variant, text, tokenize)
        if self._slot.rows:
            return [part]
        prefix = prompt.prefix(self._variant, self._study.rows, tokenize)
        self._image_end = sum(map(len, prefix))
        return [*prefix, part]

    def _keep_image(self) -> None:
        """Cut the cache behind the image rows."""
        if self._slot.rows:
            self._slot.truncate(self._image_end)

    def _sums(self, question: str, choices: Sequence[Sequence[int]]) -> list[float]:
        """Summed log-probability of each choice as the answer to a first turn."""
        self._keep_image()
        segments = self._first(question)
        sums = []
        for choice in choices:
            sums.append(scoring.log_probability(self._slot.trace(segments, choice), choice))
            segments = []  # in the cache from here on
        return sums

    def _record(
        self, asked: prompt.Asked, sampling: Sampling, prompt_rows: int, raw: str, generation: Generation
    ) -> Summary:
        self._carry = generation.carry
        read = self._read(raw)
        radiograph, timings = self._study.radiograph, self._study.timings
        first = not self.turns
        summary = Summary(
            source=radiograph.source,
            sha256=radiograph.sha256,
            sop_instance_uid=radiograph.sop_instance_uid,
            question=asked.question,
            prompt_variant=self._variant_name,
            text=read.text,
            raw_text=raw,
            finish=generation.finish,
            warnings=(
                *self._manifest.warnings,
                *radiograph.warnings,
                *undrawn(sampling, self._manifest),
                *_length_warning(generation, sampling),
                *read.warnings,
            ),
            options=sampling,
            device=self._device,
            bundle_id=self._bundle_id,
            bundle_name=self._manifest.name,
            timings=replace(
                timings if first else Timings(), prefill=generation.prefill_s, generate=generation.generate_s
            ),
            prompt_tokens=prompt_rows - (len(self._study.rows) if first else 0),
            image_tokens=len(self._study.rows) if first else 0,
            answer_tokens=len(generation.ids),
            disclaimer=self._manifest.disclaimer,
            task=asked.task,
            asked_box=asked.box,
            boxes=read.boxes,
        )
        self.turns.append(summary)
        return summary

    def _read(self, raw: str) -> boxes.Reading:
        """The answer as a reader sees it; the cache keeps the model's own words."""
        spec = self._manifest.prompt
        text = reworded(clean(raw, spec.keep_after), spec.replaced)
        if not spec.box_grid:
            return boxes.Reading(text, (), ())
        return boxes.parse(text, self._study.placement, self._manifest.image.size, spec.box_grid)


def _length_warning(generation: Generation, sampling: Sampling) -> tuple[str, ...]:
    if generation.finish == "stop":
        return ()
    return (f"the answer was cut at max_tokens = {sampling.max_tokens}; it may be incomplete",)


def _seed(seed: int, sha256: str, text: str, turn: int) -> int:
    """The sampler's seed: it depends on what is asked about what, and on no other answer or order."""
    digest = hashlib.sha256(f"{seed} {sha256} {turn} {text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4]) % (LARGEST_SEED + 1)
