"""A batch run that is killed at any moment loses nothing: every input once, every line valid, the same texts.

The real command, as a process of its own, over a bundle that truly runs.
"""

from __future__ import annotations

import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from abuse import batch_runs as runs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, which is Linux's")

GOOD, BAD = 200, 4  # inputs; those that are no images come first, so that there are failures to repeat
LATEST = 170  # records, after which a round is brought to its end
WAIT_S = 120.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "inputs"
    runs.noise(folder, [f"{number}.png" for number in range(BAD, BAD + GOOD)])
    for number in range(BAD):
        (folder / f"{number}.png").write_bytes(b"no image %d" % number)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few") / "inputs"
    runs.noise(folder, [f"{number}.png" for number in range(60)])
    return folder


class Victim:
    """A run that is watched closely until it is killed."""

    def __init__(self, arguments: list[str], out: Path) -> None:
        self.out, self.before, self.began = out, runs.count(out), time.monotonic()
        self.process = runs.start(arguments, out.name)

    def until(self, happened: Callable[[], bool]) -> bool:
        """Look some thousand times a second; False when the run ended first."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            if happened():
                return True
            assert time.monotonic() < deadline
            time.sleep(0.0002)
        return False

    def wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)

    def grows(self) -> bool:
        """Wait until a group has been written."""
        size = self.size()
        return self.until(lambda: self.size() > size)

    def size(self) -> int:
        return self.out.stat().st_size if self.out.exists() else 0

    def kill(self, number: int) -> str:
        """Send the signal to a living run and see all of it end; give what it said."""
        assert self.process.poll() is None
        self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=WAIT_S)
        assert stdout == ""
        deadline = time.monotonic() + 10
        while left := runs.alive(self.out.name):
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
        return stderr


Aim = Callable[[Victim, random.Random, float], str]

# How to wait for a moment. Each tells what the moment turned out to be, "ended" where the run was faster.


def at_start(victim: Victim, rng: random.Random, start_s: float) -> str:
    return "start" if victim.wait(rng.uniform(0, start_s)) else "ended"


def at_flush(victim: Victim, rng: random.Random, _: float) -> str:
    return "flush" if all(victim.grows() for _ in range(rng.randint(1, 3))) else "ended"


def at_work(victim: Victim, rng: random.Random, _: float) -> str:
    return "work" if victim.grows() and victim.wait(rng.uniform(0, 0.4)) else "ended"


def at_truncation(victim: Victim, _: random.Random, __: float) -> str:
    size = victim.size()
    return "truncation" if victim.until(lambda: victim.size() != size) else "ended"


def at_rewriting(victim: Victim, _: random.Random, __: float) -> str:
    part = victim.out.with_name(f".{victim.out.name}.partial")
    size = victim.size()
    return "rewriting" if victim.until(lambda: part.exists() or victim.size() != size) else "ended"


KILLS: list[tuple[Aim, signal.Signals]] = [
    *[(at_start, signal.SIGKILL)] * 14,
    *[(at_flush, signal.SIGKILL)] * 9,
    *[(at_work, signal.SIGKILL)] * 9,
    *[(at_truncation, signal.SIGKILL)] * 6,
    *[(at_rewriting, signal.SIGKILL)] * 6,
    *[(at_flush, signal.SIGTERM), (at_work, signal.SIGTERM), (at_work, signal.SIGTERM)],
    *[(at_flush, signal.SIGINT), (at_work, signal.SIGINT), (at_work, signal.SIGINT)],
]


class Round:
    """Runs over all inputs into one output, killed again and again, then brought to the end."""

    def __init__(self, bundle: Path, inputs: Path, out: Path, rng: random.Random, start_s: float) -> None:
        self.bundle, self.inputs, self.out, self.rng, self.start_s = bundle, inputs, out, rng, start_s
        self.killed = 0

    @property
    def repairable(self) -> bool:
        """Whether the bad files' failures stand there, and lines to tear."""
        return runs.count(self.out) >= BAD + 10

    def attempt(self, aim: Aim, number: signal.Signals) -> str:
        """One run, killed while it lives and is not finished; at which moment, or "ended" if it was too fast."""
        more = ["--retry-failed"] if aim is at_rewriting else []
        if aim is at_truncation:
            tear(self.out, self.rng)
        victim = Victim(runs.command(self.bundle, self.inputs, self.out, *more), self.out)
        moment = aim(victim, self.rng, self.start_s)
        if moment == "ended" or victim.process.poll() is not None:
            stderr = victim.process.communicate(timeout=WAIT_S)[1]
            assert victim.process.returncode == 3, stderr
            return "ended"
        nearly = runs.count(self.out) > GOOD + BAD - 40
        stderr = victim.kill(number)
        if nearly and runs.count(self.out) == GOOD + BAD:  # it was finished in the moment between
            return "ended"
        assert runs.count(self.out) < GOOD + BAD
        self.killed += 1
        if number == signal.SIGKILL:
            assert (victim.process.returncode, stderr) == (-signal.SIGKILL, "")
        else:
            moment = "clean end"
            assert victim.process.returncode == 130, stderr
            sentence = r"xraygpt-lite: error: stopped; .* The same command goes on from there\n"
            assert re.fullmatch(sentence if runs.count(self.out) > victim.before else rf"({sentence})?\n?", stderr)
        if moment == "rewriting" and not self.out.with_name(f".{self.out.name}.partial").exists():
            return "work"
        return "work" if moment == "start" and runs.count(self.out) > victim.before else moment

    def finish(self) -> dict[str, dict[str, Any]]:
        """Run to the end; what the kills have cost is mended by --retry-failed."""
        assert end(self.bundle, self.inputs, self.out) == 3  # the bad files
        found = runs.by_input(self.out, self.inputs)
        crashed = [one for one in found.values() if one.get("error") == "Crashed"]
        assert len(crashed) <= self.killed / 2  # two kills met it at work
        if crashed:
            assert end(self.bundle, self.inputs, self.out, "--retry-failed") == 3
            found = runs.by_input(self.out, self.inputs)
        return found


