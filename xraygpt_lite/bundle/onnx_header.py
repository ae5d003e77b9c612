"""Which further files an ONNX graph reads its weights from. Pure Python, for files nobody vouches for.

A graph may keep a tensor's bytes in another file, at any path that it names; whoever opens it would read that file. It
is walked here as protobuf, before ONNX Runtime sees it, and only as far as tensors can be: whether it is a graph that
runs is not known. Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from xraygpt_lite.errors import BundleError

_MAX_DEPTH = 100  # protobuf's own readers stop there
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Message → number of a field → the message in it, of those that may lead to a tensor."""

_KEY, _VALUE = 1, 2  # of an entry
_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5  # how a field is stored
_Span = tuple[int, int]


def external_files(path: Path) -> set[str]:
    """Names of the files that tensors of a graph lie in, as the graph spells them.

    Raises
    ------
    BundleError
        When the file is no whole protobuf message.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return {
                _text(view, fields.get(_VALUE))
                for fields in _entries(view, "model", (0, len(view)), 0)
                if _text(view, fields.get(_KEY)) == "location"
            }
    except (OSError, ValueError) as error:  # mmap: ValueError for an empty file
        raise BundleError(f"{path.name} is not a readable ONNX graph: {error}; convert the model again") from error


def _entries(view: mmap.mmap, message: str, span: _Span, depth: int) -> Iterator[dict[int, _Span]]:
    """Key and value of every entry of a tensor's `external_data`; where a field stands twice, the last one counts."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"messages lie more than {_MAX_DEPTH} deep in each other")
    if message == "entry":
        yield dict(_fields(view, span))
        return
    inside = _INSIDE[message]
    for number, content in _fields(view, span):
        if number in inside:
            yield from _entries(view, inside[number], content, depth + 1)


def _fields(view: mmap.mmap, span: _Span) -> Iterator[tuple[int, _Span]]:
    """Number and place of each field that has a length; the others are numbers and are passed over."""
    at, end = span
    while at < end:
        tag, at = _varint(view, at, end)
        if tag >= 2**32:  # ONNX Runtime's parser would cut it, and read another field
            raise ValueError(f"the field's number before byte {at} is too large")
        kind, start = tag & 7, at
        if kind == _LENGTH:
            size, start = _varint(view, at, end)
            at = start + size
        elif kind == _VARINT:
            _, at = _varint(view, at, end)
        elif kind in (_EIGHT, _FOUR):
            at += 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind} before byte {start}")
        if at > end:
            raise ValueError(f"the field at byte {start} ends behind its message")
        if kind == _LENGTH:
            yield tag >> 3, (start, at)


def _varint(view: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number in base 128, lowest digit first, and the place behind it."""
    value = 0
    for digit in range(10):
        if at + digit >= end:
            break
        byte = view[at + digit]
        value |= (byte & 0x7F) << (7 * digit)
        if byte < 0x80:
            return value, at + digit + 1
    raise ValueError(f"the number at byte {at} does not end")


def _text(view: mmap.mmap, span: _Span | None) -> str:
    return "" if span is None else view[span[0] : span[1]].decode("utf-8", "replace")
