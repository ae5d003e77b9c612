"""A run and its journal: nothing twice, nothing lost, and what was asked for is what is done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import xraygpt_lite
from xraygpt_lite import batch, vision
from xraygpt_lite.batch import runner
from xraygpt_lite.batch.inputs import find
from xraygpt_lite.batch.journal import Entry, Journal, read
from xraygpt_lite.batch.pipeline import Ask
from xraygpt_lite.batch.runner import Run, run
from xraygpt_lite.errors import ContextError, DeviceError, UsageError, XrayError
from xraygpt_lite.llm import native
from xraygpt_lite.values import Failure, GenerationOptions, Summary

COUNT = 7
OPTIONS = GenerationOptions(max_tokens=5)
Go = Callable[..., Run]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "radiographs"
    (made / "more").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for number in range(COUNT):
        path = made / ("more" if number % 2 else ".") / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (40, 48), dtype=np.uint8)).save(path)
    (made / "none.png").write_bytes(b"none")
    return made


@pytest.fixture
def go(recorded_bundle: Path, folder: Path, tmp_path: Path) -> Iterator[Go]:
    """Run over the folder into out.jsonl, to the end; gives the run, closed, with `seen`: the records that it gave."""

    def start(ask: Ask | None = None, **more: Any) -> Run:
        inputs = find([folder])
        given = {"output": tmp_path / "out.jsonl", "count": len(inputs), "parallel": 2, "threads": 1, **more}
        ask = ask or Ask(options=OPTIONS)
        with Run(inputs, ask, bundle=recorded_bundle, **given) as made:
            made.seen = list(made)  # type: ignore[attr-defined]
        return made

    return start


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


@pytest.mark.parametrize("impossible", [{"ask": Ask(options=GenerationOptions(max_tokens=2048))}, {"device": "cuda"}])
def test_what_cannot_be_answered_leaves_an_output_as_it_is(go: Go, tmp_path: Path, impossible: dict[str, Any]) -> None:
    if "device" in impossible and "CUDAExecutionProvider" in vision.available_providers() and native.supports_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises((ContextError, DeviceError)):
        go(**impossible)
    assert not (tmp_path / "out.jsonl").exists()
    go()
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(XrayError):
        go(**impossible, restart=True)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_every_input_has_one_record(go: Go, tmp_path: Path, folder: Path) -> None:
    done = go()
    assert (done.done, done.failed, done.skipped, done.journal.records, done.journal.failures) == (
        COUNT,
        1,
        0,
        COUNT + 1,
        1,
    )
    header, *records = lines(tmp_path / "out.jsonl")
    assert header["bundle_name"] == "tiny"
    assert header["inputs"] == COUNT + 1
    assert header["options"]["sampling"]["max_tokens"] == 5
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert {record["input"] for record in records} == names
    assert {record["source"] for record in records} == {str(folder / name) for name in names}
    assert {type(record) for record in done.seen} == {Summary, Failure}  # type: ignore[attr-defined]
    assert sorted(path.name for path in tmp_path.glob("out.jsonl?*")) in ([], ["out.jsonl.lock"])


def test_a_second_run_has_nothing_to_do(go: Go, tmp_path: Path) -> None:
    go()
    before = (tmp_path / "out.jsonl").read_bytes()
    again = go()
    assert (again.done, again.failed, again.skipped, again.journal.records) == (0, 0, COUNT + 1, COUNT + 1)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_run_goes_on_where_one_ended(go: Go, tmp_path: Path, recorded_bundle: Path, folder: Path) -> None:
    inputs = find([folder])
    given = {"output": tmp_path / "out.jsonl", "count": len(inputs), "parallel": 2, "threads": 1}
    with Run(inputs, Ask(options=OPTIONS), bundle=recorded_bundle, **given) as first:
        for _ in range(3):
            next(iter(first))
    assert len(lines(tmp_path / "out.jsonl")) == 1 + 3
    second = go()
    assert (second.skipped, second.done + second.failed) == (3, COUNT + 1 - 3)
    assert len({line["input"] for line in lines(tmp_path / "out.jsonl")[1:]}) == COUNT + 1


def test_a_changed_file_is_another_one_and_a_copied_one_is_not(go: Go, tmp_path: Path, folder: Path) -> None:
    go()
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(folder / "0.png")  # other content
    os.utime(folder / "2.png", (1, 1))  # the same, touched
    again = go()
    assert (again.done, again.skipped) == (1, COUNT)
    assert [line["input"] for line in lines(tmp_path / "out.jsonl")[1:]].count("0.png") == 2


def test_identical_files_are_two_inputs(go: Go, tmp_path: Path, folder: Path) -> None:
    shutil.copy(folder / "0.png", folder / "copy.png")
    assert go().done == COUNT + 1
    by_name = {line["input"]: line for line in lines(tmp_path / "out.jsonl")[1:]}
    assert by_name["0.png"]["text"] == by_name["copy.png"]["text"]
    assert by_name["0.png"]["key"] != by_name["copy.png"]["key"]


def test_failures_are_repeated_when_asked(go: Go, tmp_path: Path, folder: Path) -> None:
    go()
    Image.fromarray(np.full((40, 48), 7, np.uint8)).save(folder / "none.png")
    stat = os.stat(folder / "none.png")
    assert stat.st_size != 4
    again = go(retry_failed=True)
    assert (again.done, again.failed, again.journal.failures) == (1, 0, 0)
    assert [line["input"] for line in lines(tmp_path / "out.jsonl")[1:]].count("none.png") == 1


def test_restart_begins_anew(go: Go) -> None:
    go()
    assert go(Ask(options=GenerationOptions(max_tokens=4)), restart=True).done == COUNT


def test_other_options_are_refused_with_the_difference(go: Go) -> None:
    go()
    with pytest.raises(UsageError, match=r"sampling\.max_tokens was 5 and is now 6.*--restart"):
        go(Ask(options=GenerationOptions(max_tokens=6)))


def test_several_questions_are_asked_of_one_encoded_image(go: Go, tmp_path: Path) -> None:
    done = go(Ask(("What is seen?", "Is the heart large?"), options=OPTIONS))
    assert (done.done, done.journal.records) == (COUNT, 2 * (COUNT + 1))
    assert len({line["key"] for line in lines(tmp_path / "out.jsonl")[1:]}) == 2 * (COUNT + 1)


def test_a_file_is_counted_once_however_late_its_lane_ends(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane may end while the records before its last are being taken."""
    append = Journal.append

    def slowly(journal: Journal, entry: Entry) -> None:
        append(journal, entry)
        time.sleep(0.1)

    monkeypatch.setattr(Journal, "append", slowly)
    done = go(Ask(("What is seen?", "Is the heart large?", "And the lungs?"), options=GenerationOptions(max_tokens=40)))
    assert (done.done, done.failed) == (COUNT, 1)


def test_findings_are_scored_as_for_one(go: Go, recorded_bundle: Path, folder: Path) -> None:
    done = go(Ask(options=OPTIONS, findings=True))
    with xraygpt_lite.load(recorded_bundle, threads=1) as model:
        for record in done.seen:  # type: ignore[attr-defined]
            if isinstance(record, Summary):
                expected = model.findings(record.source)
                assert [one.name for one in record.findings] == [one.name for one in expected]
                seen = [one.probability for one in record.findings]
                assert seen == pytest.approx([one.probability for one in expected], abs=1e-3)


def test_identifiers_stay_out(go: Go, tmp_path: Path, folder: Path) -> None:
    secret = folder / "DOE^JANE 1970-01-01.png"
    (folder / "none.png").rename(secret.with_name("DOE none.png"))
    shutil.copy(folder / "0.png", secret)
    done = go(identifiers=False)
    text = (tmp_path / "out.jsonl").read_text("ascii")
    assert "DOE" not in text
    assert str(folder) not in text
    hashes = {record.sha256 for record in done.seen}  # type: ignore[attr-defined]
    assert hashlib.sha256(secret.read_bytes()).hexdigest() not in text
    assert len(hashes) == COUNT + 2
    assert go(identifiers=False).skipped == COUNT + 2


