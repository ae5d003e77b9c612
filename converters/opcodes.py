"""What a pickle would ask for if it were loaded, read off its opcodes; nothing in it is executed."""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 2**24
"""Of a file are looked at: names stand before the tensors' bytes."""

_TEXTS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})


def foreign_name(path: Path) -> str | None:
    """The first function or class that is not torch's own; None where there is none, or the file cannot be followed.

    Parameters
    ----------
    path
        A pickle, several in a row, or torch's archive of one.
    """
    try:
        return next((name for name in _names(_pickle(path)) if not _is_torch_s(name)), None)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None


def _is_torch_s(name: str) -> bool:
    return name.startswith("torch.") or name in ("collections.OrderedDict", "_codecs.encode")


def _pickle(path: Path) -> io.BytesIO:
    """The beginning of the file, or of what torch keeps the structure in."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return io.BytesIO(file.read(MOST_BYTES))
    with zipfile.ZipFile(path) as archive:
        inner = next((name for name in archive.namelist() if name.endswith("data.pkl")), "data.pkl")
        with archive.open(inner) as file:
            return io.BytesIO(file.read(MOST_BYTES))


def _names(data: io.BytesIO) -> Iterator[str]:
    """Each "module.name" that is asked for, in order; a text may come back from the pickle's memo."""
    while data.tell() < len(data.getbuffer()):
        texts: list[str] = []
        memo: dict[Any, str] = {}
        top = ""
        for opcode, value, _ in pickletools.genops(data):
            name = opcode.name
            if name in ("GLOBAL", "INST"):
                yield str(value).replace(" ", ".")
            elif name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif name == "MEMOIZE":
                memo[len(memo)] = top
            elif name.endswith("PUT"):
                memo[value] = top
            elif name != "FRAME":
                top = memo.get(value, "") if name.endswith("GET") else str(value) if name in _TEXTS else ""
                texts.append(top)
