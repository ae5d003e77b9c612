"""Finding, checking, adding and removing bundles."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest
import tiny_bundle

from xraygpt_lite.bundle import manifest, store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import BundleError, UsageError

NO_CACHE = Cache(None)


def test_load_gives_a_checked_bundle(made_bundle: Path) -> None:
    bundle = store.load(made_bundle, NO_CACHE)
    data = (made_bundle / "bundle.json").read_bytes()
    assert bundle.manifest == manifest.parse(data)
    assert bundle.id == hashlib.sha256(data).hexdigest()
    assert (bundle.vision, bundle.projector, bundle.llm) == tuple(made_bundle / n for n in manifest.REQUIRED_FILES)


def test_a_listed_further_file_is_allowed(bundle_copy: Path) -> None:
    (bundle_copy / "vision.onnx_data").write_bytes(b"weights")
    tiny_bundle.seal(bundle_copy, tiny_bundle.plain_manifest())
    assert len(store.load(bundle_copy, NO_CACHE).manifest.files) == 4


def test_hashes_are_remembered_until_a_file_changes(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    hashed: list[str] = []
    digest = hashlib.file_digest

    def count(file: BinaryIO, name: str) -> object:
        hashed.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", count)
    store.load(bundle_copy, cache)
    assert sorted(hashed) == sorted(manifest.REQUIRED_FILES)
    store.load(bundle_copy, cache)
    assert len(hashed) == 3
    data = bytearray((bundle_copy / "vision.onnx").read_bytes())
    data[-1] ^= 1
    (bundle_copy / "vision.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"vision.onnx has the sha256"):
        store.load(bundle_copy, cache)
    assert hashed[3:] == ["vision.onnx"] or hashed[3:] == ["llm.gguf", "projector.onnx", "vision.onnx"]


def test_a_replaced_file_with_the_old_times_is_hashed_again(bundle_copy: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    store.load(bundle_copy, cache)
    path = bundle_copy / "projector.onnx"
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=r"projector.onnx has the sha256"):
        store.load(bundle_copy, cache)


def test_find_knows_names_and_paths(made_bundle: Path, tmp_path: Path) -> None:
    user = tmp_path / "user"
    target = store.add(made_bundle, folder=user)
    assert store.find("tiny", user) == target
    assert store.find(str(made_bundle), user) == made_bundle
    assert store.find(made_bundle, user) == made_bundle


@pytest.mark.parametrize("name", ["no-such-bundle", "", "/no/such/folder"])
def test_find_names_what_is_known(name: str, made_bundle: Path, tmp_path: Path) -> None:
    store.add(made_bundle, folder=tmp_path)
    with pytest.raises(BundleError, match=r"known: .*tiny"):
        store.find(name, tmp_path)


def test_the_default_bundle_is_the_package_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "models"
    bundle = tiny_bundle.make(package / store.DEFAULT / "bundle", name=store.DEFAULT)
    monkeypatch.setattr(store.resources, "files", lambda name: package)
    assert store.find(None, tmp_path / "user") == bundle
    assert store.installed(tmp_path / "user") == [store.Installed(store.DEFAULT, bundle, "bundled")]
    with pytest.raises(UsageError, match="comes with the package"):
        store.remove(store.DEFAULT, folder=tmp_path / "user")
    with pytest.raises(UsageError, match="comes with the package"):
        store.add(bundle, folder=tmp_path / "user", replace=True)


def test_add_and_remove(made_bundle: Path, tmp_path: Path) -> None:
    user = tmp_path / "not" / "yet"
    target = store.add(made_bundle, folder=user)
    assert store.load(target, NO_CACHE).id == store.load(made_bundle, NO_CACHE).id
    assert [(i.name, i.path, i.origin) for i in store.installed(user) if i.origin == "installed"] == [
        ("tiny", target, "installed")
    ]
    store.remove("tiny", folder=user)
    assert os.listdir(user) == []
    with pytest.raises(UsageError, match="no bundle named 'tiny'"):
        store.remove("tiny", folder=user)


@pytest.mark.parametrize("name", ["..", "../victim", "/etc", ".", ""])
def test_remove_takes_names_only(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "bundle.json").write_text("{}")
    (tmp_path / "user").mkdir()
    with pytest.raises(UsageError):
        store.remove(name, folder=tmp_path / "user")
    assert victim.exists()


def test_add_replaces_only_when_asked(made_bundle: Path, tmp_path: Path) -> None:
    other = tiny_bundle.make(tmp_path / "other", seed=5)
    user = tmp_path / "user"
    target = store.add(made_bundle, folder=user)
    with pytest.raises(UsageError, match="installed already"):
        store.add(other, folder=user)
    assert store.load(target, NO_CACHE).id == store.load(made_bundle, NO_CACHE).id
    assert store.add(other, folder=user, replace=True) == target
    assert store.load(target, NO_CACHE).id == store.load(other, NO_CACHE).id
    assert os.listdir(user) == ["tiny"]


def test_a_full_disk_while_adding_leaves_nothing(
    made_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(BundleError, match="No space left"):
        store.add(made_bundle, folder=tmp_path / "user")
    assert os.listdir(tmp_path / "user") == []


@pytest.mark.parametrize(
    ("cause", "raised"), [(OSError(5, "Input/output error"), BundleError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failed_replacement_keeps_the_old_bundle(
    made_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cause: BaseException,
    raised: type[BaseException],
) -> None:
    user = tmp_path / "user"
    target = store.add(made_bundle, folder=user)
    rename = os.rename

    def refuse_new(source: Path, destination: Path) -> None:
        if Path(source).name == "new":
            raise cause
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(raised, match=r"Input/output error|^$"):
        store.add(tiny_bundle.make(tmp_path / "other", seed=5), folder=user, replace=True)
    assert store.load(target, NO_CACHE).id == store.load(made_bundle, NO_CACHE).id
    assert os.listdir(user) == ["tiny"]


def test_add_checks_the_copy(bundle_copy: Path, tmp_path: Path) -> None:
    data = bytearray((bundle_copy / "llm.gguf").read_bytes())
    data[-1] ^= 1
    (bundle_copy / "llm.gguf").write_bytes(data)
    with pytest.raises(BundleError, match=r"llm.gguf has the sha256"):
        store.add(bundle_copy, folder=tmp_path / "user")
    assert os.listdir(tmp_path / "user") == []


def test_what_an_interrupted_add_left_is_swept_a_day_later(made_bundle: Path, tmp_path: Path) -> None:
    old, new = tmp_path / ".tmp-old", tmp_path / ".tmp-new"
    for folder in (old, new):
        (folder / "new").mkdir(parents=True)
    os.utime(old, (0, 0))
    store.add(made_bundle, folder=tmp_path)
    assert not old.exists()
    assert new.exists()
    assert [i.name for i in store.installed(tmp_path) if i.origin == "installed"] == ["tiny"]
