"""Builds llama.cpp for this machine, once: the only place in the repository that chooses how it is compiled.

    python tools/native.py             build if needed, print the wheel's path
    python tools/native.py --install   the same, and install it where this Python lives unless it is there already

PyPI has llama-cpp-python as source only, and its default build crashes on some machines, so the flags are chosen here:

- GCC before 13.3 on x86-64 drops the stores that set up AMX tiles (GCC bug 114098), and the first long prompt ends in
  SIGILL. `-fno-tree-dse -fno-dse` keeps AMX and avoids the bug.
- On a CPU with AMX a clang of version 19 or later is taken, where it is installed with OpenMP: GCC looks up the tiles'
  thread-local memory in the innermost loop, and prompts of a 7B model are 12 % slower (docs/performance.md).
- `-DLLAVA_BUILD=OFF` leaves out the multimodal helper, which this project does not use; it takes 40 % of the time.

What the caller set comes after these and therefore wins: `CFLAGS` and `CXXFLAGS` are appended to ours, `CMAKE_ARGS` too
(of two `-D` of one name CMake takes the last), `CMAKE_BUILD_PARALLEL_LEVEL` replaces ours. A `-DCMAKE_CXX_FLAGS=…` in
`CMAKE_ARGS` makes CMake ignore `CXXFLAGS` altogether, ours included.

pip caches a wheel under the package's address and knows nothing of flags, so each build is kept in a folder named after
all that shapes it: version, flags, compiler, Python, platform, and what `-march=native` means to this compiler on this
CPU. Only the standard library is needed: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ROOT / "build" / "native"
CONSTRAINTS = ROOT / "constraints.txt"
DSE_FLAGS = ("-fno-tree-dse", "-fno-dse")
CLANG = 19  # the oldest that was tried
CMAKE_DEFAULTS = ("-DLLAVA_BUILD=OFF",)
KEPT_IN = "xraygpt-lite-native.txt"  # in the environment: the name of the build that is installed there


class BuildError(Exception):
    """The native library cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Compiler:
    """What CMake will compile C++ with, as far as its predefined macros tell.

    Attributes
    ----------
    family
        "gcc", "clang", or "unknown" where the compiler cannot be asked (MSVC is found by CMake itself).
    version
        (major, minor, patch); empty for "unknown".
    x86_64
        It compiles for x86-64.
    native
        Fingerprint of the macros under `-march=native`: the instruction sets that a native build will use.
    """

    family: str
    version: tuple[int, ...]
    x86_64: bool
    native: str

    @property
    def drops_amx_setup(self) -> bool:
        """GCC bug 114098, mended in 13.3 and 14."""
        return self.family == "gcc" and self.x86_64 and self.version < (13, 3)


@dataclass(frozen=True)
class Plan:
    """One build: the requirement, the environment that shapes it, and the folder's name that follows from all of it."""

    requirement: str
    environment: Mapping[str, str]
    name: str


