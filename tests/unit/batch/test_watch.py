"""Real folders into which files come slowly, by renaming and by the thousand, and systems that tell nothing."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watchdog.events import DirCreatedEvent
from watchdog.observers.api import BaseObserver, EventEmitter

from xraygpt_lite.batch import watch as module
from xraygpt_lite.batch.inputs import Input, find
from xraygpt_lite.batch.watch import watch
from xraygpt_lite.errors import UsageError, XrayError

LONG_AGO = 1_600_000_000
PATIENCE = 20.0  # seconds; a busy machine


class Arrivals:
    """What a watch yielded, fetched as the pipeline does."""

    def __init__(self, *folders: Path, settle: float = 0.1, **options: Any) -> None:
        self.stop = threading.Event()
        self.iterator = watch([str(folder) for folder in folders], self.stop, settle=settle, **options)
        self.inputs: list[Input] = []
        self.times: list[float] = []

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.inputs]

    def fetch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._next()

    def until(self, names: set[str] | int, then: float = 0.25) -> list[str]:
        """Names, sorted, once these or so many have come; `then` seconds longer for what ought not to come."""
        end = time.monotonic() + PATIENCE
        while len(self.inputs) < names if isinstance(names, int) else not names <= set(self.names):
            assert time.monotonic() < end, (names, self.names[-20:], len(self.names))
            self._next()
        self.fetch(then)
        return sorted(self.names)

    def _next(self) -> None:
        if (one := next(self.iterator)) is None:
            time.sleep(0.01)
        else:
            self.inputs.append(one)
            self.times.append(time.monotonic())


@pytest.fixture
def arrive() -> Iterator[Callable[..., Arrivals]]:
    before = set(threading.enumerate())
    started: list[Arrivals] = []

    def arrive(*folders: Path, **options: Any) -> Arrivals:
        started.append(Arrivals(*folders, **options))
        return started[-1]

    yield arrive
    for one in started:
        one.iterator.close()
    assert set(threading.enumerate()) <= before


@pytest.fixture(autouse=True)
def _no_other_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a second look at the folders, five seconds later, finds what the first tests want to hear of."""
    monkeypatch.setattr(module, "_SOON_S", 1000.0)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def put(path: Path, content: bytes = b"x", changed: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if changed is not None:
        os.utime(path, (changed, changed))
    return path


def old(path: Path) -> Path:
    return put(path, changed=LONG_AGO)


class _Silent(EventEmitter):
    """Of a network folder: nothing is told."""

    def queue_events(self, timeout: float) -> None:
        self.stopped_event.wait(timeout)


def silent() -> BaseObserver:
    return BaseObserver(_Silent, timeout=0.1)


def at_the_limit() -> BaseObserver:
    raise OSError(errno.EMFILE, "inotify instance limit reached")


# What is there at the start.


@pytest.mark.parametrize(
    "folders", [["a"], ["a", "b/a"], ["b/a", "a"], ["a", "a/sub"], ["a/sub", "a"], ["b", "a", "b"]]
)
def test_what_is_there_comes_as_find_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrive: Callable[..., Arrivals], folders: list[str]
) -> None:
    taken = ("2.png", "10.dcm", "sub/no-extension", "sub/deeper/é.png", "sub-2/x.png", "tub/1.png")
    for name in (*taken, ".hidden.png", ".cache/x.png", "notes.txt", "DICOMDIR"):
        old(tmp_path / "a" / name)
        old(tmp_path / "b" / "a" / name)
    outside = old(tmp_path / "outside" / "far.png")
    (tmp_path / "a" / "a-link.png").symlink_to("2.png")
    (tmp_path / "a" / "z-link.png").symlink_to("sub/no-extension")
    (tmp_path / "a" / "link.png").symlink_to(outside)
    (tmp_path / "a" / "linked").symlink_to(outside.parent)
    monkeypatch.chdir(tmp_path)
    arrivals = arrive(*map(Path, folders), settle=60.0)
    expected = find(folders, order="given")
    arrivals.until(len(expected), then=0.1)
    assert arrivals.inputs == expected


