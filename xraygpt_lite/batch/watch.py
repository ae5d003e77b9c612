"""Folders are watched: what is in them becomes inputs, then whatever arrives, each file once it is fully written.

A thread looks; the caller only fetches, so that a slow folder never holds up a run. What the system tells of changes
(through watchdog) says only where to look. Folders are also gone through again and again, because network folders tell
nothing, queues overflow and watches are limited: where that finds a file that was not told of, it is done more often.
It knows no journal: names are those of `inputs.find`, so that a run with and one without watching share one.
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import queue
import signal
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from xraygpt_lite.batch.inputs import Input, could_be_radiograph, folder_labels, matcher, unreadable
from xraygpt_lite.errors import UsageError

if sys.platform == "linux":
    import fcntl

_TICK_S = 0.1  # between two looks at what was told, and at what may have settled
_SOON_S = 5.0  # between two goes through the folders where events cannot be relied on
_SHARE = 20  # between two goes, this many times as long as the last one took
_CLOSE_S = 5.0  # a look at a network folder that does not answer is not waited for longer
_OPEN_S = 60.0  # a file that stands still and is open is not waited for longer: some network folders call all open
_MOST_GONE = 100  # looks in vain until the caller gets its turn
_TOLD = [FileCreatedEvent, FileModifiedEvent, FileMovedEvent, FileClosedEvent, DirCreatedEvent, DirMovedEvent]
_QUIET = logging.NullHandler()

_State = tuple[int, int]  # size in bytes, time of change in ns


def watch(
    arguments: Sequence[str | os.PathLike[str]],
    stop: threading.Event,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    settle: float = 2.0,
    rescan: float = 300.0,
) -> Generator[Input | None]:
    """Files of folders as they arrive, until `stop` is set; first those that are there, in the order "given" of `find`.

    A file comes once its size and time of change have stood still and it is not empty, and again whenever it has
    changed since; one that is gone by then never comes. What is there at the start and older than `settle` by its time
    of change is not waited for. A link that leads nowhere is waited for. Names are those that `find` gives for the same
    arguments, except that of a file and a link to it the one that came first names both.

    Parameters
    ----------
    arguments
        Folders that exist. One that vanishes later may come back.
    stop
        Ends the iterator, though files may be waiting.
    include, exclude
        Patterns as in `inputs.matcher`.
    settle
        Seconds of standing still. A writer that pauses for longer is taken to have finished, but for one that has the
        file open where the system tells so: it has a minute (on Linux, of this user's files, in local folders).
    rescan
        Most seconds between two goes through the folders. The first follow after 5 s, 10 s, 20 s …, and after 5 s again
        whenever one found what the system had not told of: network folders, lost events, folders beyond the system's
        limit of watches (on Linux fs.inotify.max_user_watches). They take at most a twentieth of the time.

    Returns
    -------
    generator
        None whenever no file is ready: it never waits. Its threads start with the first `next` and end with it, so
        close it where it may not be exhausted.

    Raises
    ------
    UsageError
        At once: an argument that is no folder, or none at all.
    XrayError
        While iterating: a folder that cannot be read at the start. Later ones are tried again.
    """
    folders = [os.fspath(argument) for argument in arguments]
    for folder in folders:
        if not os.path.isdir(folder):
            raise UsageError(f"{folder or repr(folder)}: this is no folder, and only folders can be watched. Make it.")
    if not folders:
        raise UsageError("no folder was given to watch; name one or more that exist")
    given = {os.path.realpath(folder): folder for folder in reversed(folders)}
    roots = [_Root(given[real], os.path.join(real, ""), label) for real, label in folder_labels(folders).items()]
    return _arrivals(_Watcher(roots, matcher(include, exclude), settle, rescan), stop)


def _arrivals(watcher: _Watcher, stop: threading.Event) -> Generator[Input | None]:
    watcher.start()
    try:
        while not stop.is_set():
            yield watcher.take()
    finally:
        watcher.close()


@dataclass(frozen=True)
class _Root:
    """`folder` as given, `real` without links and with a separator at its end; names of its files begin with `label`.

    Elsewhere here a path is one below `real`: each file has one, and the system tells of that one.
    """

    folder: str
    real: str
    label: str


@dataclass(slots=True)
class _Young:
    """A file that may still be written: `state` stands still since then (monotonic seconds)."""

    state: _State
    since: float
    told: bool  # the system told of it


class _Watcher:
    def __init__(self, roots: Sequence[_Root], wanted: Callable[[str], bool], settle: float, rescan: float) -> None:
        self._roots, self._wanted, self._settle, self._rescan = roots, wanted, settle, rescan
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._closing = threading.Event()
        self._ready: queue.SimpleQueue[tuple[str, _State, int]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._told: dict[str, None] = {}  # paths in the order told
        self._seen: set[int] = set()  # hashes of path and state of what is ready or was taken: one number a file
        # Only the thread knows these.
        self._young: dict[str, _Young] = {}  # by path, by `since`
        self._first = True
        self._pause = min(_SOON_S, rescan)
        self._ticked = 0.0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(_CLOSE_S)

    def tell(self, path: str) -> None:
        """There may be something new at this path; any thread."""
        with self._lock:
            self._told[path] = None

    def take(self) -> Input | None:
        """The next file that is still as it was when it had settled."""
        for _ in range(_MOST_GONE):
            if self._error is not None:
                raise self._error
            try:
                path, state, mark = self._ready.get_nowait()
            except queue.Empty:
                return None
            if _state(path) == state and (place := self._place(path)):
                root, below = place
                return Input(_name(root, below), Path(root.folder, below))
            self._seen.discard(mark)  # it was not taken: should it come back as it was, it is new
            self.tell(path)  # it may have come back before that
        return None

    # Run by the thread.

    def _run(self) -> None:
        try:
            observer = self._observe()
            try:
                self._go_through(self._rescan if observer else self._pause)
            finally:
                if observer:
                    observer.stop()
                    observer.join()
        # Whatever it is, the caller must hear of it.
        except BaseException as error:
            self._error = error

    def _observe(self) -> BaseObserver | None:
        """Start being told; None where the system's limits do not let us."""
        logging.getLogger("watchdog").addHandler(_QUIET)  # else its remarks on lost events land on standard error
        # Its threads warn of a folder that they began to watch twice, which copying a tree of folders leads to.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning, r"watchdog\.")
        try:
            observer = Observer()
        except OSError:
            return None
        try:
            for root in self._roots:
                folder = os.path.dirname(root.real)  # the same without its last separator
                observer.schedule(_Ear(self.tell), folder, recursive=True, event_filter=_TOLD)
            observer.start()
        except OSError:
            observer.stop()
            return None
        return observer

    def _go_through(self, longest: float) -> None:
        """Look at every file, again and again, and in between at what was told."""
        while not self._closing.is_set():
            began = time.monotonic()
            for path in itertools.chain.from_iterable(self._walk(root.real) for root in self._roots):
                self._look(path, told=self._first)
                self._tick()
            ended = time.monotonic()
            self._first = False
            while time.monotonic() < ended + max(self._pause, _SHARE * (ended - began)):
                if self._closing.wait(_TICK_S):
                    return
                self._tick()
            self._pause = min(2 * self._pause, longest)

    def _tick(self) -> None:
        now = time.monotonic()
        if now < self._ticked + _TICK_S:
            return
        self._ticked = now
        with self._lock:
            told, self._told = self._told, {}
        for path in told:
            # A folder may have come with files in it, or got them before it was watched.
            whole = os.path.isdir(path) and not os.path.islink(path) and self._place(path)
            for file in self._walk(path) if whole else [path]:
                self._look(file, told=True)
        ripe = itertools.takewhile(lambda item: item[1].since + self._settle <= now, self._young.items())
        for path, _ in list(ripe):
            self._look(path, again=True)

    def _walk(self, top: str) -> Iterator[str]:
        """Paths of what is in a folder and below it and is neither hidden nor a folder, in the order of `find`."""
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as scan:
                    entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda entry: entry.name)
                folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError as error:
                if self._first and not isinstance(error, FileNotFoundError | NotADirectoryError):
                    raise unreadable(folder, error) from None
                continue
            inner = set(folders)
            for entry in entries:
                if self._closing.is_set():
                    return
                if entry.path not in inner:
                    yield entry.path
            waiting += reversed(folders)

    def _look(self, path: str, told: bool = False, again: bool = False) -> None:
        """Note a file that has come or changed, and pass it on once it has settled."""
        place = self._place(path)
        if not place or not could_be_radiograph(os.path.basename(path)) or not self._wanted(_name(*place)):
            return
        state = _state(path, opened=again)
        real = os.path.realpath(path) if os.path.islink(path) else path
        mark = hash((os.path.normcase(real), state))
        young = self._young.get(path)
        if young and (young.state != state or mark in self._seen):
            del self._young[path]
        if state is None or mark in self._seen:
            return
        now = time.monotonic()
        if young is None or young.state != state:
            old = self._first and time.time() - self._settle > state[1] / 1e9
            young = _Young(state, -math.inf if old else now, told or bool(young and young.told))
            self._young[path] = young
        young.told |= told
        if young.since + self._settle <= now:
            if young.told and now < young.since + _OPEN_S and _being_written(path):
                return
            del self._young[path]
            self._seen.add(mark)
            self._ready.put((path, state, mark))
            if not young.told:
                self._pause = min(_SOON_S, self._rescan)

    def _place(self, path: str) -> tuple[_Root, str] | None:
        """The first root that leads to a path, and the path below it; None where only hidden folders lead there."""
        for root in self._roots:
            below = path.removeprefix(root.real)
            if len(below) < len(path) and not any(part.startswith(".") for part in below.split(os.sep)):
                return root, below
        return None


class _Ear(FileSystemEventHandler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._tell(os.fsdecode(event.dest_path or event.src_path))


def _name(root: _Root, below: str) -> str:
    return root.label + below.replace(os.sep, "/")


def _being_written(path: str) -> bool:
    """Whether some process has a file open for writing; False where the system does not tell."""
    if sys.platform == "linux":
        try:
            with open(path, "rb") as file:
                # A lease to read is refused while somebody writes. Who opens the file while we hold it waits for us,
                # and we are told by a signal, which would end this process if it were the usual one.
                fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN
    return False


def _state(path: str, opened: bool = False) -> _State | None:
    """Of a file with content; None where there is none. Opening makes network folders tell the present state."""
    try:
        status = os.stat(path)
        if opened and stat.S_ISREG(status.st_mode):
            try:
                with open(path, "rb") as file:
                    status = os.fstat(file.fileno())
            except PermissionError:  # it fails later, in sight
                pass
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) and status.st_size else None
