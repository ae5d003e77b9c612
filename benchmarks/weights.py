"""What a weight type costs: decode and prefill of GGUF files with and without repacking, in one build or several.

    python -m benchmarks.weights [GGUF]... [--work DIR --quant T]... [--library DIR]... [--rows N] [--repeats N]
                                 [--rounds N] [--no-plain]

With --work, files are made by `benchmarks.shapes` where they are missing. Each file and way runs in a process of its
own; its peak is that of one sequence. --library names a folder with another build of llama.cpp (libllama and ggml's
libraries), measured right after the installed one, in every round. Without repacking means without all of llama.cpp's
extra buffer types: with AMX its tiles go with them. Rows go through bare `llama_decode`: no sampling, no image.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from xraygpt_lite.llm.library import library, set_fields, system_info
from xraygpt_lite.llm.native import Batch, Context, Model
from xraygpt_lite.values import DevicePlan

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES, DRAFTED = (2, 4, 8, 16), (1, 2, 4, 8)
COLUMNS = {
    "file": "file", "way": "way", "file_gb": "GB", "load_s": "load s", "peak_gb": "peak GB",
    "prefill_rows_s": "prefill rows/s", "row_1": "1 row s", "read_gb_s": "GB/s",
    **{f"sequences_{n}": f"{n} seq. s" for n in SEQUENCES},
    **{f"drafted_{n}": f"{n} drafted s" for n in DRAFTED[1:]},
}  # fmt: skip


class PlainModel(Model):
    """A model whose weights stay as they are in the file."""

    def _parameters(self, *given: Any, **named: Any) -> Any:
        params = super()._parameters(*given, **named)
        set_fields(params, use_extra_bufts=False)
        return params


def measure(path: Path, repack: bool, rows: int, repeats: int, threads: int) -> dict[str, Any]:
    """All figures of one file and way; seconds are medians, each of one decode call and its logits.

    Parameters
    ----------
    rows
        Of the prompt; decoding goes on from there.
    """
    began = time.perf_counter()
    model = (Model if repack else PlainModel)(path)
    figures: dict[str, Any] = {"load_s": time.perf_counter() - began, "spread_s": {}}
    ids = (3 + np.arange(max(rows, *DRAFTED)) * 7 % (model.vocab - 3)).astype(np.int32)
    capacity = max(rows, *SEQUENCES)

    def context(sequences: int) -> tuple[Context, Batch]:
        cells = rows + max(DRAFTED)
        plan = DevicePlan(threads=threads, context=cells, batch=capacity, sequences=sequences)
        return Context(model, plan, cells), Batch(capacity)

    def prompt() -> None:
        one.cut(0, 0)
        batch.put(ids[:rows], np.arange(rows), 0, np.arange(rows) == rows - 1)
        one.decode(batch)
        one.logits(rows - 1)

    def drafted(count: int) -> None:
        batch.put(ids[:count], rows + np.arange(count), 0, True)
        one.decode(batch)
        one.logits(count - 1)
        one.cut(0, rows)

    def together(count: int) -> None:
        batch.put(ids[:count], rows, np.arange(count), True)
        one.decode(batch)
        one.logits(count - 1)
        for sequence in range(count):
            one.cut(sequence, rows)

    def take(name: str, step: Callable[[], None]) -> None:
        figures[name], figures["spread_s"][name] = _timed(step, repeats)

    one, batch = context(1)
    take("prefill_s", prompt)
    for count in DRAFTED:
        take("row_1" if count == 1 else f"drafted_{count}", partial(drafted, count))
    status = Path("/proc/self/status").read_text()
    figures["peak_gb"] = 1024 * int(re.findall(r"^VmHWM:\s+(\d+)", status, re.MULTILINE)[0]) / 1e9
    one.close()
    one, batch = context(max(SEQUENCES))
    prompt()
    for sequence in range(1, max(SEQUENCES)):
        one.copy(0, sequence)
    for count in SEQUENCES:
        take(f"sequences_{count}", partial(together, count))
    one.close()
    model.close()
    size = path.stat().st_size / 1e9
    figures |= {"file_gb": size, "prefill_rows_s": rows / figures["prefill_s"], "read_gb_s": size / figures["row_1"]}
    return figures | {"libraries": _mapped(), "system": system_info()}


def _timed(step: Callable[[], None], repeats: int) -> tuple[float, list[float]]:
    """Median seconds, after one that does not count, and the shortest and longest."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), [min(times[1:]), max(times[1:])]


