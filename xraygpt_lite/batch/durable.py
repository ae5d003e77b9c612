"""Files that are whole or absent: a lock beside an output, a replacement that is on the disk before it takes its place.

Knows paths and bytes, not what they say.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from xraygpt_lite.errors import UsageError, XrayError

FULL = errno.ENOSPC
_FULL = {FULL, errno.EDQUOT, errno.EFBIG}
_BUFFER = 1 << 20


def beside(path: Path, suffix: str) -> Path:
    """The file next to `path` whose name goes on with `suffix`, e.g. ".lock"."""
    return path.with_name(path.name + suffix)


@contextlib.contextmanager
def locked(path: Path, shown: str) -> Iterator[None]:
    """Hold the lock of an output; the lock file stays, since to remove it would let two others in at once.

    Parameters
    ----------
    shown
        What the output is called in messages.

    Raises
    ------
    XrayError
        Another process holds it, or it cannot be made.
    """
    if not path.parent.is_dir():
        raise UsageError(f"the folder of {shown} does not exist; make it, or choose another output")
    lock = FileLock(beside(path, ".lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise XrayError(f"another run is writing {shown}; wait for it, or choose another output") from None
    except OSError as error:
        raise sentence(error, f"{shown} cannot be locked") from error
    try:
        yield
    finally:
        lock.release()


def replace(path: Path, chunks: Iterable[bytes], mode: int | None = None, *, durable: bool = True) -> int:
    """Write a file beside `path`, and rename it to `path` once it is on the disk.

    The caller keeps others from writing the same path. What is interrupted leaves `path` as it was.

    Parameters
    ----------
    chunks
        The new content; may be read from `path` while this goes on.
    mode
        Permissions; by default those of the file that is replaced, or what the process gives new files.
    durable
        False: it outlives the process, perhaps not the machine.

    Returns
    -------
    int
        Bytes written.
    """
    part = path.with_name(f".{path.name}.partial")
    if mode is None and path.exists():
        mode = path.stat().st_mode & 0o777
    part.unlink(missing_ok=True)  # of a process that was killed, with permissions of its own
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode or 0o666), "wb", _BUFFER) as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.writelines(chunks)
            file.flush()
            size = file.tell()
            if durable:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)
    return size


def remove_leftover(path: Path) -> None:
    """Drop what a `replace` of this path that was killed has left."""
    path.with_name(f".{path.name}.partial").unlink(missing_ok=True)


@contextlib.contextmanager
def in_words(what: str, advice: str = "") -> Iterator[None]:
    """Turn an `OSError` into an `XrayError` that begins with `what`, e.g. "x.jsonl cannot be written"."""
    try:
        yield
    except OSError as error:
        raise sentence(error, what, advice) from error


def sentence(error: OSError, what: str, advice: str = "") -> XrayError:
    """An `OSError` as a sentence for the reader."""
    full = error.errno in _FULL
    reason = "the disk is full, or a limit on file sizes was reached" if full else error.strerror or str(error)
    return XrayError(f"{what}: {reason}{advice}")


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk; some network file systems cannot, and do it themselves."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
