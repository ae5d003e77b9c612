"""Files are read, decoded and made the encoder's input in processes of their own, ahead of the engine.

A file that hangs or kills its process costs itself only: the process is replaced. Each has a thread here, which sends
it one file after another. It knows paths and an ImageSpec; no model, no record and no journal.
"""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import numpy as np

from xraygpt_lite.batch.inputs import Input
from xraygpt_lite.closing import Closing
from xraygpt_lite.errors import ClosedError, UsageError, XrayError
from xraygpt_lite.imaging import worker
from xraygpt_lite.values import ImageSpec, Placement, Radiograph, UInt8

if sys.platform == "linux":
    import fcntl

# -P: a file of the working folder must not pass for a module.
PROGRAM = (sys.executable, "-P", "-m", "xraygpt_lite.imaging.worker")
MOST = 8
START_S = 120.0
"""Longest start of a process; a busy network folder that Python is imported from takes its time."""
_CLOSED = "the pool of processes that read files was closed; make another."
_PIPE_BYTES = 2**20  # an answer, whole: else both sides take turns in pieces of 64 KiB
_PAUSE_S = 1.0
_STEP_S = 1.0
_END_S = 5.0
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Of the libraries in a process: numpy's would make one thread a core, for work that it is never given here."""
_NO_PIXELS = np.zeros((0, 0), np.float32)
_NO_PIXELS.flags.writeable = False


@dataclass(frozen=True)
class Decoded:
    """One file, ready for the encoder.

    Attributes
    ----------
    radiograph
        What `read` says of the file; its pixels stayed in the other process, here they are (0, 0).
    square
        uint8 (S, S), as `transform.fit` makes it.
    placement
        Where the original lies in them.
    seconds
        From the request to the answer.
    """

    input: Input
    radiograph: Radiograph
    square: UInt8
    placement: Placement
    seconds: float


@dataclass(frozen=True)
class Failed:
    """One file that gave no image: the fields of a `Failure`.

    Attributes
    ----------
    sha256
        Of its bytes, where they could be read.
    stage, error
        "read" and "ImageError"; or "decode" and "Timeout", "Crashed" or the class of an unexpected error.
    """

    input: Input
    sha256: str | None
    stage: str
    error: str
    message: str


