"""The arguments of a batch become a list of named files, in an order that does not depend on the machine.

It knows no image: whether a file is a radiograph is told by its content, later, and what cannot be read fails then.
Only folders and lists are read here.
"""

from __future__ import annotations

import csv
import errno
import fnmatch
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from xraygpt_lite.errors import UsageError, XrayError

ORDERS = ("name", "given", "newest", "oldest", "random")
NO_IMAGES = frozenset(
    ".txt .csv .tsv .json .jsonl .xml .html .htm .md .rst .rtf .pdf .doc .docx .xls .xlsx .ppt .pptx .zip .gz "  # noqa: SIM905
    ".bz2 .xz .zst .7z .rar .tar .tgz .py .ipynb .sh .bat .yaml .yml .toml .ini .cfg .log .lock .running .salt "
    ".tmp .part .bak .md5 .sha1 .sha256 .db .sqlite .parquet .npy .npz .onnx .gguf .safetensors".split()
)
"""Extensions, in lower case, of files that are left out of folders and patterns; so is the index file `DICOMDIR`."""

_MAGIC = re.compile(r"[*?\[]")
_NUMBER = re.compile(r"(?=[0-9])0*([0-9]*)")
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)  # the last: "*" in a path on Windows
_Candidate = tuple[str, str, str | None]  # name, path, and the path without links where that is known already


@dataclass(frozen=True, slots=True)
class Input:
    """One file: `name` is its path below its root, with "/" on every system: what records and resuming know it by;
    `path` is where it is read. Bytes that are no UTF-8 are lone surrogates in both, as `os.fsdecode` makes them."""

    name: str
    path: Path


def find(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    order: str = "name",
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    stdin: Iterable[str] | None = None,
) -> list[Input]:
    """The files that `arguments` name: named, then filtered, then a shard of them, ordered, and the first `limit`.

    A name depends on the arguments alone, never on filters or order. The same file found twice, also through a link, is
    one input under its first name; of two files with one name the later one's name is its absolute path.

    Parameters
    ----------
    arguments
        Each is the first of these that fits:

        - "-": the lines of `stdin` are paths from the working folder; blank lines are skipped.
        - A folder: every file in it and below that `could_be_radiograph`. Links to files are followed, those to
          folders are not; a link that leads nowhere is taken, so that it fails in sight. Names begin below the folder,
          or with its own name where several folders are given ("a/x.png", then "a-2/x.png" for another "a").
        - A list in UTF-8: a `.txt` file with one path a line (blank lines and lines that begin with "#" are skipped)
          or a `.csv` file with a column titled path or file. Every path in it is taken, seen from the list's folder,
          whether it exists or not; its name is as written.
        - A file: taken whatever it is; its name is as given.
        - A pattern with "*", "?", "[…]" or "**" (any folders below): the files that it matches, none behind linked
          folders, none that cannot be images, and hidden ones only where the pattern writes their dot.
    include, exclude
        Patterns as in `matcher`.
    order
        "name": numbers in names by their value (img2 before img10), the rest by code point. "given": as the arguments
        stand, a folder's files by code point and before its folders. "newest", "oldest": by time of change, files
        that are not there last. "random": always the same shuffle, so that the first N are a fair sample.
    limit
        At least 1; None takes all.
    shard
        (k, n), k from 1 to n: see `in_shard`. A shard may be empty.
    stdin
        Lines with or without their end; needed for "-".

    Raises
    ------
    UsageError
        An argument that names nothing, a list that cannot be meant, an option out of range, or nothing found at all.
    XrayError
        A folder or list that cannot be read; the message gives the system's reason.
    """
    if order not in ORDERS:
        raise UsageError(f"order {order!r} is unknown; expected one of {', '.join(ORDERS)}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; expected 1 or more")
    if shard:
        parse_shard(f"{shard[0]}/{shard[1]}")
    given = [os.fspath(argument) for argument in arguments]
    found = _Found()
    for candidate in _candidates(given, stdin):
        found.add(*candidate)
    if not found.paths:
        raise UsageError(
            f"no file found in {_shown(given)}. Hidden files, linked folders and files that cannot be images by their "
            "extension (.txt, .json, .zip …) are left out of folders; name a file itself to take it."
        )
    names = list(filter(matcher(include, exclude), found.paths))
    if not names:
        raise UsageError(
            f"{len(found.paths)} found in {_shown(given)}, none left by include {_shown(include) or '*'} and exclude "
            f"{_shown(exclude) or 'nothing'}. They are compared with whole names and last parts, case-sensitive."
        )
    if shard:
        names = [name for name in names if in_shard(name, shard)]
    return [Input(name, Path(found.paths[name])) for name in _ordered(names, order, found.paths)[:limit]]


def could_be_radiograph(file_name: str) -> bool:
    """Whether a folder's file is taken: it is not hidden and its extension (`NO_IMAGES`) does not speak against it."""
    return not file_name.startswith(".") and _may_be_image(file_name)