def test_an_empty_folder_is_no_error_and_stop_ends_it(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    arrivals = arrive(inbox)
    arrivals.fetch(0.2)
    assert arrivals.inputs == []
    arrivals.stop.set()
    assert list(arrivals.iterator) == []


def test_what_is_there_and_young_must_stand_still(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    put(inbox / "young.png", changed=time.time() + 100)  # a clock that differs makes it no older
    began = time.monotonic()
    arrivals = arrive(inbox, settle=0.5)
    assert arrivals.until(1, then=0) == ["young.png"]
    assert arrivals.times[0] - began >= 0.5


def test_filters(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    old(inbox / "a.png")
    old(inbox / "a.dcm")
    arrivals = arrive(inbox, include=["*.dcm"], exclude=["tmp/*"])
    arrivals.until({"a.dcm"}, then=0)
    for name in ("b.png", "tmp/b.dcm", ".b.dcm", ".trash/b.dcm", "b.txt", "DICOMDIR", "c/b.dcm"):
        put(inbox / name)
    assert arrivals.until({"c/b.dcm"}) == ["a.dcm", "c/b.dcm"]


# Files that arrive.


def test_a_slow_writer_gives_one_whole_file(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    arrivals = arrive(inbox, settle=0.5)
    arrivals.fetch(0.1)
    written = threading.Event()

    def write() -> None:
        with open(inbox / "slow.dcm", "wb", buffering=0) as file:
            for piece in range(10):
                file.write(bytes([piece]) * 1000)
                time.sleep(0.1)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not arrivals.inputs:
        arrivals.fetch(0.02)
    assert written.is_set()
    assert arrivals.inputs == [Input("slow.dcm", inbox / "slow.dcm")]
    assert arrivals.until(1) == ["slow.dcm"]
    writer.join()


def test_a_copy_that_was_under_way_at_the_start_is_waited_for(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    with open(inbox / "copy.dcm", "wb", buffering=0) as file:
        file.write(b"x")
        arrivals = arrive(inbox, settle=0.6)
        for _ in range(3):
            arrivals.fetch(0.2)
            file.write(b"x")
        assert arrivals.inputs == []
    assert arrivals.until(1) == ["copy.dcm"]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells who has a file open")
def test_a_writer_that_pauses_is_waited_for_while_it_has_the_file_open(
    inbox: Path, arrive: Callable[..., Arrivals], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = arrive(inbox, settle=0.1, rescan=0.2)  # also while all files are looked at again
    arrivals.fetch(0.1)
    with open(inbox / "slow.dcm", "wb", buffering=0) as file:
        file.write(b"x")
        arrivals.fetch(1.0)
        assert arrivals.inputs == []
    assert arrivals.until(1) == ["slow.dcm"]
    monkeypatch.setattr(module, "_OPEN_S", 0.5)
    with open(inbox / "recorder.dcm", "wb", buffering=0) as file:
        file.write(b"x")
        assert arrivals.until(2) == ["recorder.dcm", "slow.dcm"]  # not for ever


def test_renamed_moved_and_linked_into_the_folder(inbox: Path, tmp_path: Path, arrive: Callable[..., Arrivals]) -> None:
    put(inbox / "a.png.part")
    arrivals = arrive(inbox)
    arrivals.fetch(0.3)
    assert arrivals.inputs == []
    (inbox / "a.png.part").rename(inbox / "a.png")
    old(tmp_path / "elsewhere" / "b.png").rename(inbox / "b.png")
    (inbox / "c.png").symlink_to(old(tmp_path / "elsewhere" / "c.png"))
    (inbox / "d.png").symlink_to("nowhere.png")
    (inbox / "e.png").symlink_to("a.png")  # the same file; which of its names comes first is open
    assert len(arrivals.until(3)) == 3
    assert {"b.png", "c.png"} < set(arrivals.names)


def test_an_empty_file_comes_once_it_has_content(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    old(inbox / "first.png")
    arrivals = arrive(inbox)
    arrivals.until(1, then=0)
    (inbox / "a.png").touch()
    arrivals.fetch(0.4)
    assert arrivals.names == ["first.png"]
    put(inbox / "a.png")
    assert arrivals.until(2) == ["a.png", "first.png"]


def test_whole_folders_that_are_moved_in_or_copied(
    inbox: Path, tmp_path: Path, arrive: Callable[..., Arrivals]
) -> None:
    below = [f"{patient}/{study}/s/{image}.dcm" for patient in range(8) for study in range(3) for image in range(2)]
    for name in below:
        old(tmp_path / "tree" / name)
    arrivals = arrive(inbox, inbox / ".." / "inbox")
    arrivals.fetch(0.1)
    for copy in ("one", "two/deep"):
        shutil.copytree(tmp_path / "tree", inbox / copy, copy_function=shutil.copyfile)
    (tmp_path / "tree").rename(inbox / "moved")
    expected = sorted(f"{top}/{name}" for top in ("one", "two/deep", "moved") for name in below)
    assert arrivals.until(set(expected)) == expected
    put(inbox / "moved" / "0" / "0" / "s" / "later.dcm")
    (inbox / "two").rename(inbox / "three")  # what is renamed is another input, for `find` too
    arrivals.until({"moved/0/0/s/later.dcm", *(f"three/deep/{name}" for name in below)}, then=0)


def test_told_of_a_folder_alone_its_files_come(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrive: Callable[..., Arrivals]
) -> None:
    observer = silent()
    monkeypatch.setattr(module, "Observer", lambda: observer)
    arrivals = arrive(inbox, rescan=1000.0)
    arrivals.fetch(0.1)
    for name in ("a.png", "s/b.png"):
        old(tmp_path / "tree" / name)
    (tmp_path / "tree").rename(inbox / "tree")
    (watched,) = (emitter.watch for emitter in observer.emitters)
    observer.event_queue.put((DirCreatedEvent(str(inbox / "tree")), watched))
    assert arrivals.until(2, then=0.1) == ["tree/a.png", "tree/s/b.png"]


def test_two_thousand_at_once(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    arrivals = arrive(inbox)
    arrivals.fetch(0.1)

    def write() -> None:
        for number in range(7):
            (inbox / f"{number}").mkdir()
        for number in range(2000):
            (inbox / f"{number % 7}" / f"{number}.png").write_bytes(b"x")

    writer = threading.Thread(target=write)
    writer.start()
    expected = sorted(f"{number % 7}/{number}.png" for number in range(2000))
    assert arrivals.until(set(expected)) == expected
    writer.join()


# Files that change, and files that go.


def test_a_rewritten_file_comes_again_and_a_reading_does_not(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    path = old(inbox / "a.png")
    arrivals = arrive(inbox, rescan=0.3)
    arrivals.until(1, then=0)
    path.read_bytes()
    arrivals.fetch(0.5)
    assert arrivals.names == ["a.png"]
    put(path, b"other")
    assert arrivals.until(2) == ["a.png", "a.png"]
    path.unlink()
    arrivals.fetch(0.2)
    put(path, b"third")
    assert arrivals.until(3) == ["a.png"] * 3


def test_rewritten_or_gone_before_it_was_fetched(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    arrivals = arrive(inbox, rescan=60.0)
    arrivals.fetch(0.1)
    for name in ("changed.png", "gone.png", "back.png", "stays.png"):
        put(inbox / name)
    time.sleep(0.6)  # all are ready now, and none is fetched
    put(inbox / "changed.png", b"whole")
    (inbox / "gone.png").unlink()
    (inbox / "back.png").rename(inbox / "back.png.bak")
    arrivals.until({"stays.png"}, then=0)
    assert arrivals.names == ["stays.png"]
    assert arrivals.until({"changed.png"}, then=0) == ["changed.png", "stays.png"]
    (inbox / "back.png.bak").rename(inbox / "back.png")  # as it was, and yet never taken
    assert arrivals.until({"back.png"}) == ["back.png", "changed.png", "stays.png"]


# What watchdog does.


def test_a_folder_that_watchdog_meets_twice_ends_no_thread(inbox: Path, arrive: Callable[..., Arrivals]) -> None:
    """Its warning of that, raised as the error that warnings are here, would end the thread that listens."""
    arrivals = arrive(inbox)
    arrivals.fetch(0.1)
    text = "Callback with id '1' already exists for watch"
    warnings.warn_explicit(text, RuntimeWarning, "inotify.py", 1, module="watchdog.observers.inotify")
    with pytest.raises(RuntimeWarning):
        warnings.warn_explicit(text, RuntimeWarning, "other.py", 1, module="other")


# Systems that tell nothing.


@pytest.mark.parametrize(("observer", "rescan"), [(silent, 0.2), (at_the_limit, 1000.0)])
def test_without_events_the_folders_are_gone_through(
    inbox: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrive: Callable[..., Arrivals],
    observer: Callable[[], BaseObserver],
    rescan: float,
) -> None:
    monkeypatch.setattr(module, "Observer", observer)
    monkeypatch.setattr(module, "_SOON_S", 0.2)
    path = old(inbox / "a.png")
    arrivals = arrive(inbox, rescan=rescan)
    arrivals.until({"a.png"}, then=0.3)
    put(inbox / "sub" / "b.png")
    put(path, b"other")
    assert arrivals.until(3) == ["a.png", "a.png", "sub/b.png"]


def test_what_was_not_told_makes_the_next_look_come_soon(
    inbox: Path, monkeypatch: pytest.MonkeyPatch, arrive: Callable[..., Arrivals]
) -> None:
    monkeypatch.setattr(module, "Observer", silent)
    monkeypatch.setattr(module, "_SOON_S", 0.1)
    arrivals = arrive(inbox, settle=0.05, rescan=1000.0)
    arrivals.fetch(0.8)  # pauses of 0.1, 0.2, 0.4 and now 0.8 s; left alone the next are 1.6, 3.2 and 6.4 s
    for number in range(3):
        put(inbox / f"{number}.png")
        began = time.monotonic()
        arrivals.until(number + 1, then=0)
        assert number == 0 or arrivals.times[-1] - began < 1.5


def test_the_folder_may_vanish_and_come_back(
    inbox: Path, monkeypatch: pytest.MonkeyPatch, arrive: Callable[..., Arrivals]
) -> None:
    old(inbox / "a.png")
    arrivals = arrive(inbox, rescan=0.3)
    arrivals.until(1, then=0)
    inbox.rename(inbox.with_name("away"))
    arrivals.fetch(0.4)
    put(inbox / "b.png")
    (inbox.with_name("away") / "a.png").rename(inbox / "a.png")  # as it was
    assert arrivals.until(2, then=0.4) == ["a.png", "b.png"]


def test_a_folder_that_does_not_answer_holds_up_nobody(
    inbox: Path, monkeypatch: pytest.MonkeyPatch, arrive: Callable[..., Arrivals]
) -> None:
    answer = threading.Event()
    scandir = os.scandir

    def hanging(path: Any = ".") -> Any:
        answer.wait(PATIENCE)
        return scandir(path)

    old(inbox / "a.png")
    arrivals = arrive(inbox)
    monkeypatch.setattr(os, "scandir", hanging)
    assert [next(arrivals.iterator) for _ in range(5)] == [None] * 5
    answer.set()
    assert arrivals.until(1) == ["a.png"]


# Errors, and the end.


def test_only_folders_that_exist_can_be_watched(inbox: Path) -> None:
    file = put(inbox / "a.png")
    for argument in (str(file), str(inbox / "nowhere"), "", "a\0b", "-"):
        with pytest.raises(UsageError, match="this is no folder, and only folders can be watched") as caught:
            watch([str(inbox), argument], threading.Event())
        assert str(caught.value).startswith(argument or "''")
    with pytest.raises(UsageError, match="no folder was given"):
        watch([], threading.Event())


def test_a_folder_that_cannot_be_read_is_an_error_at_the_start_only(
    inbox: Path, monkeypatch: pytest.MonkeyPatch, arrive: Callable[..., Arrivals]
) -> None:
    scandir = os.scandir

    def guarded(path: Any = ".") -> Any:
        if os.path.basename(os.fspath(path)) == "locked":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    old(inbox / "a.png")
    later = arrive(inbox, rescan=0.3)
    later.until({"a.png"}, then=0)
    put(inbox / "locked" / "x.png")
    put(inbox / "b.png")
    later.until({"b.png"})
    at_start = arrive(inbox)
    with pytest.raises(XrayError, match=r"locked: cannot be read \(Permission denied\)"):
        at_start.fetch(PATIENCE)


def test_threads_are_there_only_while_it_is_iterated(inbox: Path) -> None:
    before = threading.active_count()
    unused = watch([inbox], threading.Event())
    assert threading.active_count() == before
    del unused
    closed = watch([inbox], threading.Event())
    next(closed)
    assert threading.active_count() > before
    closed.close()
    assert threading.active_count() == before
    stop = threading.Event()
    stopped = watch([inbox], stop)
    next(stopped)
    stop.set()
    assert list(stopped) == []
    assert threading.active_count() == before
