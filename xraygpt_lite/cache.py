"""One folder of small JSON files: hashes, measured settings, verdicts. Nothing in it is needed; deleting it is safe.

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
from pathlib import Path
from typing import Any

_KIND = re.compile(r"[a-z][a-z0-9-]*")
_MAX_BYTES = 1 << 20


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
        path = self._path(kind, key)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                value = json.loads(file.read(_MAX_BYTES))
        except (OSError, ValueError, RecursionError):  # absent, unreadable or damaged: as if never put
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: the oldest go first
        return value

    def put(self, kind: str, key: str, value: Any) -> None:
        """Keep a JSON value under (kind, key), if that is possible.

        Raises
        ------
        TypeError
            When the value is not JSON.
        """
        path = self._path(kind, key)
        if path is None:
            return
        data = json.dumps(value).encode()
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._replace(path, data)
            self._trim(path.parent)

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

    def _path(self, kind: str, key: str) -> Path | None:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"{kind!r} is no kind of entry; expected lower-case letters, digits and '-'")
        if self.folder is None:
            return None
        return self.folder / kind / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}.json"

    def _replace(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _trim(self, folder: Path) -> None:
        with os.scandir(folder) as found:
            names = [entry.path for entry in found]
        if len(names) <= self.entries:
            return
        for name in sorted(names, key=_age)[: len(names) - self.entries]:
            with contextlib.suppress(OSError):
                os.unlink(name)


def _age(name: str) -> float:
    try:
        return os.stat(name).st_mtime
    except OSError:  # removed by another process
        return 0.0
