"""What a GGUF file says of itself: architecture, width, vocabulary. Pure Python, bounded, for files nobody vouches for.

It reads the header and the table of tensors, never weights, and does not know whether llama.cpp can run the model.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from xraygpt_lite.errors import BundleError

_MAX_ITEMS = 1 << 22  # of one array, of the metadata, of the table of tensors
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_ALIGNMENT, _EMBEDDING = "general.alignment", "token_embd.weight"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufHeader:
    """What was read.

    Attributes
    ----------
    width, vocab
        Columns and rows of the embedding table.
    context_length
        Tokens that it was trained for.
    cache_row
        Bytes of one row of its KV cache at float16, keys and values of all layers; 0 where the file does not tell.
    layers
        Its blocks; 0 where the file does not tell.
    token_bytes
        Bytes of weights that are read for one token: all tensors, but of the embedding table one row only, unless it is
        the output matrix as well.
    """

    architecture: str
    width: int
    vocab: int
    context_length: int
    cache_row: int
    layers: int
    token_bytes: int


def read(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises
    ------
    BundleError
        When the file is no GGUF, is truncated, or its parts contradict each other.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _read(view)
    except (OSError, ValueError, OverflowError, struct.error) as error:  # mmap: ValueError for an empty file
        raise BundleError(f"{path.name} is not a readable GGUF file: {error}; convert the model again") from error


def _read(view: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(view)
    if bytes(view[:4]) != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    cursor.at = 4
    if (version := cursor.number("I")) not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    tensors, pairs = cursor.count(), cursor.count()
    facts: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in facts:
            raise ValueError(f"the key {key[:60]!r} stands twice")
        facts[key] = cursor.value(cursor.number("I"))
    table = dict(cursor.tensor() for _ in range(tensors))
    if len(table) != tensors:
        raise ValueError("two tensors have the same name")
    alignment = _positive({_ALIGNMENT: 32, **facts}, _ALIGNMENT)
    size = len(view) - -(-cursor.at // alignment) * alignment
    return _header(facts, table, size)


def _header(facts: dict[str, Any], table: dict[str, _Entry], size: int) -> GgufHeader:
    architecture = facts.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("general.architecture is missing")
    width = _positive(facts, f"{architecture}.embedding_length")
    vocab = _positive(facts, "tokenizer.ggml.tokens")  # an array is kept as its length
    shape = table[_EMBEDDING].shape if _EMBEDDING in table else None
    if shape != (width, vocab):
        raise ValueError(f"{_EMBEDDING} has the shape {shape}, but the header promises ({width}, {vocab})")
    cache_row = layers = 0
    if {f"{architecture}.block_count", f"{architecture}.attention.head_count"} <= set(facts):
        layers, heads = (_positive(facts, f"{architecture}.{key}") for key in ("block_count", "attention.head_count"))
        key_heads = facts.get(f"{architecture}.attention.head_count_kv")
        cache_row = 4 * layers * width * (key_heads if isinstance(key_heads, int) else heads) // heads
    context = _positive(facts, f"{architecture}.context_length")
    return GgufHeader(architecture, width, vocab, context, cache_row, layers, max(0, _token_bytes(table, size)))


def _token_bytes(table: dict[str, _Entry], size: int) -> int:
    """Of so many bytes of tensors, those that one token reads; a tensor reaches to where the next one begins."""
    if "output.weight" not in table:
        return size
    shape, begin = table[_EMBEDDING]
    end = min((entry.offset for entry in table.values() if entry.offset > begin), default=size)
    return size - (end - begin) + (end - begin) // shape[-1]


def _positive(facts: dict[str, Any], key: str) -> int:
    value = facts.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key[:60]} is missing or no positive integer")
    return value


class _Entry(NamedTuple):
    """Shape of a tensor, columns first, and where it begins, counted from the first one."""

    shape: tuple[int, ...]
    offset: int


class _Cursor:
    """A place in the file; every read is checked against its end."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view = view
        self.at = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.view, self.at)  # struct.error past the end
        self.at += struct.calcsize("<" + code)
        return value

    def count(self) -> int:
        value = int(self.number("Q"))
        if value > _MAX_ITEMS:
            raise ValueError(f"{value} items are announced at byte {self.at - 8}, at most {_MAX_ITEMS} are read")
        return value

    def skip(self, size: int) -> None:
        if size > len(self.view) - self.at:
            raise ValueError(f"the file ends before the {size} bytes announced at byte {self.at}")
        self.at += size

    def text(self) -> str:
        size = int(self.number("Q"))
        self.skip(size)
        return self.view[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A scalar, a string, or the length of an array."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_code(kind))
        inner, length = self.number("I"), self.count()
        if inner == _STRING:
            unpack, at = struct.Struct("<Q").unpack_from, self.at  # a vocabulary has 10**5 of them: the short way
            for _ in range(length):
                at += 8 + unpack(self.view, at)[0]
            self.skip(at - self.at)
        else:
            self.skip(length * struct.calcsize("<" + _code(inner)))
        return length

    def tensor(self) -> tuple[str, _Entry]:
        """Name and content of one entry of the table."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        shape = tuple(int(self.number("Q")) for _ in range(dimensions))
        _kind, offset = self.number("I"), self.number("Q")
        if offset >= len(self.view):
            raise ValueError(f"the tensor {name[:60]!r} begins behind the end of the file")
        return name, _Entry(shape, int(offset))


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"value type {kind} is unknown")
    return _SCALARS[kind]
