"""How long one decode call takes with more or fewer rows: measured, because it does not grow evenly with them.

Knows the native library; decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..values import DevicePlan
from .native import Batch, Context, Model

_TRIES = 5
_ENOUGH_S = 1.0


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
    most = max(rows)
    model = Model(gguf, plan.gpu_layers)
    try:
        cells = len(rows) * (_TRIES + 1)
        context = Context(model, replace(plan, sequences=most), cells)
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

    found = {}
    for sequences in rows:
        step(sequences)
        times = [step(sequences)]
        while len(times) < _TRIES and sum(times) < _ENOUGH_S:
            times.append(step(sequences))
        found[sequences] = min(times)
    return found
