"""`models` and `verify` as processes with a user data folder of their own, on a small bundle that runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(process: Run, tmp_path: Path) -> Run:
    env = {"XDG_DATA_HOME": str(tmp_path / "data"), "XRAYGPT_LITE_CACHE": str(tmp_path / "cache")}

    def start(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
        return process(*args, fake=False, env={**env, **more})

    return start


def test_a_bundle_is_added_listed_and_removed(run: Run, made_bundle: Path) -> None:
    added = run("models", "add", str(made_bundle))
    assert (added.returncode, added.stderr) == (0, "")
    assert added.stdout.startswith("tiny is installed in ")
    assert any(line.split()[:2] == ["tiny", "installed"] for line in run("models").stdout.splitlines())
    again = run("models", "add", str(made_bundle))
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert "installed already" in again.stderr
    assert run("models", "add", "--replace", str(made_bundle)).returncode == 0
    assert run("models", "remove", "tiny").stdout == "tiny is removed\n"
    assert "tiny " not in run("models").stdout.replace("nih-tiny", "")
    gone = run("models", "remove", "tiny")
    assert (gone.returncode, gone.stdout, gone.stderr.count("\n")) == (2, "", 1)


def test_what_is_no_bundle_is_refused(run: Run, tmp_path: Path) -> None:
    done = run("models", "add", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)


def test_verify_passes_on_a_good_bundle(run: Run, recorded_bundle: Path) -> None:
    done = run("verify", str(recorded_bundle))
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["CHECK", "RESULT", "DETAIL"]
    assert len(rows) >= 4
    assert " failed " not in done.stdout
    found = json.loads(run("verify", "--json", XRAYGPT_LITE_BUNDLE=str(recorded_bundle)).stdout)
    assert (found["schema"], found["passed"]) == ("xraygpt-lite/verify/1", True)
    assert {check["status"] for check in found["checks"]} == {"ok"}


def test_verify_refuses_an_altered_bundle(run: Run, bundle_copy: Path) -> None:
    with (bundle_copy / "projector.onnx").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\0\1\2\3")
    done = run("verify", str(bundle_copy))
    assert done.returncode == 4
    assert " failed " in done.stdout
    assert " skipped " in done.stdout
    assert done.stderr.startswith(f"xraygpt-lite: error: the bundle {bundle_copy} fails verification: ")
    found = json.loads(run("verify", "--json", str(bundle_copy)).stdout)
    assert found["passed"] is False
    assert run("verify", "no-such-bundle").returncode == 4
