"""The memory of what is done: exact for what was added, small for very many."""

from __future__ import annotations

import hashlib
import tracemalloc

import pytest

from xraygpt_lite.batch.index import Index


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


@pytest.mark.parametrize("count", [0, 1, 1024, 1025, 1026, 5000])
def test_it_holds_what_was_added_and_nothing_else(count: int) -> None:
    index = Index()
    for number in range(count):
        assert digest(number) not in index
        index.add(digest(number))
        assert digest(number) in index
    assert all(digest(number) in index for number in range(count))
    assert not any(digest(number) in index for number in range(count, count + 1000))


def test_adding_again_changes_nothing() -> None:
    once, twice = Index(), Index()
    for number in range(3000):
        once.add(digest(number))
        twice.add(digest(number))
        twice.add(digest(number // 2))
    assert (once._sorted == twice._sorted).all()
    assert once._fresh == twice._fresh


def test_the_least_and_the_greatest() -> None:
    index = Index()
    for number in range(2000):
        index.add(digest(number))
    for edge in (bytes(8), b"\xff" * 8):
        assert edge not in index
        index.add(edge)
        for number in range(5000, 8000):
            index.add(digest(number))
        assert edge in index


def test_a_hundred_thousand_take_two_megabytes() -> None:
    """A set of the same digests takes more than ten."""
    tracemalloc.start()
    try:
        index = Index()
        for number in range(100_000):
            index.add(digest(number))
        assert tracemalloc.get_traced_memory()[0] < 2.5e6
    finally:
        tracemalloc.stop()