def matcher(include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Callable[[str], bool]:
    """Tells whether a name is wanted: it matches a pattern of `include`, if there is one, and none of `exclude`.

    Patterns are those of `fnmatch.fnmatchcase`, compared with the whole name and with its last part; "*" takes "/" too.
    """

    def any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
        match = re.compile("|".join(map(fnmatch.translate, patterns))).match
        return lambda name: bool(match(name) or match(name.rpartition("/")[2]))

    wanted, unwanted = any_of(include or "*"), any_of(exclude)
    return lambda name: wanted(name) and not (exclude and unwanted(name))


def parse_shard(text: str) -> tuple[int, int]:
    """ "3/16" → (3, 16).

    Raises
    ------
    UsageError
        Anything else than K/N with 1 ≤ K ≤ N.
    """
    numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UsageError(f"shard {text!r} is not of the form K/N with K from 1 to N; the third of sixteen is 3/16")
    return int(numbers[1]), int(numbers[2])


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether the input `name` belongs to the k-th of n parts, decided by its sha256 alone, not by other inputs."""
    number, parts = shard
    return int.from_bytes(_digest(name)[:8], "big") % parts == number - 1


def _candidates(given: Sequence[str], stdin: Iterable[str] | None) -> Iterator[_Candidate]:
    if not given:
        raise UsageError("no input was given; name files, folders, patterns or lists, or - for paths on standard input")
    kinds = [_kind(text) for text in given]  # all, before any folder is walked: a slip should show at once
    labels = folder_labels(text for text, kind in zip(given, kinds, strict=True) if kind == "folder")
    for text, kind in zip(given, kinds, strict=True):
        if kind == "folder":
            real = os.path.realpath(text)
            yield from _walk(text, real, labels[real])
        elif kind == "pattern":
            yield from _matches(text)
        elif kind == "list":
            yield from _listed(text)
        elif kind == "stdin":
            if stdin is None:
                raise UsageError("- stands for paths on standard input, and there is none; name files or folders")
            yield from _named(_lines(stdin, comments=False), "standard input", "")
        else:
            yield PurePath(text).as_posix(), text, None


def _kind(text: str) -> str:
    if text == "-":
        return "stdin"
    _check_path(text, "an argument")
    mode = _mode(text)
    if stat.S_ISDIR(mode):
        return "folder"
    if mode:
        return "list" if text.lower().endswith((".txt", ".csv")) else "file"
    if _MAGIC.search(text):
        return "pattern"
    raise UsageError(f"{text or repr(text)}: there is no such file or folder. Check the path.")


def folder_labels(folders: Iterable[str]) -> dict[str, str]:
    """What the names of each folder's files begin with, by the folder's real path, in the order given."""
    labels: dict[str, str] = {}
    times: Counter[str] = Counter()
    for folder in folders:
        real = os.path.realpath(folder)
        if real in labels:
            continue
        own = label = os.path.basename(os.path.abspath(folder)) or "root"
        while label in times:
            times[own] += 1
            label = f"{own}-{times[own]}"
        times[label] += 1
        labels[real] = label + "/"
    return labels if len(labels) > 1 else dict.fromkeys(labels, "")


def _walk(folder: str, real: str, label: str) -> Iterator[_Candidate]:
    waiting = [""]
    while waiting:
        below = waiting.pop()
        files, folders = _list(os.path.join(folder, below), "*")
        for file in files:
            name = below + file.name
            # No linked folder is entered, so that only the last part of a path can be a link.
            yield label + name, file.path, None if file.is_symlink() else os.path.join(real, name)
        waiting += [f"{below}{entry.name}/" for entry in reversed(folders)]


def _matches(pattern: str) -> Iterator[_Candidate]:
    """The files that a pattern matches; a part of it that exists as it is written is meant as it is written."""
    root, parts = "", list(Path(pattern).parts)
    while len(parts) > 1 and (not _MAGIC.search(parts[0]) or _mode(os.path.join(root, parts[0]))):
        root = os.path.join(root, parts.pop(0))
    waiting = [(root, parts)] if stat.S_ISDIR(_mode(root or ".")) else []
    done: set[tuple[str, int]] = set()  # "**/a/**" comes to a folder on several ways
    anything = False
    while waiting:
        folder, parts = waiting.pop()
        if (folder, len(parts)) in done:
            continue
        done.add((folder, len(parts)))
        part, *rest = parts
        files, folders = ([os.path.join(folder, entry.name) for entry in some] for some in _list(folder or ".", part))
        if not rest:
            anything = anything or bool(files)
            yield from ((PurePath(path).as_posix(), path, None) for path in files)
        deeper = parts if part == "**" else rest
        waiting += [(path, deeper) for path in reversed(folders) if deeper]
        if part == "**" and rest:
            waiting.append((folder, rest))
    if not anything:
        raise UsageError(f"{pattern}: neither a path nor a pattern of files that could be radiographs. Check it.")


def _list(folder: str, part: str) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Files and folders of a folder that this part of a pattern matches, sorted: a system lists them in any order."""

    def fits(name: str) -> bool:
        hidden = name.startswith(".") and not part.startswith(".")
        return not hidden and (part in ("*", "**") or fnmatch.fnmatch(name, part))

    try:
        with os.scandir(folder) as scan:
            entries = sorted((entry for entry in scan if fits(entry.name)), key=lambda entry: entry.name)
        folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        return [entry for entry in entries if _may_be_image(entry.name) and _is_file(entry)], folders
    except OSError as error:
        raise unreadable(folder, error) from None


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode) if entry.is_symlink() else entry.is_file()
    except OSError:  # a link that leads nowhere, or where this user may not look: it fails later, in sight
        return True


