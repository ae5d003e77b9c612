"""What a model says becomes what a reader sees: text that ends at a stop string, cleaned as the authors do.

Works on bytes, because a token may end within a character; knows no token ids and no model.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping


class AnswerReader:
    """Takes an answer's bytes token by token and gives out the text that may be shown.

    Bytes that could be the start of a stop string, or of a character, are held back until it is decided. Once a stop
    string is complete, it and all that follows are dropped.

    Attributes
    ----------
    stopped
        A stop string was found.
    kept_bytes
        Bytes of the answer before the stop string; all bytes so far where none was found.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stop.encode() for stop in stops if stop]
        self._find = re.compile(b"|".join(map(re.escape, self._stops)) or b"(?!)").search
        self._beginnings = tuple({stop[:length] for stop in self._stops for length in range(1, len(stop))})
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self._released = 0
        self.stopped = False

    @property
    def kept_bytes(self) -> int:
        return self._released + len(self._held)

    def feed(self, piece: bytes) -> str:
        """Take one token's bytes; return the text that is now certain to be part of the answer."""
        if self.stopped:
            return ""
        data, self._held = self._held + piece, b""
        found = self._find(data)
        if found:
            self.stopped = True
            return self._release(data[: found.start()])
        if data.endswith(self._beginnings):  # seldom
            keep = max(_overlap(data, stop) for stop in self._stops)
            data, self._held = data[: len(data) - keep], data[len(data) - keep :]
        return self._release(data)

    def finish(self) -> str:
        """The rest of the text, once no more bytes come."""
        rest, self._held = self._held, b""
        return self._release(rest) + self._decoder.decode(b"", final=True)

    def _release(self, data: bytes) -> str:
        self._released += len(data)
        return self._decoder.decode(data)


def _overlap(data: bytes, stop: bytes) -> int:
    """Length of the longest end of `data` that is a proper beginning of `stop`."""
    for length in range(min(len(data), len(stop) - 1), 0, -1):
        if data.endswith(stop[:length]):
            return length
    return 0


def clean(raw: str, keep_after: str) -> str:
    """The answer as a reader sees it: what follows the last `keep_after` (a role marker), stripped."""
    return (raw.rsplit(keep_after, 1)[-1] if keep_after else raw).strip()


def reworded(text: str, words: Mapping[str, str]) -> str:
    """`text` with every word that is a key replaced by its value, in one pass: no replacement is replaced again."""
    if not words:
        return text
    longest_first = sorted(words, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: words[match[0]], text)