def _mapped() -> str:
    """The one folder that llama.cpp's libraries were loaded from: what is mapped, not what was asked for."""
    found = set(re.findall(r"(/\S*)/lib(?:llama|ggml)[^/\s]*$", Path("/proc/self/maps").read_text(), re.MULTILINE))
    if len(found) != 1:
        sys.exit(f"llama.cpp's libraries come from {sorted(found)}; expected one folder")
    return str(found.pop())


def in_child(path: Path, repack: bool, build: Path | None, arguments: Sequence[str]) -> dict[str, Any]:
    """`measure` in a process of its own, with the installed libraries or those of a folder."""
    command = [sys.executable, "-m", "benchmarks.weights", "--one", str(path.resolve()), *arguments]
    command += [] if repack else ["--plain"]
    environment = os.environ | ({"LLAMA_CPP_LIB_PATH": str(build.resolve())} if build else {})
    child = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:  # it said why on stderr, or was killed by what this build makes this CPU do
        return {"error": f"ended with {child.returncode}"}
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    if build is not None and Path(found["libraries"]) != build.resolve():
        return {"error": f"ran with {found['libraries']}"}
    return found


def _medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first one, each figure being the median of all."""
    return {
        name: statistics.median(each.get(name, first) for each in rounds) if isinstance(first, float) else first
        for name, first in rounds[0].items()
    }


def _table(results: Sequence[dict[str, Any]]) -> str:
    """Results of one file and way in one line."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", "|" + "---|" * len(COLUMNS)]
    ways = dict.fromkeys((result["file"], result["way"]) for result in results)
    for way in ways:
        result = _medians([one for one in results if (one["file"], one["way"]) == way])
        cells = [result.get(name, result.get("error", "") if name == "file_gb" else "") for name in COLUMNS]
        lines.append(f"| {' | '.join(f'{c:.3g}' if isinstance(c, float) else str(c) for c in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files")
    parser.add_argument("--work", type=Path, help="folder of benchmarks.shapes")
    parser.add_argument("--quant", action="append", default=[], help="a weight type to make in --work")
    parser.add_argument("--small", action="store_true", help="with --work: few layers")
    parser.add_argument("--library", action="append", type=Path, default=[], help="folder with another build")
    parser.add_argument("--rows", type=int, default=96, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=5, help="the median is given")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each file and way, all in turn")
    parser.add_argument("--no-plain", action="store_true", help="repacked weights only")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        library()
        print(json.dumps(measure(options.one, not options.plain, options.rows, options.repeats, options.threads)))
        return
    if lacking := [str(folder) for folder in options.library if not list(folder.glob("libllama.*"))]:
        parser.error(f"--library {lacking[0]} holds no libllama; give the folder with libllama and ggml's libraries")
    files = list(options.files)
    if options.work:
        from benchmarks import full_size, shapes  # torch and the converters, which the measuring processes do without

        sizes = shapes.SMALL if options.small else full_size.PUBLISHED
        work = options.work / "small" if options.small else options.work
        files += [shapes.language_model(work, quant, sizes) for quant in options.quant]
    arguments = [f"--{name}={getattr(options, name)}" for name in ("rows", "repeats", "threads")]
    if not files:
        parser.error("name GGUF files, or --work and --quant")
    results = []
    ways = (True,) if options.no_plain else (True, False)
    for _, path, repack, build in product(range(options.rounds), files, ways, (None, *options.library)):
        way = ("repacked" if repack else "plain") + (f", {build}" if build else "")
        print(f"{path}: {way} …", file=sys.stderr, flush=True)
        results.append({"file": path.name, "way": way, **in_child(path, repack, build, arguments)})
    print(_table(results))
    print(json.dumps({"rows": options.rows, "threads": options.threads, "results": results}))


if __name__ == "__main__":
    main()
