"""The worker as a program: its frames, what it answers, and what it is to the system."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from xraygpt_lite.imaging.read import read
from xraygpt_lite.imaging.transform import fit
from xraygpt_lite.imaging.worker import receive, send
from xraygpt_lite.values import ImageSpec

SPEC = ImageSpec(32, "pad", "bilinear", (0.5, 0.25, 0.0), (0.5, 0.3, 1.0))
PROGRAM = (sys.executable, "-P", "-m", "xraygpt_lite.imaging.worker")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@contextmanager
def started(parent: int, program: tuple[str, ...] = PROGRAM) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that was told the spec and its parent."""
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            send(process.stdin, {"parent": parent, "spec": asdict(SPEC)})
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[bytes], path: Path | str) -> tuple[str | None, dict[str, Any], bytes]:
    send(process.stdin, {"path": os.fspath(path)})
    first, nothing = receive(process.stdout)
    assert list(first) == ["sha256"]
    assert not nothing
    header, payload = receive(process.stdout)
    return first["sha256"], header, bytes(payload)


@pytest.fixture
def png(tmp_path: Path, picture: npt.NDArray[np.uint16]) -> Path:
    Image.fromarray(picture).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("payload", [b"", b"\0\xff" * 70_000])
def test_a_frame_comes_out_as_it_went_in(payload: bytes) -> None:
    header = {"path": "a\n\udcff\0é" + "x" * 5000, "n": 0.1 + 0.2, "none": None}
    stream = io.BytesIO()
    send(stream, header, payload)
    send(stream, {})
    stream.seek(0)
    assert receive(stream) == (header, payload)
    assert receive(stream) == ({}, b"")
    with pytest.raises(EOFError):
        receive(stream)


def test_a_torn_frame_is_an_end() -> None:
    stream = io.BytesIO()
    send(stream, {"a": 1}, b"12345")
    whole = stream.getvalue()
    for length in range(len(whole)):
        with pytest.raises(EOFError):
            receive(io.BytesIO(whole[:length]))


@pytest.mark.parametrize("data", [b"hello hello", b"\0\0\0\1\0\0\0\0x", b"\0\0\0\1\0\0\0\0\xff"])
def test_what_is_no_frame_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"frame|Expecting value|decode"):
        receive(io.BytesIO(data))


def test_an_image_and_a_failure_and_the_end(png: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(png.read_bytes()[:100])
    with started(os.getpid()) as process:
        assert receive(process.stdout) == ({}, b"")
        early, header, payload = ask(process, png)
        expected = read(png)
        assert early == header["sha256"] == expected.sha256
        assert header["warnings"] == list(expected.warnings) != []
        assert payload == fit(expected.pixels, SPEC)[0].tobytes()
        early, header, payload = ask(process, bad)
        assert early == hashlib.sha256(bad.read_bytes()).hexdigest()
        assert (header["error"], header["stage"], payload) == ("ImageError", "read", b"")
        process.stdin.close()
        assert process.wait(10) == 0
        assert process.stdout.read() == b""
        assert process.stderr.read() == b""


def test_what_read_would_not_open_is_not_opened_for_its_hash(tmp_path: Path) -> None:
    """Above all no pipe: it would hang for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    with started(os.getpid()) as process:
        receive(process.stdout)
        for path in (tmp_path / "pipe.png", tmp_path, tmp_path / "absent", "a\0b"):
            early, header, _ = ask(process, path)
            assert early is None
            assert header["error"] == "ImageError"


def test_it_loads_what_it_needs_and_no_more(png: Path, tmp_path: Path) -> None:
    report = tmp_path / "modules.json"
    code = (
        "import json, sys; from xraygpt_lite.imaging import worker; worker.main(); "
        f"open({str(report)!r}, 'w').write(json.dumps(sorted(sys.modules)))"
    )
    with started(os.getpid(), (sys.executable, "-c", code)) as process:
        receive(process.stdout)
        ask(process, png)
        process.stdin.close()
        process.wait(10)
    modules = set(json.loads(report.read_text()))
    assert {"numpy", "PIL.Image", "xraygpt_lite.imaging.transform"} <= modules
    # Of the package's own modules only these: the list is what keeps a worker small.
    own = {name.split(".")[1] for name in modules if name.startswith("xraygpt_lite.")}
    assert own == {"imaging", "values", "errors"}
    assert not {"pydicom", "llama_cpp", "onnxruntime", "click", "multiprocessing"} & modules


@linux
def test_it_ends_at_once_when_its_parent_has_gone_already() -> None:
    with started(os.getppid()) as process:
        assert process.wait(30) == 0
        assert process.stdout.read() == b""


@linux
def test_it_is_the_first_to_go_without_memory_and_leaves_no_core_file(make_dicom: Callable[..., Any]) -> None:
    with started(os.getpid()) as process:
        receive(process.stdout)
        folder = Path(f"/proc/{process.pid}")
        mine = int(Path("/proc/self/oom_score_adj").read_text())
        assert int((folder / "oom_score_adj").read_text()) == max(mine, 500)
        limits = (folder / "limits").read_text().splitlines()
        assert next(line.split()[4] for line in limits if line.startswith("Max core")) == "0"
