"""The command line as a process: what it loads, how fast it answers, pipes, signals and full devices."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Process = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = ("numpy", "onnxruntime", "llama_cpp", "torch", "pydicom", "PIL", "transformers")
_LIST = """
import sys
from xraygpt_lite.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sorted(sys.modules))
"""


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["summarize", "--help"], ["chat", "--help"], ["verify", "--help"],
             ["doctor", "--help"], ["bench", "--help"], ["models", "add", "--help"], ["completion", "bash"]],
)  # fmt: skip
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", _LIST, *args], capture_output=True, text=True, timeout=60, check=True)
    loaded = done.stdout.rpartition("LOADED")[2].split()
    assert not set(HEAVY) & set(loaded)
    if args == ["--help"]:
        assert not [name for name in loaded if name.startswith("xraygpt_lite.cli.") and "console" not in name]


def test_help_answers_in_well_under_half_a_second(process: Process) -> None:
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("--help", fake=False).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.4, times  # of the processor's time: a busy machine is not our fault


def test_help_and_version(process: Process) -> None:
    from xraygpt_lite import __version__
    from xraygpt_lite.cli import COMMANDS

    done = process("--help", fake=False)
    assert done.stdout.startswith("Usage: xraygpt-lite [OPTIONS] COMMAND")
    assert all(f"  {name}" in done.stdout and what in done.stdout for name, what in COMMANDS.items())
    assert process("--version", fake=False).stdout == f"xraygpt-lite {__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sumarize"], "no such command 'sumarize'"),
        (["--nope"], "no such option"),
        (["models", "nope"], "no such command 'nope'"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
        (["chat"], "missing argument 'IMAGE'"),
        (["chat", "-"], "chat reads its questions from standard input"),
    ],
)
def test_usage_errors_are_one_line(process: Process, args: list[str], message: str) -> None:
    done = process(*args, fake=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("xraygpt-lite: error: ")
    assert message in done.stderr.casefold() or message in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_command_shows_the_help(process: Process) -> None:
    done = process(fake=False)
    assert done.returncode == 2
    assert "Usage: xraygpt-lite" in done.stderr


@pytest.mark.usefixtures("images")
def test_a_reader_that_leaves_early_is_no_error_message(process: Process) -> None:
    many = ["a.png"] * 3000
    done = process("summarize", "--json", *many, shell="| head -1")
    assert done.stderr == ""
    assert done.returncode == 1  # of summarize, by pipefail
    assert json.loads(done.stdout)["source"] == "a.png"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.usefixtures("images")
def test_a_full_device_as_standard_output(process: Process) -> None:
    done = process("summarize", "a.png", shell="> /dev/full")
    assert done.returncode == 1
    assert done.stderr == "xraygpt-lite: error: the system refused a file operation: No space left on device\n"


def test_a_name_that_is_not_utf8(process: Process, images: Path) -> None:
    name = b"r\xff.png"
    (images / os.fsdecode(name)).write_bytes(b"x")
    done = process("summarize", name, "a.png")
    assert done.returncode == 0
    assert done.stdout.startswith("== r\\udcff.png ==\n")
    assert json.loads(process("summarize", "--json", name).stdout)["source"] == "r\udcff.png"


@pytest.mark.usefixtures("images")
def test_an_output_encoding_that_lacks_a_letter(process: Process) -> None:
    done = process("summarize", "a.png", "--question", "a → ł ?", env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert "asked: a \\u2192 \\u0142 ?" in done.stdout


def test_an_interrupt_ends_with_130_and_no_traceback(images: Path) -> None:
    fake = Path(__file__).with_name("with_fake_model.py")
    args = [sys.executable, str(fake), "summarize", "a.png", "b.png", "--question", "slow", "-o", "out.txt"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        time.sleep(2)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=30)
    assert (running.returncode, stdout.strip(), stderr.strip()) == (130, b"", b"")
    assert sorted(path.name for path in images.iterdir()) == ["a.png", "b.png", "two.dcm"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(process: Process, shell: str) -> None:
    done = process("completion", shell, fake=False)
    assert done.returncode == 0
    assert "_XRAYGPT_LITE_COMPLETE" in done.stdout
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False, timeout=10).returncode == 0


def test_completion_answers(process: Process) -> None:
    def complete(words: str, at: int) -> str:
        env = {"_XRAYGPT_LITE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        return process(fake=False, env=env).stdout

    assert complete("xraygpt-lite su", 1) == "plain,summarize\n"
    assert "plain,--max-tokens\n" in complete("xraygpt-lite summarize --m", 2)
    assert complete("xraygpt-lite summarize --device c", 3) == "plain,cpu\nplain,cuda\n"
