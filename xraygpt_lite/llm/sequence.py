"""What goes into one sequence of the cache: checks, fit and chunks.

Knows the records of `values` and numpy. Knows no native library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ContextError, NativeError
from ..values import EmbeddingSegment, Float32, Int32, Segment, TokenSegment


@dataclass(eq=False)
class Held:
    """What one sequence holds in the cache. Written by the engine thread only, but for `closed`.

    Attributes
    ----------
    id
        The native sequence id.
    rows
        Rows in the cache; the next row's position.
    tail
        Logits (V,) after the last row, where they were asked for; they predict the next token.
    closed
        It was given back: its id may be somebody else's, and what is still asked of it is refused.
    """

    id: int
    rows: int = 0
    tail: Float32 | None = None
    closed: bool = False


@dataclass(frozen=True)
class Chunk:
    """Rows of one kind that fit one decode call: int32 (n,) or float32 (n, E).

    `outputs` counts the rows, from the end, whose logits are wanted.
    """

    content: Int32 | Float32
    outputs: int


def count(segments: Sequence[Segment]) -> int:
    """Return the rows that the segments take."""
    return sum(len(segment) for segment in segments)


def check(segments: Sequence[Segment], width: int, vocab: int) -> None:
    """Refuse rows that the model could not take: a wrong width, ids outside the vocabulary, values that are not finite.

    Raises
    ------
    NativeError
        Says which and gives the numbers.
    """
    for segment in segments:
        if isinstance(segment, TokenSegment):
            ids = segment.ids
            if ids.ndim != 1 or (ids.size and (ids.min() < 0 or ids.max() >= vocab)):
                raise NativeError(f"token ids must be a row of numbers from 0 to {vocab - 1}")
        elif segment.rows.ndim != 2 or segment.rows.shape[1] != width:
            raise NativeError(f"embedding rows have shape {segment.rows.shape}; the model takes (n, {width})")
        elif not np.isfinite(segment.rows).all():
            raise NativeError("embedding rows hold values that are not finite")


def check_fit(held: int, new: int, answer: int, context: int) -> None:
    """Refuse a prompt and answer that would overrun the context, before anything is decoded.

    Raises
    ------
    ContextError
        With all the numbers.
    """
    if held + new + answer > context:
        raise ContextError(
            f"{held} rows so far + {new} of the prompt + up to {answer} of the answer = {held + new + answer} do not "
            f"fit the model's context of {context}; shorten the question, lower the maximum of tokens or start anew"
        )


def joined(segments: Sequence[Segment], embed: Callable[[Int32], Float32]) -> list[Segment]:
    """Put the tokens behind image rows as rows of embeddings, so that they share decode calls with these.

    Those before the first image rows stay tokens: prompts that begin alike share them.

    Parameters
    ----------
    embed
        Token ids (n,) → the rows (n, E) that stand for them.
    """
    kinds = [isinstance(segment, EmbeddingSegment) and len(segment) > 0 for segment in segments]
    if True not in kinds:
        return list(segments)
    first = kinds.index(True)
    rows = [each.rows if isinstance(each, EmbeddingSegment) else embed(each.ids) for each in segments[first:]]
    return [*segments[:first], EmbeddingSegment(np.concatenate(rows))]


def chunks(segments: Sequence[Segment], size: int) -> Iterator[Chunk]:
    """Cut segments into chunks of at most `size` rows, the very last row with logits; neighbouring tokens share one."""
    merged = list(_merged(segments))
    for index, content in enumerate(merged):
        for start in range(0, len(content), size):
            part = content[start : start + size]
            last = index == len(merged) - 1 and start + size >= len(content)
            yield Chunk(part, int(last))


def _merged(segments: Sequence[Segment]) -> Iterator[Int32 | Float32]:
    ids: list[Int32] = []
    for segment in segments:
        if isinstance(segment, EmbeddingSegment):
            if ids:
                yield np.concatenate(ids)
                ids = []
            if len(segment):
                yield np.ascontiguousarray(segment.rows, np.float32)
        elif len(segment):
            ids.append(segment.ids.astype(np.int32, copy=False))
    if ids:
        yield np.concatenate(ids)
