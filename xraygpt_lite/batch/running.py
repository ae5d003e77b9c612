"""`OUT.running`: which files are inside native code, so that the next run knows what a process died with.

Knows digests of files, not the files. A note is one short write to the page cache: it outlives the process, which is
all that matters, and costs microseconds. A crash of the machine may lose notes, and with them one count.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from xraygpt_lite.batch.durable import beside, replace

_NOTE = re.compile(rb"(\+|-|[1-9][0-9]{0,8} )([0-9a-f]{64})")
_MOST_BYTES = 1 << 16


class Running:
    """The notes of one run, which holds the lock of its output.

    Parameters
    ----------
    output
        The journal; what an earlier process left beside it is counted, once.
    """

    def __init__(self, output: Path) -> None:
        self._path = beside(output, ".running")
        self._crashes, self._inside = self._left()
        for file in self._inside:
            self._crashes[file] = self._crashes.get(file, 0) + 1
        self._inside = set()
        self._handle = -1
        self._size = 0
        self._rewrite()

    @property
    def suspects(self) -> Mapping[str, int]:
        """Digest of a file → how many processes have died with it inside, for files that never came out since."""
        return dict(self._crashes)

    def begin(self, file: str) -> None:
        """`file`, a hex digest, enters native code."""
        if file not in self._inside:
            self._inside.add(file)
            self._note(f"+{file}\n")

    def end(self, file: str) -> None:
        """`file` came out, or was given up for good: no crash is counted against it any more."""
        if file in self._inside or file in self._crashes:
            self._inside.discard(file)
            self._crashes.pop(file, None)
            self._note(f"-{file}\n")

    def close(self) -> None:
        """The process ends in order: what is inside is not to blame. Suspects that were not tried again stay noted."""
        self._inside.clear()
        with contextlib.suppress(OSError):  # a full disk has been told already; it costs one wrong count
            self._rewrite()
        self._shut()

    def _note(self, text: str) -> None:
        if self._handle < 0:
            self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._size += os.write(self._handle, text.encode("ascii"))
        if self._size > _MOST_BYTES:
            self._rewrite()

    def _rewrite(self) -> None:
        """The same state in as few lines as there are; no file where there is nothing to say."""
        self._shut()
        counts = [f"{count} {file}\n" for file, count in self._crashes.items()]
        inside = [f"+{file}\n" for file in self._inside]
        if counts or inside:
            text = "".join(counts + inside).encode("ascii")
            self._size = replace(self._path, [text], durable=False)
        else:
            self._path.unlink(missing_ok=True)
            self._size = 0

    def _shut(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _left(self) -> tuple[dict[str, int], set[str]]:
        """Counts and files inside, as noted; lines that are not whole say nothing."""
        crashes: dict[str, int] = {}
        inside: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_bytes().split(b"\n")[:-1]:
                if note := _NOTE.fullmatch(line):
                    mark, file = note[1], note[2].decode("ascii")
                    if mark == b"+":
                        inside.add(file)
                    elif mark == b"-":
                        inside.discard(file)
                        crashes.pop(file, None)
                    else:
                        crashes[file] = int(mark)
        return crashes, inside