def test_a_name_that_is_a_word_garbles_no_message(
    recorded_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("e").write_text("none")
    given = {"output": Path("out.jsonl"), "count": 1, "parallel": 1, "threads": 1, "identifiers": False}
    with Run(find(["e"]), Ask(options=OPTIONS), bundle=recorded_bundle, **given) as made:
        (failure,) = made
    assert isinstance(failure, Failure)
    assert failure.message.startswith(f"{failure.source}: not an image")


def test_no_process_of_ours_starts_while_it_is_measured(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: (order.append(name), function(*args, **more))[1]

    monkeypatch.setattr(runner, "Pool", noted("pool", runner.Pool))
    monkeypatch.setattr(runner.sizing, "sequences", noted("sizing", runner.sizing.sequences))
    go()
    assert order == ["sizing", "pool"]


def test_too_many_failures_end_the_run(go: Go, tmp_path: Path, folder: Path) -> None:
    for path in folder.rglob("[1-5].png"):
        path.write_bytes(b"none")
    with pytest.raises(XrayError, match="3 inputs failed, as many as were allowed"):
        go(max_failures=3)
    assert sum("error" in line for line in lines(tmp_path / "out.jsonl")[1:]) == 3


DEADLY = """
import os, signal, sys
from pathlib import Path
from xraygpt_lite.batch.inputs import find
from xraygpt_lite.batch.pipeline import Ask, Pipeline
from xraygpt_lite.batch.runner import Run
from xraygpt_lite.values import GenerationOptions
answer = Pipeline._answer
def deadly(self, work):
    if work.job.input.name == "more/3.png":
        print(self.in_flight, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    answer(self, work)
Pipeline._answer = deadly
inputs = find([sys.argv[1]])
if sys.argv[4:]:  # as a watch gives them: after a crash there is a pause, then other files arrive
    inputs.sort(key=lambda one: one.name != "more/3.png")
    inputs[1:] = [None, *inputs[1:]] if Path(sys.argv[2]).exists() else []
ask = Ask(options=GenerationOptions(max_tokens=5))
with Run(inputs, ask, output=Path(sys.argv[2]), count=len(inputs), bundle=sys.argv[3], parallel=2, threads=1) as run:
    list(run)
"""


@pytest.mark.parametrize("watching", [[], ["watching"]])
def test_what_crashed_twice_is_given_up_and_what_crashed_once_runs_alone(
    go: Go, tmp_path: Path, folder: Path, recorded_bundle: Path, watching: list[str]
) -> None:
    """Processes that die while they are at work on a file, for real: the third run gives that file up."""
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", DEADLY, str(folder), str(out), str(recorded_bundle), *watching]
    alone = []
    for _ in range(2):
        child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert child.returncode == -signal.SIGKILL, child.stderr
        alone.append(int(child.stdout))
    assert alone[1] == 1  # nothing else was in flight the second time
    last = go()
    (given_up,) = [line for line in lines(out)[1:] if line.get("error") == "Crashed"]
    assert given_up["input"] == "more/3.png"
    assert "--retry-failed" in given_up["message"]
    assert last.journal.records == COUNT + 1
    assert {line["input"] for line in lines(out)[1:] if "text" in line} | {"more/3.png", "none.png"} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
    }


def test_python_callers_get_records_as_they_come(recorded_bundle: Path, folder: Path, tmp_path: Path) -> None:
    records = batch.run(folder, bundle=recorded_bundle, options=OPTIONS, threads=1, parallel=1)
    assert len(list(records)) == COUNT + 1
    _, entries = read_of(recorded_bundle, folder, tmp_path)
    assert len(entries) == 1


def read_of(bundle: Path, folder: Path, tmp_path: Path) -> tuple[Any, list[Any]]:
    list(run([folder / "0.png"], bundle=bundle, options=OPTIONS, output=tmp_path / "o.jsonl", threads=1, parallel=1))
    header, entries = read(tmp_path / "o.jsonl")
    return header, list(entries)


def test_nonsense_is_refused_before_anything_is_written(go: Go, tmp_path: Path) -> None:
    for ask in (Ask(("",)), Ask(task="vqa"), Ask(variant="none"), Ask(options=GenerationOptions(max_tokens=0))):
        with pytest.raises(UsageError):
            go(ask)
    assert not list(tmp_path.glob("out.jsonl*"))
