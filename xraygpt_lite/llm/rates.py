"""How long decode calls take: with more or fewer rows, because it does not grow evenly with them, and in a bare loop.

Knows the native library and the inside of an engine; decides nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..closing import Closing
from ..errors import NativeError
from ..values import DevicePlan, Segment, TokenSegment
from .library import library
from .native import Batch, Context, Model
from .requests import Cut
from .scheduler import Engine
from .sequence import Held, chunks, joined

_TRIES = 25
_MOST_S = 5.0


def step_seconds(gguf: Path, plan: DevicePlan, rows: Sequence[int]) -> dict[int, float]:
    """Seconds of a decode call with one row of each of n sequences, for every n in `rows`; the least of several.

    Parameters
    ----------
    gguf
        A file whose hash was checked; it is loaded for this and freed.
    plan
        Where it runs, with how many threads.

    Raises
    ------
    BundleError, NativeError, DeviceError, MissingPackageError
        The model cannot be loaded or run.
    """
    # OpenMP's threads live as long as the thread that calls them. Where there are more than processors, none of them
    # waits spinning any more, and whoever decodes later in this process would be slower.
    with ThreadPoolExecutor(1) as passing:
        return passing.submit(_step_seconds, gguf, plan, rows).result()


def _step_seconds(gguf: Path, plan: DevicePlan, rows: Sequence[int]) -> dict[int, float]:
    most = max(rows)
    model = Model(gguf, plan.gpu_layers)
    try:
        context = Context(model, replace(plan, sequences=most), len(rows))
        try:
            return _timed(context, rows)
        finally:
            context.close()
    finally:
        model.close()


def _timed(context: Context, rows: Sequence[int]) -> dict[int, float]:
    batch, held = Batch(context.batch), np.zeros(context.sequences, np.int32)

    def step(sequences: int) -> float:
        began = time.perf_counter()
        batch.put(np.ones(sequences, np.int32), held[:sequences], np.arange(sequences), True)
        context.decode(batch)
        context.logits(0)  # waits for the result
        held[:sequences] += 1
        return time.perf_counter() - began

    # Taken in turns, so that what else the machine does for a while falls on all of them alike.
    times: dict[int, list[float]] = {sequences: [] for sequences in rows}
    left = _MOST_S
    for turn in range(_TRIES + 1):
        for sequences, each in times.items():
            taken = step(sequences)
            left -= taken
            if turn:  # the first call with so many rows prepares more than it computes
                each.append(taken)
        if turn and left < 0:
            break
        for sequence in range(context.sequences):
            context.cut(sequence, 0)
        held[:] = 0
    return {sequences: min(each) for sequences, each in times.items()}


class BareRun(NamedTuple):
    """Seconds of the prompt and of the steps after it, and the likeliest token after the prompt and after each step."""

    prefill_s: float
    decode_s: float
    ids: tuple[int, ...]


class _Errand(Cut):
    """Something else that the engine's thread is to do."""

    def __init__(self, held: Held, work: Callable[[], BareRun]) -> None:
        super().__init__(held, 0)
        self._work = work
        self.found: BareRun | None = None

    def advance(self, context: Context, rows: Sequence[int]) -> None:
        del context, rows
        self.found = self._work()
        self.end(np.empty((0, 0), np.float32))


class Bare(Closing):
    """A bare loop over `llama_decode` on an engine's model: what the engine itself is measured against.

    It has a context of its own, like the engine's, which must have nothing to do while this runs: the loop runs in its
    thread, so that both are given the same threads of OpenMP (see `step_seconds`). No queue, sampler or reader of text
    stands between two calls.

    Raises
    ------
    NativeError
        There is no memory for a second context.
    """

    def __init__(self, engine: Engine) -> None:
        core = engine._core
        self._engine = engine
        self._context = Context(core.model, core.plan, core.cells)
        self._batch = Batch(self._context.batch)

    def run(self, segments: Sequence[Segment], steps: int) -> BareRun:
        """Prefill segments in the engine's chunks, then decode so many rows one by one, each with the likeliest token.

        Raises
        ------
        NativeError, ClosedError
            llama.cpp failed, or this was closed.
        """
        with self._engine.open() as slot:
            errand = _Errand(slot._held, partial(self._run, segments, steps))
            slot._wait(errand)
        assert errand.found is not None
        return errand.found

    def _run(self, segments: Sequence[Segment], steps: int) -> BareRun:
        context, batch, decode = self._context, self._batch, library().llama_decode
        pointer = context.pointer
        context.cut(0, 0)
        parts = list(chunks(joined(segments, context.model.embed), context.batch))
        began, rows, count = time.perf_counter(), 0, 0
        for part in parts:
            count = len(part.content)
            batch.put(part.content, rows + np.arange(count), 0, np.arange(count) >= count - part.outputs)
            context.decode(batch)
            rows += count
        prefilled = time.perf_counter()
        ids = [context.likeliest(count - 1)]
        batch.put(np.zeros(1, np.int32), 0, 0, True)
        for position in range(rows, rows + steps):
            batch._tokens[0], batch._positions[0] = ids[-1], position
            if decode(pointer, batch.struct):
                raise NativeError(f"llama.cpp could not decode row {position} in a bare loop; run: xraygpt-lite doctor")
            ids.append(int(context._logits(0).argmax()))
        return BareRun(prefilled - began, time.perf_counter() - prefilled, tuple(ids))

    def close(self) -> None:
        """Free the context; before the engine."""
        self._context.close()


def forgetting(engine: Engine) -> Callable[[], None]:
    """Return what makes an idle engine with one sequence forget all requests after this call.

    So every repetition can be as the first request of a process: the engine guesses nothing from its own answers, and
    its cache holds no opening. What is kept in the user's folder stays.
    """
    core = engine._core
    speculation = copy.deepcopy(core._speculation)

    def forget() -> None:
        core._speculation = copy.deepcopy(speculation)
        with engine.open() as slot:
            slot.trace([TokenSegment(np.zeros(1, np.int32))], [0])  # a row of another prompt takes the opening's place

    return forget
