"""Converting at full size: peak memory, time against a plain copy, sizes, and one radiograph through the result.

    python -m benchmarks.convert_7b --work DIR [--small] [--json]

DIR needs about 60 GB; random checkpoints in the published layouts are written there first and are kept, everything else
is removed. Each step runs in a process of its own, so that its peak is its own; files that it reads are put out of the
page cache first, and what is written counts as written when it is on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import full_size

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "synthetic-normal.png"
IMAGE_SIZE = 224
LLM = """
import sys
from pathlib import Path
from xraygpt_lite.converters.llama import LlamaFolder
LlamaFolder(Path(sys.argv[1])).write(Path(sys.argv[2]), "f16", "random")
"""
VISION = """
import sys
from pathlib import Path
from xraygpt_lite.converters import onnx
from xraygpt_lite.converters.families import loader
names = ("vision", "qformer", "checkpoint")
inputs = dict(zip(names, map(Path, sys.argv[1:4]), strict=True))
parts = loader("xraygpt")(inputs, int(sys.argv[4]), {})
onnx.export_parts(parts, int(sys.argv[5]), Path(sys.argv[6]))
"""


@dataclass(frozen=True)
class Run:
    """One child process: seconds until its files were on the disk, its largest resident set, and what it printed."""

    seconds: float
    peak_bytes: int
    output: str


def run(command: Sequence[object], reads: Iterable[Path]) -> Run:
    """Run a command whose inputs have to come from the disk; ends the benchmark if it fails."""
    forget(reads)
    began = time.perf_counter()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    os.sync()
    if status:
        sys.exit(f"{' '.join(map(str, command))[:200]} … ended with {os.waitstatus_to_exitcode(status)}")
    return Run(time.perf_counter() - began, usage.ru_maxrss * 1024, output)


def forget(paths: Iterable[Path]) -> None:
    """Put files out of the page cache."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(paths: Sequence[Path], target: Path) -> float:
    """Seconds of a plain copy of the files, one after another, onto the disk."""
    forget(paths)
    began = time.perf_counter()
    target.mkdir()
    for path in paths:
        shutil.copyfile(path, target / path.name)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def measure(work: Path, sizes: full_size.Sizes) -> dict[str, Any]:
    """Every figure, the checkpoints written first."""
    inputs = full_size.write(work / "checkpoints", sizes)
    shards = sorted(inputs["--llm"].glob("*.bin"))
    vision = [inputs[name] for name in ("--vision", "--qformer", "--checkpoint")]
    graphs, gguf, bundle = work / "graphs", work / "llm.gguf", work / "bundle"
    for old in (graphs, bundle):
        shutil.rmtree(old, ignore_errors=True)
    graphs.mkdir()
    say("plain copy of the language model's files")
    copied = copy(shards, work / "copy")
    say("language model to f16 GGUF")
    llm = run([sys.executable, "-c", LLM, inputs["--llm"], gguf], shards)
    gguf.unlink()
    say("vision and projector to ONNX")
    exported = run([sys.executable, "-c", VISION, *vision, sizes.width, IMAGE_SIZE, graphs], vision)
    shutil.rmtree(graphs)
    say("the whole command, Q4_K_M and int8")
    options = [part for pair in inputs.items() for part in pair]
    command = [sys.executable, "-m", "xraygpt_lite", "convert", "xraygpt", *options, "-o", bundle]
    whole = run([*command, "--quant", "q4_k_m", "--vision-type", "int8"], [*shards, *vision])
    files = {path.name: path.stat().st_size for path in sorted(bundle.iterdir())}
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    say("one radiograph")
    asked = ["summarize", "--bundle", bundle, "--json", "--max-tokens", 32, EXAMPLE]
    one = run([sys.executable, "-m", "xraygpt_lite", *asked], [])
    record = json.loads(one.output)
    shutil.rmtree(bundle)
    source = sum(path.stat().st_size for path in shards)
    return {
        "source_gb": source / 1e9,
        "copy_s": copied,
        "llm_f16_s": llm.seconds,
        "llm_f16_vs_copy": llm.seconds / copied,
        "llm_f16_peak_gb": llm.peak_bytes / 1e9,
        "vision_s": exported.seconds,
        "vision_peak_gb": exported.peak_bytes / 1e9,
        "whole_s": whole.seconds,
        "whole_peak_gb": whole.peak_bytes / 1e9,
        "bundle_gb": sum(files.values()) / 1e9,
        "files_gb": {name: size / 1e9 for name, size in files.items()},
        "agreement": manifest["agreement"],
        "summarize_s": one.seconds,
        "summarize_peak_gb": one.peak_bytes / 1e9,
        "summarize_timings": record["timings"],
        "answer_tokens": record["answer_tokens"],
    }


def say(step: str) -> None:
    print(f"{step} …", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--small", action="store_true", help="few layers, to try the benchmark itself")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    figures = measure(options.work, full_size.SMALL if options.small else full_size.PUBLISHED)
    for name, value in figures.items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
