"""Batches against one by one, and against what the machine could do: ratios in one run, medians of several.

    python -m benchmarks.batch [--bundle B] [--images FOLDER|ZIP] [--count N] [--tokens N] [--repeats N] [--json]

Three ways over the same radiographs, in turn: `summarize` one by one in one process, a batch into a journal, and the
bound: the encoder alone over whole batches of pixels that were read before, then a bare loop of `llama_decode` that is
given as many rows in as many calls as the batch needed. `--steps` runs one batch instead and lets a bare call of as
many rows follow every full step, so that both see the same machine; `--table` runs batches of 1 to 16 sequences.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quiet import Stolen
from xraygpt_lite import model as models
from xraygpt_lite import prompt
from xraygpt_lite.batch.inputs import Input, find
from xraygpt_lite.batch.pipeline import Ask
from xraygpt_lite.batch.runner import Run
from xraygpt_lite.imaging.read import read
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.llm.native import Batch, Context, Model
from xraygpt_lite.llm.sequence import joined
from xraygpt_lite.model import XrayModel
from xraygpt_lite.values import Bundle, EmbeddingSegment, GenerationOptions, Summary
from xraygpt_lite.vision import Encoder

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih-chestxray14" / "nih128.zip"
TABLE = (1, 2, 4, 8, 16)
KINDS = ("encode", "prefill", "steps")


@contextmanager
def native() -> Iterator[dict[str, float]]:
    """Seconds inside the encoder and inside `llama_decode` meanwhile, for prompts and for steps with a row of each."""
    seconds = dict.fromkeys(KINDS, 0.0)
    calls: list[tuple[float, Any]] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(of: Encoder | Context, given: Any) -> Any:
            began = time.perf_counter()
            result = function(of, given)
            # What it was is worked out at the end: between two steps it would cost what it is to measure.
            calls.append((time.perf_counter() - began, None if isinstance(of, Encoder) else given.outputs))
            return result

        return call

    encode, decode = Encoder.encode, Context.decode
    Encoder.encode, Context.decode = timed(encode), timed(decode)  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Encoder.encode, Context.decode = encode, decode  # type: ignore[method-assign]
        for taken, outputs in calls:
            kind = "encode" if outputs is None else "steps" if outputs.mean() > 0.5 else "prefill"
            seconds[kind] += taken


@contextmanager
def radiographs(source: Path, count: int) -> Iterator[list[Input]]:
    """The first `count` files of a folder, or of a ZIP that is unpacked for the time being."""
    with tempfile.TemporaryDirectory() as folder:
        if source.is_file():
            with zipfile.ZipFile(source) as archive:
                names = sorted(name for name in archive.namelist() if not name.endswith("/"))[:count]
                archive.extractall(folder, names)
            source = Path(folder)
        yield find([source], limit=count)


def seconds_of(spent: dict[str, float]) -> str:
    """As words."""
    return ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent.items())


def one_by_one(model: XrayModel, inputs: Sequence[Input], options: GenerationOptions) -> tuple[float, list[Summary]]:
    """Seconds of `summarize` over all, and what it said."""
    began = time.perf_counter()
    said = [model.summarize(one.path, options=options) for one in inputs]
    return time.perf_counter() - began, said


def together(
    bundle: Path, inputs: Sequence[Input], options: GenerationOptions, parallel: int | None, device: str = "auto"
) -> dict[str, Any]:
    """A batch from its first record's preparation to the journal's last flush; the model is loaded before."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Run(
            inputs, Ask(options=options), output=Path(folder) / "out.jsonl", count=len(inputs), bundle=bundle,
            parallel=parallel, device=device,
        ) as run,
    ):  # fmt: skip
        with native() as calls:
            began = time.perf_counter()
            records = list(run)
            seconds = time.perf_counter() - began
        rows, in_turn = run.model.plan.sequences // run.model.plan.engines, run.model.takes_turns
    assert all(isinstance(record, Summary) for record in records)
    share = sum(calls.values()) / seconds if in_turn else None
    return {"seconds": seconds, "rows": rows, "records": records, "native_s": calls, "native_share": share}


def fill(context: Context, batch: Batch, rows: int) -> None:
    """Put as many rows into every sequence."""
    for begin in range(0, rows, context.batch):
        places = np.arange(begin, min(begin + context.batch, rows))
        batch.put(np.ones(len(places), np.int32), places, 0, False)
        context.decode(batch)
    for one in range(1, context.sequences):
        context.copy(0, one)
    batch.put(np.ones(context.sequences, np.int32), rows, np.arange(context.sequences), True)
    context.decode(batch)  # the copies are made by it
    for one in range(context.sequences):
        context.cut(one, rows)


