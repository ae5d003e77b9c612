"""Given answers instead of free ones: how likely each of several choices is, by the logits that predict its tokens.

Knows logits as arrays and a tokenizer; no cache, no engine and no image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from xraygpt_lite.errors import UsageError
from xraygpt_lite.values import FindingSpec, Float32, Manifest, Tokenize

Float64 = npt.NDArray[np.float64]


def listed(manifest: Manifest) -> tuple[FindingSpec, ...]:
    """The findings that may be scored.

    Raises
    ------
    UsageError
        The bundle lists none.
    """
    if not manifest.prompt.findings:
        raise UsageError(f"bundle {manifest.name!r} lists no findings that may be scored")
    return manifest.prompt.findings


def choice_ids(choices: Sequence[str], tokenize: Tokenize) -> list[list[int]]:
    """Each choice's token ids, as a continuation of the prompt.

    Raises
    ------
    UsageError
        Fewer than two choices, or one that is empty or given twice.
    """
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not all(isinstance(c, str) for c in choices):
        raise UsageError("score was not given choices; it needs a sequence of two or more texts")
    if len(choices) < 2 or len(set(choices)) != len(choices):
        raise UsageError(f"score was given {len(choices)} choices; it needs two or more, all different")
    ids = [tokenize(choice, leading_space=False).tolist() for choice in choices]
    if not all(ids):
        raise UsageError("score was given an empty choice; every choice needs at least one character")
    return ids


def log_probability(logits: Float32, ids: Sequence[int]) -> float:
    """Of `ids` after one another, by the logits (n, V) that predict each; not divided by their number."""
    logs = log_softmax(logits)
    return float(logs[np.arange(len(ids)), ids].sum())


def softmax(logs: Sequence[float]) -> list[float]:
    """Probabilities that sum to 1, out of log-probabilities."""
    result: list[float] = np.exp(log_softmax(np.asarray(logs))).tolist()
    return result


def log_softmax(logits: Float32 | Float64) -> Float64:
    """Of the last axis, in double precision."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logs: Float64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs
