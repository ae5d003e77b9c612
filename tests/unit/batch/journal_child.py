"""Programs that tests of the journal run in processes of their own, to kill them, or to give them too little disk.

`python journal_child.py PROGRAM ARGUMENTS`; each is described where it is defined.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import xraygpt_lite.batch
from xraygpt_lite.batch.journal import Entry, Header, Journal, Keys, read
from xraygpt_lite.errors import XrayError
from xraygpt_lite.values import Failure, Record, Sampling, Summary, Timings

ROOM = os.path.dirname(xraygpt_lite.batch.__file__)
PLAIN = Keys(None)
INPUTS = 14


def header(inputs: int | None = 20, **options: Any) -> Header:
    return Header("f" * 64, "tiny", {"questions": ["?"], **options}, inputs, None, "Research.", "0.1.0")


def record(n: int, failed: bool = False, question: str = "?") -> Record:
    if failed:
        return Failure(f"{n}.png", None, question, "read", "ImageError", f"{n}.png is empty")
    return Summary(
        source=f"{n}.png", sha256="0" * 64, sop_instance_uid=None, question=question, prompt_variant="chat",
        text="Clear.", raw_text="Clear.", finish="stop", warnings=(), options=Sampling(), device="cpu",
        bundle_id="f" * 64, bundle_name="tiny", timings=Timings(), prompt_tokens=1, image_tokens=2, answer_tokens=3,
        disclaimer="Research.",
    )  # fmt: skip


def file(n: int, keys: Keys = PLAIN) -> str:
    return keys.file(f"{n}.png", None)


def entry(n: int, failed: bool = False, question: str = "?", keys: Keys = PLAIN) -> Entry:
    name = f"{n}.png"
    key = keys.key(name, "0" * 64, question)
    return Entry(keys.label(name), key, file(n, keys), record(n, failed, question))


def fill_in(journal: Journal, count: int) -> None:
    """What a run does, without the work: records for inputs that have none."""
    for n in range(count):
        new = entry(n, keys=journal.keys)
        if not journal.has(new.key):
            journal.append(new)


# --- killed at every line ---


def nothing(_: object) -> None:
    pass


class Scenario:
    """What lies there, what is done until it is killed, and what has to hold then."""

    def __init__(
        self,
        run: Callable[[Path, Callable[[str], None]], None],
        before: Callable[[Path], None] = nothing,
        options: dict[str, Any] | None = None,
        visits: int = 1,
    ) -> None:
        self.run, self.before, self.options = run, before, options or {}
        self.visits = visits  # a line of code is a point to be killed at the first so many times that it is passed


def work(journal: Journal, say: Callable[[str], None], inputs: range) -> None:
    """Records one after the other, as a run makes them; `say` tells the parent what must be there from now on."""
    for n in inputs:
        digest = file(n, journal.keys)
        say(f"enters {digest}")
        journal.begin(digest)
        say(f"inside {digest}")
        if not journal.has(entry(n, keys=journal.keys).key):
            journal.append(entry(n, keys=journal.keys))
        if n % 10 == 9 or n % 3 == 2:
            journal.flush()
            say(f"safe {journal.records}")
        say(f"leaves {digest}")
        journal.end(digest)
        say(f"outside {digest}")


def new(path: Path, say: Callable[[str], None], **options: Any) -> None:
    with Journal(path, header(**options)) as journal:
        work(journal, say, range(INPUTS))


def keep_names_out(path: Path, say: Callable[[str], None]) -> None:
    new(path, say, identifiers=False)


def some_records(path: Path) -> None:
    with Journal(path, header()) as journal:
        for n in range(6):
            journal.append(entry(n, failed=n % 3 == 1))


def torn(path: Path) -> None:
    some_records(path)
    with path.open("ab") as out:
        out.write(entry(6).line()[:-30])


def crashed(path: Path) -> None:
    some_records(path)
    notes = f"+{file(8)}\n+{file(9)}\n-{file(9)}\n1 {file(10)}\n+{file(11)[:9]}"
    path.with_name(path.name + ".running").write_text(notes)


def repair(path: Path, say: Callable[[str], None]) -> None:
    say("safe 6")
    with Journal(path, header()) as journal:
        work(journal, say, range(6, 9))


def retry(path: Path, say: Callable[[str], None]) -> None:
    say("safe 4")
    with Journal(path, header(inputs=None), retry_failed=True) as journal:
        work(journal, say, range(8))


def restart(path: Path, say: Callable[[str], None]) -> None:
    with Journal(path, header(), restart=True) as journal:
        work(journal, say, range(3))


SCENARIOS = {
    "new": Scenario(new, visits=2),
    "salted": Scenario(keep_names_out, options={"identifiers": False}),
    "repair": Scenario(repair, torn),
    "retry": Scenario(retry, some_records),
    "restart": Scenario(restart, some_records),
    "crashed": Scenario(repair, crashed),
}


def traced(scenario: Scenario, path: Path, seen: Callable[[tuple[str, int]], None], say: Callable[[str], None]) -> None:
    """Run a scenario and tell each line of the room that is about to run."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if os.path.dirname(frame.f_code.co_filename) != ROOM:
            return None
        if event == "line":
            seen((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        scenario.run(path, say)
    finally:
        sys.settrace(None)


EVERY = 3
"""Of the lines of code, for the time's sake; 1 was run, too, and finds no more."""


def kill(name: str, folder: Path) -> dict[str, Any]:
    """Fork a child for each line of code that a scenario passes, killed there; what was wrong when others went on."""
    scenario = SCENARIOS[name]
    lines: list[tuple[str, int]] = []
    prepared = folder / "prepared"
    prepared.mkdir()
    scenario.before(prepared / "out.jsonl")
    shutil.copytree(prepared, folder / "dry")
    traced(scenario, folder / "dry" / "out.jsonl", lines.append, nothing)
    visits: Counter[tuple[str, int]] = Counter()
    points = []
    for number, line in enumerate(lines):
        visits[line] += 1
        if visits[line] <= scenario.visits:
            points.append(number)
    points = points[::EVERY]
    wrong = []
    for point in points:
        place = folder / "killed"
        shutil.copytree(prepared, place)
        path = place / "out.jsonl"
        if fault := killed_at(scenario, path, point):
            file_name, number = lines[point]
            wrong.append(f"killed before {os.path.basename(file_name)}:{number}: {fault}")
        shutil.rmtree(place)
    return {"points": len(points), "wrong": wrong}


def killed_at(scenario: Scenario, path: Path, point: int) -> str:
    """Kill a child before its line number `point`, and go on after it; what is wrong then, or ""."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        passed = [0]

        def seen(_: tuple[str, int]) -> None:
            if passed[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            passed[0] += 1

        traced(scenario, path, seen, lambda text: nothing(os.write(writing, f"{text}\n".encode())))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().split("\n")[:-1]
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return f"the child was not killed: {status}"
    return verdict(scenario, path, said)


def verdict(scenario: Scenario, path: Path, said: list[str]) -> str:
    if scenario.before is not nothing and not (path.exists() and path.stat().st_size):
        return "what was there is gone, and nothing has come in its place"
    safe = max((int(text.split()[1]) for text in said if text.startswith("safe ")), default=0)
    with Journal(path, header(**scenario.options)) as journal:
        found = journal.records
        if found < safe:
            return f"{found} records are left of {safe} that were safe"
        if fault := suspects(scenario, dict(journal.suspects), said, journal.keys):
            return fault
        fill_in(journal, INPUTS)
        keys = journal.keys
    names = [held.input for held in read(path)[1]]
    if sorted(names) != sorted(keys.label(f"{n}.png") for n in range(INPUTS)):
        return f"inputs after going on: {names}"
    lines = path.read_bytes().split(b"\n")
    if lines.pop() or any(not isinstance(json.loads(line), dict) for line in lines):
        return "a line is not whole"
    left = {beside.name for beside in path.parent.iterdir()} - {path.name}
    if odd := left - {"out.jsonl.lock", "out.jsonl.salt", "out.jsonl.running"}:
        return f"left behind: {odd}"
    return ""


def suspects(scenario: Scenario, counts: dict[str, int], said: list[str], keys: Keys) -> str:
    """Whether exactly what was inside is suspected, apart from what was just entering or leaving."""
    states: dict[str, str] = {}
    for text in said:
        word, what = text.split()
        if word != "safe":
            states[what] = word
    expected = {what: 1 for what, word in states.items() if word == "inside"}
    free = {what for what, word in states.items() if word in ("enters", "leaves")}
    if scenario.before is crashed:  # counted once, however often the opening was killed
        expected |= {what: 1 for what in (file(8), file(10)) if states.get(what) not in ("outside", "leaves")}
        for what in (file(8), file(10)):  # it was inside a second time
            if states.get(what) == "inside":
                expected[what] = 2
    for what, count in expected.items():
        if what not in free and counts.get(what) != count:
            return f"suspected {counts.get(what)} times and not {count}"
    if odd := counts.keys() - expected.keys() - free:
        return f"{len(odd)} are suspected that were not inside"
    return ""


# --- other programs ---


def append(path: Path) -> None:
    """Append until killed. After each group the number of safe records is printed."""
    with Journal(path, header(inputs=None)) as journal:
        start = journal.records
        print("open", start, flush=True)
        for n in range(1_000_000):
            if not journal.has(entry(n).key):
                journal.append(entry(n))
                if journal.records % 10 == 0:
                    journal.flush()
                    print("safe", journal.records, flush=True)


def die(path: Path, *inside: str) -> None:
    """Be killed with these files inside native code."""
    with Journal(path, header()) as journal:
        for digest in inside:
            journal.begin(digest)
        os.kill(os.getpid(), signal.SIGKILL)


def hold(path: Path) -> None:
    """Hold a journal until standard input ends."""
    with Journal(path, header()) as journal:
        journal.append(entry(0))
        journal.flush()
        print("open", flush=True)
        sys.stdin.read()


def limits(folder: Path) -> list[str]:
    """For each size at which a file may end within the second group: what is wrong, if anything."""
    wrong = []
    path = folder / "out.jsonl"
    with Journal(path, header()) as journal:
        for n in range(3):
            journal.append(entry(n))
    whole = path.read_bytes()
    group = b"".join(entry(n).line() for n in range(3, 6))
    highest = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in sorted({*range(len(whole), len(whole) + len(group), 97), len(whole) + len(group) - 1}):
        path.write_bytes(whole)
        message = ""
        try:
            with Journal(path, header()) as journal:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, highest))
                for n in range(3, 6):
                    journal.append(entry(n))
                journal.flush()
        except XrayError as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (highest, highest))
        if "the disk is full" not in message or "3 records in it are safe" not in message:
            wrong.append(f"{limit}: {message}")
        if path.read_bytes() != whole:
            wrong.append(f"{limit}: not cut back")
        with Journal(path, header()) as journal:
            fill_in(journal, 6)
        if path.read_bytes() != whole + group:
            wrong.append(f"{limit}: did not go on")
    with Journal(path, header()) as journal:  # no room for another header, or for notes
        pass
    for attempt in (
        lambda: Journal(path, header(inputs=None)),
        lambda: Journal(path, header(), restart=True),
        lambda: Journal(folder / "other.jsonl", header()),
        lambda: Journal(folder / "salted.jsonl", header(identifiers=False)),
    ):
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, highest))
        try:
            with attempt():
                wrong.append("opened without room")
        except XrayError as error:
            if "cannot be opened: the disk is full" not in str(error):
                wrong.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (highest, highest))
        if path.read_bytes() != before:
            wrong.append("changed without room")
    left = sorted(found.name for found in folder.iterdir() if not found.name.endswith(".lock"))
    return wrong + ([] if left == ["out.jsonl"] else left)


def fill(folder: Path) -> dict[str, Any]:
    """On a disk of 256 KB: fill it, make room, and go on to the end."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(128 << 10))
    path = folder / "out.jsonl"
    messages = []
    for _ in range(2):
        try:
            with Journal(path, header()) as journal:
                fill_in(journal, 140)
        except XrayError as error:
            messages.append(str(error))
            ballast.unlink()
        else:
            break
    whole = [held.input for held in read(path)[1]]
    return {"messages": messages, "inputs": whole}


def memory(path: Path) -> int:
    """By how many bytes opening and rewriting a journal makes a process larger."""

    def resident() -> int:
        with open("/proc/self/status") as status:
            (line,) = (line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10

    before = resident()
    with Journal(path, header(inputs=None)) as journal:  # another header: it is rewritten as well
        if not journal.has(entry(99_999).key) or journal.has(entry(100_000).key):
            return -1
    return resident() - before


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "kill":
        print(json.dumps(kill(rest[0], Path(rest[1]))))
    elif command == "die":
        die(Path(rest[0]), *rest[1:])
    elif command in ("append", "hold"):
        {"append": append, "hold": hold}[command](Path(rest[0]))
    else:
        print(json.dumps({"limits": limits, "fill": fill, "memory": memory}[command](Path(rest[0]))))