def bare(bundle: Bundle, inputs: Sequence[Input], said: Sequence[Summary], sequences: int) -> dict[str, float]:
    """Seconds of the bare encoder and of the bare decode loop for the same work, by `KINDS`.

    Prompts go in as the batch puts them: the opening is there, the rest of those of all sequences in common calls.
    Each sequence then takes as many steps as its answer has tokens, and the next radiograph's prompt follows.
    """
    spec = bundle.manifest.image
    pixels = transform([read(one.path) for one in inputs], spec)
    plan = models.plan(bundle, sequences=sequences)
    encoder = Encoder(bundle, plan)
    began = time.perf_counter()
    for start in range(0, len(inputs), encoder.batch):
        encoder.encode(replace(pixels, data=pixels.data[start : start + encoder.batch]))
    encoding = time.perf_counter() - began
    encoder.close()
    longest = max(summary.answer_tokens for summary in said)
    model = Model(bundle.llm, plan.gpu_layers)
    rows = np.zeros((bundle.manifest.image_tokens, bundle.manifest.width), np.float32)
    _, wording = prompt.variant_of(bundle.manifest.prompt, None)
    opening, asked = joined(prompt.build(wording, said[0].question, rows, model.tokenize), model.embed)
    assert isinstance(asked, EmbeddingSegment)
    begin, end = len(opening), len(opening) + len(asked)
    context = Context(model, plan, end + longest)
    batch = Batch(context.batch)
    fill(context, batch, begin)
    spent, left = {"encode": encoding, "prefill": 0.0, "steps": 0.0}, list(said)
    while left:
        group, left = left[:sequences], left[sequences:]
        ids = np.arange(len(group))
        for one in range(sequences):
            context.cut(one, begin)
        began = time.perf_counter()
        for part in np.array_split(ids, -(-len(ids) // max(1, context.batch // len(asked)))):
            places = np.tile(np.arange(begin, end), len(part))
            batch.put(np.tile(asked.rows, (len(part), 1)), places, np.repeat(part, len(asked)), places == end - 1)
            context.decode(batch)
        filled = time.perf_counter()
        # Evenly long: as many calls as the tokens of the group fill, so that no place is ever empty.
        for step in range(round(sum(summary.answer_tokens for summary in group) / len(group))):
            batch.put(np.ones(len(ids), np.int32), end + step, ids, True)
            context.decode(batch)
            context.logits(0)
        spent["prefill"] += filled - began
        spent["steps"] += time.perf_counter() - filled
    context.close()
    model.close()
    return spent


def steps(
    bundle: Bundle, inputs: Sequence[Input], options: GenerationOptions, parallel: int | None, longest: int
) -> dict[str, Any]:
    """A batch whose full decode steps alternate with bare calls on a cache of the same lengths.

    A step is all from the end of one bare call to the end of the engine's next `llama_decode`: taking the tokens of the
    last one, ending and beginning answers, filling the batch. Steps with empty lanes and prefills are left out. The
    bare cache goes through as many lengths as the longest answer has tokens.
    """
    ours: list[float] = []
    theirs: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Run(
            inputs, Ask(options=options), output=Path(folder) / "out.jsonl", count=len(inputs), bundle=bundle.folder,
            parallel=parallel,
        ) as run,
    ):  # fmt: skip
        core = run.model._engine._core
        sequences, decode = core.context.sequences, core.context.decode
        spec = bundle.manifest
        rows = np.zeros((spec.image_tokens, spec.width), np.float32)
        _, wording = prompt.variant_of(spec.prompt, None)
        start = sum(map(len, prompt.build(wording, spec.prompt.default_question, rows, core.model.tokenize)))
        bare = Context(core.model, core.plan, start + longest)
        batch, ids = Batch(bare.batch), np.arange(sequences)
        fill(bare, batch, start)
        resumed: float | None = None

        def watched(given: Batch) -> None:
            nonlocal resumed
            decode(given)
            ended = time.perf_counter()
            full = given.rows == sequences and bool(given.outputs.all())
            if full and resumed is not None:
                ours.append(ended - resumed)
                batch.put(np.ones(sequences, np.int32), start + len(theirs) % longest, ids, True)
                began = time.perf_counter()
                bare.decode(batch)
                bare.logits(0)
                theirs.append(time.perf_counter() - began)
                if len(theirs) % longest == 0:
                    for one in range(sequences):
                        bare.cut(one, start)
            resumed = time.perf_counter() if full else None

        core.context.decode = watched  # type: ignore[method-assign, assignment]
        assert all(isinstance(record, Summary) for record in run)
        bare.close()
    if not ours:
        sys.exit(f"no two full steps of {sequences} sequences followed each other; give more radiographs or --parallel")
    return {
        "sequences": sequences,
        "steps": len(ours),
        "step_s": statistics.median(ours),
        "bare_step_s": statistics.median(theirs),
        "rate_vs_bare": sum(theirs) / sum(ours),
        "rate_vs_bare_median": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
    }


def compare(
    bundle: Bundle,
    inputs: Sequence[Input],
    options: GenerationOptions,
    repeats: int,
    parallel: int | None,
    some: int | None,
) -> dict[str, Any]:
    """Medians over the repeats, and the ratios; `some` radiographs only are answered for one by one."""
    alone, batched, bound, rounds = [], [], [], []
    few = inputs[:some]
    for _ in range(repeats):
        stolen = Stolen()
        with models.open_bundle(bundle) as model:
            model.summarize(inputs[0].path, options=options)
            seconds, said = one_by_one(model, few, options)
        alone.append(seconds * len(inputs) / len(few))
        print(f"one by one {alone[-1]:.1f} s", file=sys.stderr)
        run = together(bundle.folder, inputs, options, parallel)
        rows = run["rows"]
        batched.append(run["seconds"])
        by_name = {record.source: record for record in run["records"]}
        for one, summary in zip(few, said, strict=True):
            assert by_name[str(one.path)].raw_text == summary.raw_text, f"{one.name} is answered otherwise in a batch"
        print(f"batch {batched[-1]:.1f} s, the texts are the same", file=sys.stderr)
        said = [by_name[str(one.path)] for one in inputs]
        # In a thread that ends: OpenMP's threads stay with the one that called, and with others beside them they no
        # longer spin, which would slow the next round's answers down.
        with ThreadPoolExecutor(1) as pool:
            bound.append(pool.submit(bare, bundle, inputs, said, rows).result())
        rounds.append((alone[-1] / batched[-1], sum(bound[-1].values()) / batched[-1]))
        print(f"inside native calls: {seconds_of(run['native_s'])}; bound: {seconds_of(bound[-1])}", file=sys.stderr)
        print(f"{stolen.share:.1%} of the time was taken by other machines", file=sys.stderr)
    return {
        "images": len(inputs),
        "rows": rows,
        "one_by_one_images_per_s": len(inputs) / statistics.median(alone),
        "batch_images_per_s": len(inputs) / statistics.median(batched),
        "bound_images_per_s": len(inputs) / statistics.median([sum(each.values()) for each in bound]),
        "batch_vs_one_by_one": statistics.median([each[0] for each in rounds]),
        "batch_vs_bound": statistics.median([each[1] for each in rounds]),
        "native_share": run["native_share"],  # where encoder and language model take turns; of the last round
        "answer_tokens": sum(summary.answer_tokens for summary in said),
        "texts_identical": True,
    }


def row(arguments: Sequence[str]) -> dict[str, Any]:
    """Images a minute and peak memory of one batch in a process of its own."""
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.batch", "--one", *arguments], stdout=subprocess.PIPE)
    assert child.stdout
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"a batch ended with {os.waitstatus_to_exitcode(status)}")
    figures: dict[str, Any] = json.loads(output)
    return figures | {"peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="name or folder; default: the shipped one")
    parser.add_argument("--images", type=Path, default=DATA, help="a folder, or a ZIP")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--tokens", type=int, help="answers of exactly so many tokens; default: as they come")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parallel", type=int, help="sequences; default: measured")
    parser.add_argument(
        "--alone", type=int, help="answer one by one for so many only; the others are taken to be alike"
    )
    parser.add_argument("--device", default="auto", help="of --table: auto, cpu or cuda")
    parser.add_argument("--steps", action="store_true", help="the decode rate of a batch against bare calls in between")
    parser.add_argument("--table", action="store_true", help="images a minute and memory by number of sequences")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    options = GenerationOptions(max_tokens=given.tokens, min_tokens=given.tokens)
    if given.table:
        shared = [part for part in sys.argv[1:] if part not in ("--table", "--json")]
        counts = (*TABLE, 32, 64) if given.device == "cuda" or given.bundle is None else TABLE
        figures: Any = {count: row([*shared, "--parallel", str(count)]) for count in counts}
        for count, each in figures.items():
            print(f"{count:2} sequences  {each['images_per_minute']:8.1f} images/min  {each['peak_mb']:8.0f} MB")
    else:
        bundle, stolen = models.checked(given.bundle), Stolen()
        with radiographs(given.images, given.count) as inputs:
            if given.one:
                run = together(bundle.folder, inputs, options, given.parallel, given.device)
                print(json.dumps({"images_per_minute": 60 * len(inputs) / run["seconds"]}))
                return
            if given.steps:
                figures = steps(bundle, inputs, options, given.parallel, given.tokens or 60)
            else:
                figures = compare(bundle, inputs, options, given.repeats, given.parallel, given.alone)
        figures["stolen_share"] = stolen.share
        for name, value in figures.items():
            print(f"{name:26} {value:.3f}" if isinstance(value, float) else f"{name:26} {value}")
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
