"""The lines of a journal: a header, then one entry a line; how they are written, and read back as a stream.

Knows no other line than the one it is at, and writes no file. `journal.schema.json` in `report/` describes them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xraygpt_lite import records
from xraygpt_lite.batch.durable import in_words
from xraygpt_lite.errors import UsageError, XrayError
from xraygpt_lite.values import Record

SCHEMA = "xraygpt-lite/journal/1"
_FIRST = re.compile(rb'\s*\{\s*"schema"\s*:\s*"xraygpt-lite/journal/([1-9][0-9]{0,8})"')
_DIGEST = re.compile("[0-9a-f]{64}")
_SHOWN = 200  # characters of an option's value in a message


@dataclass(frozen=True)
class Header:
    """First line of a journal: all that decides about what its records say.

    Attributes
    ----------
    options
        JSON values; "questions" is a list where it is given, "identifiers" false where names are kept out.
    inputs
        How many inputs the run was given, those of its shard; None while watching.
    shard
        (3, 16): the third of sixteen parts of the inputs; None: all of them.
    version
        Of the package that wrote this line.
    salt
        Tells one salt from another (`Keys.fingerprint`); the journal fills it in.
    """

    bundle_id: str
    bundle_name: str
    options: dict[str, Any]
    inputs: int | None
    shard: tuple[int, int] | None
    disclaimer: str
    version: str
    salt: str | None = None
    schema: str = SCHEMA

    def line(self) -> bytes:
        written = records.plain(self)
        return records.line({"schema": written.pop("schema"), **written}).encode("ascii")


@dataclass(frozen=True)
class Entry:
    """A record and what a later run knows it by.

    Attributes
    ----------
    input
        What the input is called: `Input.name`, or `Keys.label` of it where identifiers are off.
    key, file
        `Keys.key` and `Keys.file`, hex.
    """

    input: str
    key: str
    file: str
    record: Record

    def line(self) -> bytes:
        if not (_DIGEST.fullmatch(self.key) and _DIGEST.fullmatch(self.file)):
            raise ValueError("key and file are sha256 digests: 64 lower-case hex digits")
        written = records.to_json(self.record)
        about = {"schema": written.pop("schema"), "input": self.input, "key": self.key, "file": self.file}
        return records.line_of({**about, **written}).encode("ascii")


def read(path: Path) -> tuple[Header, Iterator[Entry]]:
    """A journal as a stream, for reports and merging; it may be in use by a run.

    Returns
    -------
    tuple
        The header, and the entries, which are read as they are asked for. A torn last line is passed over.

    Raises
    ------
    UsageError
        The file is no journal.
    XrayError
        It cannot be read, a newer version wrote it, or (while iterating) a line is damaged; the message has its number.
    """
    with in_words(f"{path} cannot be read"):
        path.stat()
        header = read_header(path, str(path))
    if header is None:
        raise UsageError(f"{path} is empty; name a journal that `xraygpt-lite batch` wrote")
    return header, (entry for entry, _ in entries(path, str(path)))


def is_journal(path: Path, shown: str) -> bool:
    """Whether a journal, of whatever version, lies there; False where nothing does, or an empty file.

    Raises
    ------
    UsageError
        Something else lies there.
    """
    if not path.exists():
        return False
    if path.is_file():  # a pipe would wait here
        with path.open("rb") as file:
            start = file.read(100)
        if not start or _FIRST.match(start):
            return bool(start)
    raise UsageError(f"{shown} is no journal of this program, and is left as it is; choose another file")


def read_header(path: Path, shown: str) -> Header | None:
    """The first line; None where there is no file, or an empty one.

    Raises
    ------
    UsageError
        Something else lies there.
    XrayError
        It is damaged, or of a newer schema.
    """
    if not is_journal(path, shown):
        return None
    with path.open("rb") as file:
        raw = file.readline()
    first = _FIRST.match(raw)
    if first and first[1] != b"1":
        raise XrayError(
            f"{shown} is a journal of schema {first[1].decode()}, and this version reads schema 1; update the program, "
            "or choose another output"
        )
    try:
        if not raw.endswith(b"\n"):
            raise ValueError("it has no end")
        return records.parse(Header, _json(raw))
    except ValueError as error:
        raise _damaged(shown, 1, error) from error


def entries(path: Path, shown: str) -> Iterator[tuple[Entry, bytes]]:
    """The entries of a file that is a journal, each with its line; ends before a last line that is torn.

    Raises
    ------
    XrayError
        A line is damaged and others follow, or what stands in it is no entry; the message has its number.
    """
    torn: XrayError | None = None
    with in_words(f"{shown} cannot be read"), path.open("rb") as file:
        file.readline()
        for number, raw in enumerate(file, 2):
            if torn:
                raise torn
            if not raw.endswith(b"\n"):
                return
            try:
                value = _json(raw)
            except ValueError as error:
                torn = _damaged(shown, number, error)  # unless it is the last
                continue
            try:
                entry = _entry(value)
            except ValueError as error:
                raise _damaged(shown, number, error) from error
            yield entry, raw


def differences(one: Header, other: Header, *, shards: bool = True) -> list[tuple[str, str, str]]:
    """(name, value in one, value in other) of what decides about the records and is not the same.

    Questions may speak of a patient: they are told apart by a digest.
    """
    found = [
        (name, seen, asked)
        for name, seen, asked in (
            ("bundle", f"{one.bundle_name} ({one.bundle_id[:12]})", f"{other.bundle_name} ({other.bundle_id[:12]})"),
            ("shard", _shard(one.shard), _shard(other.shard)),
        )
        if seen != asked and (shards or name != "shard")
    ]
    left, right = dict(_flat(one.options)), dict(_flat(other.options))
    for name in dict.fromkeys((*left, *right)):
        seen, asked = left.get(name, "not given"), right.get(name, "not given")
        if seen != asked:
            found.append((name, _cut(seen), _cut(asked)))
    return found


def _entry(value: Any) -> Entry:
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    for name in ("input", "key", "file"):
        text = value.get(name)
        if not isinstance(text, str) or (name != "input" and not _DIGEST.fullmatch(text)):
            raise ValueError(f"{name} is missing, or no {'text' if name == 'input' else 'digest'}")
    return Entry(value["input"], value["key"], value["file"], records.from_json(value))


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):  # the decoders' own messages quote the line
        raise ValueError("it is not whole") from None


def _damaged(shown: str, number: int, error: ValueError) -> XrayError:
    return XrayError(
        f"{shown}, line {number} is damaged: {error}. Nothing was changed; put the file back from a copy or take that "
        "line out, or begin anew with --restart"
    )


def _shard(shard: tuple[int, int] | None) -> str:
    return f"{shard[0]}/{shard[1]}" if shard else "none"


def _flat(value: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """Options by their full names, with their values as JSON."""
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{at}{name}.")
            continue
        text = json.dumps(records.plain(item), sort_keys=True)
        if at + name == "questions" and isinstance(item, list):
            text = f"{len(item)} (sha256 {hashlib.sha256(text.encode('ascii')).hexdigest()[:8]})"
        yield at + name, text


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
