"""`xraygpt-lite batch`: an archive through one model, several radiographs at once, into a journal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xraygpt_lite.cli import console, interrupt, options
from xraygpt_lite.cli.tally import MODES, Tally
from xraygpt_lite.errors import UsageError

if TYPE_CHECKING:
    from types import FrameType

    from xraygpt_lite.batch.inputs import Input
    from xraygpt_lite.batch.runner import Run
    from xraygpt_lite.cli.report import Target
    from xraygpt_lite.model import XrayModel

_I = TypeVar("_I", bound="Input | None")
_ORDERS = ("name", "given", "newest", "oldest", "random")
_RENDERED = ("csv", "html")
_TOLD = ("auto", "plain")
"""Ways of telling the progress that have words beside it."""


@click.command("batch")
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@click.option("-o", "--output", required=True, metavar="OUT", help="The journal: a JSON line a record.")
@click.option("--question", "questions", multiple=True, metavar="TEXT", help="What to ask; may be repeated.")
@click.option("--task", metavar="NAME", help="A form of question that the bundle's model was trained for.")
@click.option("--box", metavar="X0,Y0,X1,Y1", help="For a task about a rectangle: pixels of each original image.")
@click.option("--findings", is_flag=True, help="Score every finding that the bundle lists, too.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Take only what fits one of these, e.g. '*.dcm'.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out what fits one of these.")
@click.option("--order", type=click.Choice(_ORDERS), default="name", show_default=True, help="Which come first.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many.")
@click.option("--shard", metavar="K/N", help="The K-th of N stable parts of the inputs, for array jobs.")
@click.option("--format", "form", type=click.Choice(_RENDERED), help="Render the journal beside it at the end.")
@click.option("--watch", is_flag=True, help="Keep running, and take files as they arrive in the folders.")
@click.option("--restart", is_flag=True, help="Begin anew: drop what OUT holds.")
@click.option("--retry-failed", is_flag=True, help="Do again what failed before.")
@click.option("--no-identifiers", is_flag=True, help="Keep paths, UIDs and hashes of files out of OUT.")
@click.option("--parallel", type=click.IntRange(1, 256), help="Radiographs at once; by default measured.")
@click.option("--file-timeout", type=click.FloatRange(0.1), default=300.0, show_default=True, metavar="SECONDS",
              help="Longest time to read a file, and to answer about it (n at once: n times as long).")  # fmt: skip
@click.option("--max-failures", type=click.IntRange(1), metavar="N", help="End the run once so many inputs failed.")
@click.option("--progress", type=click.Choice(MODES), default="auto", show_default=True, help="How to tell it.")
@options.model_options
@options.generation_options
def command(
    inputs: tuple[str, ...],
    output: str,
    questions: tuple[str, ...],
    task: str | None,
    box: str | None,
    findings: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    order: str,
    limit: int | None,
    shard: str | None,
    form: str | None,
    watch: bool,
    restart: bool,
    retry_failed: bool,
    no_identifiers: bool,
    parallel: int | None,
    file_timeout: float,
    max_failures: int | None,
    progress: str,
    bundle: str | None,
    device: str,
    threads: int | None,
    variant: str | None,
    **given: Any,
) -> int:
    """Summarize files, folders and lists of radiographs, several at once.

    IN is a file, a folder (with all below it), a pattern, a .txt or .csv list of paths, or - for paths on standard
    input. OUT is written as the run goes on; the same command again goes on where an earlier one ended, however it
    ended. `xraygpt-lite report OUT` shows the results.
    """
    if watch and (limit is not None or shard is not None or order != "name" or "-" in inputs):
        raise UsageError("--watch takes files as they come; leave out --limit, --shard, --order and -")
    if output == "-":
        raise UsageError("-o - would be standard output; the journal must be a file")
    console.check_name(output)
    corners = options.box(box) if box is not None else None
    wanted = options.generation(**given)
    rendered = _rendered(output, form, inputs) if form else None
    stop = threading.Event()
    with interrupt.heard():
        from xraygpt_lite.batch.inputs import find, parse_shard

        part = parse_shard(shard) if shard is not None else None
        filters: dict[str, Any] = {"include": include, "exclude": exclude}
        files: list[Input] = []
        if not watch:
            # Bytes: a name need not be valid in any encoding.
            lines = (os.fsdecode(line) for line in sys.stdin.buffer) if "-" in inputs and sys.stdin else None
            files += _others(find(inputs, order=order, limit=limit, shard=part, stdin=lines, **filters), output)
    count = None if watch else len(files)
    with _signals(stop):
        from xraygpt_lite.batch.pipeline import Ask
        from xraygpt_lite.batch.runner import Run, drained

        ask = Ask(questions or (None,), task, corners, variant, wanted, findings)
        source: Generator[Input | None]
        if watch:
            from xraygpt_lite.batch.watch import watch as arriving

            source = _others(arriving(inputs, stop, **filters), output)
        else:
            source = drained(files)
        with (
            closing(source),
            Run(
                source, ask, output=Path(output), count=count, shard=part, bundle=bundle, device=device,
                threads=threads, parallel=parallel, identifiers=not no_identifiers, restart=restart,
                retry_failed=retry_failed, file_timeout=file_timeout, max_failures=max_failures,
                stop=None if watch else stop, doing=console.doing if progress in _TOLD else lambda _: None,
            ) as run,
            Tally(progress, count) as tally,
        ):  # fmt: skip
            if progress in _TOLD:
                if parallel is None:
                    click.echo("; ".join(run.because), err=True)
                _warn(run.model)
            try:
                for _ in run:
                    tally.show(run.done, run.failed, run.skipped)
            except KeyboardInterrupt:
                console.error(f"stopped; {_counts(run)} stand in {output}. The same command goes on from there")
                return 130
            tally.show(run.done, run.failed, run.skipped)
    if rendered:
        from xraygpt_lite.cli import report

        report.write(output, str(form), rendered, ())
    _conclude(run, tally, output)
    return 3 if run.journal and run.journal.failures else 0


def _warn(model: XrayModel) -> None:
    """Say where answers depend, by more than float weights' rounding, on those that are written beside them."""
    kind = model.bundle.manifest.weight_types["llm"]
    if model.plan.sequences > 1 and not model.exact and kind not in ("f32", "f16", "bf16"):
        console.warn(
            f"{model.plan.sequences} answers are written at a time, and with {kind} weights that changes how sums are "
            "rounded on this machine: words may differ from those of summarize. With --parallel 1 they do not"
        )