def tear(out: Path, rng: random.Random) -> None:
    """Leave part of a group at the end, as a machine that lost power would."""
    line = out.read_bytes().splitlines(keepends=True)[-1]
    with out.open("ab") as file:
        file.write(line[: rng.randint(1, len(line) - 1)])


def end(bundle: Path, inputs: Path, out: Path, *more: str) -> int:
    """Run to the end; the exit code."""
    process = runs.start(runs.command(bundle, inputs, out, *more), out.name)
    stderr = process.communicate(timeout=WAIT_S)[1]
    assert re.search(r"^\d+ done, \d+ failed, \d+ done before; \d+ images a minute", stderr), stderr
    return process.returncode


@pytest.mark.slow
def test_killed_at_fifty_moments(recorded_bundle: Path, inputs: Path, tmp_path: Path) -> None:
    rng = random.Random(4)
    quiet = Victim(runs.command(recorded_bundle, inputs, tmp_path / "quiet.jsonl"), tmp_path / "quiet.jsonl")
    assert quiet.until(lambda: runs.count(quiet.out) > 0)
    start_s = time.monotonic() - quiet.began
    quiet.process.communicate(timeout=WAIT_S)
    assert quiet.process.returncode == 3
    expected = list(runs.said(runs.by_input(quiet.out, inputs)))

    left = list(KILLS)
    rng.shuffle(left)
    moments: Counter[str] = Counter()
    rounds = 0
    while left:
        rounds += 1
        one = Round(recorded_bundle, inputs, tmp_path / f"round-{rounds}.jsonl", rng, start_s)
        while left and runs.count(one.out) < LATEST:
            anywhere = (kill for kill in left if one.repairable or kill[0] not in (at_truncation, at_rewriting))
            kill = next(anywhere, (at_flush, signal.SIGKILL))
            moment = one.attempt(*kill)
            moments[moment] += 1
            if moment != "ended" and kill in left:
                left.remove(kill)
        assert list(runs.said(one.finish())) == expected
        assert runs.alive(one.out.name) == []
    assert moments.total() - moments["ended"] >= 50
    assert min(moments[moment] for moment in ("start", "flush", "work", "truncation", "clean end")) >= 5, moments
    assert moments["rewriting"] >= 2, moments


