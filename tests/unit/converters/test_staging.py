"""A bundle's folder in the making: what survives which end, and that the target is whole or untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from xraygpt_lite.converters.staging import STATE, Staging
from xraygpt_lite.errors import ConversionError

REQUEST = {"family": "tiny", "quant": "f16"}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def write(staging: Staging, name: str, text: str = "content") -> str:
    (staging.folder / name).write_text(text)
    return name


def one_step(output: Path, error: BaseException | None = None, request: Any = REQUEST) -> list[str]:
    """Run step "a", then fail in the middle of step "b"; gives the names of the files that lie beside the target."""
    with Staging(output, request) as staging:
        staging.step("a", ["a.*"], lambda: write(staging, "a.bin"))
        write(staging, "b.bin", "half")
        if error:
            raise error
    return beside(output)


def made(output: Path) -> None:
    with Staging(output, REQUEST) as staging:
        staging.step("a", ["bundle/*"], lambda: write(staging, "bundle/a.bin"))
        staging.finish()


def test_the_lock_is_not_taken_from_the_next_one(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is gone before the lock is given back; removed later, it might be another process's."""
    release, there = FileLock.release, []
    monkeypatch.setattr(FileLock, "release", lambda lock: (there.append(Path(lock.lock_file).exists()), release(lock)))
    made(output)
    assert there[0] is False
    assert beside(output) == ["bundle", "bundle/a.bin"]


def test_another_process_may_make_the_folder_before_it_asks_for_the_lock(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: (remove(path, **more), path.mkdir()))
    with Staging(output, REQUEST) as staging:
        staging.step("a", ["bundle/*"], lambda: write(staging, "bundle/a.bin"))
        monkeypatch.undo()
        staging.finish()
    assert beside(output) == ["bundle", "bundle/a.bin"]


def beside(output: Path) -> list[str]:
    return sorted(path.relative_to(output.parent).as_posix() for path in output.parent.rglob("*"))


def test_finish_puts_the_bundle_alone_into_place(output: Path) -> None:
    with Staging(output, REQUEST) as staging:
        assert staging.step("a", ["reference/*"], lambda: write(staging, "reference/x.bin")) == "reference/x.bin"
        assert staging.written() > len("content")
        staging.step("b", ["bundle/a.bin"], lambda: write(staging, "bundle/a.bin"))
        staging.finish()
    assert beside(output) == ["bundle", "bundle/a.bin"]


def test_an_error_leaves_nothing(output: Path) -> None:
    with pytest.raises(ValueError, match="mistake"):
        one_step(output, ValueError("mistake"))
    assert beside(output) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_interruption_keeps_finished_steps_alone(output: Path, error: BaseException) -> None:
    kept = rf"; finished steps are kept in {output.with_name('.bundle.partial')}, and the same command goes on there$"
    with pytest.raises((KeyboardInterrupt, ConversionError), match=kept):
        one_step(output, error)
    assert beside(output) == [
        ".bundle.partial",
        *(f".bundle.partial/{name}" for name in ("a.bin", "bundle", "reference", STATE)),
    ]
    with Staging(output, REQUEST) as staging:
        assert staging.finished == ("a",)
        assert staging.step("a", ["a.*"], lambda: pytest.fail("was done again")) == "a.bin"


def test_an_interruption_before_any_step_leaves_nothing_and_promises_nothing(output: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^$"), Staging(output, REQUEST):
        raise KeyboardInterrupt
    assert beside(output) == []


@pytest.mark.parametrize("refused", [True, False])
def test_a_refusal_keeps_finished_steps_and_no_other_error_does(output: Path, refused: bool) -> None:
    def give_up() -> None:
        with Staging(output, REQUEST) as staging:
            staging.step("a", ["a.*"], lambda: write(staging, "a.bin"))
            refusal = staging.refusal("too lossy")
            raise refusal if refused else ConversionError("too lossy")

    kept = (
        rf"^too lossy; finished steps are kept in {output.with_name('.bundle.partial')}, and the same command goes on"
    )
    with pytest.raises(ConversionError, match=kept if refused else r"^too lossy$"):
        give_up()
    with Staging(output, REQUEST) as staging:
        assert staging.finished == (("a",) if refused else ())


def test_a_full_disk_is_said_with_what_was_kept(output: Path) -> None:
    with pytest.raises(ConversionError, match=r"disk is full.*finished steps are kept in .*\.bundle\.partial"):
        one_step(output, OSError(errno.ENOSPC, "full"))


def test_a_full_disk_before_any_step_leaves_nothing(output: Path) -> None:
    with (
        pytest.raises(ConversionError, match=r"disk is full, or a limit on file sizes was reached$"),
        Staging(output, 1),
    ):
        raise OSError(errno.EFBIG, "large")
    assert beside(output) == []


def test_another_request_begins_anew(output: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        one_step(output, KeyboardInterrupt())
    with Staging(output, {**REQUEST, "quant": "q8_0"}) as staging:
        assert staging.finished == ()
        assert [path for path in staging.folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("spoil", ["shorter", "absent", "state"])
def test_a_step_whose_files_are_not_whole_is_done_again(output: Path, spoil: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        one_step(output, KeyboardInterrupt())
    folder = output.with_name(".bundle.partial")
    if spoil == "absent":
        (folder / "a.bin").unlink()
    else:
        (folder / ("a.bin" if spoil == "shorter" else STATE)).write_text("{")
    with Staging(output, REQUEST) as staging:
        assert staging.step("a", ["a.*"], lambda: write(staging, "a.bin", "again")) == "a.bin"
        assert (staging.folder / "a.bin").read_text() == "again"


KILLED = """
import os, signal, sys
from pathlib import Path
from xraygpt_lite.converters.staging import Staging
with Staging(Path(sys.argv[1]), {"family": "tiny", "quant": "f16"}) as staging:
    staging.step("a", ["a.*"], lambda: (staging.folder / "a.bin").write_text("whole"))
    (staging.folder / "b.bin").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_process_is_continued(output: Path) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(output)], check=False)
    assert child.returncode == -signal.SIGKILL
    with Staging(output, REQUEST) as staging:
        assert staging.finished == ("a",)
        assert not (staging.folder / "b.bin").exists()


def test_two_at_once(output: Path) -> None:
    with (
        Staging(output, REQUEST),
        pytest.raises(ConversionError, match="another process is making"),
        Staging(output, 1),
    ):
        pass


def test_a_bundle_that_is_replaced_comes_back_when_that_fails(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.mkdir()
    (output / "old").write_text("kept")
    rename = Path.rename

    def broken(path: Path, target: Path) -> Path:
        if path.parent.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken disk")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(ConversionError, match="broken disk"):
        made(output)
    assert beside(output) == ["bundle", "bundle/old"]


def test_a_bundle_is_replaced(output: Path) -> None:
    output.mkdir()
    (output / "old").write_text("gone")
    made(output)
    assert beside(output) == ["bundle", "bundle/a.bin"]


def test_results_are_json(output: Path) -> None:
    with Staging(output, REQUEST) as staging:
        staging.step("a", [], lambda: {"figure": 0.5})
        state = json.loads((staging.folder / STATE).read_bytes())
    assert state["done"]["a"] == {"files": {}, "result": {"figure": 0.5}}
