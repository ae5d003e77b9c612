"""What every command says on stderr, and the files that may take a command's output."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path

import click

from xraygpt_lite.errors import UsageError, XrayError
from xraygpt_lite.report.text import one_line, printable

PROGRAM = "xraygpt-lite"


def prepare() -> None:
    """Let what a stream's encoding cannot express appear as an escape, not as an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence_stdout() -> None:
    """Drop what stdout still holds: writing it has failed, and would fail again, loudly, at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def out(text: str) -> None:
    """`text` on stdout, at once."""
    if text:
        click.echo(text, nl=False)


def error(message: str) -> None:
    _say("error", message)


def warn(message: str) -> None:
    _say("warning", message)


def doing(what: str) -> None:
    """Say what now takes time."""
    click.echo(f"{what} …", err=True)


def _say(kind: str, message: str) -> None:
    click.echo(f"{PROGRAM}: {kind}: {one_line(message)}", err=True)


def check_name(output: str) -> None:
    """Raise UsageError where -o names no file: "", ".", "/"."""
    if not Path(output).name:
        raise UsageError(f"-o {output!r} is no file's name")


class Live:
    """One answer on stdout, piece by piece."""

    def __init__(self) -> None:
        self._shown = ""

    def piece(self, text: str) -> None:
        fresh = printable(text)
        self._shown += fresh
        out(fresh)

    def end(self, final: str) -> None:
        """Close the line; print `final`, a line or more, where the pieces did not say it."""
        if self._shown and not self._shown.endswith("\n"):
            out("\n")
        if self._shown.strip() != printable(final).strip():
            out(printable(final))


class OutputFile:
    """A file named by an option: checked before the work, written at once after it, never half.

    Parameters
    ----------
    path
        Where to write; a link is followed.
    inputs
        Files that are read: none of them is overwritten.
    option
        What the user named it by.

    Raises
    ------
    UsageError
        Nothing can be written there.
    """

    def __init__(self, path: str, inputs: Iterable[str], option: str = "-o") -> None:
        self._name = f"{option} {path}"
        self._path = Path(os.path.realpath(path))
        # Not by the process's number: in containers, two that share a folder may have the same.
        self._draft = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.tmp")
        if self._path.exists():
            if not self._path.is_file():
                raise UsageError(f"{self._name} is not a regular file; name a file, or leave {option} out")
            if any(os.path.exists(name) and os.path.samefile(name, path) for name in inputs):
                raise UsageError(f"{self._name} is one of the images; name another file")
        try:
            self._draft.touch(exist_ok=False)
            self._draft.unlink()
        except OSError as cause:
            raise UsageError(f"{self._name} cannot be written: {cause.strerror}") from cause

    def same_as(self, other: OutputFile) -> bool:
        """Whether both would write one file."""
        return self._path == other._path

    def write(self, data: bytes) -> None:
        """Put `data` in the file's place, whole; raises as `write_all`."""
        self.write_all([data])

    def write_all(self, pieces: Iterable[bytes]) -> None:
        """As `write`, with pieces that are made while they are written.

        Raises
        ------
        XrayError
            The disk is full or the folder is gone; the file is as it was before.
        """
        try:
            with open(self._draft, "xb") as draft:
                if self._path.exists():
                    os.chmod(self._draft, self._path.stat().st_mode & 0o777)
                draft.writelines(pieces)
                draft.flush()
                os.fsync(draft.fileno())
            os.replace(self._draft, self._path)
        except OSError as cause:
            raise XrayError(f"{self._name} could not be written: {cause.strerror}") from cause
        finally:
            self._draft.unlink(missing_ok=True)