def worker_count(cores: int) -> int:
    """How many processes read files beside an engine that is busy on every core.

    As few as keep up, since the engine's threads wait for each other: what a process takes from one, all lose. One
    decodes some 20 PNG files of 1024 x 1024 or 6 DICOM files of 2048 x 2048 a second. So: a quarter of the cores, at
    least 1, at most 8.
    """
    return max(1, min(MOST, cores // 4))


class Pool(Closing):
    """Processes that read files; they start at once, so that they are ready when the engine is.

    One thread uses a pool; any may close it.

    Parameters
    ----------
    spec
        The encoder's input.
    workers
        Processes, at least 1; see `worker_count`.
    timeout
        Seconds that one file may take.
    program
        What is started in place of `imaging.worker`, for tests.
    """

    def __init__(self, spec: ImageSpec, workers: int, timeout: float, program: Sequence[str] = PROGRAM) -> None:
        if workers < 1:
            raise UsageError(f"{workers} worker processes; expected at least 1.")
        self._spec, self._timeout, self._program = spec, timeout, tuple(program)
        self._inputs: queue.SimpleQueue[Input | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Decoded | Failed | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()  # a process is either started before `close` looks for it, or not at all
        self._closed = threading.Event()
        self._children: set[_Child] = set()
        self._pending = 0
        # A process dies with the thread that started it (Linux): so each has one that lives as long as the pool.
        self._threads = [threading.Thread(target=self._serve, name="reader", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """Inputs that were submitted and whose results were not taken."""
        return self._pending

    def submit(self, given: Input) -> None:
        """Queue a file. The queue has no end: the caller keeps `pending` small, or uses `run`."""
        self._pending += 1
        self._inputs.put(given)

    def take(self, timeout: float | None = None) -> Decoded | Failed | None:
        """Take the next result, in order of completion.

        Parameters
        ----------
        timeout
            Seconds to wait for it; 0 only looks, None waits as long as it takes.

        Returns
        -------
        Decoded or Failed
            None when there is none within the time, or none pending.

        Raises
        ------
        XrayError
            A process could not be started twice in a row; the pool is closed then.
        ClosedError
            The pool was closed.
        """
        result = None
        if self._pending and not self._closed.is_set():
            with suppress(queue.Empty):
                result = self._results.get(timeout=timeout)
        if self._closed.is_set():  # maybe while this waited: a file that was in work then looks crashed
            raise ClosedError(_CLOSED)
        if isinstance(result, Exception):
            self.close()
            raise result
        self._pending -= result is not None
        return result

    def close(self) -> None:
        """End the processes at once, whatever they do, and drop what was not taken."""
        with self._lock:
            self._closed.set()
            for child in self._children:
                child.process.kill()
        for _ in self._threads:
            self._inputs.put(None)
        for thread in self._threads:
            thread.join()
        self._results.put(ClosedError(_CLOSED))  # wakes who waits in `take`

    def _serve(self) -> None:
        child = None
        try:
            child = self._start()
            while (given := self._inputs.get()) is not None and not self._closed.is_set():
                if child.ended():  # on the file before this one, or while it waited
                    self._drop(child)
                    child = self._start()
                self._results.put(child.decode(given, self._timeout))
        except Exception as error:  # whatever it is: `take` must not wait for a thread that has gone
            self._results.put(error)
        finally:
            if child is not None:
                self._drop(child)

    def _start(self) -> _Child:
        """Start a process and wait until it is ready; a second one if need be."""
        cause = ""
        for pause in (0.0, _PAUSE_S):
            self._closed.wait(pause)
            with self._lock:
                if self._closed.is_set():
                    raise ClosedError(_CLOSED)
                try:
                    child = _Child(self._program, self._spec, min(_STEP_S, self._timeout / 4))
                except OSError as error:
                    cause = error.strerror or type(error).__name__
                    continue
                self._children.add(child)
            if child.ready():
                return child
            cause = child.cause
            self._drop(child)
        raise XrayError(
            f"the process that reads files could not be started, twice in a row: {cause}. To see why, run: "
            f"{shlex.join(self._program)} < {os.devnull}"
        )

    def _drop(self, child: _Child) -> None:
        child.end()
        with self._lock:
            self._children.discard(child)


class _Child:
    """One process. All but `process.kill` belongs to one thread."""

    def __init__(self, program: Sequence[str], spec: ImageSpec, step: float) -> None:
        self.process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | _ONE_THREAD,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        if sys.platform == "linux":
            with suppress(OSError):  # this user's pipes are large enough in all
                fcntl.fcntl(self._answers, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._spec = spec
        self._late = False
        self.cause = ""
        self._task: list[float] | None = None  # the seconds left for what it is at
        self._watching = threading.Lock()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(step,), name="reader-limit", daemon=True)
        self._watcher.start()

    def ready(self) -> bool:
        """Whether it says that it is ready to read."""
        try:
            with self._limit(START_S):
                worker.send(self._requests, {"parent": os.getpid(), "spec": asdict(self._spec)})
                worker.receive(self._answers)
                return True
        except (EOFError, OSError, ValueError):
            self.cause = f"it was not ready within {START_S:g} s" if self._late else f"it {self._end()}"
            return False

    def decode(self, given: Input, timeout: float) -> Decoded | Failed:
        """Ask for one file; whatever happens, there is a result."""
        began = time.perf_counter()
        path, sha256 = os.fspath(given.path), None
        try:
            with self._limit(timeout):
                worker.send(self._requests, {"path": path})
                sha256 = worker.receive(self._answers)[0]["sha256"]
                header, payload = worker.receive(self._answers)
            if "error" in header:
                return Failed(given, sha256, header["stage"], header["error"], header["message"])
            square = np.frombuffer(payload, np.uint8).reshape(self._spec.size, self._spec.size)
        except (EOFError, OSError, ValueError):
            if self._late:
                self.end()
                message = f"{path}: was not read within {timeout:g} s. Allow more time, or leave it out."
                return Failed(given, sha256, "decode", "Timeout", message)
            message = (
                f"{path}: the process that read it {self._end()}. The file may be damaged, or need more memory than "
                "there is; export it again, or leave it out."
            )
            return Failed(given, sha256, "decode", "Crashed", message)
        placement = Placement(**{key: tuple(value) for key, value in header["placement"].items()})
        radiograph = Radiograph(
            _NO_PIXELS, path, header["sha256"], tuple(header["warnings"]), header["sop_instance_uid"]
        )
        return Decoded(given, radiograph, square, placement, time.perf_counter() - began)

    def ended(self) -> bool:
        return self._late or self.process.poll() is not None

    def end(self) -> None:
        """Kill it, wait for it and close its pipes."""
        self._ended.set()
        self._watcher.join()
        self.process.kill()
        for stream in (self._requests, self._answers):
            with suppress(OSError):  # what was not sent has no reader
                stream.close()
        with suppress(subprocess.TimeoutExpired):  # stuck in a dead network folder, it ends when that comes back
            self.process.wait(_END_S)

    def _end(self) -> str:
        """How it ended by itself, in a few words; it is gone afterwards."""
        try:
            status = self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "gave no answer that can be read"
        finally:
            self.end()
        if status >= 0:
            return f"ended with status {status}"
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"

    @contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        """Kill the process when it takes longer; then whoever reads from it meets the end of the pipe."""
        with self._watching:
            self._task = [seconds]
        try:
            yield
        finally:
            with self._watching:
                self._task = None

    def _watch(self, step: float) -> None:
        """Look at what it is at every `step` seconds, and take these from what is left for it: never early, two late.

        Of a clock that runs on while this program is stopped (Ctrl-Z, a frozen container), one step may pass.
        """
        seen = None
        while not self._ended.wait(step):
            with self._watching:
                if self._task is not None and self._task is seen:
                    self._task[0] -= step
                    if self._task[0] <= 0:
                        self._late = True
                        self.process.kill()
                        return
                seen = self._task