def _listed(path: str) -> Iterator[_Candidate]:
    try:
        # Names need not be UTF-8; a list of such names is kept as bytes by the system and comes through as it is.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            rows = _column(file, path) if path.lower().endswith(".csv") else _lines(file, comments=True)
            yield from _named(rows, path, os.path.dirname(path))
    except OSError as error:
        raise unreadable(path, error) from None


def _named(rows: Iterable[tuple[int, str]], source: str, folder: str) -> Iterator[_Candidate]:
    for number, text in rows:
        _check_path(text, f"{source}, line {number}: the path")
        yield PurePath(text).as_posix(), os.path.join(folder, text), None


def _lines(lines: Iterable[str], comments: bool) -> Iterator[tuple[int, str]]:
    """Number and path of each line. Blanks at either end of a line belong to the path."""
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n").removesuffix("\r")
        if text.strip() and not (comments and text.startswith("#")):
            yield number, text


def _column(file: Iterable[str], source: str) -> Iterator[tuple[int, str]]:
    """Line number and path of each row of a CSV file; rows without anything are skipped."""
    rows = csv.reader(file)
    try:
        header = [title.strip().lower() for title in next(rows, [])]
        at = next((header.index(title) for title in ("path", "file") if title in header), None)
        if at is None:  # the titles are not shown: where the header was forgotten they are data
            columns = f"{len(header)} columns between commas, none titled path or file"
            raise UsageError(f"{source}: the first line has {columns}; a CSV list needs a header with one of them")
        for row in rows:
            if len(row) > at and row[at].strip():
                yield rows.line_num, row[at]
            elif any(cell.strip() for cell in row):
                raise UsageError(f"{source}, line {rows.line_num}: the column {header[at]} is empty; expected a path")
    except csv.Error as error:
        raise UsageError(f"{source}, line {rows.line_num}: this is no CSV ({error}). Check the file.") from None


class _Found:
    """What was found: `paths` by name, in order; the names are unique, and so are the files behind them."""

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self._files: set[str] = set()
        self._folders: dict[str, str] = {}

    def add(self, name: str, path: str, real: str | None) -> None:
        real = real or self._real(path)
        if (file := os.path.normcase(real)) in self._files:
            return
        self._files.add(file)
        # A real path is no other file's name: names from folders are relative, others lead to the file they name.
        self.paths[PurePath(real).as_posix() if name in self.paths else name] = path

    def _real(self, path: str) -> str:
        """`path` without links. A long list asks for few folders many times, so these are remembered."""
        folder, last = os.path.split(path)
        if last in ("", os.curdir, os.pardir) or os.path.islink(path):
            return os.path.realpath(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return os.path.join(self._folders[folder], last)


def _ordered(names: list[str], order: str, paths: dict[str, str]) -> list[str]:
    if order == "random":
        return sorted(names, key=lambda name: _digest(name)[8:])  # other bytes than those that decide the shard
    if order != "given":
        names = sorted(names, key=_natural)
    if order in ("given", "name"):
        return names
    sign = -1 if order == "newest" else 1

    def age(name: str) -> tuple[bool, int]:
        try:
            return False, sign * os.stat(paths[name]).st_mtime_ns
        except OSError:
            return True, 0

    return sorted(names, key=age)


def _natural(name: str) -> tuple[str, str]:
    """Sorts "img2" before "img10": before each number stands its length."""
    return _NUMBER.sub(lambda number: f"0{len(number[1]):04}{number[1]}", name), name


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def _may_be_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() not in NO_IMAGES and name.upper() != "DICOMDIR"


def _mode(path: str) -> int:
    """The file mode behind a path; 0 where nothing is."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        raise unreadable(path, error) from None


def unreadable(path: str, error: OSError) -> XrayError:
    return XrayError(f"{path}: cannot be read ({error.strerror}). Check it and its permissions, or leave it out.")


def _shown(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _check_path(path: str, where: str) -> None:
    try:
        if b"\0" not in os.fsencode(path):
            return
    except UnicodeEncodeError:
        pass
    raise UsageError(f"{where} holds a character that no path can hold; expected paths in UTF-8 between line ends")
