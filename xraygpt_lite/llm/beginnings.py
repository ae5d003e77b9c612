"""Which sequences of a cache begin with which opening, so that its rows are prefilled once and copied from there on.

An opening is named by the bytes of its token ids (int32). Knows the context and the store; knows no request. For the
engine's thread.
"""

from __future__ import annotations

import numpy as np

from ..errors import NativeError
from .native import Context
from .openings import Openings

_ID_BYTES = np.dtype(np.int32).itemsize


class Beginnings:
    """Openings of a context's sequences, whoever holds these.

    Parameters
    ----------
    context
        Everything that shortens or replaces a sequence's first rows must be told to this.
    store
        Where openings of earlier processes are, if anywhere.
    """

    def __init__(self, context: Context, store: Openings | None) -> None:
        self._context = context
        self._store = store
        self._known: dict[int, bytes] = {}

    def share(self, target: int, opening: bytes) -> bool:
        """Make a sequence hold an opening alone: its own, a copy, or one from the store; False where there is none."""
        rows = _rows(opening)
        alike = (sequence for sequence, ids in self._known.items() if ids == opening)
        first = sorted(alike, key=lambda sequence: sequence != target)  # its own, if it has them
        holder = next((sequence for sequence in first if self._context.length(sequence) >= rows), None)
        if holder is None and not self._recall(target, opening):
            return False
        if holder not in (None, target):
            self._context.cut(target, 0)
            self._context.copy(holder, target)
        self._context.cut(target, rows)
        self._known[target] = opening
        return True

    def keep(self, sequence: int, opening: bytes) -> None:
        """Note what a sequence holds, nothing else being there yet, and put its rows into the store."""
        self._known[sequence] = opening
        if self._store:
            self._store.put(opening, lambda: self._context.save(sequence))

    def forget(self, sequence: int) -> None:
        """Note that a sequence's rows are not certain any more."""
        self._known.pop(sequence, None)

    def overwrite(self, sequence: int, rows: int) -> None:
        """Drop what a sequence has behind so many rows where that is part of its opening, which others will replace."""
        if rows < self._rows(sequence):
            self.forget(sequence)
            self._context.cut(sequence, rows)

    def rewind(self, sequence: int) -> None:
        """Empty a sequence but for its opening."""
        rows = self._rows(sequence)
        if self._context.length(sequence) < rows:
            self.forget(sequence)
            rows = 0
        self._context.cut(sequence, rows)

    def _recall(self, sequence: int, opening: bytes) -> bool:
        """Take opening rows from the store; False where it has none that fit, or copies wait."""
        # What is restored is there at once, and could take the place of what a copy still has to move.
        state = self._store.get(opening) if self._store and not self._context.copying else None
        if state is None:
            return False
        self.forget(sequence)
        self._context.cut(sequence, 0)
        try:
            self._context.restore(sequence, state)
            if self._context.length(sequence) == _rows(opening):
                return True
        except NativeError:  # of another form: as if it were not there
            pass
        self._context.cut(sequence, 0)
        return False

    def _rows(self, sequence: int) -> int:
        return _rows(self._known.get(sequence, b""))


def _rows(opening: bytes) -> int:
    return len(opening) // _ID_BYTES
