"""What is installed here and whether it runs: facts for a person or a bug report, one `Check` each.

It changes nothing, prints nothing and reads no image. llama.cpp, which could crash this process, is tried in a child
first.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from xraygpt_lite import device, vision
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import BundleError, MissingPackageError, XrayError
from xraygpt_lite.llm import native, selftest
from xraygpt_lite.values import Check

LARGE = 10**9
"""Bytes of a language model from which on the speeds of a 7B model say something about it."""
_PACKAGES = ("numpy", "pillow", "pydicom", "click", "platformdirs")


def run(bundle: str | None = None) -> list[Check]:
    """Gather the facts.

    Parameters
    ----------
    bundle
        One more whose weights are to be looked at: a name or a path.

    Returns
    -------
    list of Check
        "failed" means that no radiograph can be summarized before it is mended, and the detail says how; "skipped" that
        something optional is absent, or cannot be found out because of an earlier failure.
    """
    cache = Cache(device.cache_folder())
    checks = [
        _check("program", _program),
        _check("packages", _packages),
        _check("CPU", _cpu),
        _check("onnxruntime", _onnxruntime),
        _check("llama-cpp-python", _llama),
        _check("default bundle", lambda: _default_bundle(cache)),
    ]
    checks.append(_after(checks, ("llama-cpp-python", "default bundle"), "llama.cpp self-test", _selftest))
    checks.append(_after(checks, ("llama.cpp self-test",), "llama.cpp build", native.system_info))
    checks.append(_after(checks, ("onnxruntime", "llama.cpp self-test"), "GPU", _gpu))
    checks.append(_cache_folder(cache))
    checks.append(Check("installed bundles", "ok", _bundles()))
    checks.append(_check("weight types", lambda: _weight_types(bundle)))
    return checks


def _check(name: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", step())
    except XrayError as error:
        return Check(name, "failed", str(error))


def _after(checks: list[Check], needed: tuple[str, ...], name: str, step: Callable[[], str]) -> Check:
    """A step that opens native libraries, which have to be there and to be known not to crash."""
    for check in checks:
        if check.name in needed and check.status != "ok":
            return Check(name, "skipped", f"not reached: {check.name} is {check.status}")
    return _check(name, step)


def _program() -> str:
    python = f"Python {platform.python_version()} ({sys.executable})"
    return f"xraygpt-lite {metadata.version('xraygpt-lite')}, {python}, {platform.platform()}"


def _packages() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise MissingPackageError(f"the package {name} is absent; run: pip install xraygpt-lite") from error


def _cpu() -> str:
    features = " ".join(device.cpu_features()) or "features unknown on this system"
    return f"{selftest.cpu_id()}, {device.cores()} of {os.cpu_count()} cores for this process; {features}"


def _onnxruntime() -> str:
    providers = ", ".join(vision.available_providers())
    name, version = next(iter(vision.installed_runtimes().items()), ("onnxruntime", "of an unknown distribution"))
    return f"{name} {version}: {providers}"


def _llama() -> str:
    return f"{_version('llama-cpp-python')}, build {native.build_id()}"


def _default_bundle(cache: Cache) -> str:
    bundle = store.load(store.find(None), cache)
    return f"{bundle.manifest.name}, id {bundle.id[:12]}, all files as listed"


def _selftest() -> str:
    selftest.check(store.find(None) / "llm.gguf", Cache(None))
    return "a child process prefilled and decoded without a crash"


def _gpu() -> str:
    vision_gpu = device.CUDA in vision.available_providers()
    llama_gpu = native.supports_gpu()
    return (
        f"vision {'can' if vision_gpu else 'cannot'} use CUDA, llama.cpp {'can' if llama_gpu else 'cannot'} use a GPU; "
        f"NVIDIA driver: {_nvidia_driver()}"
    )


def _nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[0].removeprefix("NVRM version: ").strip()
    except (OSError, IndexError):
        return "none found"


def _cache_folder(cache: Cache) -> Check:
    if cache.writable():
        return Check("cache folder", "ok", str(cache.folder))
    return Check("cache folder", "skipped", f"{cache.folder} cannot be written; nothing is remembered between runs")


def _bundles() -> str:
    found = ", ".join(f"{item.name} ({item.origin})" for item in store.installed()) or "none"
    return f"{found}; yours are kept in {store.user_folder()}"


def _weight_types(bundle: str | None) -> str:
    """Which bundles have weights of a type that is slow on this class of CPU, and which type is the fastest."""
    paths = {item.path.resolve(): item.name for item in store.installed()}
    if bundle is not None:
        store.inspect(store.find(bundle))  # the one that is meant must be readable
        paths.setdefault(store.find(bundle).resolve(), bundle)
    cpu = device.cpu_class()
    if cpu is None:
        known = " and ".join(device.SPEEDS)
        return f"speeds are known for {known} only, which this is not; measure with: xraygpt-lite bench"
    found = []
    for path, name in paths.items():
        try:
            manifest = store.inspect(path)[0]
        except BundleError:
            found.append(f"{name} cannot be read; run: xraygpt-lite verify {name}")
            continue
        kind = manifest.weight_types["llm"]
        size = next(entry.size for entry in manifest.files if entry.name == "llm.gguf")
        if size >= LARGE and (slow := device.slow_weights(kind, cpu)):
            found.append(f"{name} ({kind}) is {slow}")
    fastest = f"--quant auto takes {device.best_weights()} for a large one"
    return "; ".join(found) or f"no bundle has a slow one for {cpu}, where {fastest}"
