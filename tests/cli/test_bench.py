"""`bench` as its user sees it: a table, one JSON line, a chart, sentences and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from xraygpt_lite.bench.runner import STAGES

Run = Callable[..., subprocess.CompletedProcess[str]]
IMAGE = str(Path(__file__).parents[2] / "examples" / "synthetic-normal.png")
FAST = ("--images", IMAGE, "--tokens", "5", "--repeats", "1")


@pytest.fixture
def env(made_bundle: Path, default_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    assert default_bundle.is_dir()  # llama.cpp's self-test runs on it
    cache = tmp_path_factory.getbasetemp() / "cli-cache"
    return {"XRAYGPT_LITE_BUNDLE": str(made_bundle), "XRAYGPT_LITE_CACHE": str(cache)}


@pytest.fixture
def bench(process: Run, env: dict[str, str]) -> Run:
    return lambda *args: process("bench", *args, fake=False, env=env)


def test_one_json_line_and_a_chart(bench: Run, tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    done = bench(*FAST, "--json", "--plot", str(chart))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    for name in ("decode_vs_bare", "decode_vs_bandwidth", "first_token_s", "total_s", "peak_rss_mb"):
        assert found[name] > 0, name
    assert (found["speculation"], found["prompt_cache"], found["repeats"], found["images"]) == (True, True, 1, 1)
    assert found["answer_tokens"] == [5]
    assert ElementTree.parse(chart).getroot().tag.endswith("svg")


def test_a_table_for_a_reader(bench: Run, env: dict[str, str]) -> None:
    done = bench(*FAST, IMAGE, "--no-speculation", "--no-prompt-cache", "--device", "cpu", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    first = {line.split()[0]: line for line in lines if line}
    assert {*STAGES, "first", "total"} <= set(first)
    assert first["STAGE"].split() == ["STAGE", "SECONDS", "LOWEST", "HIGHEST"]
    assert "tiny, id " in first["bundle"]
    assert "vision f32, projector f32, llm f32" in first["bundle"]
    assert "llama-cpp-python" in first["versions"]
    assert "1 threads were asked for" in first["plan"]
    assert "2 images, 5 tokens" in first["answers"]
    assert "guesses at next tokens off, prompt cache off" in first["used"]
    assert "decode_vs_bare" in first
    assert max(map(len, first["decode_vs_bare"].splitlines())) < 160


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--bundle", "nowhere"], 4, "'nowhere' is neither the name of a bundle"),
        (["--images", "gone.png"], 1, "gone.png: there is no such file"),
        (["--images", IMAGE, "letter.dcm"], 1, "letter.dcm: not an image that can be read"),
        (["--plot", "nowhere/chart.svg"], 2, "--plot nowhere/chart.svg cannot be written: No such file or directory"),
        (["--plot", "letter.svg", "--images", "letter.svg"], 2, "--plot letter.svg is one of the images"),
        (["--plot", "chart.png"], 2, "--plot chart.png is written as SVG"),
        ([IMAGE], 2, "stands alone; images are named behind --images"),
        (["--tokens", "1"], 2, "1 is not in the range 2<=x<=100000"),
        (["--repeats", "0"], 2, "0 is not in the range 1<=x<=1000"),
        (["--device", "cuda"], 1, "--device cuda cannot be met"),
        (["--images", IMAGE, "--tokens", "90000"], 1, "do not fit the model's context"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("letter.dcm", "letter.svg"):
        Path(name).write_text("Dear colleague,\n")
    done = bench(*args)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("xraygpt-lite: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_no_chart(env: dict[str, str], tmp_path: Path, number: int) -> None:
    args = [
        sys.executable,
        "-m",
        "xraygpt_lite",
        "bench",
        "--images",
        IMAGE,
        "--repeats",
        "1000",
        "--plot",
        "chart.svg",
    ]
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **env}, cwd=tmp_path
    ) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        deadline = time.monotonic() + 60
        while not (measured := children.read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(number)
        stdout, stderr = running.communicate(timeout=30)
    assert (running.returncode, stdout.strip(), stderr.strip()) == (130, b"", b"")
    while any(map(_runs, measured)):  # one that was just being started ends when nothing comes of its request
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def _runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_terminal_is_told_what_comes_next(
    terminal: Callable[..., object], env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    screen = terminal("bench", *FAST, fake=False)
    screen.until("starting, 1 of 1")  # type: ignore[attr-defined]  # conftest's Terminal
    screen.until("comparing with a bare loop")  # type: ignore[attr-defined]
    screen.until("decode_vs_bare")  # type: ignore[attr-defined]
    assert screen.wait() == 0  # type: ignore[attr-defined]
