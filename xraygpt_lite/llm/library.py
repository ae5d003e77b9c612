"""Loads llama.cpp once and keeps it quiet: its log becomes part of our errors instead of lines on stderr.

Knows how llama-cpp-python is laid out (the low-level functions, struct fields, the folder of libraries). Knows nothing
of models, sequences or sampling. Never uses the high-level `Llama` class.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

from ..errors import MissingPackageError, NativeError

VERSION = "0.3.36"
REINSTALL = (
    'CMAKE_ARGS="-DLLAVA_BUILD=OFF" CFLAGS="-fno-tree-dse -fno-dse" CXXFLAGS="-fno-tree-dse -fno-dse" '
    f"pip install --no-cache-dir --force-reinstall --no-deps llama-cpp-python=={VERSION}"
)
EXACT = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
"""Types of weights that `exact` holds for where the CPU has AMX."""
WARNING, ERROR, CONTINUED = 3, 4, 5
_KEPT_LINES = 2000
_SPINS = "10000"
"""How often a thread of GCC's OpenMP looks for the others before it sleeps, as a rule longer than they take. By
default it looks for a millisecond and more, hundreds of times a token, and where another program is at work keeps the
very thread that it waits for from the processor. OpenMP reads this once, when it is loaded."""
_GPU = 1
_SIZE = ctypes.POINTER(ctypes.c_size_t)


class Log:
    """The last lines that llama.cpp and ggml logged, from whatever thread, numbered so that a caller sees its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[tuple[int, int, str]] = deque(maxlen=_KEPT_LINES)
        self._count = 0
        self._open = False
        self.callback: Any = None

    def add(self, level: int, text: bytes) -> None:
        """Take one message; one that follows an unfinished line is joined to it."""
        decoded = text.decode("utf-8", "replace")
        with self._lock:
            if self._lines and (level == CONTINUED or (self._open and level == self._lines[-1][1])):
                number, first, line = self._lines.pop()
                self._lines.append((number, first, line + decoded.rstrip("\n")))
            else:
                self._count += 1
                self._lines.append((self._count, level, decoded.rstrip("\n")))
            self._open = not decoded.endswith("\n")

    def mark(self) -> int:
        """Return the number of the last line, to be given to `since`."""
        return self._count

    def since(self, mark: int, level: int = ERROR) -> list[str]:
        """Return the lines of exactly this level that came after `mark`."""
        with self._lock:
            return [line.strip() for number, seen, line in self._lines if number > mark and seen == level]

    def reason(self, mark: int) -> str:
        """Return ": " and the first error after `mark`, for the end of a message; "" where nothing was logged."""
        lines = [line for line in self.since(mark) if line]
        if not lines:
            return ""
        # The first error names the cause; those after it only say who passed it on.
        return ": " + lines[0].removesuffix(".")


log = Log()


@functools.cache
def library() -> Any:
    """Load llama.cpp and return the module of its low-level functions; the first call takes a moment.

    Raises
    ------
    MissingPackageError
        llama-cpp-python is not installed.
    NativeError
        It is installed, but its library cannot be loaded, or it is of another version.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        import llama_cpp
        from llama_cpp import llama_cpp as functions
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the Python package {error.name} is missing; install llama.cpp with: {REINSTALL}"
        ) from error
    except (OSError, RuntimeError, ImportError) as error:
        raise NativeError(f"llama.cpp's library cannot be loaded ({error}); reinstall it with: {REINSTALL}") from error
    if llama_cpp.__version__ != VERSION:
        raise NativeError(
            f"llama-cpp-python is {llama_cpp.__version__}, this program was made for {VERSION}; "
            f"install that with: {REINSTALL}"
        )
    _silence(functions)
    functions.llama_backend_init()
    return functions


def _silence(functions: Any) -> None:
    """Put our log in place of llama-cpp-python's, which prints."""

    def receive(level: int, text: bytes, _data: object) -> None:
        log.add(level, text)

    # llama.cpp keeps the pointer for as long as the process runs.
    log.callback = functions.llama_log_callback(receive)
    functions.llama_log_set(log.callback, None)