def _others(found: Iterable[_I], output: str) -> Generator[_I]:
    """What is found but for the output itself and what lies beside it, in a folder that is both read and written."""
    place = os.path.realpath(output)
    own = {place + suffix for suffix in ("", ".lock", ".running", ".salt")}
    names = {os.path.basename(path) for path in own}
    for one in found:
        if one is None or one.path.name not in names or os.path.realpath(one.path) not in own:
            yield one


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP set `stop`, which ends the run at its next turn; a second one ends it at once.

    An exception out of a handler may come while a native library calls a function of ours, and be lost there.
    """

    def heard(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rendered(output: str, form: str, inputs: tuple[str, ...]) -> Target:
    """The file beside the journal that takes the rendered one."""
    from xraygpt_lite.cli.report import Target

    stem, ending = os.path.splitext(output)
    # Anything else behind a dot tells one journal from another: run.1, run.2.
    return Target(f"{stem if ending in ('.jsonl', '.json', f'.{form}') else output}.{form}", output, inputs)


def _counts(run: Run) -> str:
    return f"{run.journal.records} records ({run.journal.failures} of them failures)" if run.journal else "no records"


def _conclude(run: Run, tally: Tally, output: str) -> None:
    """The last line: what was done, and what to do about failures."""
    text = f"{run.done} done, {run.failed} failed, {run.skipped} done before; {tally.rate:.0f} images a minute"
    if run.journal and run.journal.failures:
        text += (
            f". {run.journal.failures} failures stand in {output}: see them with `xraygpt-lite report {output}`, and "
            "do them again with --retry-failed"
        )
    click.echo(text, err=True)
