"""`doctor`: the real one, and how it shows a failure."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest
from click.testing import Result

from xraygpt_lite.values import Check


@pytest.mark.usefixtures("default_bundle")
def test_this_machine_is_well(process: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = process("doctor", fake=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].split() == ["CHECK", "RESULT", "DETAIL"]
    found = json.loads(process("doctor", "--json", fake=False).stdout)
    assert (found["schema"], found["passed"]) == ("xraygpt-lite/doctor/1", True)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("skipped", 0), ("failed", 1)])
def test_a_failed_check_is_exit_code_1(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    checks = [Check("CPU", "ok", "fine"), Check("self-test", status, "llama.cpp crashes\nreinstall it")]  # type: ignore[arg-type]  # the parameter
    monkeypatch.setattr("xraygpt_lite.doctor.run", lambda _: checks)
    result = invoke("doctor")
    assert result.exit_code == code
    assert result.stdout.splitlines()[2].split(maxsplit=2) == ["self-test", status, "llama.cpp crashes reinstall it"]
    assert result.stderr == ("xraygpt-lite: error: this installation needs mending: self-test\n" if code else "")
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["passed"] is (code == 0)
    assert found["checks"][1]["status"] == status
