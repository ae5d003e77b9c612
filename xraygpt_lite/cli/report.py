"""`xraygpt-lite report`: what a batch run has recorded, as a page, a table or text."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xraygpt_lite.cli import console
from xraygpt_lite.errors import UsageError, XrayError

if TYPE_CHECKING:
    from xraygpt_lite.batch.journal import Header
    from xraygpt_lite.report.survey import Named
    from xraygpt_lite.report.thumbnail import Thumbnail
    from xraygpt_lite.values import Record

FORMATS = ("text", "csv", "html")
_ENDINGS = {".csv": "csv", ".html": "html", ".htm": "html"}
# A file whose decoding failed may crash or hang a decoder, here too: thumbnails are made of what a run could decode.
_DECODED = {"preprocess", "vision", "prompt", "generate"}


@click.command("report")
@click.argument("journal", metavar="OUT", type=click.Path(exists=True, dir_okay=False))
@click.option("--format", "form", type=click.Choice(FORMATS), help="By default what FILE ends in, else text.")
@click.option("-o", "--output", metavar="FILE", help="Write to FILE, whole or not at all, instead of printing.")
@click.option("--thumbnails/--no-thumbnails", default=True, help="In a page: a small picture of every radiograph.")
@click.option("--root", "roots", multiple=True, metavar="DIR", help="Where the radiographs are now; may be repeated.")
def command(journal: str, form: str | None, output: str | None, thumbnails: bool, roots: tuple[str, ...]) -> int:
    """Show the results of a batch run as a page, a table or text.

    OUT is the file that `batch` wrote; it is not changed. html is one page that needs no other file and no network:
    pictures, texts and failures to filter, sort and print. csv has a row for each record; text that a spreadsheet could
    take for a formula has an apostrophe in front.

    A picture is shown where the file still has the content that was summarized, and with all that is burned into it;
    never for a run with --no-identifiers.
    """
    if output == "-":
        output = None
    target = Target(output, journal) if output is not None else None
    form = form or _ENDINGS.get(Path(output or "").suffix.lower(), "text")
    if form == "html" and target is None and sys.stdout.isatty():
        raise UsageError("a page is nothing to read in a terminal; name a file for it with -o FILE")
    write(journal, form, target, roots if thumbnails else None)
    return 0


def write(journal: str, form: str, target: Target | None, roots: Sequence[str] | None) -> None:
    """Render the journal at this path; `roots` are searched for the radiographs, None leaves thumbnails out."""
    from xraygpt_lite.report import csv, html
    from xraygpt_lite.report.survey import survey

    header, first = _records(journal)
    seen = survey(first)
    _, records = _records(journal)
    pictures = None
    if form == "html":
        if roots is not None and header.options.get("identifiers", True):  # without names nothing can be found again
            pictures = Pictures(roots)
        if pictures and sys.stderr.isatty():
            records = _counted(records, seen.records)
        pieces = html.render(header, seen, records, pictures)
    else:
        pieces = csv.render(header, seen, records) if form == "csv" else _text(header, records)
    if target:
        target.write_all(piece.encode() for piece in pieces)
    else:
        for piece in pieces:
            console.out(piece)
    if pictures and pictures.missing:
        console.warn(
            f"{pictures.missing} of {pictures.wanted} radiographs have no picture in the page: the file is not where "
            "it was, or its content has changed; say with --root where the inputs are, or use --no-thumbnails"
        )


def _records(journal: str) -> tuple[Header, Iterator[Named]]:
    from xraygpt_lite.batch import journal as journals

    header, entries = journals.read(Path(journal))
    return header, ((entry.input, entry.record) for entry in entries)


def _text(header: Header, records: Iterable[Named]) -> Iterator[str]:
    """Every record under a heading of its own, the disclaimer at the end."""
    from xraygpt_lite.report import text
    from xraygpt_lite.values import Summary

    for name, record in records:
        yield text.heading(name)
        yield f"{text.one_line(record.question)}\n"
        if isinstance(record, Summary):
            yield text.answer(record)
        else:
            yield f"No result: {text.one_line(record.stage)} failed. {text.one_line(record.message)}\n"
        yield "\n"
    yield f"{text.printable(header.disclaimer)}\n"


def _counted(records: Iterator[Named], total: int) -> Iterator[Named]:
    """The records, with a bar on the terminal: making thumbnails takes minutes for thousands."""
    with click.progressbar(records, total, label="thumbnails", file=sys.stderr) as bar:
        yield from bar


class Pictures:
    """Thumbnails of radiographs whose files still have the content that a record is about.

    Parameters
    ----------
    roots
        Folders below which an input's name is looked for, beside the path that the record holds.

    Attributes
    ----------
    wanted, missing
        Radiographs that were asked for, and those of them without a thumbnail.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = roots
        self.wanted = self.missing = 0

    def __call__(self, name: str, records: Sequence[Record]) -> Thumbnail | None:
        from xraygpt_lite.values import Summary

        sha256 = records[0].sha256  # the same in all of them
        if sha256 is None or not any(isinstance(one, Summary) or one.stage in _DECODED for one in records):
            return None
        self.wanted += 1
        paths = dict.fromkeys([*(os.path.join(root, name) for root in self._roots), records[0].source])
        found = next(filter(None, (_thumbnail(path, sha256) for path in paths)), None)
        self.missing += found is None
        return found


def _thumbnail(path: str, sha256: str) -> Thumbnail | None:
    from xraygpt_lite.imaging.read import decode, load
    from xraygpt_lite.report import thumbnail

    try:
        data = load(path)
        if hashlib.sha256(data).hexdigest() != sha256:  # another file: nobody knows what it does to a decoder
            return None
        return thumbnail.make(decode(data, path, sha256).pixels)
    except XrayError:
        return None


class Target(console.OutputFile):
    """The file of -o.

    Raises
    ------
    UsageError
        Nothing can be written there, or it is the journal itself.
    """

    def __init__(self, path: str, journal: str, inputs: Iterable[str] = ()) -> None:
        if os.path.realpath(path) == os.path.realpath(journal):
            raise UsageError(f"-o {path} is the journal that is read; name another file")
        super().__init__(path, inputs)
