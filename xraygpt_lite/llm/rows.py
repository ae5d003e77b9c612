"""Rows on their way into the cache: the batch of one decode call.

Knows the native struct. Knows no model and no context.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import NativeError
from ..values import Float32, Int32
from .library import library, set_fields


class Batch:
    """Rows of one decode call, in numpy arrays that the native struct points into; nothing to free.

    One row has a token id or an embedding (one kind in a batch), a position, one sequence id, and a mark whether its
    logits are wanted.
    """

    def __init__(self, capacity: int) -> None:
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._counts = np.ones(capacity, np.int32)
        self._sequences = np.zeros(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.bool_)
        base = self._sequences.ctypes.data
        self._addresses = (base + 4 * np.arange(capacity)).astype(np.uintp)
        self._rows: Float32 | None = None
        self._count = 0
        self.struct = library().llama_batch()
        kinds = dict(self.struct._fields_)
        # The field as an address: each of numpy's pointers leaves a cycle behind, which Python has to look for.
        self._embd = ctypes.c_void_p.from_buffer(self.struct, library().llama_batch.embd.offset)
        self._token_pointer = self._tokens.ctypes.data_as(kinds["token"])
        set_fields(
            self.struct,
            n_tokens=0,
            token=self._token_pointer,
            embd=None,
            pos=self._positions.ctypes.data_as(kinds["pos"]),
            n_seq_id=self._counts.ctypes.data_as(kinds["n_seq_id"]),
            seq_id=self._addresses.ctypes.data_as(kinds["seq_id"]),
            logits=self._outputs.view(np.int8).ctypes.data_as(kinds["logits"]),
        )

    @property
    def rows(self) -> int:
        """Number of rows in it."""
        return self._count

    @property
    def outputs(self) -> npt.NDArray[np.bool_]:
        """Which rows (n,) give logits."""
        return self._outputs[: self._count].copy()

    def put(
        self,
        content: Int32 | Float32,
        positions: npt.ArrayLike,
        sequences: npt.ArrayLike,
        outputs: Sequence[bool] | npt.NDArray[np.bool_] | bool,
    ) -> None:
        """Replace the content.

        Parameters
        ----------
        content
            int32 (n,) token ids, or float32 (n, E) embedding rows with the model's width.
        positions, sequences, outputs
            One value a row, or one for all.
        """
        count = len(content)
        if count > len(self._tokens):
            raise NativeError(f"{count} rows do not fit a batch of {len(self._tokens)}")
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._outputs[:count] = outputs
        if content.ndim == 1:
            self._tokens[:count] = content
            self._holds_tokens(count)
            return
        self._rows = np.ascontiguousarray(content, np.float32)
        self.struct.token, self._embd.value = None, self._rows.ctypes.data
        self.struct.n_tokens = self._count = count

    def put_token(self, token: int, position: int, sequence: int, output: bool) -> None:
        """Replace the content by one row, as `put` does, in a fifth of the time."""
        self._tokens[0], self._positions[0], self._sequences[0], self._outputs[0] = token, position, sequence, output
        self._holds_tokens(1)

    def follow(self, tokens: Sequence[int]) -> None:
        """Replace the content, tokens as well, by those that follow each row."""
        self._tokens[: self._count] = tokens
        self._positions[: self._count] += 1

    def _holds_tokens(self, count: int) -> None:
        # Without `set_fields`, in every step: it knew these names when this was made.
        if self._rows is not None or not self._count:
            self._rows = None
            self.struct.token, self._embd.value = self._token_pointer, None
        if count != self._count:
            self.struct.n_tokens = self._count = count
