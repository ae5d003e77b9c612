"""Nothing leaves the machine, and nothing is left on it: what the native libraries do by themselves is seen here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import socket, sys
import xraygpt_lite
from importlib import resources

def refuse(*_):
    raise AssertionError("a socket was opened")

socket.socket.connect = socket.getaddrinfo = refuse
with xraygpt_lite.load(threads=1) as model:
    with resources.as_file(resources.files("xraygpt_lite.examples")) as examples:
        model.summarize(examples / "synthetic-normal.png")
"""


def run(folder: Path, *command: str) -> list[Path]:
    """Run a command whose home, cache and temporary folders are empty; return what it left there but our own cache."""
    places = {name: folder / name for name in ("home", "cache", "config", "tmp", "ours")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    known = os.environ | {
        "HOME": str(places["home"]), "XDG_CACHE_HOME": str(places["cache"]), "XDG_CONFIG_HOME": str(places["config"]),
        "TMPDIR": str(places["tmp"]), "XRAYGPT_LITE_CACHE": str(places["ours"]),
    }  # fmt: skip
    environment = {name: value for name, value in known.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [path for name, place in places.items() if name != "ours" for path in place.rglob("*")]


def test_a_summary_leaves_no_trace_of_a_library(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry would put a queue of events and an identifier of the device there."""
    assert run(tmp_path, sys.executable, "-c", PROGRAM) == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_system_call_reaches_for_the_network(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    run(tmp_path, "strace", "-f", "-e", "trace=socket,connect,sendto", "-o", str(log), sys.executable, "-c", PROGRAM)
    assert [line for line in log.read_text().splitlines() if "AF_INET" in line] == []
