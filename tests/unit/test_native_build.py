"""Which compiler llama.cpp is built with: GCC unless the CPU has AMX and a clang with OpenMP is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_FILE = Path(__file__).resolve().parents[2] / "tools" / "native.py"
_GCC = "#define __GNUC__ 12\\n#define __x86_64__ 1\\n"
_AMX = "#define __AMX_INT8__ 1\\n"


@pytest.fixture(scope="module")
def native() -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def compiler(folder: Path, name: str, macros: str, links: bool = True) -> None:
    """A program that tells its macros as compilers do, and ends as one does that finds OpenMP or does not."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) printf "{macros}" ;; *) exit {int(not links)} ;; esac\n')
    path.chmod(0o755)


def clang(major: int) -> str:
    return f"#define __clang__ 1\\n#define __clang_major__ {major}\\n#define __x86_64__ 1\\n"


def test_clang_is_taken_on_a_cpu_with_amx(native: ModuleType, tmp_path: Path) -> None:
    compiler(tmp_path, "c++", _GCC + _AMX)
    compiler(tmp_path, "clang++-19", clang(19))
    found = native.clang_for_amx({"PATH": str(tmp_path)})
    assert found == {"CC": f"{tmp_path}/clang-19", "CXX": f"{tmp_path}/clang++-19"}
    environment = {"PATH": str(tmp_path), **found}
    plan = native.make_plan("1", native.find_compiler(environment), environment)
    assert (plan.environment["CC"], plan.environment["CXX"]) == (found["CC"], found["CXX"])
    assert plan.environment["CXXFLAGS"] == ""


def test_the_plain_name_counts_as_well(native: ModuleType, tmp_path: Path) -> None:
    compiler(tmp_path, "c++", _GCC + _AMX)
    compiler(tmp_path, "clang++", clang(20))
    assert native.clang_for_amx({"PATH": str(tmp_path)}) == {"CC": f"{tmp_path}/clang", "CXX": f"{tmp_path}/clang++"}


@pytest.mark.parametrize(
    ("default", "major", "links"),
    [(_GCC, 19, True), (_GCC + _AMX, 18, True), (_GCC + _AMX, 19, False), (clang(19) + _AMX, 19, True)],
    ids=["no AMX", "too old", "no OpenMP", "clang is the default"],
)
def test_otherwise_the_default_stays(native: ModuleType, tmp_path: Path, default: str, major: int, links: bool) -> None:
    compiler(tmp_path, "c++", default)
    compiler(tmp_path, f"clang++-{major}", clang(major), links)
    assert native.clang_for_amx({"PATH": str(tmp_path)}) == {}


@pytest.mark.parametrize("named", [{"CC": "gcc"}, {"CXX": "g++"}, {"CMAKE_ARGS": "-DCMAKE_CXX_COMPILER=g++"}])
def test_what_the_caller_names_stays(native: ModuleType, tmp_path: Path, named: dict[str, str]) -> None:
    compiler(tmp_path, "c++", _GCC + _AMX)
    compiler(tmp_path, "clang++-19", clang(19))
    assert native.clang_for_amx({"PATH": str(tmp_path), **named}) == {}


def test_gcc_keeps_the_flags_that_save_amx(native: ModuleType, tmp_path: Path) -> None:
    compiler(tmp_path, "c++", _GCC + _AMX)
    environment = {"PATH": str(tmp_path)}
    plan = native.make_plan("1", native.find_compiler(environment), environment)
    assert plan.environment["CXXFLAGS"].split() == list(native.DSE_FLAGS)
    assert "CC" not in plan.environment
