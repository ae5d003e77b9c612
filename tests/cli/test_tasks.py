"""Tasks, boxes and the overlay on the command line, over a real engine that says a known answer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import xraygpt_lite
from xraygpt_lite import model as models
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.model import XrayModel

Invoke = Callable[..., Result]
SAID = "XrayGPT sees the heart and {<1><2>.\nbox 10,40,50,140 px: the heart\nbox 60,0,100,200 px: the heart\n"
UNREAD = "xraygpt-lite: warning: a box in the answer could not be read"


@pytest.fixture(scope="module")
def model(talking_bundle: Path) -> Iterator[XrayModel]:
    with models.open_bundle(store.load(talking_bundle, Cache(None)), threads=1, context=512) as opened:
        yield opened


@pytest.fixture
def run(model: XrayModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """run("summarize", "a.png"), in a folder with a.png (100 x 200 pixels) and small.png (50 x 50)."""
    from xraygpt_lite.cli import main

    monkeypatch.chdir(tmp_path)
    for name, shape in (("a.png", (200, 100)), ("small.png", (50, 50))):
        Image.fromarray(np.random.default_rng(3).integers(0, 256, shape, np.uint8)).save(name)
    monkeypatch.setitem(vars(xraygpt_lite), "load", lambda *_, **__: contextlib.nullcontext(model))

    def invoke(*args: str, input: bytes | None = None) -> Result:
        return CliRunner().invoke(main, args, input=input)

    return invoke


def test_the_answer_its_boxes_and_the_disclaimer(run: Invoke) -> None:
    result = run("summarize", "a.png", "--task", "vqa", "--question", "large?")
    assert (result.exit_code, result.stdout) == (0, f"{SAID}\nResearch use, not a medical device.\n")
    assert result.stderr.startswith(UNREAD)


def test_json_tells_what_was_asked_and_where_the_boxes_are(run: Invoke) -> None:
    result = run("summarize", "--json", "a.png", "--task", "identify", "--box", "1,2,30.5,40")
    record = json.loads(result.stdout)
    assert (record["task"], record["question"]) == ("identify", "what is this")
    assert record["asked_box"] == [1.0, 2.0, 30.5, 40.0]
    assert record["boxes"][0] == {"phrase": "the heart", "x0": 10.0, "y0": 40.0, "x1": 50.0, "y1": 140.0}


@pytest.mark.parametrize(
    ("args", "stderr"),
    [
        (["--task", "nope"], "task 'nope' is unknown to this bundle; it has: identify, vqa"),
        (["--task", "vqa"], "task 'vqa' has no question of its own"),
        (["--task", "vqa", "--question", "###"], "the question contains '###'"),
        (["--task", "identify"], "give its X0,Y0,X1,Y1 in pixels of the original image (--box)"),
        (["--box", "1,2,3,4"], "this bundle has: identify"),
        (["--task", "identify", "--box", "1,2,3"], "a box needs four numbers"),
        (["--task", "identify", "--box", "1,2,x,4"], "a box needs four numbers"),
        (["--task", "identify", "--box", "3,2,1,4"], "box 3,2,1,4 holds nothing"),
        (["--task", "identify", "--box", "0,0,101,200"], "the image, which is 100 x 200 pixels"),
        (["--overlay", "b.jpg"], "--overlay b.jpg is written as PNG"),
        (["--overlay", "-"], "--overlay - is written as PNG"),
        (["--overlay", "a.png"], "--overlay a.png is one of the images"),
        (["--overlay", "no/b.png"], "--overlay no/b.png cannot be written"),
        (["--overlay", "b.png", "-o", "./b.png"], "-o and --overlay name the same file"),
        (["--overlay", "b.png", "small.png"], "--overlay draws on one image, and 2 are named"),
    ],
)
def test_refused(run: Invoke, args: list[str], stderr: str) -> None:
    result = run("summarize", "a.png", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert stderr in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir()) == ["a.png", "small.png"]


def test_a_box_that_one_of_several_images_cannot_hold_fails_that_one_only(run: Invoke) -> None:
    args = ["--task", "identify", "--box", "0,0,60,60"]
    result = run("summarize", "--json", "small.png", "a.png", *args)
    first, second = map(json.loads, result.stdout.splitlines())
    assert result.exit_code == 3
    assert (first["error"], first["stage"], first["question"]) == ("UsageError", "prompt", "what is this")
    assert "50 x 50" in first["message"]
    assert second["asked_box"] == [0.0, 0.0, 60.0, 60.0]


def test_an_overlay_is_the_image_at_its_size_with_the_boxes(run: Invoke) -> None:
    result = run("summarize", "a.png", "--overlay", "OUT.PNG", "-o", "text", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    with Image.open("OUT.PNG") as picture:
        assert (picture.size, picture.mode, picture.format) == ((100, 200), "RGB", "PNG")
        assert picture.getpixel((10, 100)) == (0xF0, 0xE4, 0x42)
    assert sorted(os.listdir()) == ["OUT.PNG", "a.png", "small.png", "text"]


def test_an_overlay_is_not_written_for_a_failure_nor_half(run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("b.png").write_bytes(b"before")
    assert run("summarize", "gone.png", "--overlay", "b.png").exit_code == 1

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("summarize", "a.png", "--overlay", "b.png")
    assert result.exit_code == 1
    assert "--overlay b.png could not be written: No space left on device" in result.stderr
    assert Path("b.png").read_bytes() == b"before"
    assert sorted(os.listdir()) == ["a.png", "b.png", "small.png"]


def test_an_answer_without_boxes_gives_the_image_alone_and_a_warning(
    made_bundle: Path, run: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    with models.open_bundle(store.load(made_bundle, Cache(None)), threads=1, context=256) as silent:
        monkeypatch.setitem(vars(xraygpt_lite), "load", lambda *_, **__: contextlib.nullcontext(silent))
        result = run("summarize", "a.png", "--overlay", "b.png")
        assert result.exit_code == 0
        assert "the answer holds no box that could be drawn" in result.stderr
        assert Path("b.png").exists()
        assert "no box" not in run("summarize", "a.png", "--overlay", "b.png", "--quiet").stderr
        refused = run("summarize", "a.png", "--task", "vqa")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "this bundle has no tasks" in refused.stderr


def test_tasks_in_a_conversation(run: Invoke) -> None:
    lines = "/task vqa large?\n/task identify 1,2,30,40\n/task identify 1,2,30,40 what then\nplain\n"
    result = run("chat", "a.png", input=lines.encode())
    assert result.exit_code == 0
    assert result.stdout.count(SAID) == 4
    assert "> /task identify 1,2,30,40 what then\n" in result.stdout


@pytest.mark.parametrize(
    ("line", "stderr"),
    [
        ("/task", "/task needs a name; this bundle has: identify, vqa"),
        ("/task nope", "it has: identify, vqa"),
        ("/task vqa", "has no question of its own"),
        ("/task identify", "asks about a box"),
        ("/task identify what is this", "a box needs four numbers"),
        ("/task identify 0,0,500,500", "100 x 200"),
    ],
)
def test_a_task_that_cannot_be_asked_in_a_conversation(run: Invoke, line: str, stderr: str) -> None:
    result = run("chat", "a.png", input=f"{line}\nplain\n".encode())
    assert result.exit_code == 3
    assert stderr in result.stderr
    assert result.stdout.endswith(f"> plain\n{SAID}")
