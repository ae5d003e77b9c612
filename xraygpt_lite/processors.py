"""What of the processors' time other programs take, so that nothing measured beside them is taken for the machine's."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_NOTICEABLE = 0.1


class Others:
    """The share of the processors' time, from making it on, that other programs and the host's other machines took."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._began = self._now()

    @property
    def share(self) -> float | None:
        """Up to now; None where the system does not tell."""
        now = self._now()
        if self._began is None or now is None:
            return None
        whole, taken = (after - before for after, before in zip(now, self._began, strict=True))
        return max(0.0, taken / whole) if whole else 0.0

    def in_the_way(self, threads: int) -> bool:
        """Whether they took noticeably of the processors that so many threads would have had; False: not known."""
        processors = os.cpu_count() or threads
        return (self.share or 0.0) * processors > max(0, processors - threads) + _NOTICEABLE * threads

    def _now(self) -> tuple[float, float] | None:
        """Seconds of all processors since the start, and those of them that others took."""
        with suppress(OSError, ValueError, IndexError):
            # user nice system idle iowait irq softirq steal: https://docs.kernel.org/filesystems/proc.html
            ticks = [int(value) for value in self._stat.read_text("ascii").split("\n", 1)[0].split()[1:9]]
            second = os.sysconf("SC_CLK_TCK")
            return sum(ticks) / second, (sum(ticks) - ticks[3] - ticks[4]) / second - time.process_time()
        return None
