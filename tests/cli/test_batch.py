"""`batch` and `merge` over a bundle that truly runs: what they take, write, refuse, say and return.

One run serves several assertions. What kills leave behind is in tests/abuse/test_batch_kills.py.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_bundle
from abuse import batch_runs as runs
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[2]
DICOM = ROOT / "examples" / "synthetic-cr-monochrome1.dcm"
UID = "1.2.826.0.1.3680043.10.1338"  # what every example's UIDs begin with
NAMES = [f"scan{number}.png" for number in (1, 2, 10)]
QUESTIONS = ("What do you see?", "Is the heart large?")
SMALL = ["--threads", "1", "--parallel", "2", "--max-tokens", "4"]
HEAVY = ("numpy", "onnxruntime", "llama_cpp", "pydicom", "PIL", "rich", "filelock", "watchdog")
WAIT_S = 60
Batch = Callable[..., Result]


@pytest.fixture
def batch(recorded_bundle: Path) -> Batch:
    """Run `batch` in this process: batch("in", "-o", "out.jsonl")."""

    def run(*args: str | Path, bundle: Path = recorded_bundle, input: bytes = b"") -> Result:
        return cli("batch", "--bundle", bundle, *SMALL, *args, input=input)

    return run


def cli(*args: str | Path, input: bytes = b"") -> Result:
    from xraygpt_lite.cli import main

    return CliRunner().invoke(main, [os.fspath(each) for each in args], input=input)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the folder `in`: three images, one deeper, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    runs.noise(tmp_path / "in", NAMES)
    (tmp_path / "in" / "deep").mkdir()
    shutil.copy(DICOM, tmp_path / "in" / "deep" / "x.dcm")
    (tmp_path / "in" / "bad.png").write_bytes(b"none")
    return tmp_path


def inputs_of(journal: str) -> list[str]:
    return [one["input"] for one in runs.records(Path(journal))]


def last_line(result: Result) -> str:
    return str(result.stderr.splitlines()[-1])


def error_of(result: Result, code: int) -> str:
    """The sentence of a run that could not be done."""
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert result.stderr.startswith("xraygpt-lite: error: ")
    assert result.stderr.count("\n") == 1
    assert "internal error" not in result.stderr
    return str(result.stderr)


def test_help_loads_nothing_heavy() -> None:
    code = """if True:
        import sys
        from xraygpt_lite.cli import main
        for name in ("batch", "report", "merge"):
            try:
                main([name, "--help"])
            except SystemExit as end:
                assert not end.code
        print("LOADED", *sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    text, _, loaded = done.stdout.rpartition("LOADED")
    assert text.count("Usage: xraygpt-lite") == 3
    assert not set(HEAVY) & set(loaded.split())


def test_a_whole_run_and_all_that_follows_it(batch: Batch, archive: Path) -> None:
    """Two questions, findings, a page: exit code 3 for the file that is no image; then runs that have less to do."""
    asked = [part for question in QUESTIONS for part in ("--question", question)]
    first = batch("in", "-o", "out.jsonl", *asked, "--findings", "--progress", "json", "--format", "html")
    assert (first.exit_code, first.stdout) == (3, "")
    assert re.fullmatch(
        r"4 done, 1 failed, 0 done before; \d+ images a minute\. 2 failures stand in out\.jsonl: see them with "
        r"`xraygpt-lite report out\.jsonl`, and do them again with --retry-failed",
        last_line(first),
    )
    found = runs.records(Path("out.jsonl"))
    names = [*NAMES, "deep/x.dcm", "bad.png"]
    assert sorted((one["input"], one["question"]) for one in found) == sorted((n, q) for n in names for q in QUESTIONS)
    for one in found:
        if one["input"] == "bad.png":
            assert (one["stage"], one["error"]) == ("read", "ImageError")
        else:
            assert [finding["name"] for finding in one["findings"]] == ["Effusion"]
            assert (one["sop_instance_uid"] is not None) == (one["input"] == "deep/x.dcm")
    page = Path("out.html").read_text("utf-8")
    assert all(name in page for name in names)
    assert sorted(path.name for path in archive.iterdir()) == ["in", "out.html", "out.jsonl", "out.jsonl.lock"]

    whole = Path("out.jsonl").read_bytes()
    again = batch("in", "-o", "out.jsonl", *asked, "--findings")
    assert again.exit_code == 3
    assert last_line(again).startswith("0 done, 0 failed, 5 done before; 0 images a minute. 2 failures stand in ")
    assert Path("out.jsonl").read_bytes() == whole

    other = error_of(batch("in", "-o", "out.jsonl", "--question", QUESTIONS[0]), 2)
    assert "findings was true and is now false" in other
    assert re.search(r"questions was 2 \(sha256 [0-9a-f]{8}\) and is now 1 \(sha256 [0-9a-f]{8}\)", other)
    assert not any(question in other for question in QUESTIONS)  # one may speak of a patient
    assert "--restart" in other
    assert Path("out.jsonl").read_bytes() == whole

    table = cli("report", "out.jsonl", "--format", "csv")
    assert table.exit_code == 0
    assert len(list(csv.DictReader(io.StringIO(table.stdout_bytes.decode("utf-8-sig"), newline="")))) == 10
    assert "== deep/x.dcm ==" in cli("report", "out.jsonl").stdout

    os.remove("in/bad.png")
    runs.noise(Path("in"), ["bad.png"], seed=1)
    mended = batch("in", "-o", "out.jsonl", *asked, "--findings", "--retry-failed", "--format", "csv")
    assert mended.exit_code == 0
    assert re.fullmatch(r"1 done, 0 failed, 4 done before; \d+ images a minute", last_line(mended))
    assert sorted(inputs_of("out.jsonl")) == sorted(2 * names)
    with open("out.csv", encoding="utf-8-sig", newline="") as file:
        assert {row["status"] for row in csv.DictReader(file)} == {"summary"}
    anew = batch("in/scan1.png", "-o", "out.jsonl", "--restart")
    assert (anew.exit_code, inputs_of("out.jsonl")) == (0, ["in/scan1.png"])


def test_failures_that_are_met_again(batch: Batch, archive: Path) -> None:
    """Touched, copied back, rewritten with as little in it: the same failure, once, and no end of the run."""
    Path("in/empty.png").touch()
    Path("in/gone.png").symlink_to("nowhere")
    assert batch("in", "-o", "out.jsonl").exit_code == 3
    for name in ("in/bad.png", "in/empty.png"):
        os.utime(name, (1, 1))
    os.remove("in/gone.png")
    Path("in/gone.png").touch()
    again = batch("in", "-o", "out.jsonl")
    assert again.exit_code == 3, again.stderr
    found = inputs_of("out.jsonl")
    assert sorted(name for name in found if name in ("bad.png", "empty.png")) == ["bad.png", "empty.png"]
    failures = sum("error" in one for one in runs.records(Path("out.jsonl")))
    assert f" {failures} failures stand in out.jsonl" in again.stderr


def test_progress(batch: Batch, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON for programs; else, where there is no terminal, plain lines now and then."""
    from xraygpt_lite.cli import tally

    for mode in ("json", "plain"):
        monkeypatch.setitem(tally._PAUSE_S, mode, 0.0)
    first = batch("in", "-o", "out.jsonl", "--progress", "json")
    *states, _ = first.stderr.splitlines()
    told = [json.loads(state) for state in states]
    assert len(told) > 2
    assert all(state["total"] == 5 for state in told)
    ended = [state["done"] + state["failed"] + state["skipped"] for state in told]
    assert ended == sorted(ended)
    last = told[-1]
    assert (last["done"], last["failed"], last["skipped"]) == (4, 1, 0)
    assert last["seconds_left"] == 0

    again = batch("in", "-o", "out.jsonl", "--progress", "json")
    last = json.loads(again.stderr.splitlines()[-2])
    assert (last["done"], last["failed"], last["skipped"], last["total"]) == (0, 0, 5, 5)

    plain = batch("in", "-o", "plain.jsonl")
    assert "\x1b" not in plain.stderr
    assert "\r" not in plain.stderr
    *lines, _ = plain.stderr.splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"\d of 5, \d failed, \d+ images a minute(, \d+ s left)?", line)
    assert not [line for line in lines if line.startswith("0 of")]

    quiet = batch("in", "-o", "quiet.jsonl", "--progress", "none")
    assert quiet.stderr.count("\n") == 1


def test_how_many_at_once_and_why(recorded_bundle: Path, archive: Path) -> None:
    said = cli("batch", "in", "--bundle", recorded_bundle, "--threads", "1", "--max-tokens", "4", "-o", "out.jsonl")
    assert re.search(r"^\d+ sequences: measured here, tokens a second by sequences: 1: ", said.stderr, re.MULTILINE)


def test_words_that_depend_on_what_is_beside_them(
    recorded_bundle: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of K-quants, as on a CPU without AMX."""
    from xraygpt_lite import model

    folder = Path(shutil.copytree(recorded_bundle, archive / "quantized"))
    plain = tiny_bundle.plain_manifest()
    tiny_bundle.seal(folder, replace(plain, weight_types={**plain.weight_types, "llm": "q6_k"}))
    run = ["batch", "in", "--bundle", folder, *SMALL]
    for exact, parallel, warned in ((False, "2", True), (False, "1", False), (True, "2", False)):
        monkeypatch.setattr(model.native, "exact", lambda _, exact=exact: exact)
        said = cli(*run, "-o", f"{exact}{parallel}.jsonl", "--parallel", parallel).stderr
        assert ("2 answers are written at a time, and with q6_k weights that changes" in said) == warned


def test_which_inputs(batch: Batch, archive: Path) -> None:
    def took(*args: str, input: bytes = b"", code: int = 0) -> list[str]:
        result = batch(*args, "-o", "out.jsonl", "--restart", "--progress", "none", input=input)
        assert result.exit_code == code, result.stderr
        header = json.loads(Path("out.jsonl").read_bytes().splitlines()[0])
        found = inputs_of("out.jsonl")
        assert header["inputs"] == len(found)
        return found

    assert sorted(took("in", "--include", "scan*", "--limit", "2")) == ["scan1.png", "scan2.png"]  # 10 comes after 2
    chosen = took("in", "--include", "scan*", "--exclude", "*2.png", "--include", "*.dcm", "--order", "given")
    assert sorted(chosen) == ["deep/x.dcm", "scan1.png", "scan10.png"]
    assert took("in", "--limit", "1", "--order", "random") == took("in", "--limit", "1", "--order", "random")
    odd = os.fsencode("in/r\udcff.png")
    shutil.copy("in/scan1.png", odd)
    listed = took("-", input=b"in/scan2.png\r\n\n" + odd + b"\nin/none.png\n", code=3)
    assert sorted(listed) == ["in/none.png", "in/r\udcff.png", "in/scan2.png"]
    runs.records(Path("out.jsonl"))


def test_shards_and_merge(batch: Batch, archive: Path) -> None:
    shards = [f"shard{number}.jsonl" for number in (1, 2, 3)]
    for number, shard in enumerate(shards, 1):
        result = batch("in", "-o", shard, "--shard", f"{number}/3", "--progress", "none")
        assert result.exit_code == (3 if "bad.png" in inputs_of(shard) else 0), result.stderr
    parts = [inputs_of(shard) for shard in shards]
    assert sorted(name for part in parts for name in part) == sorted([*NAMES, "deep/x.dcm", "bad.png"])

    gap = cli("merge", *shards[:2], "-o", "two.jsonl")
    assert gap.exit_code == 3
    assert gap.stderr.startswith("xraygpt-lite: warning: of 3 shards these are missing: 3\n")
    whole = cli("merge", *shards, "-o", "all.jsonl")
    assert (whole.exit_code, whole.stderr) == (0, "5 records, 1 of them failures: all.jsonl\n")
    runs.records(Path("all.jsonl"))
    over = cli("merge", *shards, "all.jsonl", "-o", "over.jsonl")
    assert over.exit_code == 0
    assert "5 records, 1 of them failures, 5 stood in more than one: over.jsonl" in over.stderr
    assert sorted(inputs_of("over.jsonl")) == sorted(inputs_of("all.jsonl"))
    onward = batch("in", "-o", "all.jsonl")  # a merged journal is one that a run goes on with
    assert last_line(onward).startswith("0 done, 0 failed, 5 done before")

    for nameless in ("", ".", "/"):
        assert "is no file's name" in error_of(cli("merge", *shards, "-o", nameless), 2)
        assert "is no file's name" in error_of(cli("batch", "in", "-o", nameless, "--format", "csv"), 2)
    before = Path("all.jsonl").read_bytes()
    assert "exists" in error_of(cli("merge", *shards, "-o", "all.jsonl"), 2)
    assert Path("all.jsonl").read_bytes() == before
    assert "shard was 1/3 and is now 2/3" in error_of(batch("in", "-o", shards[0], "--shard", "2/3"), 2)
    for wrong in ("0/3", "4/3", "x"):
        assert f"'{wrong}'" in error_of(batch("in", "-o", "x.jsonl", "--shard", wrong), 2)
    assert not list(archive.glob("x.jsonl*"))


def test_names_are_kept_out(batch: Batch, archive: Path) -> None:
    secret = archive / "in" / "DOE^JANE 19700101"
    secret.mkdir()
    shutil.copy(DICOM, secret / "DOE.dcm")
    (secret / "DOEbad.png").write_bytes(b"bad")
    (secret / "DOEdamaged.png").write_bytes((archive / "in" / "scan1.png").read_bytes()[:200])
    (secret / "DOEgone.png").symlink_to("nowhere")
    given = [str(archive / "in"), "-o", "out.jsonl", "--no-identifiers", "--progress", "json"]
    first = batch(*given, "--format", "html")
    assert first.exit_code == 3, first.stderr
    runs.records(Path("out.jsonl"))
    again = batch(*given, "--format", "csv")
    assert last_line(again).startswith("0 done, 0 failed, 9 done before")
    assert Path("out.jsonl.salt").stat().st_mode & 0o077 == 0
    told = first.stderr + again.stderr
    for path in archive.glob("out*"):
        told += path.read_bytes().decode("latin-1")
    files = [path for path in (archive / "in").rglob("*") if path.is_file()]
    hidden = ["DOE", "scan1", "deep", "bad.png", ".dcm", str(archive), UID]
    hidden += [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    hidden += [hashlib.sha256(path.name.encode()).hexdigest()[:16] for path in files]
    assert [text for text in hidden if text in told] == []
    assert len(set(re.findall("input-[0-9a-f]{16}", told))) == 9
    assert "salt" in error_of(unsalted(batch, given), 1)
    with_names = error_of(batch("in", "-o", "out.jsonl"), 2)
    assert "identifiers was false and is now true" in with_names


def unsalted(batch: Batch, given: list[str]) -> Result:
    """Run once while the salt is somewhere else."""
    os.rename("out.jsonl.salt", "away")
    try:
        return batch(*given)
    finally:
        os.rename("away", "out.jsonl.salt")


def test_the_rendered_file_s_name_tells_its_journal(batch: Batch, archive: Path) -> None:
    for output, rendered in (("run.1", "run.1.csv"), ("run.2", "run.2.csv"), ("a.b.jsonl", "a.b.csv")):
        assert batch("in/scan1.png", "-o", output, "--format", "csv").exit_code == 0
        assert (archive / rendered).is_file()


def test_what_cannot_be_an_output(batch: Batch, archive: Path) -> None:
    """Each is refused before any work, in a sentence, and nothing is touched."""
    Path("notes.jsonl").write_text('{"mine": true}\n')
    Path("folder").mkdir()
    Path("list.csv").write_text("path\nin/scan1.png\n")
    before = {path: path.read_bytes() for path in archive.rglob("*") if path.is_file()}
    for output in ("folder", "in/scan1.png", "notes.jsonl"):
        assert "no journal of this program" in error_of(batch("in", "-o", output), 2)
        assert "no journal of this program" in error_of(batch("in", "-o", output, "--restart"), 2)
    assert "folder of nowhere/out.jsonl does not exist" in error_of(batch("in", "-o", "nowhere/out.jsonl"), 2)
    error_of(batch("in", "-o", ""), 2)
    error_of(batch("in", "-o", "out.html", "--format", "html"), 2)
    error_of(batch("list.csv", "-o", "list.jsonl", "--format", "csv"), 2)  # it would replace the list
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in archive.rglob("*") if path.is_file()} == before.keys()  # no lock either
    assert not archive.with_name(f"{archive.name}.lock").exists()  # of -o ""


def test_what_cannot_be_meant(batch: Batch, archive: Path, bundle_copy: Path) -> None:
    import tiny_bundle

    from xraygpt_lite.bundle import store
    from xraygpt_lite.cache import Cache

    manifest = store.load(bundle_copy, Cache(None)).manifest
    tiny_bundle.seal(bundle_copy, replace(manifest, prompt=replace(manifest.prompt, findings=())))
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--question", ""), "question"),
        (("--task", "vqa"), "task"),
        (("--box", "1,2,3"), ""),
        (("--prompt", "none"), "none"),
        (("--watch", "--limit", "3"), "--watch takes files as they come"),
        (("--watch", "--shard", "1/3"), "--watch takes files as they come"),
        (("--include", "*.nope"), "none left"),
        (("--findings",), "finding"),
        (("--max-failures", "0"), "max-failures"),
        (("--parallel", "0"), "parallel"),
    ]
    for args, message in cases:
        assert message in error_of(batch("in", "-o", "out.jsonl", *args, bundle=bundle_copy), 2), args
    assert "nothing.png" in error_of(batch("nothing.png", "-o", "out.jsonl"), 2)
    assert "-o" in error_of(batch("in"), 2)
    assert not list(archive.glob("out.jsonl*"))


def test_too_many_failures(batch: Batch, archive: Path) -> None:
    for number in range(5):
        (archive / "in" / f"a{number}.png").write_bytes(b"none %d" % number)
    result = batch("in", "-o", "out.jsonl", "--max-failures", "2")
    message = error_of(result, 1)
    assert "2 inputs failed, as many as were allowed" in message
    assert sum("error" in one for one in runs.records(Path("out.jsonl"))) == 2
    assert batch("in", "-o", "out.jsonl", "--max-failures", "5").exit_code == 3
    assert sorted(inputs_of("out.jsonl")) == sorted({*inputs_of("out.jsonl")})


@pytest.mark.parametrize("output", ["in/out.jsonl", "in/out"])
def test_an_output_among_the_inputs(batch: Batch, archive: Path, output: str) -> None:
    """What a run writes there, and what one that was killed has left there, is no input."""
    given = ["in", "-o", output, "--no-identifiers", "--progress", "none"]
    assert batch(*given).exit_code == 3
    Path(f"{output}.running").write_text(f"+{'0' * 64}\n")
    again = batch(*given)
    assert last_line(again).startswith("0 done, 0 failed, 5 done before"), again.stderr
    assert len(runs.records(Path(output))) == 5


@pytest.fixture
def running(recorded_bundle: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a run as a process of its own; it is gone when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "xraygpt_lite", "batch", *args, "--bundle", str(recorded_bundle), *SMALL]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S / 2
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_second_run_on_one_output_and_a_clean_end_of_the_first(
    batch: Batch, running: Callable[..., subprocess.Popen[str]], archive: Path
) -> None:
    runs.noise(archive / "many", [f"{number}.png" for number in range(300)])
    first = running("many", "-o", "out.jsonl")
    until(lambda: runs.count(Path("out.jsonl")))
    assert "another run is writing out.jsonl; wait for it" in error_of(batch("many", "-o", "out.jsonl"), 1)
    first.send_signal(signal.SIGTERM)
    stdout, stderr = first.communicate(timeout=WAIT_S)
    assert (first.returncode, stdout) == (130, ""), stderr
    left = len(runs.records(Path("out.jsonl")))
    assert 0 < left < 300
    said = re.search(
        r"^xraygpt-lite: error: stopped; (\d+) records \(0 of them failures\) stand in out\.jsonl\. The same command "
        r"goes on from there\n\Z",
        stderr,
        re.MULTILINE,
    )
    assert said, stderr
    assert left - 1 <= int(said[1]) <= left
    assert not Path("out.jsonl.running").exists()
    rest = batch("many", "-o", "out.jsonl", "--limit", str(left + 5))
    assert rest.exit_code == 0
    assert len(set(inputs_of("out.jsonl"))) == len(inputs_of("out.jsonl")) >= left + 5


def test_a_terminal(terminal: Callable[..., Any], recorded_bundle: Path, archive: Path) -> None:
    """A live line, and a Ctrl-C that the reading processes hear too."""
    runs.noise(archive / "many", [f"{number}.png" for number in range(400)])
    given = ["batch", "many", "-o", "out.jsonl", "--bundle", str(recorded_bundle), *SMALL]
    one = terminal(*given, fake=False)
    until(lambda: runs.count(Path("out.jsonl")))
    one.type("\x03")
    assert one.wait() == 130
    assert "stopped; " in one.text
    assert "Traceback" not in one.text
    left = runs.records(Path("out.jsonl"))
    assert 0 < len(left) < 400
    assert all("text" in record for record in left)
    two = terminal(*given, "--limit", "3", fake=False)
    assert two.wait() == 0
    assert "0 done, 0 failed, 3 done before" in two.text


def test_watching(batch: Batch, running: Callable[..., subprocess.Popen[str]], archive: Path) -> None:
    """What is there, what a killed run was at work on, and what arrives; until SIGTERM."""
    from xraygpt_lite.batch.journal import Keys

    out = Path("out.jsonl")
    assert batch("in", "-o", "out.jsonl", "--include", "scan1.png").exit_code == 0
    suspect = Keys(None).file("scan2.png", os.stat("in/scan2.png"))
    Path("out.jsonl.running").write_text(f"+{suspect}\n")
    first = running("in", "-o", "out.jsonl", "--watch", "--progress", "json")
    until(lambda: runs.count(out) >= 5 or first.poll() is not None)
    runs.noise(archive / "in" / "later", ["new.png"], seed=5)
    until(lambda: runs.count(out) >= 6 or first.poll() is not None)
    first.send_signal(signal.SIGTERM)
    _, stderr = first.communicate(timeout=WAIT_S)
    assert first.returncode == 3, stderr
    *states, last = stderr.splitlines()
    assert last.startswith("4 done, 1 failed, 1 done before; ")
    assert all(json.loads(state)["total"] is None for state in states)
    assert sorted(inputs_of("out.jsonl")) == sorted([*NAMES, "deep/x.dcm", "bad.png", "later/new.png"])
    assert json.loads(out.read_bytes().splitlines()[0])["inputs"] is None
    assert not Path("out.jsonl.running").exists()


def test_a_file_that_changes_while_it_is_at_work(recorded_bundle: Path, archive: Path) -> None:
    """Watching gives it a second time then: one record for each of its contents."""
    from xraygpt_lite.batch.inputs import Input
    from xraygpt_lite.batch.pipeline import Ask
    from xraygpt_lite.batch.runner import Run
    from xraygpt_lite.values import GenerationOptions

    def arrivals() -> Iterator[Input]:
        for seed in (7, 8):
            runs.noise(archive / "in", ["scan1.png"], seed)
            yield Input("scan1.png", Path("in/scan1.png"))

    ask = Ask(tuple(f"{number}?" for number in range(20)), options=GenerationOptions(max_tokens=4))
    with Run(arrivals(), ask, output=Path("out.jsonl"), bundle=recorded_bundle, threads=1, parallel=2) as run:
        # It may have been read only after the change, and then again: what no record answers by then is asked twice.
        assert 20 <= len(list(run)) <= 40
    found = runs.records(Path("out.jsonl"))
    assert len(found) == 20 * len({one["sha256"] for one in found})