def defined_macros(command: Sequence[str], *flags: str) -> dict[str, str] | None:
    """The compiler's predefined macros under `flags`, or None if it cannot be asked."""
    try:
        answer = subprocess.run(
            [*command, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(re.findall(r"^#define (\S+) (.*)$", answer.stdout, flags=re.MULTILINE))


def compiler_command(environment: Mapping[str, str]) -> list[str] | None:
    """The C++ compiler in CMake's order: named in CMAKE_ARGS, named in CXX, then the first on the PATH."""
    named = re.findall(r"-DCMAKE_CXX_COMPILER(?::\w+)?=(\S+)", environment.get("CMAKE_ARGS", ""))
    if named:
        return [named[-1]]
    if environment.get("CXX"):
        return shlex.split(environment["CXX"])
    found = next(
        (path for name in ("c++", "g++", "clang++") if (path := shutil.which(name, path=environment.get("PATH")))), None
    )
    return [found] if found else None


def clang_for_amx(environment: Mapping[str, str]) -> dict[str, str]:
    """CC and CXX of a clang to be taken in place of GCC; empty where the caller named a compiler, or none fits."""
    if environment.get("CC") or environment.get("CXX") or "_COMPILER" in environment.get("CMAKE_ARGS", ""):
        return {}
    command = compiler_command(environment)
    macros = defined_macros(command, "-march=native") if command else None
    if not macros or "__clang__" in macros or "__AMX_INT8__" not in macros:
        return {}
    folders = [Path(folder) for folder in environment.get("PATH", "").split(os.pathsep) if folder]
    names = ("clang++", "clang++-[1-9][0-9]")
    for path in (path for name in names for folder in folders for path in sorted(folder.glob(name), reverse=True)):
        major = (defined_macros([str(path)]) or {}).get("__clang_major__", "0")
        if int(major) >= CLANG and compiles_openmp(path):
            return {"CC": str(path.with_name(path.name.replace("++", ""))), "CXX": str(path)}
    return {}


def compiles_openmp(compiler: Path) -> bool:
    """Whether programs can be compiled and linked with OpenMP, which is a package of its own beside clang."""
    program = b"#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    command = [str(compiler), "-fopenmp", "-x", "c++", "-", "-o", os.devnull]
    try:
        return subprocess.run(command, input=program, capture_output=True).returncode == 0
    except OSError:
        return False


def find_compiler(environment: Mapping[str, str]) -> Compiler:
    """Ask the C++ compiler what it is.

    Raises
    ------
    BuildError
        No compiler answers, on a system where CMake would not find one by itself either.
    """
    command = compiler_command(environment)
    macros = defined_macros(command) if command else None
    if command is None or macros is None:
        if os.name == "nt":
            return Compiler("unknown", (), False, digest(platform.processor()))
        looked_for = shlex.join(command) if command else "c++, g++, clang++"
        raise BuildError(
            f"no working C++ compiler was found (looked for {looked_for}), and "
            "llama.cpp is compiled on installation: install one (Debian, Ubuntu: apt install g++; Fedora: dnf "
            "install gcc-c++; macOS: xcode-select --install) or name one in CXX."
        )
    family, names = "gcc", ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__")
    if "__clang__" in macros:
        family, names = "clang", ("__clang_major__", "__clang_minor__", "__clang_patchlevel__")
    version = tuple(int(macros.get(name, "0")) for name in names)
    native = defined_macros(command, "-march=native") or defined_macros(command, "-mcpu=native")
    shape = json.dumps(sorted(native.items())) if native else platform.processor()
    return Compiler(family, version, "__x86_64__" in macros, digest(shape))


def digest(text: str) -> str:
    """Ten hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def pinned_version(constraints: str) -> str:
    """The version of llama-cpp-python in the text of the constraints file."""
    found = re.search(r"^llama-cpp-python==(\S+)", constraints, flags=re.MULTILINE)
    if not found:
        raise BuildError(f"{CONSTRAINTS} has no line llama-cpp-python==VERSION: restore it")
    return found[1]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_plan(version: str, compiler: Compiler, caller: Mapping[str, str]) -> Plan:
    """Decide the flags and the name of the build, given the caller's environment."""
    ours = DSE_FLAGS if compiler.drops_amx_setup else ()
    shaping = {
        "CFLAGS": " ".join((*ours, *caller.get("CFLAGS", "").split())),
        "CXXFLAGS": " ".join((*ours, *caller.get("CXXFLAGS", "").split())),
        "CMAKE_ARGS": " ".join((*CMAKE_DEFAULTS, *caller.get("CMAKE_ARGS", "").split())),
    }
    native = re.findall(r"-DGGML_NATIVE(?::\w+)?=(\w+)", shaping["CMAKE_ARGS"])[-1:]
    cpu = "baseline" if native and native[0].upper() in ("OFF", "0", "NO", "FALSE") else compiler.native
    tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    shown = f"{compiler.family}{'.'.join(map(str, compiler.version))}"
    named = {name: caller.get(name, "") for name in ("CC", "CXX")}
    key = digest(json.dumps([version, shaping, named, asdict(compiler) | {"native": cpu}, tag], sort_keys=True))
    shaping["CMAKE_BUILD_PARALLEL_LEVEL"] = caller.get("CMAKE_BUILD_PARALLEL_LEVEL", str(cores()))
    shaping |= {name: path for name, path in named.items() if path}
    return Plan(f"llama-cpp-python=={version}", shaping, f"{version}-{tag}-{shown}-{key}")


def wheel_in(folder: Path) -> Path | None:
    """The wheel of a finished build."""
    return next(iter(sorted(folder.glob("llama_cpp_python-*.whl"))), None)


def build(plan: Plan, builds: Path = BUILDS) -> Path:
    """The wheel of `plan`, compiled unless it is there; an interrupted build leaves no folder of that name.

    Raises
    ------
    BuildError
        pip failed; what it said went to stderr.
    """
    target = builds / plan.name
    if (wheel := wheel_in(target)) is not None:
        return wheel
    say(f"Compiling {plan.requirement} for this machine, once (about 4 minutes on two cores) …")
    for name, value in plan.environment.items():
        say(f"  {name}={value}")
    builds.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=builds) as scratch:
        done = Path(scratch) / "done"
        command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-cache-dir", "--no-deps", "-w", str(done)]
        outcome = subprocess.run([*command, plan.requirement], env={**os.environ, **plan.environment})
        if outcome.returncode != 0 or wheel_in(done) is None:
            raise BuildError(
                f"llama.cpp could not be compiled (pip ended with {outcome.returncode}, its words are above); "
                "docs/install.md lists what a build needs."
            )
        seconds = time.monotonic() - started
        record = {"requirement": plan.requirement, **plan.environment, "seconds": round(seconds, 1)}
        (done / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if wheel_in(target) is None:  # another process may have finished the same build meanwhile
            shutil.rmtree(target, ignore_errors=True)
            done.replace(target)
    say(f"Compiled in {seconds:.0f} s; kept in {target}")
    finished = wheel_in(target)
    if finished is None:
        raise BuildError(f"{target} lost its wheel while it was being written: run this again")
    return finished


def install(wheel: Path, name: str) -> None:
    """Put `wheel` where this Python lives, unless the build `name` is there already. Its dependencies come with ours.

    Raises
    ------
    BuildError
        This is no virtual environment, or pip failed.
    """
    if sys.prefix == sys.base_prefix:
        raise BuildError(f"{sys.executable} is not in a virtual environment: install {wheel} with your own pip instead")
    note = Path(sys.prefix) / KEPT_IN
    if note.exists() and note.read_text(encoding="utf-8").strip() == name:
        return
    note.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--force-reinstall", str(wheel)]
    if subprocess.run(command).returncode != 0:
        raise BuildError(f"pip could not install {wheel}; its words are above")
    note.write_text(name + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Progress goes to stderr; stdout has the wheel's path alone."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build llama.cpp for this machine, once, and print the wheel's path.")
    parser.add_argument("--install", action="store_true", help="also install it where this Python lives")
    chosen = parser.parse_args(arguments)
    try:
        version = pinned_version(CONSTRAINTS.read_text(encoding="utf-8"))
        environment = {**os.environ, **clang_for_amx(os.environ)}
        plan = make_plan(version, find_compiler(environment), environment)
        wheel = build(plan)
        if chosen.install:
            install(wheel, plan.name)
        else:
            print(wheel)
    except BuildError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
