"""`xraygpt-lite summarize`: one loaded model, a record for each image."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from xraygpt_lite.cli import console, options
from xraygpt_lite.errors import BundleError, CancelledError, UsageError, XrayError

if TYPE_CHECKING:
    from xraygpt_lite import XrayModel
    from xraygpt_lite.report import Format
    from xraygpt_lite.values import Corners, GenerationOptions, Manifest, Radiograph, Record, Summary

MARKUP = "{<10000><10000><10000><10000>}"  # a box's, at its longest


@click.command("summarize")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--question", metavar="TEXT", help="What to ask; by default the bundle's or the task's own question.")
@click.option("--task", metavar="NAME", help="A form of question that the bundle's model was trained for.")
@click.option("--box", metavar="X0,Y0,X1,Y1", help="For a task about a rectangle: pixels of the original image.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, failures included.")
@click.option("-o", "--output", metavar="FILE", help="Write to FILE, whole or not at all, instead of printing.")
@click.option("--overlay", metavar="OUT.png", help="Draw the answer's boxes on the image (one image only).")
@click.option("--quiet", is_flag=True, help="No warnings; errors stay.")
@options.model_options
@options.generation_options
def command(
    images: tuple[str, ...],
    question: str | None,
    task: str | None,
    box: str | None,
    as_json: bool,
    output: str | None,
    overlay: str | None,
    quiet: bool,
    bundle: str | None,
    device: str,
    threads: int | None,
    variant: str | None,
    **given: Any,
) -> int:
    """Describe chest radiographs in words.

    IMAGE is a DICOM, PNG, JPEG or TIFF file; - reads one from standard input. Several images are answered by one
    loaded model, in order, and one that cannot be read, or that --box does not fit, does not stop the others (exit
    code 3).
    """
    if images.count("-") > 1:
        raise UsageError("- stands for standard input and can be read once only")
    target = console.OutputFile(output, images) if output not in (None, "-") else None
    picture = _picture(overlay, images, target) if overlay is not None else None
    corners = options.box(box) if box is not None else None
    import xraygpt_lite
    from xraygpt_lite.report import FORMATS
    from xraygpt_lite.values import Failure, Summary

    wanted = options.generation(**given)
    several = len(images) > 1
    form = FORMATS["json" if as_json else "text"]
    written: list[str] = []
    put = written.append if target else console.out
    live = target is None and not as_json and sys.stdout.isatty()
    show = _live if live else partial(_whole, form, put)
    records: list[Record] = []
    rows = partial(_rows, question, wanted, task, corners, variant)
    with xraygpt_lite.load(bundle, device=device, threads=threads, context=rows) as model:
        asked = model.check(question, wanted, task=task, box=corners, variant=variant)
        ask = _Ask(model, question, asked.question, wanted, task, corners, variant, several)
        for image in images:
            records.append(show(ask, image, several))
            _remark(records[-1], several, quiet)
    put(form.end(records))
    failures = sum(isinstance(record, Failure) for record in records)
    if target and (as_json or failures < len(records)):
        target.write("".join(written).encode())
    if picture and ask.radiograph and isinstance(records[0], Summary):
        _draw(picture, ask.radiograph, records[0], quiet)
    return 0 if not failures else 3 if several else 1


@dataclass
class _Ask:
    """What is asked of every image; `radiograph` is what the last answer is about."""

    model: XrayModel
    question: str | None
    asked: str
    options: GenerationOptions
    task: str | None
    box: Corners | None
    variant: str | None
    several: bool
    radiograph: Radiograph | None = None

    def __call__(self, image: str, piece: Callable[[str], object] | None = None) -> Record:
        """The record of one image; `piece` is told the text as it comes. What concerns every image is raised.

        Question, task and options were checked before: a usage error that is left concerns this image, e.g. a box
        outside it. Of one image that is wrong usage; among several, it must not stop the others.
        """
        from xraygpt_lite.values import Failure

        if image == "-" and sys.stdin is None:
            raise UsageError("there is no standard input to read an image from")
        data = sys.stdin.buffer.read() if image == "-" else image
        try:
            with self.model.stream(
                data, self.question, self.options, task=self.task, box=self.box, variant=self.variant
            ) as stream:
                for text in stream:
                    if piece:
                        piece(text)
                self.radiograph = stream.radiograph
                return replace(stream.summary, source=image)
        except (BundleError, CancelledError):
            raise
        except XrayError as error:
            if isinstance(error, UsageError) and not self.several:
                raise
            return Failure(image, _sha256(data), self.asked, error.stage, type(error).__name__, str(error))


def _rows(
    question: str | None,
    options: GenerationOptions,
    task: str | None,
    box: Corners | None,
    variant: str | None,
    manifest: Manifest,
) -> int:
    """Rows of the KV cache that no first turn exceeds: at seven billion parameters half a megabyte each."""
    from xraygpt_lite import prompt
    from xraygpt_lite.options import resolve

    _, wording = prompt.variant_of(manifest.prompt, variant)
    text = prompt.wording(manifest.prompt, prompt.ask(manifest.prompt, question, task, box), MARKUP)
    return prompt.most_rows(manifest, wording, text, resolve(options, manifest).max_tokens)


def _whole(form: Format, put: Callable[[str], object], ask: _Ask, image: str, several: bool) -> Record:
    """One record, written when it is finished."""
    record = ask(image)
    put(form.record(record, several))
    return record


def _live(ask: _Ask, image: str, several: bool) -> Record:
    """One answer on a terminal as it comes; a text that the clean-up changes is shown again, as the record has it."""
    from xraygpt_lite.report import text

    if several:
        console.out(text.heading(image))
    screen = console.Live()
    record = ask(image, screen.piece)
    screen.end(text.record(record, False))
    if several:
        console.out("\n")
    return record


def _remark(record: Record, several: bool, quiet: bool) -> None:
    """Errors and warnings of one record, on stderr."""
    where = f"{record.source}: " if several else ""
    from xraygpt_lite.values import Failure

    if isinstance(record, Failure):
        console.error(record.message if record.source in record.message else where + record.message)
    elif not quiet:
        for warning in record.warnings:
            console.warn(where + warning)


def _picture(overlay: str, images: tuple[str, ...], target: console.OutputFile | None) -> console.OutputFile:
    """The file of --overlay, checked."""
    if len(images) > 1:
        raise UsageError(f"--overlay draws on one image, and {len(images)} are named; run it for each of them")
    if not overlay.lower().endswith(".png"):
        raise UsageError(f"--overlay {overlay} is written as PNG; name a file that ends in .png")
    picture = console.OutputFile(overlay, images, "--overlay")
    if target and target.same_as(picture):
        raise UsageError(f"-o and --overlay name the same file, {overlay}; name two")
    return picture


def _draw(picture: console.OutputFile, radiograph: Radiograph, summary: Summary, quiet: bool) -> None:
    from xraygpt_lite.report import overlay

    if not summary.boxes and not quiet:
        console.warn("the answer holds no box that could be drawn; the overlay shows the image alone")
    picture.write(overlay.render(radiograph.pixels, summary))


def _sha256(data: str | bytes) -> str | None:
    """Of the bytes, or of the regular file of this name; None where it cannot be read."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    try:
        if not os.path.isfile(data):
            return None
        with open(data, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
