"""Starts the measured processes, and makes figures of what they tell.

One process measures everything. Others only start, import and load, so that these have a spread, too; the first of them
warms up the system's file cache. It prints nothing and decides nothing that a user would have decided otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any

from xraygpt_lite import errors
from xraygpt_lite.bundle import store
from xraygpt_lite.errors import NativeError, XrayError
from xraygpt_lite.imaging.read import decode, is_dicom, load

# -P: a file of the working folder must not pass for a module.
PROGRAM = (sys.executable, "-P", "-m", "xraygpt_lite.bench.child")
EXAMPLE = "synthetic-cr-monochrome1.dcm"
SCHEMA = "xraygpt-lite/bench/1"
STAGES = ("start", "import", "load", "read", "preprocess", "encode", "project", "prefill", "decode", "rest")
"""Of one process that answers about one image, in order; "rest" is the prompt's wording and the record."""
NOT_ALWAYS = frozenset({"decode_vs_bandwidth", "bandwidth_gb_s", "tokens_per_s_bandwidth", "tokens_per_call"})
"""None where a GPU runs the language model, whose memory is not measured; the last where an answer is kept from ending,
which excludes guesses."""
_END_S = 5.0


def run(
    bundle: str | None,
    images: Sequence[str] = (),
    *,
    device: str = "auto",
    threads: int | None = None,
    tokens: int | None = None,
    repeats: int = 5,
    speculation: bool = True,
    prompt_cache: bool = True,
    doing: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Measure a bundle on this machine.

    Parameters
    ----------
    bundle, device, threads, speculation, prompt_cache
        As for `load`.
    images
        Files, each answered for in every repetition; none: an example that is installed, a DICOM file.
    tokens
        Of every answer, exactly; None lets the bundle end it.
    repeats
        Of everything, after a warm-up.
    doing
        Told in words what comes next.

    Returns
    -------
    dict
        JSON values. Figures are medians, in "spread" are [lowest, highest]; `_s` are seconds, `_mb` 10**6 bytes,
        `_gb_s` 10**9 bytes a second. `decode_vs_bare` and `decode_vs_bandwidth` are shares of what a bare loop and the
        memory's speed allow, both without guessing at tokens.

    Raises
    ------
    BundleError, DeviceError, MissingPackageError, NativeError
        As `load`; NativeError also where the measuring process was killed.
    ImageError
        An image cannot be read.
    UsageError
        So many tokens never come.
    """
    folder = store.find(bundle)
    with resources.as_file(resources.files("xraygpt_lite.examples") / EXAMPLE) as example:
        paths = list(images) or [str(example)]
        data = [load(path) for path in paths]
        for path, content in zip(paths, data, strict=True):
            decode(content, path, "")
        request = {
            "bundle": os.path.abspath(folder),
            "images": paths,
            "dicom": any(map(is_dicom, data)),
            "device": device,
            "threads": threads,
            "tokens": tokens,
            "repeats": repeats,
            "speculation": speculation,
            "prompt_cache": prompt_cache,
        }
        starts = []
        for number in range(repeats):
            doing(f"starting, {number + 1} of {repeats}")
            starts.append(_child({**request, "only_start": True}, doing)["samples"])
        found = _child({**request, "only_start": False}, doing)
    samples = found["samples"]
    for name in ("start", "import", "load"):
        samples[name] += [value for one in starts[1:] for value in one[name]]
    asked = {"images": len(paths), "repeats": repeats, "tokens": tokens, "speculation": speculation,
             "prompt_cache": prompt_cache}  # fmt: skip
    return {"schema": SCHEMA, **asked, **figures(samples), **found["facts"]}


def figures(samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The median of each, stages together, and the spreads."""
    medians: dict[str, float | None] = {name: statistics.median(values) for name, values in samples.items()}
    stages = {name: medians.pop(name) for name in STAGES}
    lacking = dict.fromkeys(NOT_ALWAYS - set(medians))
    spread = {name: [min(values), max(values)] for name, values in samples.items()}
    return {**medians, **lacking, "stages_s": stages, "spread": spread}


def _child(request: dict[str, Any], doing: Callable[[str], object]) -> dict[str, Any]:
    """Run one measured process, which ends with this function, and return its answer; raises what it raised."""
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        with subprocess.Popen(
            PROGRAM, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, errors="replace"
        ) as child:
            try:
                answer = _talk(child, json.dumps({**request, "began": began}), doing)
                status = child.wait()
            except BaseException:
                _end(child)
                raise
        said.seek(0)
        last = said.read().decode("utf-8", "replace").strip().splitlines()[-1:]
    if "samples" in answer:
        return answer
    if answer.get("error") == "MemoryError":
        raise MemoryError
    if "error" in answer:
        kind = getattr(errors, answer["error"], XrayError)
        raise kind(answer["message"])
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if status < 0:
        raise NativeError(
            f"the measured process was ended by signal {-status}; if memory ran out, close other programs or take a "
            "smaller bundle, else run: xraygpt-lite doctor"
        )
    raise RuntimeError(f"the measured process ended with status {status}: {' '.join(last)}")


def _talk(child: subprocess.Popen[str], request: str, doing: Callable[[str], object]) -> dict[str, Any]:
    """The child's last answer, {} where there was none. What a native library prints in between is passed over."""
    assert child.stdin
    assert child.stdout
    try:
        child.stdin.write(request + "\n")
        child.stdin.flush()  # and not closed: the child ends where this process does
    except BrokenPipeError:  # it has ended: its status tells more
        with suppress(BrokenPipeError):
            child.stdin.close()
    answer: dict[str, Any] = {}
    for line in child.stdout:
        with suppress(ValueError):
            answer = json.loads(line)
            if "doing" in answer:
                doing(answer["doing"])
    return answer


def _end(child: subprocess.Popen[str]) -> None:
    """End it as Ctrl-C does, so that it ends what it has started; or by force."""
    try:
        with suppress(subprocess.TimeoutExpired):
            child.send_signal(signal.SIGINT)
            child.wait(_END_S)
    finally:
        child.kill()
        child.wait()
