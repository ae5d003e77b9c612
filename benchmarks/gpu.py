"""All figures of a machine with an NVIDIA GPU, by the other benchmarks: one command, one JSON object.

    python -m benchmarks.gpu --bundle B... > figures.json

For each bundle: first token, tokens a second against a bare loop over `llama_decode`, and memory, on the GPU and on the
CPU; then images a minute and memory of batches of 1 to 64. Where no GPU was at hand, `--device cpu` tried the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader")


def figures(command: Sequence[str]) -> Any:
    """The last line that a benchmark prints, which is JSON; ends here if it fails."""
    print(" ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def gpu() -> str:
    """Name, driver and memory of the GPU, as the driver gives them."""
    try:
        return subprocess.run(_QUERY, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none found"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", action="append", required=True, help="name or folder; may be given several times")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script itself")
    parser.add_argument("--count", type=int, default=128, help="radiographs of a batch")
    parser.add_argument("--tokens", type=int, default=120)
    given = parser.parse_args()
    found: dict[str, Any] = {"gpu": gpu()}
    for bundle in given.bundle:
        asked = ["--bundle", bundle, "--tokens", str(given.tokens), "--json"]
        batches = ["benchmarks.batch", "--table", "--count", str(given.count), "--device", given.device]
        found[bundle] = {
            "one": {
                device: figures(["xraygpt_lite", "bench", "--device", device, *asked])
                for device in dict.fromkeys((given.device, "cpu"))
            },
            "batches": figures([*batches, *asked]),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
