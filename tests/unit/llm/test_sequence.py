"""Checks, fit and chunks of segments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xraygpt_lite.errors import ContextError, NativeError
from xraygpt_lite.llm.sequence import check, check_fit, chunks, count, joined
from xraygpt_lite.values import EmbeddingSegment, Segment, TokenSegment


def tokens(n: int, start: int = 0) -> TokenSegment:
    return TokenSegment(np.arange(start, start + n, dtype=np.int32))


def rows(n: int, start: int = 0) -> EmbeddingSegment:
    return EmbeddingSegment(np.arange(start, start + n, dtype=np.float32)[:, None].repeat(4, 1))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=6), st.integers(1, 5))
def test_chunks_keep_every_row_in_order(kinds: list[tuple[bool, int]], size: int) -> None:
    segments: list[Segment] = []
    for is_tokens, n in kinds:
        segments.append(tokens(n, count(segments)) if is_tokens else rows(n, count(segments)))
    made = list(chunks(segments, size))
    assert all(0 < len(chunk.content) <= size for chunk in made)
    flat = [int(v) for chunk in made for v in (chunk.content if chunk.content.ndim == 1 else chunk.content[:, 0])]
    assert flat == list(range(count(segments)))
    assert [chunk.outputs for chunk in made] == [0] * (len(made) - 1) + [1] * bool(made)


def test_neighbouring_tokens_share_a_chunk() -> None:
    assert [len(c.content) for c in chunks([tokens(1), tokens(3), rows(2), tokens(5)], 4)] == [4, 2, 4, 1]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=6))
def test_tokens_behind_image_rows_become_rows(kinds: list[tuple[bool, int]]) -> None:
    segments: list[Segment] = []
    for is_tokens, n in kinds:
        segments.append(tokens(n, count(segments)) if is_tokens else rows(n, count(segments)))
    made = list(chunks(joined(segments, lambda ids: rows(len(ids), int(ids[0])).rows), 100))
    flat = [int(v) for chunk in made for v in (chunk.content if chunk.content.ndim == 1 else chunk.content[:, 0])]
    assert flat == list(range(count(segments)))
    first = next((index for index, (is_tokens, _) in enumerate(kinds) if not is_tokens), len(kinds))
    before, behind = count(segments[:first]), count(segments[first:])
    assert [(chunk.content.ndim, len(chunk.content)) for chunk in made] == [(1, before)] * (before > 0) + [
        (2, behind)
    ] * (behind > 0)


def test_overflow_gives_the_numbers() -> None:
    check_fit(10, 20, 34, 64)
    with pytest.raises(ContextError, match=r"10 rows so far \+ 20 .* \+ up to 35 .* = 65 .* context of 64"):
        check_fit(10, 20, 35, 64)


@pytest.mark.parametrize(
    ("segment", "words"),
    [
        (TokenSegment(np.array([0, 8], np.int32)), "from 0 to 7"),
        (TokenSegment(np.array([-1], np.int32)), "from 0 to 7"),
        (EmbeddingSegment(np.zeros((2, 5), np.float32)), r"shape \(2, 5\).*\(n, 4\)"),
        (EmbeddingSegment(np.full((2, 4), np.nan, np.float32)), "not finite"),
    ],
)
def test_rows_that_the_model_cannot_take(segment: Segment, words: str) -> None:
    with pytest.raises(NativeError, match=words):
        check([tokens(3), segment], width=4, vocab=8)
