"""What callers see of the language model: an engine, its slots, and the streams of text they give.

    with Engine(gguf, plan) as engine, engine.open() as slot:
        stream = slot.generate(segments, sampling, stop_ids=(engine.eos,), reader=reader)
        for text in stream: ...
        stream.result

Every method may be called from any thread; one thread inside owns the context (`core`). A stream that nobody reads
blocks nobody. Knows nothing of prompts, stop strings or images.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from ..closing import Closing
from ..errors import CancelledError, ClosedError, NativeError, UsageError
from ..values import DevicePlan, Float32, Int32, Sampling, Segment, TokenSegment
from .core import Core
from .draft import Reader
from .openings import Openings
from .requests import Answer, Cut, Generate, Generation, Request, Trace
from .sampling import Sampler
from .search import Search
from .sequence import Held, check, check_fit, count, joined

__all__ = ["Engine", "Generation", "Reader", "Slot", "Stream"]


class Engine(Closing):
    """One loaded language model.

    Parameters
    ----------
    gguf
        A file whose hash was checked.
    plan
        Threads, context, batch, sequences, layers on a GPU, precision of the cache.
    cores
        Held during each decode call, e.g. a lock that another library's calls hold, too: the threads of two of them,
        each made for all cores, slow each other down more than taking turns does.
    phrases
        Texts that answers begin with or hold: greedy answers are then sped up by guessing (`speculation`). None does
        not guess.
    openings
        Where the rows of a prompt's fixed text are kept for later processes.

    Attributes
    ----------
    width
        E, the width of embedding rows.
    context
        Rows that fit one sequence: the plan's, at most what the model was trained for.
    vocab, bos, eos
        Size of the vocabulary, and the ids that begin and end a text (-1 where there is none).

    Raises
    ------
    BundleError, NativeError, DeviceError, MissingPackageError
        The model cannot be loaded.
    """

    def __init__(
        self,
        gguf: Path,
        plan: DevicePlan,
        cores: AbstractContextManager[object] | None = None,
        *,
        phrases: Sequence[str] | None = None,
        openings: Openings | None = None,
    ) -> None:
        self._core = Core(gguf, plan, cores or nullcontext(), phrases, openings)
        model = self._core.model
        self.width, self.vocab, self.bos, self.eos = model.width, model.vocab, model.bos, model.eos
        self.context = self._core.cells
        # Also runs when the engine is forgotten, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, self._core.stop)

    @property
    def usable(self) -> bool:
        """False once it was closed or has stopped working."""
        return self._core.usable

    @property
    def free(self) -> int:
        """Sequences that nobody holds at the moment."""
        return self._core.free

    def tokenize(self, text: str, *, leading_space: bool) -> Int32:
        """Turn text into token ids (n,), without BOS; control tokens written in it stay plain characters.

        Parameters
        ----------
        text
            Any text.
        leading_space
            True for a piece of its own, as the slow Llama tokenizer treats it; False for what continues a text.
        """
        with self._core.lock:
            return self._core.model.tokenize(text, leading_space=leading_space)

    def open(self) -> Slot:
        """Take a sequence; waits for one where all are in use.

        Raises
        ------
        UsageError
            All are held by the calling thread itself, so that it would wait forever.
        ClosedError
            The engine was closed.
        """
        return Slot(self, self._core)

    def close(self) -> None:
        """End every request, free the model and join the thread; idempotent."""
        self._finalizer()


class Slot(Closing):
    """One sequence of the engine's cache; segments are appended to what it holds. One request at a time."""

    def __init__(self, engine: Engine, core: Core) -> None:
        self._engine = engine
        self._core = core
        self._held: Held = core.take_sequence()
        self._last: list[Request] = []
        self._finalizer = weakref.finalize(self, core.release, self._held, self._last)

    @property
    def rows(self) -> int:
        """Rows in the cache, once the last request has ended."""
        self._settle()
        return self._held.rows

    def generate(
        self,
        segments: Sequence[Segment],
        sampling: Sampling,
        *,
        stop_ids: tuple[int, ...],
        reader: Reader,
        pieces: bool = True,
    ) -> Stream:
        """Append segments and generate an answer.

        Parameters
        ----------
        segments
            At least one row.
        sampling
            How tokens are chosen, and how many. With more than one beam it is beam search (`beams`), whose text comes
            whole at the end.
        stop_ids
            Token ids that end the answer; barred until `min_tokens` others were chosen.
        reader
            Decodes the text and finds stop strings; used by the engine thread until the end.
        pieces
            False: the text comes whole at the end, and nobody is woken for every token.

        Returns
        -------
        Stream
            Iterate it for the text. If it is closed, fails or is forgotten, the slot is left as before this call.

        Raises
        ------
        ContextError
            Prompt and answer do not fit; nothing was decoded.
        UsageError, NativeError, ClosedError
            A value that cannot be meant, rows that the model cannot take, or a closed engine.
        """
        self._prepare(segments, sampling.max_tokens)
        if not count(segments):
            raise UsageError("there is nothing to answer: the prompt has no rows")
        model, rows = self._core.model, self._core.context.batch
        segments = joined(segments, model.embed)
        request: Answer
        if sampling.beams > 1:
            request = Search(
                self._held, segments, rows, sampling=sampling, stop_ids=stop_ids, reader=reader, plan=self._core.plan
            )
        else:
            sampler = Sampler(model, sampling, stop_ids)
            request = Generate(
                self._held, segments, rows,
                sampler=sampler, sampling=sampling, stop_ids=stop_ids, reader=reader, pieces=pieces,
            )  # fmt: skip
        self._submit(request)
        return Stream(self._core, request)

    def trace(self, segments: Sequence[Segment], ids: Sequence[int]) -> Float32:
        """Append segments, and return the logits that predict each of `ids` when the ones before it are given.

        Parameters
        ----------
        segments
            May be empty when the last call on this slot was a trace too.
        ids
            At least one. They are not kept in the cache; the segments are.

        Returns
        -------
        float32 (len(ids), V)
        """
        given = np.asarray(ids, np.int32)
        if not len(given):
            raise UsageError("a trace needs at least one token id")
        self._prepare([*segments, TokenSegment(given)], 0, beside=len(given))
        if not count(segments) and self._held.tail is None:
            raise UsageError("a trace without a prompt needs another trace before it")
        return self._wait(Trace(self._held, joined(segments, self._core.model.embed), self._core.context.batch, given))

    def truncate(self, rows: int) -> None:
        """Forget all but the first `rows` rows of the cache, e.g. to ask another question about the same image rows.

        Raises
        ------
        UsageError
            The cache holds fewer rows.
        """
        self._prepare((), 0)
        if not 0 <= rows <= self._held.rows:
            raise UsageError(f"cannot keep {rows} rows of a cache that holds {self._held.rows}")
        self._wait(Cut(self._held, rows))

    def close(self) -> None:
        """Cancel what runs and give the sequence back; idempotent."""
        self._finalizer()

    def _prepare(self, segments: Sequence[Segment], answer: int, beside: int = 0) -> None:
        if not self._finalizer.alive:
            raise ClosedError("this slot was closed; open another")
        for request in self._last:
            if not request.cancelled and not request.done.is_set():
                raise UsageError("this slot's last stream has not ended; read it to its end or close it first")
        self._settle()
        check(segments, self._engine.width, self._engine.vocab)
        check_fit(self._held.rows, count(segments) - beside, answer + beside, self._engine.context)

    def _settle(self) -> None:
        """Take back what was cancelled: the engine, which runs ahead of who reads, may have finished it before."""
        for request in list(self._last):
            if not request.cancelled:
                continue
            request.done.wait()
            if self._finalizer.alive and self._held.rows > request.start[0]:
                self._wait(Cut(self._held, *request.start))

    def _submit(self, request: Request) -> None:
        self._last[:] = [request]
        self._core.submit(request)

    def _wait(self, request: Trace | Cut) -> Float32:
        self._submit(request)
        try:
            outcome = request.events.get()
        except BaseException:
            _cancel(self._core, request)
            raise
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, np.ndarray)
        return outcome


