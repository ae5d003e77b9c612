"""The sampler chain against numpy, on real logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.errors import UsageError
from xraygpt_lite.llm.native import Batch, Context, Model
from xraygpt_lite.llm.sampling import Sampler
from xraygpt_lite.values import DevicePlan, Float32, Sampling

DRAW = Sampling(temperature=1.0, max_tokens=500)


@pytest.fixture(scope="module")
def decoded(tiny: Any, plan: DevicePlan) -> Iterator[Context]:
    """A context whose last batch has logits in row 0."""
    model = Model(tiny.gguf)
    context = Context(model, plan, 256)
    batch = Batch(8)
    batch.put(np.array([1], np.int32), 0, 0, True)
    context.decode(batch)
    yield context
    context.close()
    model.close()


def draw(context: Context, sampling: Sampling, n: int = 1, stop_ids: tuple[int, ...] = ()) -> list[int]:
    sampler = Sampler(context.model, sampling, stop_ids)
    ids = [sampler.sample(context, 0) for _ in range(n)]
    sampler.close()
    sampler.close()
    return ids


def order(logits: Float32) -> list[int]:
    return [int(i) for i in np.argsort(-logits)]


def test_greedy_is_the_arg_max_whatever_the_seed(decoded: Context) -> None:
    best = int(decoded.logits(0).argmax())
    assert {draw(decoded, Sampling(seed=seed))[0] for seed in range(5)} == {best}


def test_a_seed_gives_its_draws_and_another_gives_others(decoded: Context) -> None:
    assert draw(decoded, DRAW, 20) == draw(decoded, DRAW, 20)
    assert draw(decoded, DRAW, 20) != draw(decoded, replace(DRAW, seed=1), 20)


def test_draws_follow_the_softmax_at_the_temperature(decoded: Context) -> None:
    sampling = replace(DRAW, temperature=0.5)
    logits = decoded.logits(0).astype(np.float64) / 0.5
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    seen = np.bincount(draw(decoded, sampling, 4000), minlength=len(expected)) / 4000
    assert np.abs(seen - expected).max() < 0.03


def test_top_p_of_nothing_leaves_the_likeliest(decoded: Context) -> None:
    assert set(draw(decoded, replace(DRAW, top_p=0.0), 50)) == {decoded.likeliest(0)}


def test_top_k_and_top_p_cut_the_tail(decoded: Context) -> None:
    logits = decoded.logits(0).astype(np.float64)
    ranked = order(decoded.logits(0))
    assert set(draw(decoded, replace(DRAW, top_k=3), 300)) == set(ranked[:3])
    share = np.exp(logits - logits.max())[ranked]
    nucleus = int(np.searchsorted(np.cumsum(share / share.sum()), 0.3)) + 1
    assert set(draw(decoded, replace(DRAW, top_p=0.3), 800)) <= set(ranked[:nucleus])
    assert len(set(draw(decoded, DRAW, 800))) > nucleus


@pytest.mark.parametrize("last_n", [64, -1])
def test_the_penalty_lowers_what_was_generated(decoded: Context, last_n: int) -> None:
    logits = decoded.logits(0)
    ids = draw(decoded, Sampling(repeat_penalty=1.5, penalty_last_n=last_n), 3)
    expected = []
    for _ in range(3):
        expected.append(int(logits.argmax()))
        seen = list(set(expected))
        logits = decoded.logits(0)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
    assert ids == expected
    assert len(set(ids)) > 1
    assert len(set(draw(decoded, Sampling(repeat_penalty=1.5, penalty_last_n=0), 3))) == 1


def test_stop_ids_wait_for_min_tokens(decoded: Context) -> None:
    first, second = order(decoded.logits(0))[:2]
    assert draw(decoded, Sampling(min_tokens=2), 4, stop_ids=(first,)) == [second, second, first, first]
    assert draw(decoded, Sampling(min_tokens=2), 2) == [first, first]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must lie between 1"),
        ({"min_tokens": 301}, "min_tokens is 301"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repeat_penalty": 0.0}, "repeat_penalty is 0.0"),
        ({"penalty_last_n": -2}, "penalty_last_n is -2"),
        ({"seed": 2**32 - 1}, "seed is 4294967295"),
    ],
)
def test_values_that_cannot_be_meant(decoded: Context, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampler(decoded.model, replace(Sampling(), **change), ())
