"""One command from the start of its process to its end, against a process that does nothing but the inevitable.

    python -m benchmarks.start [--image DICOM] [--bundle B] [--repeats N] [--json]

The inevitable: import numpy, ONNX Runtime, llama.cpp's bindings and pydicom, load the files, encode pixels that were
prepared before, prefill the same rows and decode as many tokens, one by one. Both in turn, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xraygpt_lite import model as models
from xraygpt_lite import prompt
from xraygpt_lite.imaging.read import read
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.values import EmbeddingSegment

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "synthetic-cr-monochrome1.dcm"
BARE = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime, pydicom, click
from xraygpt_lite.llm.native import Batch, Context, Model
from xraygpt_lite.values import DevicePlan
work, given = Path(sys.argv[1]), json.loads(Path(sys.argv[1], "given.json").read_text())
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = given["threads"]
data = np.load(work / "pixels.npy")
for name, source, result in (("vision", "pixels", "features"), ("projector", "features", "embeddings")):
    session = onnxruntime.InferenceSession(given[name], options, providers=["CPUExecutionProvider"])
    data = session.run([result], {source: data})[0]
model = Model(Path(given["llm"]))
plan = DevicePlan(threads=given["threads"])
context, batch, place = Context(model, plan, given["cells"]), Batch(plan.batch), 0
before, after = (np.array(ids, np.int32) for ids in given["ids"])
for content in (before, data[0], after):
    batch.put(content, np.arange(place, place + len(content)), 0, np.arange(len(content)) == len(content) - 1)
    context.decode(batch)
    place += len(content)
token = context.likeliest(len(after) - 1)
for _ in range(given["tokens"] - 1):
    batch.put(np.array([token], np.int32), place, 0, True)
    context.decode(batch)
    token, place = context.likeliest(0), place + 1
context.close()
model.close()
"""


def seconds(command: Sequence[object]) -> float:
    """Of one process, from its start to its end; ends the benchmark if it fails."""
    began = time.perf_counter()
    done = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{command[-2:]} ended with {done.returncode}")
    return time.perf_counter() - began


def prepare(bundle: str | None, image: Path, work: Path) -> dict[str, Any]:
    """Put what the bare process needs into `work`; return what it is given."""
    found = models.checked(bundle)
    manifest = found.manifest
    pixels = transform([read(image)], manifest.image)
    np.save(work / "pixels.npy", pixels.data)
    with models.open_bundle(found) as model:
        summary = model.summarize(image)
        engine = model._engine
        _, wording = prompt.variant_of(manifest.prompt, None)
        rows = np.zeros((manifest.image_tokens, manifest.width), np.float32)
        before, _, after = prompt.build(wording, summary.question, rows, engine.tokenize)
        ids = [part.ids.tolist() for part in (before, after) if not isinstance(part, EmbeddingSegment)]
    given = {
        "vision": str(found.vision), "projector": str(found.projector), "llm": str(found.llm), "ids": ids,
        "threads": model.plan.threads, "tokens": summary.answer_tokens,
        "cells": summary.prompt_tokens + summary.image_tokens + summary.answer_tokens,
    }  # fmt: skip
    (work / "given.json").write_text(json.dumps(given))
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="name or folder; default: the shipped one")
    parser.add_argument("--image", type=Path, default=EXAMPLE)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = prepare(options.bundle, options.image, Path(folder))
        named = ["--bundle", options.bundle] if options.bundle else []
        ours = [sys.executable, "-m", "xraygpt_lite", "summarize", "--quiet", *named, options.image]
        bare = [sys.executable, "-c", BARE, folder]
        seconds(ours), seconds(bare)
        pairs = [(seconds(ours), seconds(bare)) for _ in range(options.repeats)]
    figures = {
        "summarize_s": statistics.median(pair[0] for pair in pairs),
        "bare_s": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
        "answer_tokens": given["tokens"],
    }
    for name, value in figures.items():
        print(f"{name:14} {value:.3f}" if isinstance(value, float) else f"{name:14} {value}")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