class Stream(Iterator[str]):
    """Text of one answer as it comes. Closing or forgetting it, or Ctrl-C while it waits, cancels the answer."""

    def __init__(self, core: Core, request: Answer) -> None:
        self._core = core
        self._request = request
        self._result: Generation | None = None
        self._ended = False
        self._finalizer = weakref.finalize(self, _cancel, core, request)
        self._finalizer.atexit = False

    def __next__(self) -> str:
        """Wait for the next piece of text.

        Raises
        ------
        NativeError, CancelledError, ClosedError
            The answer ended before its time.
        """
        if self._ended:
            raise StopIteration
        try:
            event = self._request.events.get()
        except BaseException:
            self.close()
            raise
        if isinstance(event, str):
            return event
        self._ended = True
        self._finalizer.detach()
        if isinstance(event, Generation):
            self._result = event
            raise StopIteration
        if isinstance(event, BaseException):
            raise event
        raise NativeError("the engine answered a stream with something else")

    @property
    def result(self) -> Generation:
        """How it went; once the text was read to its end."""
        if self._result is None:
            raise CancelledError("this answer has no result: it was cancelled, failed or not read to its end")
        return self._result

    def close(self) -> None:
        """Cancel, and wait until the engine has let go of it; idempotent, nothing after the end."""
        self._ended = True
        if self._finalizer.detach() is not None:
            _cancel(self._core, self._request)
            self._request.done.wait()


def _cancel(core: Core, request: Request) -> None:
    request.cancelled = True
    core.wake()
