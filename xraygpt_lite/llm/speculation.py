"""Guesses the next tokens of an answer from what was said before, so that one decode call can verify several.

Reports repeat phrases. One table holds which tokens followed which: in phrases that the bundle ships, in this process's
earlier answers, and in the current one. Whether a guess is worth its rows is reckoned from the calls measured so far,
so guessing ends by itself where it does not pay, and is tried again later.

Knows token ids and seconds; knows no model, cache or text. What it learns stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SIZES = (4, 8, 16)
"""Rows of a call with guesses. On CPUs 2 rows cost as much as 4."""
_ORDERS = (5, 2)
_START = -1
_MOST_CONTEXTS = 200_000
_UNTRIED = 1.3
"""What a size that was never tried is taken to cost, of the next smaller one: little, so that it is tried."""
_MEMORY = 0.95
_RECOVERY = 0.99


class Speculation:
    """The table, what calls cost here, and how far guesses were right.

    Parameters
    ----------
    phrases
        Token ids of texts that answers begin with or hold.
    """

    def __init__(self, phrases: Iterable[Sequence[int]] = ()) -> None:
        # The last tokens → what followed them, how often.
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}
        self._seconds: dict[int, float] = {}
        self._hoped = self._right = 0.0
        for phrase in phrases:
            self.learn(phrase)

    def learn(self, ids: Sequence[int], known: int = 0) -> None:
        """Note what follows what in an answer or phrase; its first `known` tokens were noted before."""
        for end in range(known, len(ids)):
            for context in _contexts(ids, end):
                followers = self._followers.get(context)
                if followers is None:
                    if len(self._followers) >= _MOST_CONTEXTS:
                        continue
                    followers = self._followers[context] = {}
                followers[ids[end]] = followers.get(ids[end], 0) + 1

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow an answer so far; none where verifying them would not pay."""
        tokens, chances = self._likely(ids, min(most, max(SIZES) - 1))
        trust = min(1.0, (self._right + 1) / (self._hoped + 1))
        best, rate = 0, 1 / self._cost(1)
        for size in SIZES:
            count = min(size - 1, len(tokens))
            tried = (1 + trust * sum(chances[:count])) / self._cost(size)
            if count and tried > rate:
                best, rate = count, tried
        self._hoped += sum(chances[:best])
        if not best:
            self._hoped, self._right = self._hoped * _RECOVERY, self._right * _RECOVERY
        return tokens[:best]

    def called(self, guessed: int, right: int, seconds: float) -> None:
        """Note how long a call with so many guesses took, and how many of them were right."""
        self._right += right
        if guessed:
            self._hoped, self._right = self._hoped * _MEMORY, self._right * _MEMORY
        size = _size(guessed + 1)
        known = self._seconds.get(size, seconds)
        # A call that something else held up says little.
        self._seconds[size] = 0.8 * known + 0.2 * min(seconds, 3 * known)

    def _likely(self, ids: Sequence[int], most: int) -> tuple[list[int], list[float]]:
        """The likeliest continuation, and for each token the chance that all up to it are right."""
        text, tokens, chances, chance = list(ids), list[int](), list[float](), 1.0
        while len(tokens) < most:
            seen = (self._followers.get(context) for context in _contexts(text, len(text)))
            followers = next((each for each in seen if each), None)
            if followers is None:
                break
            token = max(followers, key=followers.__getitem__)
            # Half a count for what was never seen.
            chance *= followers[token] / (sum(followers.values()) + 0.5)
            text.append(token)
            tokens.append(token)
            chances.append(chance)
        return tokens, chances

    def _cost(self, size: int) -> float:
        """Seconds of a call with so many rows."""
        if size in self._seconds:
            return self._seconds[size]
        if size == 1:
            return 1.0
        smaller = max(each for each in (1, *SIZES) if each < size)
        return self._cost(smaller) * _UNTRIED


def _contexts(ids: Sequence[int], end: int) -> list[tuple[int, ...]]:
    """What stands before position `end`, the longest first; the answer's begin counts as a token."""
    found = []
    for order in _ORDERS:
        begin = end - order
        context = tuple(ids[begin:end]) if begin >= 0 else (_START, *ids[:end])
        if context not in found:
            found.append(context)
    return found


def _size(rows: int) -> int:
    return next(size for size in (1, *SIZES) if rows <= size)