def test_a_native_crash_is_like_any_kill(recorded_bundle: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for moment in (lambda: runs.count(out) > 0, (tmp_path / "out.jsonl.running").exists):
        victim = Victim(runs.command(recorded_bundle, few, out), out)
        resource.prlimit(victim.process.pid, resource.RLIMIT_CORE, (0, 0))
        assert victim.until(moment)
        assert victim.kill(signal.SIGSEGV) == ""
        assert victim.process.returncode == -signal.SIGSEGV
        assert runs.count(out) < 60
    assert end(recorded_bundle, few, out) == 0
    assert all("text" in one for one in runs.by_input(out, few).values())


def test_notes_of_a_file_that_was_written_do_not_stay(recorded_bundle: Path, few: Path, tmp_path: Path) -> None:
    """Killed after the group was on the disk and before the note that its last file came out."""
    out = tmp_path / "out.jsonl"
    assert end(recorded_bundle, few, out) == 0
    running = tmp_path / "out.jsonl.running"
    running.write_text(f"+{runs.records(out)[9]['file']}\n")
    assert end(recorded_bundle, few, out) == 0
    assert not running.exists()


DISK = """
mount -t tmpfs -o size=160k tmpfs "$1" || exit 77
cd "$1"; head -c 100000 /dev/zero > ballast; shift
"$@"; echo "ended with $?" >&2
rm ballast
"$@"; echo "ended with $?" >&2
cp out.jsonl ..
"""


def test_a_full_disk_ends_a_run_that_goes_on_later(recorded_bundle: Path, few: Path, tmp_path: Path) -> None:
    """On a disk of its own, where the system lets this user mount one."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, which is absent")
    disk = tmp_path / "disk"
    disk.mkdir()
    batch = runs.command(recorded_bundle, few, Path("out.jsonl"))
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", DISK, "sh", str(disk), *batch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    if done.returncode in (1, 77) and "ended with" not in done.stderr:
        pytest.skip("needs a mount of its own, which this system does not allow")
    first, second, rest = re.split("ended with (?=[0-9])", done.stderr)
    assert "the disk is full" in first
    assert first.startswith("xraygpt-lite: error: out.jsonl")
    assert first.count("\n") == 1
    assert second[0] == "1"
    assert rest[0] == "0", second
    assert len(runs.by_input(tmp_path / "out.jsonl", few)) == 60


def test_a_limit_on_file_sizes_ends_a_run_that_goes_on_later(recorded_bundle: Path, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *runs.command(recorded_bundle, few, out)]
    process = runs.start(limited, out.name)
    stderr = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 1
    assert stderr.count("\n") == 1
    safe = runs.count(out)
    assert f"a limit on file sizes was reached; {safe} records in it are safe. Run the same command again" in stderr
    assert 0 < safe < 60
    assert end(recorded_bundle, few, out) == 0
    assert len(runs.by_input(out, few)) == 60


def test_a_folder_that_is_gone_for_a_while(recorded_bundle: Path, few: Path, tmp_path: Path) -> None:
    """As a network folder may be; its mount point stays, and is empty."""
    share, away, out = tmp_path / "share", tmp_path / "away", tmp_path / "out.jsonl"
    shutil.copytree(few, share)
    victim = Victim(runs.command(recorded_bundle, share, out), out)
    assert victim.until(lambda: runs.count(out) > 0)
    share.rename(away)
    share.mkdir()
    stderr = victim.process.communicate(timeout=WAIT_S)[1]
    assert victim.process.returncode == 3, stderr
    failed = {one["input"] for one in runs.records(out) if "error" in one}
    assert len(failed) > 10
    before = out.read_bytes()
    process = runs.start(runs.command(recorded_bundle, share, out), out.name)
    assert "no file found" in process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 2
    assert out.read_bytes() == before
    share.rmdir()
    away.rename(share)
    assert end(recorded_bundle, share, out, "--retry-failed") == 0
    assert all("text" in one for one in runs.by_input(out, share).values())


# Sends the signal at a moment that a timer hardly ever meets, in code that cannot end with KeyboardInterrupt.
INTERRUPTED = """
import os, signal, sys
from xraygpt_lite.cli import main

number, place = getattr(signal, sys.argv[1]), sys.argv[2]

def look(frame, event, about):
    if not callable(signal.getsignal(signal.SIGTERM)):
        return
    if place == "callback" and event == "call" and frame.f_code.co_filename.endswith("llm/library.py"):
        if frame.f_code.co_name == "receive":
            sys.setprofile(None)
            os.kill(os.getpid(), number)
    if place == "import" and event == "c_call" and about.__name__ == "exec_dynamic":
        if "onnxruntime" in str(frame.f_locals.get("args")):
            sys.setprofile(None)
            signal.signal(signal.SIGALRM, signal.getsignal(number))
            signal.setitimer(signal.ITIMER_REAL, 0.0005)

sys.setprofile(look)
main(sys.argv[3:])
"""


@pytest.mark.parametrize(("name", "place"), [("SIGTERM", "callback"), ("SIGINT", "import")])
def test_a_signal_is_not_lost_in_native_code(
    recorded_bundle: Path, few: Path, tmp_path: Path, name: str, place: str
) -> None:
    """During the start, where llama.cpp calls back or ONNX Runtime is being loaded."""
    out = tmp_path / "out.jsonl"
    batch = runs.command(recorded_bundle, few, out)[3:]
    process = runs.start([sys.executable, "-c", INTERRUPTED, name, place, *batch], out.name)
    stderr = process.communicate(timeout=WAIT_S)[1]
    assert "Traceback" not in stderr
    assert process.returncode == 130, stderr
    assert runs.count(out) < 60
