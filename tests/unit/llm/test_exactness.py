"""A row's logits do not depend on what is decoded with it or on threads: what batches and guesses rely on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.llm import library, native
from xraygpt_lite.llm.library import EXACT, exact
from xraygpt_lite.llm.native import Batch, Context, Model
from xraygpt_lite.llm.quantize import quantize
from xraygpt_lite.values import DevicePlan, Float32

BEGIN, END = 244, 268
"""Positions looked at: llama.cpp's attention changes its ways at 256."""


@pytest.fixture(scope="module", params=EXACT)
def model(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    if not exact(request.param):
        pytest.skip(f"{request.param} is not said to be exact on this CPU")
    path = tmp_path_factory.mktemp("exact") / f"{request.param}.gguf"
    quantize(tiny.gguf, path, request.param)
    opened = Model(path)
    yield opened
    opened.close()


def logits(
    model: Model,
    *,
    threads: int = 1,
    sequences: int = 1,
    rows: int = 1,
    cells: int = 512,
    float32_cache: bool = False,
) -> Float32:
    """Those of the first sequence, beside others, so many rows of each in a call."""
    texts = np.random.default_rng(1).integers(3, 300, (sequences, END)).astype(np.int32)
    plan = DevicePlan(threads=threads, batch=256, sequences=sequences, float32_cache=float32_cache)
    context = Context(model, plan, cells)
    batch, found = Batch(256), []
    for sequence, text in enumerate(texts):
        batch.put(text[:BEGIN], np.arange(BEGIN), sequence, False)
        context.decode(batch)
    for start in range(BEGIN, END, rows):
        places = np.tile(np.arange(start, start + rows), sequences)
        batch.put(texts[:, start : start + rows].ravel(), places, np.repeat(np.arange(sequences), rows), True)
        context.decode(batch)
        found += [context.logits(row) for row in range(rows)]
    context.close()
    return np.stack(found)


@pytest.fixture(scope="module")
def alone(model: Model) -> Float32:
    return logits(model)


@pytest.mark.parametrize(
    "how",
    [
        {"threads": 2}, {"cells": 1024}, {"sequences": 2}, {"sequences": 3, "threads": 2}, {"sequences": 8},
        {"rows": 2}, {"rows": 4, "threads": 2}, {"rows": 8}, {"rows": 12, "threads": 2},
    ],
    ids=str,
)  # fmt: skip
def test_no_bit_depends_on_company(model: Model, alone: Float32, how: dict[str, int]) -> None:
    assert np.array_equal(logits(model, **how), alone)


@pytest.mark.parametrize(
    ("features", "kernels", "held"),
    [
        ("AVX2 = 1 | AMX_INT8 = 1 |", None, {"q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"}),
        ("AVX2 = 1 |", None, {"q8_0", "q4_0"}),
        ("AVX2 = 1 |", "1", {"q8_0"}),  # a model of another type was there first, or the user wants it so
        ("NEON = 1 |", None, set()),  # not tried
    ],
)
def test_what_is_said_to_be_exact(
    monkeypatch: pytest.MonkeyPatch, features: str, kernels: str | None, held: set[str]
) -> None:
    monkeypatch.setattr(library, "system_info", lambda: f"CPU : {features}")
    for kind in ("f32", "f16", "iq4_xs", *EXACT):
        monkeypatch.delenv("GGML_CPU_TILED_MM", raising=False)
        if kernels:
            monkeypatch.setenv("GGML_CPU_TILED_MM", kernels)
        assert exact(kind) == (kind in held)


def test_values_in_bfloat16_are_as_near_to_float32_as_in_float16(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tiny.gguf)
    try:
        ours, exact = logits(model), logits(model, float32_cache=True)
        monkeypatch.setattr(native, "_BFLOAT16_TYPE", 1)
        half = logits(model)
    finally:
        model.close()
    assert np.square(ours - exact).mean() < 1.5 * np.square(half - exact).mean()