def brief(function: Any, result: Any = None) -> Any:
    """Return the same native function, called without giving up the interpreter's lock meanwhile.

    For what takes microseconds: to get the lock back from other threads took 90 of them in a batch. Not for what waits.
    `result` is another type for what it returns, such as `c_void_p` for a pointer's bare address.
    """
    address: Any = ctypes.cast(function, ctypes.c_void_p).value
    return ctypes.PYFUNCTYPE(result or function.restype, *function.argtypes)(address)


def set_fields(struct: Any, **values: Any) -> None:
    """Set fields of a ctypes struct, which would take a misspelt name without a word.

    Raises
    ------
    NativeError
        The struct has no such field.
    """
    known = {name for name, *_ in struct._fields_}
    for name, value in values.items():
        if name not in known:
            raise NativeError(
                f"llama.cpp's {type(struct).__name__} has no field {name!r}; this program was made for "
                f"llama-cpp-python {VERSION}"
            )
        setattr(struct, name, value)


def library_files() -> list[Path]:
    """Return the native libraries of the installed llama-cpp-python, without loading them; empty where it is absent."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "lib"
    return sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []


def build_id() -> str:
    """Return 16 hex digits that change when llama.cpp is reinstalled: of its files' names, sizes and times."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in library_files()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def system_info() -> str:
    """Return what llama.cpp says of the CPU features it was compiled with, e.g. "CPU : AVX512 = 1 | …"."""
    info: bytes = library().llama_print_system_info()
    return info.decode("utf-8", "replace").strip()


def exact(kind: str) -> bool:
    """Tell whether rows of such weights, decoded together on this CPU, have the very logits that each has alone.

    To be asked before anything is decoded: without AMX it also chooses ggml's kernels, for the rest of the process.

    Parameters
    ----------
    kind
        A type of weights by its name, "q4_0".
    """
    features = system_info()
    if "AMX_INT8 = 1" in features:
        return kind in EXACT
    # From eight rows on ggml multiplies K-quants by other kernels, which round otherwise. A Q4_0 model has such weights
    # in its output layer alone and is hardly slower without them; others need them. It asks once, when it decodes.
    tiled = os.environ.setdefault("GGML_CPU_TILED_MM", "0" if kind == "q4_0" else "1")
    return "AVX2 = 1" in features and (kind == "q8_0" or (kind == "q4_0" and tiled == "0"))


def supports_gpu() -> bool:
    """Tell whether this build of llama.cpp can offload layers to a GPU that is present."""
    return bool(library().llama_supports_gpu_offload())


def gpu_memory() -> int | None:
    """Return the free bytes of all GPUs that this build of llama.cpp sees; None where it cannot be asked.

    Where no GPU is at hand it was tried with the CPU's device alone, which this leaves out.
    """
    if not supports_gpu():
        return None
    return sum(free for kind, free in devices() if kind == _GPU) or None


def devices() -> list[tuple[int, int]]:
    """Return kind (0 = CPU, 1 = GPU, as ggml numbers them) and free bytes of each device; empty where ggml is mute."""
    try:
        count = ggml("ggml_backend_dev_count", ctypes.c_size_t)
        device_at = ggml("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
        kind = ggml("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
        memory = ggml("ggml_backend_dev_memory", None, ctypes.c_void_p, _SIZE, _SIZE)
    except NativeError:
        return []
    found = []
    for number in range(count()):
        device = device_at(number)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append((int(kind(device)), free.value))
    return found


def ggml(name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of ggml, of which llama-cpp-python offers none, with its types of result and arguments.

    Raises
    ------
    NativeError
        This build of llama.cpp has no such function.
    """
    for loaded in _loaded():
        if hasattr(loaded, name):
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
            return function
    raise NativeError(f"llama.cpp's libraries have no function {name}; reinstall it with: {REINSTALL}")


@functools.cache
def _loaded() -> list[ctypes.CDLL]:
    """llama.cpp's library, through which a system other than Windows sees those that it loaded itself."""
    found = [library()._lib]
    if sys.platform == "win32":
        found += [ctypes.CDLL(str(path)) for path in library_files() if path.stem in ("ggml", "ggml-base")]
    return found
