"""Ways to run the command line: in this process, as a process, on a terminal; over a stand-in or the real model."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

import xraygpt_lite
from xraygpt_lite.bundle import store
from xraygpt_lite.errors import BundleError

HERE = Path(__file__).parent
FAKE = HERE / "with_fake_model.py"
_TIMEOUT = 60


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("with_fake_model", FAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["with_fake_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def invoke(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line in this process over the stand-in: invoke("summarize", "a.png", input=b"")."""
    from xraygpt_lite.cli import main

    monkeypatch.setitem(vars(xraygpt_lite), "load", fake.load)  # setattr would import the real one first
    monkeypatch.delenv("XRAYGPT_LITE_BUNDLE", raising=False)

    def run(*args: str, input: bytes | None = None) -> Result:
        return CliRunner().invoke(main, args, input=input)

    return run


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the stand-in takes for images: a.png, b.png, and two.dcm, which has a warning."""
    monkeypatch.chdir(tmp_path)
    for name, data in (("a.png", b"a"), ("b.png", b"bb"), ("two.dcm", b"7 bytes")):
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line as a process of its own; `fake` puts the stand-in under it."""

    def run(
        *args: str | bytes, fake: bool = True, input: bytes = b"", env: dict[str, str] | None = None, shell: str = ""
    ) -> subprocess.CompletedProcess[str]:
        head = command(fake)
        whole = ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *head, *args] if shell else [*head, *args]
        done = subprocess.run(
            whole, input=input, capture_output=True, timeout=_TIMEOUT, env={**os.environ, **(env or {})}
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode(errors="backslashreplace")
        )

    return run


def command(fake: bool) -> list[str]:
    return [sys.executable, str(FAKE)] if fake else [sys.executable, "-m", "xraygpt_lite"]


@pytest.fixture(scope="session")
def default_bundle() -> Path:
    """The bundle that ships with the package; the test is skipped where it has not been built."""
    try:
        return store.find(None)
    except BundleError:
        pytest.skip("needs the default bundle, models/nih-tiny/bundle, which is absent")


class Terminal:
    """A process on a pseudo-terminal of its own, whose Ctrl-C is a real one."""

    def __init__(self, args: list[str]) -> None:
        self._master, slave = os.openpty()
        self._process = subprocess.Popen(
            args,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self.text = ""

    def until(self, wanted: str) -> str:
        """Read until `wanted` appears after what was read before; return what came, `wanted` included."""
        start, deadline = len(self.text), time.monotonic() + _TIMEOUT
        while wanted not in self.text[start:]:
            if not self._more(deadline):
                raise AssertionError(f"{wanted!r} did not come; the terminal shows {self.text!r}")
        return self.text[start:]

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self) -> int:
        """Read to the end; return the exit code."""
        deadline = time.monotonic() + _TIMEOUT
        while self._more(deadline):
            pass
        return self._process.wait(_TIMEOUT)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)

    def _more(self, deadline: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._master, 4096)
        except OSError:  # Linux's end of file: the last process has left the terminal
            return False
        self.text += data.decode(errors="replace")
        return bool(data)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Start a command line on a terminal: terminal("chat", "a.png")."""
    opened: list[Terminal] = []

    def start(*args: str, fake: bool = True) -> Terminal:
        opened.append(Terminal([*command(fake), *args]))
        return opened[-1]

    yield start
    for one in opened:
        one.close()
