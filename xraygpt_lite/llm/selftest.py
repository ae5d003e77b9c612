"""Finds out whether this build of llama.cpp runs on this CPU, in a child process, since a bad build kills the process.

Some builds end in SIGILL at the first prompt of more than a few tokens (GCC bug 114098), others on an older CPU. The
verdict is kept for each build and CPU. Run as a module, it is that child: it prints nothing and its exit status counts.
"""

from __future__ import annotations

import hashlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..cache import Cache
from ..errors import NativeError, XrayError
from ..values import DevicePlan
from .library import REINSTALL, build_id

KIND = "selftest"
PREFILL_ROWS, DECODE_STEPS = 96, 4
_TIMEOUT_S = 300
_FAILED = 3
_CRASHES = {
    -signal.SIGILL: "an illegal instruction",
    -signal.SIGSEGV: "a segmentation fault",
    -signal.SIGABRT: "an abort",
    -signal.SIGFPE: "an arithmetic fault",
    0xC000001D: "an illegal instruction",
    0xC0000005: "an access violation",
}


@dataclass(frozen=True)
class Verdict:
    """What the child's end says.

    Attributes
    ----------
    healthy
        It ran to its end.
    crashed
        It was killed by a fault of the native code; only then is reinstalling the cure.
    cause
        How it ended, in a few words; "" when healthy.
    build, cpu
        What the verdict holds for.
    seconds
        Time the child took.
    """

    healthy: bool
    crashed: bool
    cause: str
    build: str
    cpu: str
    seconds: float


def check(gguf: Path, cache: Cache) -> None:
    """Refuse a build of llama.cpp that crashes here; takes a moment once for each build and CPU.

    Parameters
    ----------
    gguf
        A small quantized model: the default bundle's.
    cache
        Remembers the verdict.

    Raises
    ------
    NativeError
        One sentence: what happened, and how to reinstall where that is the cure.
    """
    key = f"{build_id()} {cpu_id()}"
    known = cache.get(KIND, key)
    try:
        verdict = Verdict(**known)
    except TypeError:
        verdict = probe(gguf)
        # A child that failed for another reason, e.g. for want of memory, may do better the next time.
        if verdict.healthy or verdict.crashed:
            cache.put(KIND, key, asdict(verdict))
    if verdict.crashed:
        raise NativeError(
            f"this build of llama.cpp ends in {verdict.cause} on this CPU; reinstall it with: {REINSTALL}"
        )
    if not verdict.healthy:
        raise NativeError(f"the self-test of llama.cpp failed: {verdict.cause}")


def probe(gguf: Path, command: Sequence[str] | None = None) -> Verdict:
    """Run the child and judge how it ended.

    Parameters
    ----------
    gguf
        The model that the child loads.
    command
        Another child, for tests of this function.
    """
    # -P: a file of the working folder must not pass for a module.
    command = command or [sys.executable, "-P", "-m", __spec__.name if __spec__ else __name__, str(gguf)]
    began = time.perf_counter()

    def verdict(cause: str, crashed: bool = False) -> Verdict:
        return Verdict(not cause, crashed, cause, build_id(), cpu_id(), time.perf_counter() - began)

    try:
        child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return verdict(f"it did not end within {_TIMEOUT_S} s")
    except OSError as error:
        return verdict(f"the child process could not be started ({error.strerror})")
    if child.returncode == 0:
        return verdict("")
    if child.returncode in _CRASHES:
        return verdict(_CRASHES[child.returncode], crashed=True)
    said = child.stderr.decode("utf-8", "replace").strip().splitlines()
    return verdict(said[-1] if said else f"the child process ended with status {child.returncode}")


def cpu_id() -> str:
    """Return the CPU's name and 8 hex digits of its features, which a virtual machine may hide."""
    name, features = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            features = value.strip()
            break
    return f"{name} {hashlib.sha256(features.encode()).hexdigest()[:8]}"


def exercise(gguf: Path) -> None:
    """Prefill many rows and decode a few, which runs the matrix kernels of both kinds."""
    from .native import Batch, Context, Model

    plan = DevicePlan(threads=2, context=PREFILL_ROWS + DECODE_STEPS, batch=PREFILL_ROWS)
    model = Model(gguf)
    context = Context(model, plan, plan.context)
    batch = Batch(plan.batch)
    tokens = (np.arange(PREFILL_ROWS) * 7 % model.vocab).astype(np.int32)
    batch.put(tokens, np.arange(PREFILL_ROWS), 0, np.arange(PREFILL_ROWS) == PREFILL_ROWS - 1)
    context.decode(batch)
    row = PREFILL_ROWS - 1
    for step in range(DECODE_STEPS):
        token = int(context.logits(row).argmax())
        batch.put(np.array([token], np.int32), PREFILL_ROWS + step, 0, True)
        context.decode(batch)
        row = 0
    context.logits(row)
    context.close()
    model.close()


def main(arguments: Sequence[str]) -> int:
    """Be the child process; the exit status and, on failure, one line for `sys.exit` are the answer."""
    try:
        exercise(Path(arguments[0]))
    except XrayError as error:
        sys.stderr.write(f"{error}\n")
        return _FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
