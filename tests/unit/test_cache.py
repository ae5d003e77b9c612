"""The cache keeps, forgets and survives, and never gets in the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xraygpt_lite.cache import Cache


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_gives_back_what_was_put(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.get("sha256", "a") is None
    cache.put("sha256", "a", {"x": [1, 2.5, "ü"]})
    cache.put("verdict", "a", 2)
    assert cache.get("sha256", "a") == {"x": [1, 2.5, "ü"]}
    assert cache.get("verdict", "a") == 2
    cache.put("verdict", "a", 3)
    assert Cache(tmp_path / "new" / "folder").get("verdict", "a") == 3


def test_no_folder_means_no_cache() -> None:
    cache = Cache(None)
    cache.put("sha256", "a", 1)
    assert cache.get("sha256", "a") is None
    assert not cache.writable()


def test_keys_are_not_stored_in_clear(tmp_path: Path) -> None:
    Cache(tmp_path).put("sha256", "/home/someone/patient-17.gguf", "value")
    (path,) = files(tmp_path)
    assert b"someone" not in path.read_bytes()
    assert "someone" not in str(path.relative_to(tmp_path))


def test_a_key_may_hold_undecodable_bytes(tmp_path: Path) -> None:
    key = os.fsdecode(b"/x/\xff")
    Cache(tmp_path).put("sha256", key, 1)
    assert Cache(tmp_path).get("sha256", key) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[" * 100_000])
def test_a_damaged_entry_is_as_if_never_put(tmp_path: Path, content: bytes) -> None:
    cache = Cache(tmp_path)
    cache.put("sha256", "a", 1)
    files(tmp_path)[0].write_bytes(content)
    assert cache.get("sha256", "a") is None
    cache.put("sha256", "a", 2)
    assert cache.get("sha256", "a") == 2


def test_those_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, entries=3)
    for age, key in ((40, "a"), (30, "b"), (20, "c")):
        cache.put("kind", key, key)
        newest = max(files(tmp_path), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (newest.stat().st_mtime - age,) * 2)
    assert cache.get("kind", "a") == "a"  # used now
    cache.put("kind", "d", "d")
    assert [cache.get("kind", key) for key in "abcd"] == ["a", None, "c", "d"]
    assert len(files(tmp_path)) == 3


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "cache")
    cache.put("sha256", "a", 1)
    assert cache.get("sha256", "a") is None
    assert not cache.writable()


def test_a_full_disk_leaves_the_old_entry_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    cache.put("sha256", "a", 1)

    def full(_source: str, _target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.put("sha256", "a", 2)
    assert cache.get("sha256", "a") == 1
    assert len(files(tmp_path)) == 1


def test_a_kind_is_a_plain_word(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no kind of entry"):
        Cache(tmp_path).put("../up", "a", 1)


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from xraygpt_lite.cache import Cache\n"
        "cache = Cache(Path(sys.argv[1]), entries=5)\n"
        "for i in range(150):\n"
        "    cache.put('kind', str(i % 8), 'x' * 2000)\n"
        "    assert cache.get('kind', str((i + 3) % 8)) in (None, 'x' * 2000)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    left = files(tmp_path)
    assert 1 <= len(left) <= 8
    assert all(json.loads(path.read_bytes()) == "x" * 2000 for path in left)
