"""The encoder in int8 against float32: speed, agreement, time to load and memory.

    python -m benchmarks.vision GRAPH_F32 GRAPH_INT8 [--threads N] [--repeats N] [--json]
    python -m benchmarks.vision --family xraygpt|xraygpt-paper --work DIR [--small] [--json]

Graphs of a bundle or of a conversion, or graphs of the published sizes with random weights of realistic scale, which
are made in DIR (the first time, some minutes and up to 12 GB). Images are encoded one at a time, float32 and int8 in
turn, in one process; loading and memory are measured in a process of each graph's own. Memory needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from xraygpt_lite.compare import check_images
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.values import DevicePlan, Float32, ImageSpec
from xraygpt_lite.vision import open_graph, return_freed_memory

FAMILIES = ("xraygpt", "xraygpt-paper")
_T = TypeVar("_T")


def alone(function: Callable[..., _T], *arguments: object) -> _T:
    """What a function gives in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def made(work: Path, family: str, small: bool) -> list[Path]:
    """Graphs of random weights, float32 and int8, made unless they are there."""
    from benchmarks import full_size, shapes

    sizes, folder = (shapes.SMALL, work / "small") if small else (full_size.PUBLISHED, work)
    folder.mkdir(parents=True, exist_ok=True)
    return [shapes.graphs(folder, family, kind, sizes) / "vision.onnx" for kind in ("f32", "int8")]


def pixels_for(session: Any) -> Float32:
    """The example radiographs as a graph's input (B, 3, S, S), with the mean and deviation of CLIP's images."""
    size = session.get_inputs()[0].shape[-1]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return transform(check_images(None), ImageSpec(size, "stretch", "bicubic", mean, deviation)).data


def loading(path: Path, threads: int) -> dict[str, float]:
    """Seconds to create a session, and MB of this process: then, after the first image, and at most."""
    began, busy = time.perf_counter(), time.process_time()
    session = open_graph(path, DevicePlan(threads=threads))
    return_freed_memory()
    figures = {"create_s": time.perf_counter() - began, "create_cpu_s": time.process_time() - busy}
    figures |= {"file_mb": sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*")) / 1e6}
    figures |= {"loaded_mb": memory("VmRSS")}
    encode(session, pixels_for(session)[:1])
    return figures | {"encoded_mb": memory("VmRSS"), "peak_mb": memory("VmHWM")}


def memory(field: str) -> float:
    """MB of this process, as Linux has it in /proc/self/status; not a number elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text() if status.exists() else "", re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def encode(session: Any, pixels: Float32) -> Float32:
    """Features (B, M, F)."""
    features: Float32 = session.run(["features"], {"pixels": pixels})[0]
    return features


def in_turn(reference: Path, smaller: Path, threads: int, repeats: int) -> dict[str, float]:
    """Seconds an image of both, medians; their ratio; the cosine of each token's features, mean and of the worst."""
    sessions = [open_graph(path, DevicePlan(threads=threads)) for path in (reference, smaller)]
    pixels = pixels_for(sessions[0])
    expected, seen = (np.concatenate([encode(one, pixels[n : n + 1]) for n in range(len(pixels))]) for one in sessions)
    cosines = (expected * seen).sum(-1) / (np.linalg.norm(expected, axis=-1) * np.linalg.norm(seen, axis=-1))
    seconds: tuple[list[float], list[float]] = ([], [])
    for n in range(repeats):
        for session, spent in zip(sessions, seconds, strict=True):
            one = n % len(pixels)
            began = time.perf_counter()
            encode(session, pixels[one : one + 1])
            spent.append(time.perf_counter() - began)
    medians = [statistics.median(spent) for spent in seconds]
    return {
        "f32_s": medians[0],
        "int8_s": medians[1],
        "int8_speedup": medians[0] / medians[1],
        "spread": max(np.ptp(np.percentile(spent, (25, 75))) / statistics.median(spent) for spent in seconds),
        "cosine_mean": float(cosines.mean()),
        "cosine_worst": float(cosines.min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path, nargs="*", help="one of float32, one of int8")
    parser.add_argument("--family", choices=FAMILIES, help="make graphs of this one in place of given ones")
    parser.add_argument("--work", type=Path, help="folder for what is made and kept")
    parser.add_argument("--small", action="store_true", help="few layers, to try the benchmark itself")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.family and options.work and not options.graphs:
        graphs = alone(made, options.work, options.family, options.small)
    elif len(options.graphs) == 2 and not options.family:
        graphs = options.graphs
    else:
        parser.error("give two graphs, or --family and --work")
    figures = {
        f"{kind}_{name}": value
        for kind, path in zip(("f32", "int8"), graphs, strict=True)
        for name, value in alone(loading, path, options.threads).items()
    }
    reference, smaller = graphs
    figures = in_turn(reference, smaller, options.threads, options.repeats) | figures
    for name, value in figures.items():
        print(f"{name:20} {value:.4g}")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
