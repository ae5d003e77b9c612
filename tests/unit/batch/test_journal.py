"""The journal: what was flushed is there once and whole, whatever ended the process; everything else is refused.

The programs that are killed and starved stand in `journal_child.py`.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.batch import journal_child as child
from unit.batch.journal_child import PLAIN, entry, fill_in, header

from xraygpt_lite.batch import journal as module
from xraygpt_lite.batch.journal import Header, Journal, Keys, read
from xraygpt_lite.errors import UsageError, XrayError
from xraygpt_lite.values import Failure

PROGRAM = [sys.executable, child.__file__]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where there is one: these tests bring thousands of small files to the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def wrote(path: Path, count: int, header: Header | None = None, **options: Any) -> bytes:
    """A journal of so many records, every third a failure; its bytes."""
    with Journal(path, header or child.header(**options)) as journal:
        for n in range(count):
            journal.append(entry(n, failed=n % 3 == 1, keys=journal.keys))
    return path.read_bytes()


def inputs(path: Path) -> list[str]:
    return [held.input for held in read(path)[1]]


def beside(path: Path) -> set[str]:
    """What lies there beside the journal and its lock, which stays."""
    return {found.name for found in path.parent.iterdir()} - {path.name, f"{path.name}.lock"}


class TestWriting:
    def test_a_header_then_a_record_a_line(self, path: Path) -> None:
        with Journal(path, header()) as journal:
            for n in range(12):
                journal.append(entry(n, failed=n == 5))
            assert (journal.records, journal.failures) == (12, 1)
        assert beside(path) == set()
        found, entries = read(path)
        assert found == header()
        assert list(entries) == [entry(n, failed=n == 5) for n in range(12)]

    def test_an_empty_file_is_taken(self, path: Path) -> None:
        path.touch(0o640)
        wrote(path, 1)
        assert inputs(path) == ["0.png"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_a_tenth_record_is_not_held(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        write, sync = os.write, os.fsync
        monkeypatch.setattr(os, "write", lambda to, data: calls.append(f"{data.count(10)} lines") or write(to, data))
        monkeypatch.setattr(os, "fsync", lambda handle: calls.append("to the disk") or sync(handle))
        with Journal(path, header()) as journal:
            del calls[:]
            for n in range(23):
                journal.append(entry(n))
                assert len(inputs(path)) == (n + 1) // 10 * 10
            assert not journal.due
            journal.flush()
            assert len(inputs(path)) == 23
            journal.flush()
        assert calls == ["10 lines", "to the disk", "10 lines", "to the disk", "3 lines", "to the disk"]

    @pytest.mark.parametrize("how", ["new", "header", "failures", "restart", "torn"])
    def test_a_file_is_on_the_disk_before_it_takes_another_s_place(
        self, path: Path, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if how != "new":
            path.write_bytes(wrote(path, 3) + b"torn" * (how == "torn"))
        calls: list[str] = []
        sync, rename = os.fsync, os.replace
        monkeypatch.setattr(
            os, "fsync", lambda handle: calls.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle)
        )
        monkeypatch.setattr(os, "replace", lambda old, new: calls.append("rename") or rename(old, new))
        with Journal(
            path, header(7 if how == "header" else 20), restart=how == "restart", retry_failed=how == "failures"
        ):
            pass
        part = str(path.with_name(f".{path.name}.partial"))
        assert calls == ([str(path)] if how == "torn" else [part, "rename", str(path.parent)])

    def test_a_second_s_work_is_not_held(self, path: Path) -> None:
        with Journal(path, header()) as journal:
            assert not journal.due
            journal.append(entry(0))
            assert not journal.due
            time.sleep(1.01)
            assert journal.due
            journal.append(entry(1))
            assert not journal.due
            assert inputs(path) == ["0.png", "1.png"]

    def test_a_key_is_written_once(self, path: Path) -> None:
        with Journal(path, header()) as journal:
            journal.append(entry(0))
            assert journal.has(entry(0).key)
            with pytest.raises(ValueError, match=r"key .* stands in .*out\.jsonl already"):
                journal.append(entry(0, failed=True))
        with Journal(path, header()) as journal, pytest.raises(ValueError, match="already"):
            journal.append(entry(0))
        assert inputs(path) == ["0.png"]

    def test_digests_are_checked(self, path: Path) -> None:
        with Journal(path, header()) as journal:
            for spoilt in (replace(entry(0), key="0" * 63), replace(entry(0), file="A" * 64)):
                with pytest.raises(ValueError, match="hex"):
                    journal.append(spoilt)
            assert journal.records == 0

    def test_records_are_written_when_the_run_fails(self, path: Path) -> None:
        def run() -> None:
            with Journal(path, header()) as journal:
                journal.append(entry(0))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run()
        assert inputs(path) == ["0.png"]
        assert beside(path) == set()

    @pytest.mark.parametrize("spoil", ["remove", "replace", "cut"])
    def test_another_program_s_doing_is_said(self, path: Path, spoil: str) -> None:
        with Journal(path, header()) as journal:
            journal.append(entry(0))
            journal.flush()
            if spoil == "cut":
                os.truncate(path, 10)
            elif spoil == "remove":
                path.unlink()
            else:
                path.with_name("other").write_text("mine")
                path.with_name("other").replace(path)
            journal.append(entry(1))
            for go_on in (journal.flush, journal.flush, lambda: journal.append(entry(2))):
                with pytest.raises(XrayError, match="removed or cut short by another program"):
                    go_on()
        if spoil == "replace":
            assert path.read_text() == "mine"

    def test_ctrl_c_at_any_line_writes_nothing_twice(self, quick: Path) -> None:
        path = quick / "out.jsonl"
        reached = 0
        for point in range(1000):
            path.unlink(missing_ok=True)
            passed = -1

            def trace(frame: FrameType, event: str, _: object, point: int = point) -> Any:
                nonlocal passed
                if frame.f_code.co_filename != module.__file__ or frame.f_code.co_name == "__exit__":
                    return None
                if event == "line":
                    passed += 1
                    if passed == point:
                        raise KeyboardInterrupt
                return trace

            interrupted = False
            with Journal(path, header()) as journal:
                sys.settrace(trace)
                try:
                    for n in range(11):
                        journal.append(entry(n))
                    journal.flush()
                except KeyboardInterrupt:
                    interrupted = True
                finally:
                    sys.settrace(None)
            names = inputs(path)
            assert names == [f"{n}.png" for n in range(len(names))]
            reached += interrupted
            if not interrupted:
                break
        assert reached > 100
        assert len(names) == 11


class TestResuming:
    def test_what_is_done_is_known(self, path: Path, tmp_path: Path) -> None:
        image = tmp_path / "a.png"
        image.write_bytes(b"one")
        name = "a/\udcff.png"
        with Journal(path, header()) as journal:
            keys = journal.keys
            first = replace(entry(0), input=name, key=keys.key(name, "0" * 64, "?"), file=keys.file(name, image.stat()))
            journal.append(first)
        with Journal(path, header()) as journal:
            assert (journal.records, journal.failures) == (1, 0)
            assert journal.done(keys.file(name, image.stat()), "?")
            assert not journal.done(keys.file(name, image.stat()), "another question")
            assert not journal.done(keys.file("b.png", image.stat()), "?")
            assert journal.has(keys.key(name, "0" * 64, "?"))
            assert not journal.has(keys.key(name, None, "?"))
            image.write_bytes(b"three")
            assert not journal.done(keys.file(name, image.stat()), "?")
            before = image.stat()
            os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
            assert keys.file(name, before) != keys.file(name, image.stat())

    def test_the_same_run_changes_nothing(self, path: Path) -> None:
        before = wrote(path, 5)
        inode = path.stat().st_ino
        assert wrote(path, 0) == before
        assert path.stat().st_ino == inode

    @pytest.mark.parametrize("change", [{"inputs": 21}, {"inputs": None}, {"version": "0.2.0"}])
    def test_the_header_is_the_last_run_s(self, path: Path, change: dict[str, Any]) -> None:
        records = wrote(path, 5).split(b"\n", 1)[1]
        path.chmod(0o600)
        with Journal(path, replace(header(), **change)) as journal:
            assert journal.header == replace(header(), **change)
            assert journal.records == 5
        assert path.read_bytes() == replace(header(), **change).line() + records
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_failures_are_repeated_when_asked(self, path: Path) -> None:
        wrote(path, 9)
        with Journal(path, header()) as journal:
            assert (journal.records, journal.failures) == (9, 3)
            assert journal.has(entry(4).key)
        with Journal(path, header(), retry_failed=True) as journal:
            assert (journal.records, journal.failures) == (6, 0)
            assert not journal.has(entry(4).key)
            assert not journal.done(entry(4).file, "?")
            fill_in(journal, 9)
        assert sorted(inputs(path)) == [f"{n}.png" for n in range(9)]
        assert not any(isinstance(held.record, Failure) for held in read(path)[1])
        before = path.stat()
        wrote(path, 0)
        with Journal(path, header(), retry_failed=True):
            assert path.stat().st_ino == before.st_ino  # no failure: nothing to rewrite

    def test_restart_drops_all_and_takes_other_options(self, path: Path) -> None:
        wrote(path, 9)
        with Journal(path, header(task="other"), restart=True) as journal:
            assert journal.records == 0
            journal.append(entry(0))
        assert inputs(path) == ["0.png"]
        assert read(path)[0] == header(task="other")

    def test_restart_drops_a_journal_that_cannot_be_read(self, path: Path) -> None:
        wrote(path, 2)
        for spoilt in (b'{"schema": "xraygpt-lite/journal/1", ', b'{"schema": "xraygpt-lite/journal/7"}\n'):
            path.write_bytes(spoilt)
            with Journal(path, header(), restart=True) as journal:
                assert journal.records == 0

    def test_a_link_is_followed(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "elsewhere").mkdir()
        real = tmp_path / "elsewhere" / "real.jsonl"
        wrote(real, 2)
        path.symlink_to(real)
        monkeypatch.chdir(tmp_path)
        with Journal(Path("out.jsonl"), header(inputs=3)) as journal:
            monkeypatch.chdir("/")
            journal.append(entry(7))
        assert path.is_symlink()
        assert len(inputs(real)) == 3


class TestRefusals:
    def refused(self, path: Path, kind: type[XrayError], message: str, header: Header, **how: Any) -> None:
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(kind, match=message), Journal(path, header, **how):
            pytest.fail("was opened")
        assert (path.read_bytes() if path.is_file() else None) == before
        assert beside(path) <= {f"{path.name}.salt"}

    @pytest.mark.parametrize("how", [{}, {"restart": True}, {"retry_failed": True}])
    @pytest.mark.parametrize("content", [b"mine", b"mine\n", b'{"schema": "xraygpt-lite/record/1"}\n', b"\x00" * 99])
    def test_somebody_s_file_is_left(self, path: Path, content: bytes, how: dict[str, bool]) -> None:
        path.write_bytes(content)
        self.refused(path, UsageError, r"out\.jsonl is no journal .* choose another file", header(), **how)

    def test_what_is_no_file_is_left(self, path: Path) -> None:
        os.mkfifo(path)
        self.refused(path, UsageError, "is no journal", header())
        path.unlink()
        path.mkdir()
        self.refused(path, UsageError, "is no journal", header())

    def test_a_folder_that_is_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b.jsonl"
        with pytest.raises(UsageError, match=r"the folder of .* does not exist"), Journal(path, header()):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_lock_that_cannot_be_made(self, path: Path) -> None:
        path.with_name("out.jsonl.lock").mkdir()
        self.refused(path, XrayError, r"out\.jsonl cannot be locked: Is a directory", header())

    def test_a_newer_schema(self, path: Path) -> None:
        path.write_bytes(b'{"schema": "xraygpt-lite/journal/2", "new": 1}\n')
        self.refused(path, XrayError, r"journal of schema 2, and this version reads schema 1; update", header())
        with pytest.raises(XrayError, match="journal of schema 2"):
            read(path)

    def test_every_difference_is_named(self, path: Path) -> None:
        wrote(path, 1, header(generation={"max_tokens": 300, "stops": ["a"]}, task=None))
        asked = header(generation={"max_tokens": 200, "stops": ["a"]}, box=[1.0], task=None, questions=["?", "x" * 300])
        self.refused(
            path,
            UsageError,
            r"holds records made otherwise: bundle was tiny \(f{12}\) and is now big \(e{12}\); shard was none and is "
            r"now 3/16; questions was 1 \(sha256 \w{8}\) and is now 2 \(sha256 \w{8}\); "
            r"generation.max_tokens was 300 and is now 200; "
            r"box was not given and is now \[1.0\]. To go on, choose another output with -o, give the same options, or "
            r"begin anew with --restart$",
            replace(asked, bundle_id="e" * 64, bundle_name="big", shard=(3, 16)),
        )

    def test_a_header_whose_questions_are_no_list(self, path: Path) -> None:
        wrote(path, 1, header(questions=None))
        self.refused(path, UsageError, r"questions was null and is now 1 \(sha256", header(questions=["?"]))

    def test_options_are_compared_as_they_are_written(self, path: Path) -> None:
        wrote(path, 1, header(stops=("a",), temperature=0.1 + 0.2))
        wrote(path, 0, header(temperature=0.3, stops=["a"]))
        self.refused(path, UsageError, "stops was .* and is now", header(temperature=0.3, stops=["b"]))

    @pytest.mark.parametrize(
        ("number", "line", "message"),
        [
            (3, b'{"schema": "xraygpt-li\n', "it is not whole"),
            (3, b"\xff\n", "it is not whole"),
            (3, b"\n", "it is not whole"),
            (3, b"[" * 100_000 + b"\n", "it is not whole"),
            (4, b"[]\n", "it is no object"),
            (6, b"{}\n", "input is missing, or no text"),
            (6, b'{"input": "secret", "key": "0"}\n', "key is missing, or no digest"),
            (6, entry(4).line().replace(b'"finish": "stop"', b'"finish": "secret"'), "finish is none of stop, length"),
            (6, entry(4).line().replace(b"record/1", b"record/2"), "schema is not xraygpt-lite/record/1"),
            (2, child.header().line(), "input is missing, or no text"),
        ],
    )
    def test_a_damaged_line_is_named_and_nothing_is_lost(
        self, path: Path, number: int, line: bytes, message: str
    ) -> None:
        lines = wrote(path, 5).splitlines(keepends=True)
        lines[number - 1] = line
        path.write_bytes(b"".join(lines))
        expected = rf"out\.jsonl, line {number} is damaged: {message}.*Nothing was changed"
        for how in ({}, {"retry_failed": True}):
            self.refused(path, XrayError, expected, header(), **how)
        with pytest.raises(XrayError, match=expected) as caught:
            list(read(path)[1])
        assert "secret" not in str(caught.value)

    def test_a_damaged_header(self, path: Path) -> None:
        path.write_bytes(wrote(path, 1).replace(b'"inputs": 20', b'"inputs": "20"'))
        self.refused(path, XrayError, "line 1 is damaged: inputs is text, expected a whole number", header())
        path.write_bytes(header().line()[:-1])
        self.refused(path, XrayError, "line 1 is damaged: it has no end", header())

    def test_a_record_that_stands_twice(self, path: Path) -> None:
        path.write_bytes(wrote(path, 3) + entry(0, failed=True).line())
        self.refused(path, XrayError, r"line 5 is about the same input and question .*xraygpt-lite merge", header())

    def test_a_file_that_may_not_be_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(XrayError, match=r"gone\.jsonl cannot be read: No such file"):
            read(path.with_name("gone.jsonl"))
        path.touch()
        with pytest.raises(UsageError, match="is empty; name a journal"):
            read(path)


class TestRepair:
    def test_a_torn_last_line_is_dropped_at_every_byte(self, quick: Path) -> None:
        path = quick / "out.jsonl"
        whole = wrote(path, 2)
        start = len(header().line())
        ends = [start, start + len(entry(0).line()), len(whole)]
        for cut in range(start, len(whole) + 1):
            path.write_bytes(whole[:cut])
            kept = max(end for end in ends if end <= cut)
            assert inputs(path) == ["0.png", "1.png"][: ends.index(kept)]
            with Journal(path, header()) as journal:
                assert journal.records == ends.index(kept)
                assert path.read_bytes() == whole[:kept]
                if cut % 50 == 0:
                    fill_in(journal, 3)
            if cut % 50 == 0:
                assert inputs(path) == ["0.png", "1.png", "2.png"]

    def test_a_torn_header_is_nobody_s_to_repair(self, path: Path) -> None:
        whole = wrote(path, 0)
        for cut in range(1, len(whole)):
            path.write_bytes(whole[:cut])
            with pytest.raises(XrayError, match=r"is no journal|line 1 is damaged"), Journal(path, header()):
                pass
            assert path.read_bytes() == whole[:cut]

    @settings(deadline=None)
    @given(st.binary(max_size=200).map(lambda tail: tail.replace(b"\n", b"")), st.booleans(), st.booleans())
    def test_whatever_a_torn_line_holds(self, tail: bytes, ended: bool, retry: bool) -> None:
        try:
            json.loads(tail.decode())
            return  # a whole line of something else is damage, not a torn line
        except ValueError:
            pass
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "out.jsonl"
            whole = wrote(path, 4)
            path.write_bytes(whole + tail + b"\n" * ended)
            assert len(inputs(path)) == 4
            with Journal(path, header(), retry_failed=retry) as journal:
                assert journal.records == 4 - retry
                fill_in(journal, 5)
            assert sorted(inputs(path)) == [f"{n}.png" for n in range(5)]
            assert retry or path.read_bytes() == whole + entry(4).line()


class TestCrashes:
    def crash(self, path: Path, *files: str) -> None:
        """A process dies with these files inside."""
        assert subprocess.run([*PROGRAM, "die", str(path), *files], timeout=60).returncode == -signal.SIGKILL

    def test_a_file_in_flight_is_counted(self, path: Path) -> None:
        one, two, three = (child.file(n) for n in range(3))
        self.crash(path, one, two)
        with Journal(path, header()) as journal:
            assert journal.suspects == {one: 1, two: 1}
            journal.begin(one)
            journal.end(one)  # alone it came through
            assert journal.suspects == {two: 1}
        assert beside(path) == {"out.jsonl.running"}  # two was not tried again: a clean end does not excuse it
        self.crash(path, two, three)
        with Journal(path, header()) as journal:
            assert journal.suspects == {two: 2, three: 1}
            journal.append(entry(1, failed=True))
            journal.flush()
            journal.end(two)  # given up
            journal.begin(three)
            journal.end(three)
            assert journal.suspects == {}
        assert beside(path) == set()

    def test_a_clean_end_blames_nobody(self, path: Path) -> None:
        def run() -> None:
            with Journal(path, header()) as journal:
                journal.begin(child.file(0))
                journal.begin(child.file(0))
                assert beside(path) == {"out.jsonl.running"}
                raise RuntimeError

        with pytest.raises(RuntimeError):
            run()
        assert beside(path) == set()

    def test_restart_forgets(self, path: Path) -> None:
        self.crash(path, child.file(0))
        with Journal(path, header(), restart=True) as journal:
            assert journal.suspects == {}
        assert beside(path) == set()

    def test_a_refused_run_counts_nothing(self, path: Path) -> None:
        self.crash(path, child.file(0))
        for _ in range(3):
            with pytest.raises(UsageError), Journal(path, header(task="other")):
                pass
        for _ in range(3):
            with Journal(path, header()) as journal:
                assert journal.suspects == {child.file(0): 1}

    def test_torn_and_foreign_notes_say_nothing(self, path: Path) -> None:
        one, two = child.file(0), child.file(1)
        wrote(path, 1)
        path.with_name("out.jsonl.running").write_bytes(
            f"+{one}\n+{one[:9]}+{two}\n-\n\n0 {two}\n99999999999 {two}\n2 {two}\n\xff\n-{one}\n+{two}\n+{one}".encode()
        )
        with Journal(path, header()) as journal:
            assert journal.suspects == {two: 3}

    def test_notes_stay_small(self, path: Path) -> None:
        notes = path.with_name("out.jsonl.running")
        self.crash(path, child.file(1))
        with Journal(path, header()) as journal:
            journal.begin(child.file(2))
            largest = 0
            for n in range(10, 2000):
                journal.begin(child.file(n))
                journal.end(child.file(n))
                largest = max(largest, notes.stat().st_size)
            assert 50_000 < largest < 70_000
            shutil.copy(notes, path.with_name("copy"))
        path.with_name("copy").replace(notes)  # as if it had been killed there
        with Journal(path, header()) as journal:
            assert journal.suspects == {child.file(1): 1, child.file(2): 1}


class TestWithoutNames:
    def test_names_are_kept_out_and_known_again(self, path: Path) -> None:
        asked = header(identifiers=False)
        wrote(path, 3, asked)
        salt = path.with_name("out.jsonl.salt")
        assert stat.S_IMODE(salt.stat().st_mode) == 0o600
        assert len(salt.read_bytes()) == 32
        keys = Keys(salt.read_bytes())
        assert inputs(path) == [keys.label(f"{n}.png") for n in range(3)]
        assert read(path)[0] == replace(asked, salt=keys.fingerprint)
        with Journal(path, asked) as journal:
            assert journal.has(entry(0, keys=keys).key)
            assert not journal.has(entry(0).key)
            assert journal.done(entry(0, keys=keys).file, "?")
        shown = header(identifiers=True)
        with pytest.raises(UsageError, match="identifiers was false and is now true"), Journal(path, shown):
            pass

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"out\.jsonl\.salt, by which it knows its inputs, is missing; put it back, or .* --restart"),
            (b"o" * 32, r"is another one; put it back"),
            (b"short", r"out\.jsonl\.salt is no salt of 32 bytes"),
            (b"l" * 33, r"out\.jsonl\.salt is no salt of 32 bytes"),
        ],
    )
    def test_a_salt_that_is_lost(self, path: Path, content: bytes | None, message: str) -> None:
        asked = header(identifiers=False)
        before = wrote(path, 3, asked)
        salt = path.with_name("out.jsonl.salt")
        salt.unlink()
        if content:
            salt.write_bytes(content)
        with pytest.raises(XrayError, match=message), Journal(path, asked):
            pass
        assert path.read_bytes() == before
        assert salt.exists() is bool(content)
        if content and len(content) != 32:
            salt.unlink()
        with Journal(path, asked, restart=True) as journal:
            assert journal.keys.fingerprint == Keys(salt.read_bytes()).fingerprint

    def test_a_new_journal_uses_a_salt_that_lies_there(self, path: Path) -> None:
        path.with_name("out.jsonl.salt").write_bytes(b"s" * 32)
        wrote(path, 1, header(identifiers=False))
        assert inputs(path) == [Keys(b"s" * 32).label("0.png")]

    def test_with_names_there_is_no_salt(self, path: Path) -> None:
        wrote(path, 1, header(identifiers=True))
        assert beside(path) == set()
        assert read(path)[0].salt is None


class TestKeys:
    """Digests as they are written: another version must find the same."""

    @pytest.mark.parametrize(
        ("keys", "key", "unread", "file", "absent", "label"),
        [
            (
                PLAIN,
                "30741c5f688f71cb32a4",
                "9c44864050341b7849f7",
                "65a257cd71b45ea660c3",
                "8a12c203f1e5e0a8c7d9",
                "a/b.png",
            ),
            (
                Keys(b"s" * 32),
                "0180614e85831c8fd57d",
                "d51a648b3adb86f2b9c9",
                "a43beb3f5c0ebcffb14a",
                "48353932170ef43e71d9",
                "input-2c8c4243d4c44f13",
            ),
        ],
    )
    def test_they_stay_what_they_are(
        self, keys: Keys, key: str, unread: str, file: str, absent: str, label: str, tmp_path: Path
    ) -> None:
        image = tmp_path / "b.png"
        image.write_bytes(b"12345")
        os.utime(image, ns=(0, 1_234_567_890_123_456_789))
        assert keys.key("a/b.png", "0" * 64, "?").startswith(key)
        assert keys.key("a/b.png", None, "?").startswith(unread)
        assert keys.file("a/b.png", image.stat()).startswith(file)
        assert keys.file("a/b.png", None).startswith(absent)
        assert keys.label("a/b.png") == label

    def test_parts_do_not_run_into_each_other(self) -> None:
        digests = [
            make(*parts)
            for keys in (PLAIN, Keys(b"s" * 32), Keys(b"t" * 32))
            for make in (keys.key,)
            for parts in [("a", "b", "c"), ("ab", "", "c"), ("a", None, "bc"), ("a", "null", "c"), ("\udcff", None, "")]
        ]
        assert len(set(digests)) == len(digests)
        assert {len(digest) for digest in digests} == {64}


class TestProcesses:
    def test_a_second_run_is_refused_until_the_first_is_dead(self, path: Path) -> None:
        with subprocess.Popen([*PROGRAM, "hold", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout
            assert holder.stdout.readline() == b"open\n"
            link = path.with_name("link")
            link.symlink_to(path)
            for name in (path, link):
                for how in ({}, {"restart": True}, {"retry_failed": True}):
                    with (
                        pytest.raises(XrayError, match=rf"^another run is writing {name}; wait for it, or choose an"),
                        Journal(name, header(), **how),
                    ):
                        pass
            assert inputs(path) == ["0.png"]  # reading is free
            holder.kill()
        with Journal(path, header()) as journal:
            assert journal.records == 1
            with pytest.raises(XrayError, match="another run is writing"), Journal(path, header()):
                pass
            journal.append(entry(1))
        assert inputs(path) == ["0.png", "1.png"]

    @pytest.mark.slow
    @pytest.mark.parametrize("scenario", child.SCENARIOS)
    def test_killed_before_any_third_line_it_goes_on(self, quick: Path, scenario: str) -> None:
        outcome = subprocess.run([*PROGRAM, "kill", scenario, str(quick)], capture_output=True, timeout=600)
        assert outcome.returncode == 0, outcome.stderr.decode()
        found = json.loads(outcome.stdout)
        assert found["wrong"] == []
        assert found["points"] > 30

    @pytest.mark.slow
    def test_killed_at_any_moment_it_goes_on(self, path: Path) -> None:
        chance = random.Random(0)
        safe = 0
        for _ in range(15):
            before = len(inputs(path)) if path.exists() else 0
            with subprocess.Popen([*PROGRAM, "append", str(path)], stdout=subprocess.PIPE, text=True) as run:
                assert run.stdout
                assert run.stdout.readline() == f"open {before}\n"
                select.select([run.stdout], [], [], 60)
                time.sleep(chance.random() / 20)
                assert run.poll() is None
                run.kill()
                said = [int(text.split()[1]) for text in run.stdout.read().split("\n")[:-1]]
            safe = said[-1] if said else safe
            names = inputs(path)
            assert len(names) >= safe
            assert names == [f"{n}.png" for n in range(len(names))]
        assert safe > 100


class TestDisk:
    def run(self, *command: str) -> Any:
        outcome = subprocess.run([*PROGRAM, *command], capture_output=True, timeout=300)
        assert outcome.returncode == 0, outcome.stderr.decode()
        return json.loads(outcome.stdout)

    def test_a_limit_on_the_file_s_size(self, quick: Path) -> None:
        assert self.run("limits", str(quick)) == []

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """On a disk of its own, where the system lets an ordinary user mount one."""
        mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        script = 'mount -t tmpfs -o size=256k tmpfs "$1" || exit 77; shift; exec "$@"'
        command = [*mount, script, "sh", str(tmp_path), *PROGRAM, "fill", str(tmp_path)]
        try:
            outcome = subprocess.run(command, capture_output=True, timeout=300)
        except FileNotFoundError:
            pytest.skip("needs unshare, which is absent")
        if outcome.returncode in (1, 77) and b"Traceback" not in outcome.stderr:
            pytest.skip("needs a mount of its own, which this system does not allow")
        assert outcome.returncode == 0, outcome.stderr.decode()
        found = json.loads(outcome.stdout)
        (message,) = found["messages"]
        assert "the disk is full" in message
        assert "records in it are safe. Run the same command again to go on" in message
        assert found["inputs"] == [f"{n}.png" for n in range(140)]

    @pytest.mark.slow
    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc, which is absent")
    def test_memory_does_not_hold_the_records(self, path: Path) -> None:
        # Failures, because they are read faster, as long as a summary is.
        first = entry(0, failed=True)
        line = first.line().replace(b" is empty", b" is empty" * 50).decode()
        with path.open("w") as out:
            out.write(header().line().decode())
            for n in range(100_000):
                key, file = PLAIN.key(f"{n}.png", "0" * 64, "?"), child.file(n)
                out.write(line.replace(first.key, key).replace(first.file, file))
        grown = self.run("memory", str(path))
        assert path.stat().st_size > 70e6
        assert 0 <= grown < 35e6
