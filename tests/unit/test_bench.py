"""The measurement: what runs in a repetition, what the figures are made of, the processes around it, the chart."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny_bundle

from xraygpt_lite.bench import ceilings, child, machine, picture, runner
from xraygpt_lite.errors import BundleError, DeviceError, ImageError, NativeError, UsageError
from xraygpt_lite.llm import library, native

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG, DICOM = str(EXAMPLES / "synthetic-normal.png"), str(EXAMPLES / runner.EXAMPLE)
REQUEST = {
    "began": 0.0, "only_start": False, "images": [PNG], "dicom": False, "device": "cpu", "threads": 1, "tokens": 6,
    "repeats": 3, "speculation": False, "prompt_cache": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XRAYGPT_LITE_CACHE", str(tmp_path_factory.getbasetemp() / "bench-cache"))
    monkeypatch.setattr(ceilings, "ENOUGH_S", 0.0)


@pytest.fixture(scope="module")
def figures(made_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Measured in processes of their own, over two images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XRAYGPT_LITE_CACHE", str(tmp_path_factory.getbasetemp() / "bench-cache"))
        yield runner.run(str(made_bundle), [PNG, DICOM], tokens=6, repeats=2, device="cpu")


def test_every_figure_is_there(figures: dict[str, Any]) -> None:
    assert figures["schema"] == "xraygpt-lite/bench/1"
    assert (figures["bundle"], figures["images"], figures["answer_tokens"]) == ("tiny", 2, [6, 6])
    assert list(figures["stages_s"]) == list(runner.STAGES)
    ratios = [figures[name] for name in ("decode_vs_bare", "decode_vs_bandwidth", "prefill_vs_bare")]
    seconds = [figures[name] for name in ("first_token_s", "total_s", "first_answer_s")]
    assert min(*ratios, *seconds, *figures["stages_s"].values()) > 0
    assert seconds == sorted(seconds)
    assert figures["same_tokens"] is True
    assert figures["rounds"] >= 2
    assert set(figures["machine"]["versions"]) >= {"python", "xraygpt-lite", "llama-cpp-python", "numpy"}
    assert figures["reasons"]


def test_what_is_repeated_has_a_spread(figures: dict[str, Any]) -> None:
    for name, (low, high) in figures["spread"].items():
        middle = figures["stages_s"][name] if name in runner.STAGES else figures[name]
        assert low <= middle <= high, name
    assert {*runner.STAGES, "total_s", "decode_vs_bare", "bandwidth_gb_s"} <= set(figures["spread"])
    low, high = figures["spread"]["import"]  # of two processes
    assert low < high


def test_memory_is_a_run_s_and_not_that_of_what_is_measured_after_it(figures: dict[str, Any]) -> None:
    whole = figures["files_mb"] + figures["kv_cache_mb"]
    assert whole < figures["peak_rss_mb"] < whole + 400  # the arrays that are read alone take 500


def test_the_answers_end_by_themselves_where_no_length_is_asked_for(talking_bundle: Path) -> None:
    measured = _measure(talking_bundle, tokens=None)
    assert measured.facts["answer_tokens"] == [len(tiny_bundle.SAYS) + 1]  # and what ends them
    assert measured.facts["same_tokens"]


def test_a_length_is_kept_where_an_answer_would_end_before(talking_bundle: Path) -> None:
    measured = _measure(talking_bundle, tokens=9)
    assert measured.facts["answer_tokens"] == [9]
    assert measured.facts["same_tokens"]
    assert "tokens_per_call" not in measured.samples


def test_a_stop_string_that_comes_too_early_is_said() -> None:
    with pytest.raises(UsageError, match="ends an answer after 5 tokens, and 9 were asked for; give --tokens 5"):
        child._check_lengths([9, 5], 9)
    with pytest.raises(UsageError, match="too short"):
        child._check_lengths([1], None)


def test_a_stage_is_no_part_of_another(made_bundle: Path) -> None:
    samples = _measure(made_bundle).samples
    stages = ("read", "preprocess", "encode", "project", "prefill", "decode", "rest")
    parts = [samples[name][0] for name in stages]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(samples["total_s"][0])
    assert samples["first_token_s"][0] == pytest.approx(samples["total_s"][0] - samples["decode"][0])


def test_each_repetition_is_as_the_first_of_a_process(made_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = native.Context.decode

    def counted(self: native.Context, batch: native.Batch) -> None:
        rows.append(batch.rows)
        real(self, batch)

    monkeypatch.setattr(native.Context, "decode", counted)
    stages: list[tuple[int, ...]] = []

    def note(what: str) -> None:
        stages.append(tuple(rows))
        rows.clear()

    child.Measurement({**REQUEST, "bundle": str(made_bundle)}, note).run()
    _, first, *others = stages[:4]
    # the row that takes an earlier opening's place, then the prompt in three chunks, then the answer
    assert len(first) > 6
    assert others[0] == others[1] == (1, *first)


def test_the_engine_s_memory_of_answers_is_no_help(made_bundle: Path) -> None:
    """float32 weights exclude guesses: the figure that would tell of them says so."""
    measured = _measure(made_bundle, speculation=True, prompt_cache=True)
    assert measured.samples["tokens_per_call"] == [1.0]
    assert measured.facts["same_tokens"]


def test_medians_and_spreads() -> None:
    samples = {name: [3.0, 1.0, 2.0] for name in (*runner.STAGES, "total_s")}
    found = runner.figures({**samples, "decode_vs_bare": [0.5]})
    assert found["total_s"] == found["stages_s"]["import"] == statistics.median(samples["total_s"])
    assert found["spread"]["total_s"] == [1.0, 3.0]
    assert found["decode_vs_bare"] == 0.5
    assert [found[name] for name in sorted(runner.NOT_ALWAYS)] == [None] * 4


@pytest.mark.parametrize("name", ["gone.png", "letter.dcm"])
def test_an_image_that_cannot_be_read_is_noticed_before_anything_is_measured(
    made_bundle: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "letter.dcm").write_text("Dear colleague,\n")
    told: list[str] = []
    with pytest.raises(ImageError, match=name):
        runner.run(str(made_bundle), [PNG, str(tmp_path / name)], doing=told.append)
    assert told == []


def test_errors_of_the_measured_process_come_out_as_they_are(bundle_copy: Path) -> None:
    with (bundle_copy / "llm.gguf").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(BundleError, match=r"llm\.gguf has the sha256 "):
        runner.run(str(bundle_copy), [PNG], repeats=1)


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", NativeError, "ended by signal 9"),
        ("import sys; sys.exit('a sentence')", RuntimeError, "status 1: a sentence"),
        ("import sys; sys.exit(130)", KeyboardInterrupt, None),
        ('print(\'{"error": "MemoryError", "message": ""}\')', MemoryError, None),
        ('print(\'{"error": "DeviceError", "message": "no GPU"}\')', DeviceError, "no GPU"),
    ],
)
def test_how_a_measured_process_may_end(
    monkeypatch: pytest.MonkeyPatch, program: str, error: type[BaseException], message: str | None
) -> None:
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, "-c", program))
    with pytest.raises(error, match=message):
        runner._child({}, print)


def test_what_a_library_prints_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "print('hello'); print('{\"doing\": \"this\"}'); print('{\"samples\": {}}'); print('bye')"
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, "-c", program))
    told: list[str] = []
    assert runner._child({}, told.append) == {"samples": {}}
    assert told == ["this"]


def test_nothing_is_left_running_when_a_caller_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import json, os, time; print(json.dumps({'doing': os.getpid()}), flush=True); time.sleep(60)"
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, "-c", program))
    running: list[int] = []

    def interrupted(process: Any) -> None:
        running.append(process)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner._child({}, interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(running[0], 0)


def test_the_measured_process_ends_with_its_caller(made_bundle: Path) -> None:
    request = {**REQUEST, "bundle": str(made_bundle), "repeats": 100_000}
    with subprocess.Popen(runner.PROGRAM, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        assert "doing" in child.stdout.readline()
        child.stdin.close()  # as when the caller was killed
        assert child.wait(30) == -signal.SIGTERM


class TestMachine:
    @pytest.mark.parametrize(
        ("content", "compiler"),
        [
            (b"\0GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0", "GCC: (Debian 12.2.0-14+deb12u1) 12.2.0"),
            (
                b"\0GCC: (Debian 12) 12.2.0\0Debian clang version 19.1.7 (3+b1)\0\1",
                "Debian clang version 19.1.7 (3+b1)",
            ),
            (b"\0libm.so.6\0libomp.so.5\0", "clang (no version is noted)"),
            (b"stripped", "unknown"),
            (b"", "unknown"),
        ],
    )
    def test_the_compiler_is_what_the_library_says(self, tmp_path: Path, content: bytes, compiler: str) -> None:
        (tmp_path / "libllama.so").write_bytes(b"\0GCC: (Other) 1.2.3\0")
        (tmp_path / "libggml-cpu.so").write_bytes(content)
        assert machine.compiler(sorted(tmp_path.iterdir())) == compiler

    def test_facts(self) -> None:
        facts = machine.facts()
        assert machine.compiler(library.library_files()) == facts["compiler"] != "unknown"
        assert facts["cores"] >= 1
        assert facts["cpu"]
        assert "=" in facts["features"]
        assert all(facts["versions"].values())

    def test_the_largest_cache(self, tmp_path: Path) -> None:
        for number, size in enumerate(("48K", "2048K", "105M\n", "odd", "")):
            (tmp_path / f"index{number}").mkdir()
            (tmp_path / f"index{number}" / "size").write_text(size)
        assert machine.largest_cache(tmp_path) == 105 * 2**20
        assert machine.largest_cache(tmp_path / "none") == 0

    def test_memory_is_read_by_every_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "_LEAST_BYTES", 1 << 20)
        monkeypatch.setattr(machine, "largest_cache", lambda: 1 << 20)
        with machine.Memory(3) as memory:
            assert [array.nbytes for array in memory._arrays] == [(4 << 20) // 3 // 8 * 8] * 3
            assert all(array.min() == array.max() == 1 for array in memory._arrays)
            assert memory.gigabytes_per_second() > 0

    def test_the_peak(self, tmp_path: Path) -> None:
        status = tmp_path / "status"
        status.write_text("Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t   2048 kB\nVmRSS:\t 1 kB\n")
        assert child.peak_bytes(status) == 2048 * 1024


class TestPicture:
    def test_it_shows_every_stage_within_its_frame(self, figures: dict[str, Any]) -> None:
        root = ElementTree.fromstring(picture.svg(figures))
        words = [element.text for element in root.iter() if element.tag.endswith("text")]
        assert set(runner.STAGES) <= set(words)
        assert {"bare loop", "memory's speed"} <= set(words)
        for element in root.iter():
            if element.tag.endswith("rect"):
                assert float(element.get("x", "")) + float(element.get("width", "")) <= picture.WIDTH
                assert float(element.get("y", "")) + picture.BAR < float(root.get("height", ""))

    def test_what_was_not_measured_has_no_bar_and_names_cannot_break_it(self, figures: dict[str, Any]) -> None:
        spread = {name: values for name, values in figures["spread"].items() if name != "tokens_per_s_bandwidth"}
        odd = {**figures, "bundle": "<a & b>", "tokens_per_s_bandwidth": None, "spread": spread}
        root = ElementTree.fromstring(picture.svg(odd))
        words = [element.text for element in root.iter() if element.tag.endswith("text")]
        assert "memory's speed" not in words
        assert any(word and word.startswith("<a & b>: ") for word in words)

    @pytest.mark.parametrize(
        ("value", "text"), [(1234.5, "1,234"), (12.345, "12.3"), (0.01234, "0.0123"), (0.0000567, "0.000057"), (0, "0")]
    )
    def test_numbers(self, value: float, text: str) -> None:
        assert picture.shown(value) == text


def _measure(bundle: Path, doing: Callable[[str], object] = lambda _: None, **given: Any) -> child.Measurement:
    """In this process."""
    measurement = child.Measurement({**REQUEST, "bundle": str(bundle), "repeats": 1, **given}, doing)
    measurement.run()
    return measurement
