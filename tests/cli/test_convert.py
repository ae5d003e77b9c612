"""`xraygpt-lite convert`: what is typed, what is printed, what is returned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import make_llama_files
import pytest

from xraygpt_lite import cli
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.cli import convert

FILES = ["--vision", "medclip_resnet.bin", "--checkpoint", "linear.pth", "--llm", "llm"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", *arguments])
    return int(end.value.code or 0)


def test_a_conversion(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    output = tmp_path / "bundle"
    assert run("xraygpt-paper", *FILES, "-o", str(output), "--quant", "f16", "--name", "mine") == 0
    printed = capsys.readouterr()
    bundle = store.load(output, Cache(None))
    assert printed.out.startswith(f"{output}: mine, ")
    assert bundle.id[:12] in printed.out
    assert "text_model.projection_head.weight" in printed.err
    assert "model.layers.*.self_attn.rotary_emb.inv_freq" in printed.err
    assert "vision_model.model.layer*.*.bn*.num_batches_tracked (9)" in printed.err
    assert "note: " not in printed.err
    assert run("xraygpt-paper", *FILES, "-o", str(output)) == 1
    assert capsys.readouterr().err.count("\n") == 1


FORKED = """
import json, os, signal, sys
from xraygpt_lite.cli import main
from xraygpt_lite.converters import assemble  # once for all, for it takes seconds
from xraygpt_lite.converters.families import xraygpt_paper

def run(step, number):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(writer, 2)
        try:
            main(sys.argv[1:])
        except SystemExit as end:
            os._exit(end.code)
    os.close(writer)
    lines = []
    for line in os.fdopen(reader):
        lines.append(line.rstrip())
        if line.startswith(step):
            os.kill(child, number)
            step = "never again"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines

stops = [("writing the language", signal.SIGINT), ("comparing", signal.SIGTERM), ("comparing", signal.SIGKILL)]
print(json.dumps([run(*stop) for stop in (*stops, ("never", 0))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no fork, and no SIGKILL")
def test_a_conversion_that_is_interrupted_and_goes_on_makes_the_same_bundle(made: Path, tmp_path: Path) -> None:
    inputs = [str(made / value) if n % 2 else value for n, value in enumerate(FILES)]
    command = ["convert", "xraygpt-paper", *inputs, "--quant", "q8_0", "-o"]
    assert run(*command[1:], str(tmp_path / "at once")) == 0
    output = tmp_path / "bundle"
    script = [sys.executable, "-c", FORKED, *command, str(output)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120)
    (first, *lines), second, third, last = ((code, *lines) for code, lines in json.loads(done.stdout.splitlines()[-1]))
    kept = f"interrupted; finished steps are kept in {tmp_path / '.bundle.partial'}, and the same command goes on there"
    assert (first, lines[-1]) == (130, f"xraygpt-lite: error: {kept}")
    assert (second[0], second[-1]) == (130, lines[-1])
    assert third[0] == -signal.SIGKILL
    for each in (second, third, last):
        assert "exporting vision and projector to ONNX … (kept)" in each
    assert "writing the language model as q8_0 … (kept)" in third
    assert last[0] == 0
    ids = [store.load(folder, Cache(None)).id for folder in (output, tmp_path / "at once")]
    assert ids[0] == ids[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at once", "bundle"]


def test_what_is_to_be_known_is_noted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    llm = make_llama_files.folder(tmp_path / "llm", make_llama_files.weights(rows=400))
    assert run("xraygpt-paper", *FILES[:4], "--llm", str(llm), "-o", str(tmp_path / "bundle"), "--quant", "f32") == 0
    note = "note: 16 rows of the embedding table stand for no piece of the vocabulary (padding)\n"
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Usage"),
        (("blip",), 2, "no such command 'blip'"),
        (("xraygpt", *FILES, "-o", "x"), 2, "missing option '--qformer'"),
        (("minigpt-med", *FILES, "--qformer", "linear.pth", "-o", "x"), 2, "no such option '--qformer'"),
        (("minigpt4", *FILES, "--qformer", "linear.pth", "-o", "x"), 1, "use `convert xraygpt-paper`"),
        (("minigpt-med", *FILES, "-o", "x"), 1, "use `convert xraygpt-paper`"),
        (("xraygpt-paper", "-o", "x"), 2, "missing option '--vision'"),
        (("xraygpt-paper", *FILES[:4], "--llm", "absent", "-o", "x"), 2, "'absent' does not exist"),
        (("xraygpt-paper", *FILES, "-o", "x", "--quant", "q3"), 2, "'q3' is not one of"),
        (("xraygpt-paper", *FILES, "-o", "x", "--set", "vision.num_heads"), 2, "expected KEY=VALUE"),
        (("xraygpt-paper", *FILES, "-o", "x", "--set", "a=1", "--set", "a=2"), 2, "each key once"),
        (("xraygpt-paper", *FILES, "-o", "x", "--set", "a=1"), 2, "no such setting"),
        (("nih-tiny", *FILES, "-o", "x"), 1, "nih-tiny expects nih-tiny's encoder there"),
    ],
)
def test_what_is_refused(
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(made)
    assert run(*arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not (made / "x").exists()


def test_a_missing_extra_is_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setattr(convert, "NEEDED", ("json", "no_such_package", "no_such.package"))
    assert run("xraygpt-paper", *FILES, "-o", "x") == 1
    assert "pip install 'xraygpt-lite[cpu,convert]'" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "other"), [("xraygpt", "MiniGPT-4"), ("minigpt4", "XrayGPT")])
def test_help_says_which_files_look_alike(capsys: pytest.CaptureFixture[str], family: str, other: str) -> None:
    assert run(family, "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "look alike and cannot be told apart" in printed
    assert other in printed
    assert "--qformer" in printed
    assert "A delta, as Vicuna's first weights are, is no model alone: give it as --llm-delta." in printed


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from xraygpt_lite.cli import main\n"
        "try: main(['convert', 'xraygpt-paper', '--help'])\n"
        "except SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'onnxruntime', 'llama_cpp', 'pydicom', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--vision" in done.stdout
