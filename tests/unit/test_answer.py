"""Answers are cut at stop strings exactly, however tokens slice the bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xraygpt_lite.answer import AnswerReader, clean, reworded


def read(pieces: list[bytes], stops: list[str]) -> tuple[AnswerReader, list[str]]:
    reader = AnswerReader(stops)
    shown = [reader.feed(piece) for piece in pieces]
    shown.append(reader.finish())
    return reader, shown


def test_a_stop_string_split_over_tokens_is_never_shown() -> None:
    reader, shown = read([b"No effusion.", b"#", b"#", b"#", b"Patient:"], ["###"])
    assert shown == ["No effusion.", "", "", "", "", ""]
    assert reader.stopped
    assert reader.kept_bytes == len(b"No effusion.")


def test_a_partial_stop_that_does_not_complete_is_given_out_later() -> None:
    reader, shown = read([b"a##", b"b", b"#"], ["###"])
    assert shown == ["a", "##b", "", "#"]
    assert not reader.stopped
    assert reader.kept_bytes == 5


def test_a_character_split_over_tokens_is_held_back_until_whole() -> None:
    euro = "€".encode()
    _, shown = read([b"5 " + euro[:1], euro[1:2], euro[2:]], ["###"])
    assert shown == ["5 ", "", "€", ""]


def test_a_character_that_never_completes_becomes_a_replacement_mark() -> None:
    _, shown = read([b"5 " + "€".encode()[:2]], [])
    assert "".join(shown) == "5 \ufffd"


def test_the_earliest_of_several_stops_wins() -> None:
    reader, shown = read([b"one</s>two###three"], ["###", "</s>"])
    assert "".join(shown) == "one"
    assert reader.kept_bytes == 3


@given(
    st.text(alphabet="ab#€\n", max_size=30),
    st.lists(st.text(alphabet="ab#€", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 100), max_size=12),
)
def test_any_slicing_gives_what_cutting_the_whole_text_gives(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    reader, shown = read([data[a:b] for a, b in pairwise(edges)], stops)
    found = [data.find(stop.encode()) for stop in stops]
    ends = [at for at in found if at >= 0]
    # the first stop to be complete ends the answer; an earlier start that completes later in the same piece wins
    assert reader.stopped == bool(ends)
    if not ends:
        assert "".join(shown) == text
    else:
        assert text.startswith("".join(shown).rstrip("\ufffd"))
        assert reader.kept_bytes in ends
        assert not any(stop in "".join(shown) for stop in stops)


@pytest.mark.parametrize(
    ("raw", "keep_after", "expected"),
    [
        (" The heart is normal. ", "Doctor:", "The heart is normal."),
        ("x Doctor: a Doctor: b", "Doctor:", "b"),
        (" a [/INST] b ", "[/INST]", "b"),
        (" a ", "", "a"),
    ],
)
def test_clean_keeps_what_follows_the_last_marker(raw: str, keep_after: str, expected: str) -> None:
    assert clean(raw, keep_after) == expected


def test_an_end_mark_written_as_text_ends_the_answer() -> None:
    reader, shown = read([b" no effusion<", b"/s", b"> [INST] more"], ["</s>"])
    assert clean("".join(shown), "[/INST]") == "no effusion"
    assert reader.stopped


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, "ab abc chatab"),
        ({"ab": "x"}, "x xc chatx"),
        ({"ab": "abc", "abc": "ab"}, "abc ab chatabc"),  # the longer word first, and no replacement again
        ({"a.": "x", "b": ""}, "a ac chata"),
    ],
)
def test_words_are_replaced_once(words: dict[str, str], expected: str) -> None:
    assert reworded("ab abc chatab", words) == expected
