"""Where bundles are, and whether one may be loaded: the checks that come before any native parser sees a file.

It knows files, sizes and hashes, and of the model only what `bundle.json` and the GGUF header say, and which further
files the graphs name. Whether the graphs give what is promised is checked by `vision` when they are opened, and by
`verify`.

A file's hash is remembered in the cache under its path, size, times and inode, because hashing 4 GB at every start
would take seconds. Whoever can change a file and forge all of these can also replace this program; `verify` hashes
always.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import platformdirs

from xraygpt_lite.bundle import gguf_header, manifest, onnx_header
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import BundleError, UsageError
from xraygpt_lite.values import Bundle, FileEntry, Manifest

DEFAULT = "nih-tiny"
_TEMPORARY = ".tmp-"
_STALE_SECONDS = 86400


class Installed(NamedTuple):
    """A bundle that can be named: "bundled" with the package, or "installed" in the user's data folder."""

    name: str
    path: Path
    origin: Literal["bundled", "installed"]


def user_folder() -> Path:
    """Where `add` keeps bundles."""
    return Path(platformdirs.user_data_dir("xraygpt-lite", appauthor=False)) / "bundles"


def installed(folder: Path | None = None) -> list[Installed]:
    """The bundles that can be named, those of the package first; nothing is checked.

    Parameters
    ----------
    folder
        In place of the user's data folder.
    """
    packaged = Path(str(resources.files("xraygpt_lite.models")))
    result = [Installed(p.parent.parent.name, p.parent, "bundled")
              for p in sorted(packaged.glob(f"*/bundle/{manifest.FILE_NAME}"))]  # fmt: skip
    taken = {item.name for item in result}
    for path in sorted((folder or user_folder()).glob(f"*/{manifest.FILE_NAME}")):
        name = path.parent.name
        if manifest.is_bundle_name(name) and name not in taken:
            result.append(Installed(name, path.parent, "installed"))
    return result


def find(name_or_path: str | os.PathLike[str] | None, folder: Path | None = None) -> Path:
    """The folder of a bundle, unchecked: None is the default one; a known name comes before a path.

    Raises
    ------
    BundleError
        When it is neither the name of a bundle nor a folder.
    """
    wanted = DEFAULT if name_or_path is None else os.fspath(name_or_path)
    known = {item.name: item.path for item in installed(folder)}
    if wanted in known:
        return known[wanted]
    path = Path(wanted)
    if name_or_path is not None and wanted and path.is_dir():
        return path
    names = ", ".join(sorted(known)) or "none"
    raise BundleError(f"{wanted!r} is neither the name of a bundle (known: {names}) nor a folder")


def load(path: Path, cache: Cache) -> Bundle:
    """Check a bundle's folder and return it.

    The order: the folder and `bundle.json`, the manifest, every file's kind, name and size, every file's sha256, the
    language model's header, the files that graphs name. Only then may a native library open a file.

    Parameters
    ----------
    cache
        Remembers hashes of files that did not change; `Cache(None)` hashes always.

    Raises
    ------
    BundleError
        At the first check that fails.
    """
    parsed, identity = inspect(path)
    for entry in parsed.files:
        check_hash(path, entry, cache)
    check_llm(path, parsed)
    check_graphs(path, parsed)
    return Bundle(path, parsed, identity)


def inspect(path: Path) -> tuple[Manifest, str]:
    """Manifest and id of a bundle whose folder holds what the manifest lists and nothing else; no content is hashed.

    Raises
    ------
    BundleError
        For a missing, linked, unlisted or wrongly sized file, or a manifest that `manifest.parse` refuses.
    """
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise BundleError(f"{path} is not a folder (a link to one is refused); expected the folder of a bundle")
        sizes = {name: _size(path / name) for name in sorted(os.listdir(path))}
        if manifest.FILE_NAME not in sizes:
            raise BundleError(f"{path} holds no {manifest.FILE_NAME}, so it is not a bundle")
        with (path / manifest.FILE_NAME).open("rb") as file:
            data = file.read(manifest.MAX_BYTES + 1)
    except OSError as error:
        raise BundleError(f"the bundle {path} cannot be read: {error.strerror}") from error
    parsed = manifest.parse(data)
    listed = {entry.name: entry.size for entry in parsed.files}
    for name, size in listed.items():
        if name not in sizes:
            raise BundleError(f"{name} is missing from the bundle {path}; copy or convert it again")
        if sizes[name] != size:
            raise BundleError(f"{name} has {sizes[name]} bytes, but {manifest.FILE_NAME} lists {size}; {_AGAIN}")
    for name in sizes:
        if name not in listed and name != manifest.FILE_NAME:
            raise BundleError(f"{name!r} lies in {path} but is not listed in its {manifest.FILE_NAME}; remove it")
    return parsed, manifest.bundle_id(data)


_AGAIN = "the file was altered or copied incompletely: copy or convert the bundle again"


