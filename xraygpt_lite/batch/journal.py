"""The journal of a run over many radiographs: the one durable thing, and what resuming goes by.

OUT holds a header and one record a line. Beside it lie OUT.lock, OUT.running while a run goes on or has crashed, and
OUT.salt where names are kept out. Every state that a killed process can leave is one that the next run goes on from:

- Lines are appended in groups, each with one write that is brought to the disk. A group that was cut off leaves a torn
  last line, which is dropped when the journal is opened.
- Everything else is a new file that takes the old one's place by a rename once it is on the disk.

Knows records and digests; no model, no image, no folder of inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from xraygpt_lite.batch import durable
from xraygpt_lite.batch.index import Index
from xraygpt_lite.batch.keys import Keys, new_salt, read_salt, write_salt
from xraygpt_lite.batch.lines import Entry, Header, differences, entries, is_journal, read, read_header
from xraygpt_lite.batch.running import Running
from xraygpt_lite.errors import UsageError, XrayError
from xraygpt_lite.values import Failure

__all__ = ["Entry", "Header", "Journal", "Keys", "read"]

_GROUP = 10  # records, and
_SECONDS = 1.0  # of work, that a crash may cost at most
_ADVICE = "choose another output with -o, give the same options, or begin anew with --restart"


class Journal:
    """A journal in use by this process; a context manager, for one thread.

    In memory are some 200 bytes a record, whatever the records hold.

    Parameters
    ----------
    path
        OUT, in a folder that exists.
    header
        Of this run. Where the journal's own differs in bundle, options or shard the run is refused; its other fields
        are brought up to date.
    restart
        Drop the records of earlier runs.
    retry_failed
        Drop their failures.

    Attributes
    ----------
    header
        As it stands in the file.
    keys
        Digests for entries, salted if the options say `"identifiers": false`.
    records, failures
        How many entries there are, and how many of them are failures; those not yet flushed count.

    Raises
    ------
    UsageError
        On entering: OUT is no journal, or of other options; each difference is named.
    XrayError
        On entering: another run writes it, a newer version wrote it, a line is damaged, its salt is lost, or the disk
        is full. Nothing that was there is lost by any of these.
    """

    header: Header
    keys: Keys
    records: int
    failures: int
    _size: int  # bytes up to the end of the last whole group

    def __init__(self, path: Path, header: Header, *, restart: bool = False, retry_failed: bool = False) -> None:
        self._shown = str(path)
        self._path = Path(os.path.realpath(path))  # through a link, to the file that is replaced; and wherever we go
        self._asked, self._restart, self._retry = header, restart, retry_failed
        self._stack = contextlib.ExitStack()
        self._handle = -1

    def __enter__(self) -> Journal:
        with contextlib.ExitStack() as stack, durable.in_words(f"{self._shown} cannot be opened"):
            is_journal(self._path, self._shown)  # before the lock: nothing is left beside what cannot be an output
            stack.enter_context(durable.locked(self._path, self._shown))
            for suffix in ("", ".salt", ".running"):
                durable.remove_leftover(durable.beside(self._path, suffix))
            self._keys, self._done = Index(), Index()
            self.records = self.failures = 0
            self._open()
            self._running = Running(self._path)
            self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            stack.callback(os.close, self._handle)
            self._pending: list[bytes] = []
            self._since = 0.0
            self._error: XrayError | None = None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._stack:
            try:
                if not self._error:
                    self.flush()
            finally:
                self._running.close()

    def has(self, key: str) -> bool:
        """Whether a record with this key stands in the journal."""
        return bytes.fromhex(key) in self._keys

    def done(self, file: str, question: str) -> bool:
        """Whether there is a record about this file (`Keys.file`), unchanged since, and this question."""
        return _about(file, question) in self._done

    def append(self, entry: Entry) -> None:
        """Take a record, and write what is waiting if that is ten records or a second's work.

        Raises
        ------
        ValueError
            A record with this key is there already: the caller asks `has` first.
        XrayError
            As in `flush`.
        """
        if self._error:
            raise self._error
        if self.has(entry.key):
            raise ValueError(f"a record with the key {entry.key} stands in {self._shown} already")
        line = entry.line()
        if not self._pending:
            self._since = time.monotonic()
        self._note(entry)
        self._pending.append(line)
        if len(self._pending) >= _GROUP or self.due:
            self.flush()

    @property
    def due(self) -> bool:
        """Whether a record has been waiting for a second: time to `flush`."""
        return bool(self._pending) and time.monotonic() - self._since >= _SECONDS

    def flush(self) -> None:
        """Bring all waiting records to the disk.

        Raises
        ------
        XrayError
            The disk is full, or the file cannot be written any more. The journal ends with the last group that was
            written whole, and takes nothing more.
        """
        if self._error:
            raise self._error
        if not self._pending:
            return
        group = b"".join(self._pending)
        end = self._size + len(group)
        try:
            self._check_file()
            if os.write(self._handle, group) < len(group):
                raise OSError(durable.FULL, os.strerror(durable.FULL))
            os.fsync(self._handle)
        except OSError as error:
            safe = self.records - len(self._pending)
            self._error = durable.sentence(
                error,
                f"{self._shown} cannot be written",
                f"; {safe} records in it are safe. Run the same command again to go on once that is mended",
            )
            with contextlib.suppress(OSError):  # a torn line is dropped by the next run as well
                os.ftruncate(self._handle, self._size)
                os.fsync(self._handle)
            raise self._error from error
        # No call in this line: Ctrl-C comes before it or after it, and a group is not written twice.
        self._size, self._pending = end, []

    @property
    def suspects(self) -> Mapping[str, int]:
        """File digest → how many processes have died with it in native code. One: run it alone; two: give it up."""
        return self._running.suspects

    def begin(self, file: str) -> None:
        """Note that a file (`Keys.file`) enters native code of this process."""
        with durable.in_words(f"{self._shown}.running cannot be written"):
            self._running.begin(file)

    def end(self, file: str) -> None:
        """Note that it came out, or that it was given up and its failures are flushed: its crashes are forgotten."""
        with durable.in_words(f"{self._shown}.running cannot be written"):
            self._running.end(file)

    def _open(self) -> None:
        """Leave a whole journal with this run's header at `path`, and its digests in memory."""
        seen = None
        if is_journal(self._path, self._shown) and not self._restart:
            seen = read_header(self._path, self._shown)
        if seen:
            self._check_same(seen)
        self.keys = self._salted(seen)
        asked = replace(self._asked, salt=self.keys.fingerprint)
        self.header = seen if seen and seen.line() == asked.line() else asked
        if not seen:
            self._size = durable.replace(self._path, [asked.line()])
            durable.beside(self._path, ".running").unlink(missing_ok=True)
            return
        dropped = self._load()
        if dropped or self.header is not seen:
            self._size = durable.replace(self._path, self._kept())
        elif os.path.getsize(self._path) > self._size:
            with self._path.open("rb+") as file:
                file.truncate(self._size)
                os.fsync(file.fileno())

    def _load(self) -> bool:
        """Note every entry and where the last one ends; True if there is one to drop."""
        dropped = False
        with self._path.open("rb") as file:
            self._size = len(file.readline())
        for number, (entry, raw) in enumerate(entries(self._path, self._shown), 2):
            self._size += len(raw)
            if self._retry and isinstance(entry.record, Failure):
                dropped = True
            elif self.has(entry.key):
                raise XrayError(
                    f"{self._shown}, line {number} is about the same input and question as a line before it; take one "
                    f"out, or keep one of each with `xraygpt-lite merge {self._shown} -o` another file"
                )
            else:
                self._note(entry)
        return dropped

    def _kept(self) -> Iterator[bytes]:
        """The lines of the file that takes the place of this one."""
        yield self.header.line()
        for entry, raw in entries(self._path, self._shown):
            if not (self._retry and isinstance(entry.record, Failure)):
                yield raw

    def _note(self, entry: Entry) -> None:
        self._keys.add(bytes.fromhex(entry.key))
        self._done.add(_about(entry.file, entry.record.question))
        self.records += 1
        self.failures += isinstance(entry.record, Failure)

    def _check_same(self, seen: Header) -> None:
        if others := differences(seen, self._asked):
            listed = "; ".join(f"{name} was {old} and is now {new}" for name, old, new in others)
            raise UsageError(f"{self._shown} holds records made otherwise: {listed}. To go on, {_ADVICE}")

    def _salted(self, seen: Header | None) -> Keys:
        """This run's keys; a new journal's salt is on the disk before its header, and one that lies there is used."""
        if self._asked.options.get("identifiers", True):
            return Keys(None)
        salt = read_salt(self._path)
        if salt is None and seen is None:
            salt = new_salt()
            write_salt(self._path, salt)
        keys = Keys(salt)
        if seen and (salt is None or keys.fingerprint != seen.salt):
            raise XrayError(
                f"{self._shown} keeps names out, and {self._shown}.salt, by which it knows its inputs, is "
                f"{'missing' if salt is None else 'another one'}; put it back, or begin anew with --restart"
            )
        return keys

    def _check_file(self) -> None:
        """The file ends where the last group did, or is made to."""
        found = os.fstat(self._handle)
        if found.st_nlink == 0 or found.st_size < self._size:
            self._error = XrayError(
                f"{self._shown} was removed or cut short by another program while this run was writing it; put it back "
                "from a copy if there is one, and run the same command again"
            )
            raise self._error
        if found.st_size > self._size:  # Ctrl-C in the middle of a flush
            os.ftruncate(self._handle, self._size)


def _about(file: str, question: str) -> bytes:
    """The digest of a file and a question."""
    return hashlib.sha256(bytes.fromhex(file) + question.encode("utf-8", "surrogatepass")).digest()
