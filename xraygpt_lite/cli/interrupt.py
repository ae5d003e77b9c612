"""Ctrl-C and SIGTERM end a command alike; knows nothing of what the command does."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.2
"""Seconds until an interruption that was lost is raised again."""


@contextmanager
def heard() -> Iterator[None]:
    """Within it, SIGTERM raises KeyboardInterrupt as Ctrl-C does, and neither is lost.

    Python raises it in whatever it runs next. Where a native library was calling a function of ours, that ends with the
    function, and is reported as ignored: then it is raised again, until it meets code that it can end.
    """
    report = sys.unraisablehook
    timers: list[threading.Timer] = []

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        main = threading.main_thread().ident or 0  # a signal to another thread would not wake it
        timers.append(threading.Timer(AGAIN, signal.pthread_kill, (main, signal.SIGTERM)))
        timers[-1].daemon = True
        timers[-1].start()

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    sys.unraisablehook = again
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = report
        signal.signal(signal.SIGTERM, before)
