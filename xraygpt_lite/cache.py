"""One folder of small JSON files: hashes, measured settings, verdicts; and of a few larger blocks of bytes.

Nothing in it is needed; deleting it is safe.

It knows no path and no meaning: a key is stored as its sha256, so that no file name of the user can be read from it.
Each entry is replaced as a whole, so that any number of processes may share the folder. Where it cannot be written, or
an entry is damaged, the cache does without, silently: what it holds can always be worked out again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_KIND = re.compile(r"[a-z][a-z0-9-]*")
_MAX_BYTES = 1 << 20
_DIGEST = hashlib.sha256().digest_size
_MAX_BLOCKS_BYTES = 1 << 29
"""All blocks of one kind together: about twelve prompts of a model with seven billion parameters."""


class Cache:
    """A bounded store of JSON values.

    Parameters
    ----------
    folder
        Created when something is first put; None keeps nothing.
    entries
        Kept of each kind; beyond it those used longest ago go.
    """

    def __init__(self, folder: Path | None, *, entries: int = 1000) -> None:
        self.folder = folder
        self.entries = entries

    def get(self, kind: str, key: str) -> Any:
        """The value put last under (kind, key), or None."""
        path = self._path(kind, key, "json")
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                value = json.loads(file.read(_MAX_BYTES))
        except (OSError, ValueError, RecursionError):  # absent, unreadable or damaged: as if never put
            return None
        _touch(path)
        return value

    def put(self, kind: str, key: str, value: Any) -> None:
        """Keep a JSON value under (kind, key), if that is possible.

        Raises
        ------
        TypeError
            When the value is not JSON.
        """
        self._put(self._path(kind, key, "json"), (json.dumps(value).encode(),))

    def get_bytes(self, kind: str, key: str) -> memoryview | None:
        """The block put last under (kind, key), or None; read in one go and held against its sha256."""
        path = self._path(kind, key, "bin")
        if path is None:
            return None
        try:
            data = memoryview(path.read_bytes())
        except OSError:
            return None
        digest, block = data[:_DIGEST], data[_DIGEST:]
        if not block or hashlib.sha256(block).digest() != digest:
            return None
        _touch(path)
        return block

    def put_bytes(self, kind: str, key: str, block: bytes | memoryview) -> None:
        """Keep a block under (kind, key), if that is possible and it is not too large."""
        if len(block) <= _MAX_BLOCKS_BYTES:
            self._put(self._path(kind, key, "bin"), (hashlib.sha256(block).digest(), block))

    def writable(self) -> bool:
        """Whether anything put is kept."""
        if self.folder is None:
            return False
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                return True
        except OSError:
            return False

    def _put(self, path: Path | None, parts: Iterable[bytes | memoryview]) -> None:
        if path is None:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._replace(path, parts)
            self._trim(path.parent)

    def _path(self, kind: str, key: str, ending: str) -> Path | None:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"{kind!r} is no kind of entry; expected lower-case letters, digits and '-'")
        if self.folder is None:
            return None
        return self.folder / kind / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}.{ending}"

    def _replace(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(parts)
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _trim(self, folder: Path) -> None:
        """Remove those used longest ago where there are too many, or blocks take too much."""
        with os.scandir(folder) as found:
            entries = sorted((_used(entry) for entry in found), reverse=True)
        taken = 0
        for number, (_, size, name) in enumerate(entries):
            taken += size
            if number >= self.entries or taken > _MAX_BLOCKS_BYTES:
                with contextlib.suppress(OSError):
                    os.unlink(name)


def _touch(path: Path) -> None:
    """Used now: the oldest go first."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _used(entry: os.DirEntry[str]) -> tuple[float, int, str]:
    try:
        status = entry.stat()
    except OSError:  # removed by another process
        return 0.0, 0, entry.path
    return status.st_mtime, status.st_size, entry.path
