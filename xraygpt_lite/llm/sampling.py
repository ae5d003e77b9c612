"""How the next token is chosen: llama.cpp's sampler chain, built from a `Sampling` record.

Greedy, or penalties → top-k → top-p → temperature → a draw with a seed. Beam search is in `beams`. Knows nothing of
sequences or text.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

from ..errors import NativeError, UsageError
from ..values import Sampling
from .library import library, set_fields
from .native import Context, Model


def check(sampling: Sampling) -> None:
    """Refuse values that cannot be meant.

    Raises
    ------
    UsageError
        Names the option, the value seen and the values allowed.
    """
    if fault := sampling.fault():
        raise UsageError(fault)
    if sampling.min_tokens > sampling.max_tokens:
        raise UsageError(f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}")
    if sampling.beams > 1 and sampling.temperature > 0:
        raise UsageError(f"temperature is {sampling.temperature}; expected 0 with beam search, which draws nothing")


class Sampler:
    """A chain for one answer. It has a memory (seed, penalties): one for each request.

    Parameters
    ----------
    model
        For the size of the vocabulary.
    sampling
        Its `stops` are not looked at: stopping by text is the reader's.
    stop_ids
        Ids that are not chosen before `min_tokens` others were.
    """

    def __init__(self, model: Model, sampling: Sampling, stop_ids: Sequence[int]) -> None:
        check(sampling)
        self._lib = library()
        self._chain: Any = None
        penalized = sampling.repeat_penalty != 1.0 and sampling.penalty_last_n != 0
        if sampling.temperature == 0 and not penalized and not (sampling.min_tokens and stop_ids):
            return  # the likeliest token, always: no chain is needed, which would sort through the whole vocabulary
        self._barred = sampling.min_tokens if stop_ids else 0
        self._chain = self._lib.llama_sampler_chain_init(self._lib.llama_sampler_chain_default_params())
        if self._barred:
            self._add(self._bar(model.vocab, stop_ids))
        if penalized:
            # This version of llama.cpp takes -1 for "off"; ours means all generated tokens.
            last_n = sampling.max_tokens if sampling.penalty_last_n == -1 else sampling.penalty_last_n
            self._add(self._lib.llama_sampler_init_penalties(model.vocab, last_n, sampling.repeat_penalty, 0.0, 0.0))
        if sampling.temperature == 0:
            self._add(self._lib.llama_sampler_init_greedy())
            return
        if sampling.top_k:
            self._add(self._lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            self._add(self._lib.llama_sampler_init_top_p(sampling.top_p, 1))
        self._add(self._lib.llama_sampler_init_temp(sampling.temperature))
        self._add(self._lib.llama_sampler_init_dist(sampling.seed))

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest token, always, and remembers nothing."""
        return not self._chain

    def _add(self, part: Any) -> None:
        if not part:
            raise NativeError("llama.cpp could not make a sampler")
        self._lib.llama_sampler_chain_add(self._chain, part)

    def _bar(self, vocab: int, ids: Sequence[int]) -> Any:
        biases = (self._lib.llama_logit_bias * len(ids))()
        for bias, token in zip(biases, ids, strict=True):
            set_fields(bias, token=token, bias=-math.inf)
        self._biases = biases
        return self._lib.llama_sampler_init_logit_bias(vocab, len(ids), ctypes.cast(biases, ctypes.POINTER(type(bias))))

    def sample(self, context: Context, row: int) -> int:
        """Choose the token that follows one row of the last batch, and remember it for the penalties."""
        if self.greedy:
            return context.likeliest(row)
        context.logits(row)  # refuses what is not finite
        token = int(self._lib.llama_sampler_sample(self._chain, context.pointer, row))
        if self._barred:
            self._barred -= 1
            if not self._barred:
                self._lib.llama_sampler_free(self._lib.llama_sampler_chain_remove(self._chain, 0))
        return token

    def close(self) -> None:
        """Free the chain; idempotent."""
        if self._chain:
            self._lib.llama_sampler_free(self._chain)
            self._chain = None
