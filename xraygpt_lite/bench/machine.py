"""What it runs on, in words, and how fast this machine reads memory. Knows no model and no bundle."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from xraygpt_lite import __version__, device, vision
from xraygpt_lite.closing import Closing
from xraygpt_lite.llm import library, selftest
from xraygpt_lite.values import Float32

_LEAST_BYTES = 1 << 29
_TIMES_CACHE = 4
_PASSES = 3
_LLVM_OPENMP = b"\0libomp.so"
_CLANG = re.compile(rb"[\w .+~-]{0,60}clang version [^\0\n]{1,80}")
_GCC = re.compile(rb"GCC: \([^)\0]{1,80}\) [\w.-]{1,40}")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def facts() -> dict[str, Any]:
    """CPU, cores, the compiler of llama.cpp and the CPU features it was compiled for, and versions."""
    versions = {"python": platform.python_version(), "xraygpt-lite": __version__, "llama-cpp-python": library.VERSION}
    return {
        "cpu": selftest.cpu_id().rpartition(" ")[0],
        "cores": device.cores(),
        "cores_of_machine": os.cpu_count(),
        "cache_mb": largest_cache() / 1e6,
        "compiler": compiler(library.library_files()),
        "features": library.system_info(),
        "versions": {**versions, **vision.installed_runtimes(), "numpy": np.__version__},
        "system": platform.platform(),
    }


def compiler(libraries: Iterable[Path]) -> str:
    """What compiled llama.cpp's kernels for the CPU, as it noted in the library; "unknown" where it did not.

    A library of clang's also holds GCC's note, from the files that every program begins with; where LLVM's tools took
    all notes out of it, LLVM's OpenMP library, which it asks for, still tells it.
    """
    for path in libraries:
        if not path.name.startswith(("libggml-cpu", "ggml-cpu")):
            continue
        with suppress(OSError):
            content = path.read_bytes()
            if found := _CLANG.search(content) or _GCC.search(content):
                return found[0].decode("ascii", "replace").strip()
            if _LLVM_OPENMP in content:
                return "clang (no version is noted)"
    return "unknown"


def largest_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the CPU's largest cache; 0 where the system does not tell."""
    sizes = [0]
    for path in folder.glob("index*/size"):
        with suppress(OSError, ValueError, KeyError, IndexError):
            text = path.read_text("ascii").strip()
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes)


class Memory(Closing):
    """Arrays much larger than any cache, a thread for each to read it with.

    Parameters
    ----------
    threads
        As many as the language model has.
    """

    def __init__(self, threads: int) -> None:
        wanted = max(_LEAST_BYTES, _TIMES_CACHE * largest_cache())
        size = min(wanted, device.free_memory() // 4) // threads
        self._pool = ThreadPoolExecutor(threads)
        # Filled, since pages that were never written are all the same one; by the threads, whose memory is the nearest.
        self._arrays = list(self._pool.map(lambda _: np.full((2, size // 8), 1, np.float32), range(threads)))

    def gigabytes_per_second(self) -> float:
        """10**9 bytes a second that all threads read together, the best of a few passes."""
        size = sum(array.nbytes for array in self._arrays)
        return max(size / self._pass() for _ in range(_PASSES)) / 1e9

    def _pass(self) -> float:
        began = time.perf_counter()
        for _ in self._pool.map(_product, self._arrays):
            pass
        return time.perf_counter() - began

    def close(self) -> None:
        """Free the arrays and end the threads."""
        self._arrays = []
        self._pool.shutdown()


def _product(rows: Float32) -> None:
    """Read two rows (2, n) at once: a core does that faster than one after the other. Other threads go on meanwhile."""
    np.einsum("i,i->", rows[0], rows[1])
