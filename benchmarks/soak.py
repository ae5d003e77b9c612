"""A long run: does memory stay flat, does speed hold?

    python -m benchmarks.soak [--images ZIP...] [--count 10000] [--json]

Runs the command `batch` over the data set's images and watches, from outside, the journal and the memory of the process
and of those that read files for it. Memory after the first 500 images, against its largest value later; images a second
of the first and of the last tenth, the first 500 left out of both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.batch import DATA

WARM = 500
_PAUSE_S = 0.05  # a tenth of the run may take no longer than 5 s


def resident(pid: int) -> int:
    """Bytes of private memory of a process and of its children; 0 for one that has ended."""
    total = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += (task / "children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return total
    return total + sum(resident(int(child)) for child in set(children))


def watch(command: list[str], journal: Path) -> list[tuple[float, int, int]]:
    """Seconds, records and resident bytes, twenty times a second, until the command has ended."""
    child = subprocess.Popen(command)
    seen, read, records = [], 0, -1  # the header is no record
    while child.poll() is None:
        time.sleep(_PAUSE_S)
        if journal.exists():
            with journal.open("rb") as file:
                file.seek(read)
                fresh = file.read()
            read, records = read + len(fresh), records + fresh.count(b"\n")
        seen.append((time.monotonic(), max(records, 0), resident(child.pid)))
    if child.returncode:
        sys.exit(f"batch ended with {child.returncode}")
    return [each for each in seen if each[2]]


def rate(seen: list[tuple[float, int, int]], low: int, high: int) -> float:
    """Records a second while their number went from `low` to `high`."""
    began = next(each for each in seen if each[1] >= low)
    ended = next(each for each in seen if each[1] >= high)
    return (ended[1] - began[1]) / (ended[0] - began[0])


def figures(seen: list[tuple[float, int, int]], count: int) -> dict[str, Any]:
    """Memory and speed, early and late."""
    warm = [size for _, records, size in seen if WARM <= records <= WARM + (count - WARM) // 10]
    later = [size for _, records, size in seen if WARM + (count - WARM) // 10 < records < count]
    tenth = (count - WARM) // 10
    first, last = rate(seen, WARM, WARM + tenth), rate(seen, count - tenth, count)
    return {
        "images": count,
        "memory_early_mb": max(warm) / 1e6,
        "memory_later_mb": max(later) / 1e6,
        "memory_growth": max(later) / max(warm) - 1,
        "first_tenth_images_per_s": first,
        "last_tenth_images_per_s": last,
        "speed_change": last / first - 1,
        "seconds": seen[-1][0] - seen[0][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", default=[DATA, DATA.with_name("nih64.zip")])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for archive in given.images:
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(Path(folder) / "images" / archive.stem)
        journal = Path(folder) / "out.jsonl"
        command = ["batch", str(Path(folder) / "images"), "-o", str(journal), "--limit", str(given.count)]
        whole = [sys.executable, "-m", "xraygpt_lite", *command, "--order", "random"]
        seen = watch(whole, journal)
        lines = journal.read_bytes().splitlines()
        names = {json.loads(line)["input"] for line in lines[1:]}
    assert len(names) == len(lines) - 1 == given.count
    result = figures(seen, given.count)
    for name, value in result.items():
        print(f"{name:26} {value:.4f}" if isinstance(value, float) else f"{name:26} {value}")
    if given.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
