"""Real `batch` runs over small noise images, and what must hold of the journals that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from unit.report.test_record_schema import SCHEMA as RECORD
from unit.report.test_record_schema import faults

JOURNAL = json.loads((resources.files("xraygpt_lite.report") / "journal.schema.json").read_text("utf-8"))
MARK = "XRAYGPT_LITE_TEST_MARK"
TOKENS = 4


def noise(folder: Path, names: Sequence[str], seed: int = 0) -> None:
    """Write a grey PNG of 40 x 40 for each name, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / name)


def command(bundle: Path, inputs: Path, out: Path, *more: str) -> list[str]:
    small = ["--threads", "1", "--parallel", "2", "--max-tokens", str(TOKENS)]
    given = ["--bundle", str(bundle), str(inputs), "-o", str(out)]
    return [sys.executable, "-m", "xraygpt_lite", "batch", *small, *given, *more]


def start(arguments: Sequence[str], mark: str) -> subprocess.Popen[str]:
    """Run in a session of its own; `mark` is how `alive` knows it and its children, whoever their parent is by then."""
    env = {**os.environ, MARK: mark}
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )


def alive(mark: str) -> list[int]:
    """Processes that run with this mark; zombies have none."""
    wanted = f"{MARK}={mark}".encode()
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if wanted in _environment(path)]


def count(out: Path) -> int:
    """Whole records in a journal, which may be in use, be torn or not be there yet."""
    try:
        return max(0, out.read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


def records(out: Path) -> list[dict[str, Any]]:
    """All records, every line checked against the schemas, the last one too."""
    data = out.read_bytes()
    assert data.isascii()
    assert data.endswith(b"\n")
    header, *found = map(json.loads, data.splitlines())
    assert faults(header, JOURNAL["$defs"]["header"]) == []
    for one in found:
        kind = "failure" if "error" in one else "summary"
        assert faults(one, JOURNAL["$defs"]["entry"]) == []
        assert faults(one, RECORD["$defs"][kind]) == []
    assert len({one["key"] for one in found}) == len(found)
    return found


def by_input(out: Path, inputs: Path) -> dict[str, dict[str, Any]]:
    """The records by their inputs: every file of the folder exactly once."""
    found = records(out)
    times = Counter(one["input"] for one in found)
    names = {path.relative_to(inputs).as_posix() for path in inputs.rglob("*.png")}
    assert {name: times[name] for name in times.keys() | names if times[name] != (name in names)} == {}
    return {one["input"]: one for one in found}


def said(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """What does not depend on when a record was made: input, content, and text or error."""
    for name, one in sorted(found.items()):
        yield name, one["sha256"], one.get("text", f"{one.get('stage')} {one.get('error')}")


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended meanwhile, or is another user's
        return b""
