"""The folder in which a bundle is made, beside its target: finished steps survive an interruption.

A step names its files and gives a result that is JSON. Once it has ended, files and result are on the disk and noted;
the same request finds them there and goes on behind them. Knows nothing of what the steps do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from xraygpt_lite.errors import ConversionError

STATE = "steps.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_T = TypeVar("_T")


class Staging:
    """Use it as a context manager; `finish` puts the bundle into its place.

    What is left of it depends on how it ends. An interruption, a disk that is full, or a `refusal` leaves the files of
    finished steps, in a hidden folder beside the target, and says so; any other error leaves nothing. A process that is
    killed leaves what it had, and the next one drops all that belongs to no finished step.

    Parameters
    ----------
    output
        The bundle's folder, untouched until `finish`.
    request
        All that decides about the result, as JSON; finished steps of another request are dropped.

    Attributes
    ----------
    folder, bundle, reference
        The hidden folder, and in it the folders of what goes into the bundle and of what it is compared with.

    Raises
    ------
    ConversionError
        Another process is making the same bundle, or the folder cannot be written.
    KeyboardInterrupt
        As it came, with the sentence that says where finished steps are kept.
    """

    def __init__(self, output: Path, request: object) -> None:
        self.folder = output.with_name(f".{output.name}.partial")
        self.bundle, self.reference = self.folder / "bundle", self.folder / "reference"
        self._output = output
        self._key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        self._lock = FileLock(output.with_name(f".{output.name}.lock"))
        self._done: dict[str, dict[str, Any]] = {}
        self._refusal: ConversionError | None = None

    def __enter__(self) -> Staging:
        with self._in_words():
            self.folder.mkdir(exist_ok=True)  # before the lock, which takes a folder that is closed for one in use
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise ConversionError(
                    f"another process is making {self._output}; wait for it, or choose another place"
                ) from error
            self._done = self._noted()
            if not self._done:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(exist_ok=True)  # another process may be before the lock
            for folder in (self.bundle, self.reference):
                folder.mkdir(exist_ok=True)
            self._drop_unfinished()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        meant = interrupted or _is_full(error) or (error is not None and error is self._refusal)
        stays = meant and bool(self._done)
        try:
            if stays:
                self._drop_unfinished()
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            # Removed while it is held: after that it may be another process's already. One that has it open sees that
            # it is gone; where the system keeps open files in place (Windows), it stays.
            with suppress(OSError):
                os.unlink(self._lock.lock_file)
            self._lock.release()
        if isinstance(error, OSError):
            raise self._sentence(error) from error
        if interrupted and stays:
            raise KeyboardInterrupt(f"interrupted; {self._kept()}") from error

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the steps that are done, by this run or an earlier one."""
        return tuple(self._done)

    def step(self, name: str, files: Sequence[str], make: Callable[[], _T]) -> _T:
        """The result of `make`, or of the run that finished this step.

        Parameters
        ----------
        files
            Names, relative to `folder`, that `make` writes; patterns are allowed.
        make
            Gives something that JSON can hold.
        """
        if name in self._done:
            result: _T = self._done[name]["result"]
            return result
        result = make()
        written = sorted({path for pattern in files for path in self.folder.glob(pattern)})
        for path in written:
            _to_disk(path)
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in written}
        self._done[name] = {"files": sizes, "result": result}
        state = self.folder / STATE
        part = state.with_suffix(".part")
        part.write_text(json.dumps({"request": self._key, "done": self._done}))
        _to_disk(part)
        part.replace(state)
        return result

    def refusal(self, message: str) -> ConversionError:
        """An error to raise where what was made could still be wanted: finished steps stay, and the message says so."""
        self._refusal = ConversionError(f"{message}; {self._kept()}")
        return self._refusal

    def written(self) -> int:
        """Bytes in the folder so far; what lies there under two names counts once."""
        stats = [path.stat() for path in self.folder.rglob("*") if not path.is_dir()]
        return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())

    def finish(self) -> None:
        """Rename the folder `bundle` to the target; what was there comes back on failure."""
        with self._in_words():
            old = self._output.with_name(f".{self._output.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            if self._output.exists():
                self._output.rename(old)
            try:
                self.bundle.rename(self._output)
            except BaseException:
                if old.exists():
                    old.rename(self._output)
                raise
            shutil.rmtree(old, ignore_errors=True)

    def _noted(self) -> dict[str, dict[str, Any]]:
        """Finished steps of this request whose files are all there, up to the first that is not whole."""
        try:
            state = json.loads((self.folder / STATE).read_bytes())
            done: dict[str, dict[str, Any]] = state["done"] if state["request"] == self._key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        whole: dict[str, dict[str, Any]] = {}
        for name, step in done.items():
            if any(_size(self.folder / file) != size for file, size in step["files"].items()):
                break
            whole[name] = step
        return whole

    def _drop_unfinished(self) -> None:
        known = {STATE, *(file for step in self._done.values() for file in step["files"])}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if not path.is_dir() and path.relative_to(self.folder).as_posix() not in known:
                path.unlink()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._sentence(error) from error

    def _sentence(self, error: OSError) -> ConversionError:
        if not _is_full(error):
            return ConversionError(f"the bundle {self._output} could not be written: {error.strerror or error}")
        message = (
            f"the bundle {self._output} could not be written: the disk is full, or a limit on file sizes was reached"
        )
        if self._done:
            message += f"; {self._kept()}"
        return ConversionError(message)

    def _kept(self) -> str:
        return f"finished steps are kept in {self.folder}, and the same command goes on there"


def _is_full(error: BaseException | None) -> bool:
    if not isinstance(error, OSError):
        return False
    return error.errno in _FULL or (error.errno is None and "requested and" in str(error))  # the latter: numpy's tofile


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
