"""Which of very many digests were seen, in little memory: an archive's run would grow by 250 bytes a file otherwise.

Knows no record and no file.
"""

from __future__ import annotations

import numpy as np

_BYTES = 8  # kept of each: among a million digests two are taken for one another once in 37 million runs
_FRESH = 1024  # kept one by one, at least; or an eighth of all, so that taking them in stays cheap


class Index:
    """A set that only grows, of digests: bytes, at least eight, evenly spread as those of a hash are."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._fresh: set[int] = set()

    def __contains__(self, digest: bytes) -> bool:
        number = _number(digest)
        if number in self._fresh:
            return True
        at = int(np.searchsorted(self._sorted, np.uint64(number)))
        return at < len(self._sorted) and int(self._sorted[at]) == number

    def add(self, digest: bytes) -> None:
        """Remember one; again is no harm."""
        if digest in self:
            return
        self._fresh.add(_number(digest))
        if len(self._fresh) > max(_FRESH, len(self._sorted) // 8):
            fresh = np.sort(np.fromiter(self._fresh, np.uint64, len(self._fresh)))
            self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, fresh), fresh)
            self._fresh.clear()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:_BYTES], "little")
