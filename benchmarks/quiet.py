"""How much of the time other machines on the same host took: figures of minutes when it was much are to be repeated."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


class Stolen:
    """Share of this machine's CPU time, from making it on, that its host gave to others; 0 where Linux does not say."""

    def __init__(self) -> None:
        self._began, self._before = time.monotonic(), _seconds()

    @property
    def share(self) -> float:
        """Up to now."""
        return (_seconds() - self._before) / (time.monotonic() - self._began) / (os.cpu_count() or 1)


def _seconds() -> float:
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0