def check_hash(folder: Path, entry: FileEntry, cache: Cache) -> None:
    """Compare a file's sha256 with the listed one.

    Raises
    ------
    BundleError
        When it differs, or the file cannot be read.
    """
    path = folder / entry.name
    try:
        key = _identity(path)
        digest = cache.get("sha256", key)
        if not isinstance(digest, str):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if _identity(path) == key:  # not changed meanwhile
                cache.put("sha256", key, digest)
    except OSError as error:
        raise BundleError(f"{entry.name} cannot be read: {error.strerror}") from error
    if digest != entry.sha256:
        raise BundleError(f"{entry.name} has the sha256 {digest[:12]}…, but {manifest.FILE_NAME} lists "
                          f"{entry.sha256[:12]}…; {_AGAIN}")  # fmt: skip


def check_llm(folder: Path, parsed: Manifest) -> None:
    """Compare the language model's header with the manifest: its width, and the ids that the prompt uses.

    Raises
    ------
    BundleError
        When they contradict each other, or the file is no GGUF.
    """
    header = gguf_header.read(folder / "llm.gguf")
    if header.width != parsed.width:
        raise BundleError(
            f"llm.gguf takes rows of width {header.width}, but the projector gives {parsed.width}: "
            "projector and language model belong to different models"
        )
    used = [*parsed.prompt.stop_ids, *parsed.self_test.ids]
    for variant in parsed.prompt.variants.values():
        used.extend((*variant.before_ids, *variant.next_turn_ids))
    if max(used) >= header.vocab:
        raise BundleError(f"{manifest.FILE_NAME} uses the token id {max(used)}, but llm.gguf has {header.vocab} tokens")


def check_graphs(folder: Path, parsed: Manifest) -> None:
    """Compare the files that graphs keep weights in with the bundle's list.

    Raises
    ------
    BundleError
        When a graph names a file that the bundle does not list, by whatever path, or is no ONNX graph.
    """
    allowed = {entry.name for entry in parsed.files} - set(manifest.REQUIRED_FILES)
    for name in ("vision.onnx", "projector.onnx"):
        for other in sorted(onnx_header.external_files(folder / name) - allowed):
            raise BundleError(
                f"{name} keeps weights in {other[:100]!r}, which is not among the further files that "
                f"{manifest.FILE_NAME} lists; {_AGAIN}"
            )


def add(path: Path, *, folder: Path | None = None, replace: bool = False) -> Path:
    """Copy a bundle into the user's data folder, check the copy, and give it its name in one step.

    Parameters
    ----------
    folder
        In place of the user's data folder.
    replace
        Whether a bundle of the same name is replaced.

    Returns
    -------
    Path
        The bundle's new folder.

    Raises
    ------
    BundleError
        When the bundle or its copy fails a check, or it cannot be written.
    UsageError
        When the name is taken.
    """
    parsed, _ = inspect(path)
    target = (folder or user_folder()) / parsed.name
    for other in installed(folder):
        if other.name == parsed.name and other.origin == "bundled":
            raise UsageError(f"{parsed.name} is the name of a bundle that comes with the package; rename yours")
    if os.path.lexists(target) and not replace:
        raise UsageError(f"a bundle named {parsed.name} is installed already; remove it first, or ask to replace it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=target.parent) as temporary:
            copy = Path(temporary) / "new"
            copy.mkdir()
            for name in (manifest.FILE_NAME, *(entry.name for entry in parsed.files)):
                shutil.copyfile(path / name, copy / name, follow_symlinks=False)
            load(copy, Cache(None))
            _swap(copy, target, Path(temporary) / "old")
    except OSError as error:
        raise BundleError(f"{parsed.name} cannot be installed in {target.parent}: {error.strerror}") from error
    return target


def remove(name: str, *, folder: Path | None = None) -> None:
    """Delete an installed bundle; it loses its name before the first file goes.

    Raises
    ------
    UsageError
        When there is none of this name, or it belongs to the package.
    BundleError
        When it cannot be deleted.
    """
    found = {item.name: item for item in installed(folder)}.get(name)
    if found is None:
        raise UsageError(f"no bundle named {name!r} is installed; `xraygpt-lite models` lists those that are")
    if found.origin == "bundled":
        raise UsageError(f"{name} comes with the package and cannot be removed")
    try:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=found.path.parent) as temporary:
            os.rename(found.path, Path(temporary) / "old")
    except OSError as error:
        raise BundleError(f"{name} cannot be removed from {found.path.parent}: {error.strerror}") from error


def _size(path: Path) -> int:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path.name!r} in {path.parent} is a link, folder or device; a bundle holds plain files")
    return found.st_size


def _identity(path: Path) -> str:
    found = os.lstat(path)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return repr((os.path.realpath(path), found.st_size, times, found.st_dev, found.st_ino))


def _swap(new: Path, target: Path, old: Path) -> None:
    replaced = os.path.lexists(target)
    if replaced:
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if replaced:
            os.rename(old, target)
        raise


def _sweep(folder: Path) -> None:
    """Remove what an interrupted `add` or `remove` left a day ago or earlier."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
