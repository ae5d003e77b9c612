"""What guessing at next tokens gives: over a data set's split with the real answers, and what it would have to give.

    python -m benchmarks.speculation [--split test] [--count N] [--bundle B] [--json]
    python -m benchmarks.speculation --needed --bundle B

Every radiograph is answered plainly and with guesses, in turn; the texts are compared, the calls counted. `--needed`
measures calls with several rows of one sequence instead, and says how many tokens a call would have to give to pay.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xraygpt_lite import model as models
from xraygpt_lite.llm.native import Batch, Context, Model
from xraygpt_lite.llm.speculation import SIZES
from xraygpt_lite.model import XrayModel
from xraygpt_lite.values import Bundle, Summary

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih-chestxray14"
_TRIES = 7


def radiographs(split: str, count: int | None) -> Iterator[bytes]:
    """The files of one split of the data set."""
    with (DATA / "nih128.csv").open(newline="") as table, zipfile.ZipFile(DATA / "nih128.zip") as archive:
        inside = {Path(name).name: name for name in archive.namelist()}
        names = [row["image"] for row in csv.DictReader(table) if row["split"] == split]
        for name in names[:count]:
            yield archive.read(inside[name])


def counted(model: XrayModel) -> list[int]:
    """Rows of every decode call of a model from here on."""
    rows: list[int] = []
    context = model._engine._core.context
    decode = context.decode

    def watched(batch: Batch) -> None:
        rows.append(batch.rows)
        decode(batch)

    context.decode = watched  # type: ignore[method-assign]
    return rows


def compare(bundle: Bundle, images: Iterator[bytes]) -> dict[str, Any]:
    """Both ways over the same radiographs, one image after another."""
    said: dict[bool, list[Summary]] = {False: [], True: []}
    calls: dict[bool, int] = {False: 0, True: 0}
    # One engine for both: the OpenMP threads of two slow each other down.
    with models.open_bundle(bundle, speculation=True) as model:
        core, seen = model._engine._core, counted(model)
        table = core._speculation
        before = 3  # calls before the answer: the opening, the first time; the image; the question
        for image in images:
            for guessing in said:
                core._speculation = table if guessing else None
                said[guessing].append(model.summarize(io.BytesIO(image).getvalue()))
                calls[guessing] += len(seen) - before
                before = 2
                seen.clear()
    tokens = sum(summary.answer_tokens for summary in said[False])
    seconds = {which: sum(one.timings.generate for one in each) for which, each in said.items()}
    return {
        "images": len(said[False]),
        "identical": sum(a.raw_text == b.raw_text for a, b in zip(said[False], said[True], strict=True)),
        "answer_tokens": tokens,
        "tokens_a_call_plain": tokens / calls[False],
        "tokens_a_call": tokens / calls[True],
        "generate_speedup": seconds[False] / seconds[True],
        "generate_speedup_median": statistics.median(
            a.timings.generate / b.timings.generate for a, b in zip(said[False], said[True], strict=True)
        ),
        "first_ten_speedup": sum(one.timings.generate for one in said[False][:10])
        / sum(one.timings.generate for one in said[True][:10]),
    }


def needed(bundle: Bundle) -> dict[str, float]:
    """Rows of a call → how many tokens it would have to give, so that the plain loop is not faster."""
    plan = models.plan(bundle)
    model = Model(bundle.llm, plan.gpu_layers)
    context, batch = Context(model, plan, 512), Batch(plan.batch)
    batch.put(np.ones(100, np.int32), np.arange(100), 0, False)
    context.decode(batch)
    times: dict[int, list[float]] = {rows: [] for rows in (1, 2, *SIZES)}
    for _ in range(_TRIES):
        for rows, each in times.items():
            began = time.perf_counter()
            batch.put(np.ones(rows, np.int32), 100 + np.arange(rows), 0, True)
            context.decode(batch)
            context.logits(rows - 1)
            each.append(time.perf_counter() - began)
            context.cut(0, 100)
    context.close()
    model.close()
    medians = {rows: statistics.median(each[1:]) for rows, each in times.items()}
    return {f"{rows} rows": seconds / medians[1] for rows, seconds in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="name or folder; default: the shipped one")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int)
    parser.add_argument("--needed", action="store_true", help="what a call would have to give, instead")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    bundle = models.checked(given.bundle)
    figures = needed(bundle) if given.needed else compare(bundle, radiographs(given.split, given.count))
    for name, value in figures.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
