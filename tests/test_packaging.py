"""What is installed, with which versions, and how llama.cpp is compiled: checked without building anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import xraygpt_lite

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "xraygpt_lite": "xraygpt_lite",
    **{f"xraygpt_lite.{folder}": folder for folder in ("converters", "examples", "models")},
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def tool(name: str) -> ModuleType:
    """A script of tools/, imported."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return tool("native")


@pytest.fixture(scope="module")
def check_wheel() -> ModuleType:
    return tool("check_wheel")


class TestPyproject:
    def test_every_folder_with_code_is_packaged(self, project: dict[str, Any]) -> None:
        found = set()
        for package, folder in SOURCES.items():
            for file in (ROOT / folder).rglob("*.py"):
                inside = file.parent.relative_to(ROOT / folder).parts
                if all(part.isidentifier() for part in inside):
                    found.add(".".join((package, *inside)))
        assert found == set(project["tool"]["setuptools"]["packages"])

    def test_only_one_top_level_package(self, project: dict[str, Any]) -> None:
        setuptools = project["tool"]["setuptools"]
        assert setuptools["package-dir"] == SOURCES
        assert {name.split(".")[0] for name in setuptools["packages"]} == {"xraygpt_lite"}

    def test_data_files_match_their_patterns_and_training_is_left_out(self, project: dict[str, Any]) -> None:
        patterns = project["tool"]["setuptools"]["package-data"]["xraygpt_lite.models"]
        data = {file for pattern in patterns for file in (ROOT / "models").glob(pattern) if file.is_file()}
        assert ROOT / "models" / "xraygpt-paper" / "template.json" in data
        assert not [file for file in data if "train" in file.relative_to(ROOT).parts]
        assert (ROOT / "xraygpt_lite" / "py.typed").exists()

    def test_version_is_the_same_everywhere(self, project: dict[str, Any]) -> None:
        assert project["project"]["version"] == xraygpt_lite.__version__

    def test_licence_is_apache(self, project: dict[str, Any]) -> None:
        assert project["project"]["license"] == "Apache-2.0"
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        assert "Apache License" in text
        assert "Version 2.0, January 2004" in text

    def test_no_gpl_decoder_and_no_torch_in_the_base(self, project: dict[str, Any]) -> None:
        names = {canonicalize_name(Requirement(line).name) for line in project["project"]["dependencies"]}
        assert not names & {"pylibjpeg-libjpeg", "torch", "torchvision", "onnxruntime", "onnxruntime-gpu"}
        assert {"pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "python-gdcm"} <= names

    def test_markers_are_the_documented_ones(self, project: dict[str, Any]) -> None:
        markers = [line.split(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]]
        assert markers == ["gpu", "slow", "browser"]


class TestConstraints:
    def test_pins_satisfy_the_ranges(self, project: dict[str, Any], pins: dict[str, str]) -> None:
        extras = project["project"]["optional-dependencies"]
        lines = [*project["project"]["dependencies"], *extras["cpu"], *extras["convert"], *extras["dev"]]
        for requirement in map(Requirement, lines):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)

    def test_pins_are_exact_canonical_and_without_local_versions(self, pins: dict[str, str]) -> None:
        assert pins["torch"] == "2.13.0"
        assert [name for name in pins if name != canonicalize_name(name)] == []
        assert [version for version in pins.values() if not re.fullmatch(r"\d+(\.\d+)*", version)] == []

    def test_everything_that_comes_in_is_pinned(self, project: dict[str, Any], pins: dict[str, str]) -> None:
        extras = project["project"]["optional-dependencies"]
        waiting = [*project["project"]["dependencies"], *extras["cpu"], *extras["convert"], *extras["dev"]]
        seen: set[tuple[str, frozenset[str]]] = set()
        missing: set[str] = set()
        while waiting:
            requirement = Requirement(waiting.pop())
            name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                further = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # not installed here, as an extra or a marker of another platform may leave it
            if name not in pins:
                missing.add(name)
            for line in further:
                marker = Requirement(line).marker
                if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                    waiting.append(line)
        assert not missing

    def test_the_runtimes_that_exclude_each_other_are_not_both_pinned(self, pins: dict[str, str]) -> None:
        assert "onnxruntime-gpu" not in pins


def gcc(native: ModuleType, *version: int, x86_64: bool = True, cpu: str = "cpu-a") -> Any:
    return native.Compiler("gcc", version, x86_64, cpu)


class TestNativeFlags:
    @pytest.mark.parametrize(
        ("family", "version", "x86_64", "avoided"),
        [
            ("gcc", (12, 2, 0), True, True),
            ("gcc", (13, 2, 9), True, True),
            ("gcc", (13, 3, 0), True, False),
            ("gcc", (14, 1, 0), True, False),
            ("gcc", (12, 2, 0), False, False),
            ("clang", (12, 0, 0), True, False),
            ("unknown", (), False, False),
        ],
    )
    def test_the_bug_is_avoided_where_it_is(
        self, native: ModuleType, family: str, version: tuple[int, ...], x86_64: bool, avoided: bool
    ) -> None:
        plan = native.make_plan("0.3.36", native.Compiler(family, version, x86_64, "cpu"), {})
        for name in ("CFLAGS", "CXXFLAGS"):
            assert plan.environment[name] == ("-fno-tree-dse -fno-dse" if avoided else "")
        assert plan.environment["CMAKE_ARGS"] == "-DLLAVA_BUILD=OFF"

    def test_the_caller_has_the_last_word(self, native: ModuleType) -> None:
        caller = {
            "CXXFLAGS": "-O2 -ftree-dse",
            "CMAKE_ARGS": "-DGGML_CUDA=on -DLLAVA_BUILD=ON",
            "CMAKE_BUILD_PARALLEL_LEVEL": "3",
        }
        environment = native.make_plan("0.3.36", gcc(native, 12, 2), caller).environment
        assert environment["CXXFLAGS"] == "-fno-tree-dse -fno-dse -O2 -ftree-dse"
        assert environment["CMAKE_ARGS"] == "-DLLAVA_BUILD=OFF -DGGML_CUDA=on -DLLAVA_BUILD=ON"
        assert environment["CMAKE_BUILD_PARALLEL_LEVEL"] == "3"

    def test_all_cores_are_used(self, native: ModuleType) -> None:
        plan = native.make_plan("0.3.36", gcc(native, 12, 2), {})
        assert int(plan.environment["CMAKE_BUILD_PARALLEL_LEVEL"]) == native.cores() >= 1

    def test_the_name_follows_from_what_shapes_the_build(self, native: ModuleType) -> None:
        def name(version: str = "0.3.36", cpu: str = "cpu-a", **caller: str) -> str:
            return str(native.make_plan(version, gcc(native, 12, 2, cpu=cpu), caller).name)

        shaped = [
            name(),
            name(version="0.3.37"),
            name(cpu="cpu-b"),
            name(CXXFLAGS="-O2"),
            name(CMAKE_ARGS="-DGGML_CUDA=on"),
            name(CC="clang"),
            str(native.make_plan("0.3.36", gcc(native, 14, 1), {}).name),
        ]
        assert len(set(shaped)) == len(shaped)
        assert name() == name(CMAKE_BUILD_PARALLEL_LEVEL="7", HOME="/elsewhere")
        assert re.fullmatch(r"[\w.-]+", name())

    def test_a_baseline_build_does_not_depend_on_the_cpu(self, native: ModuleType) -> None:
        def name(cpu: str, arguments: str) -> str:
            return str(native.make_plan("0.3.36", gcc(native, 12, 2, cpu=cpu), {"CMAKE_ARGS": arguments}).name)

        assert name("cpu-a", "-DGGML_NATIVE=OFF") == name("cpu-b", "-DGGML_NATIVE=OFF")
        assert name("cpu-a", "-DGGML_NATIVE=OFF -DGGML_NATIVE:BOOL=ON") != name(
            "cpu-b", "-DGGML_NATIVE=OFF -DGGML_NATIVE:BOOL=ON"
        )


class TestNativeCompiler:
    @pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler on the PATH")
    def test_this_machine_s_compiler_is_recognised(self, native: ModuleType) -> None:
        found = native.find_compiler({})
        said = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
        assert found.family == ("clang" if "clang" in said else "gcc")
        assert ".".join(map(str, found.version)) in said
        assert re.fullmatch(r"[0-9a-f]{10}", found.native)

    @pytest.mark.skipif(sys.platform == "win32", reason="on Windows CMake finds the compiler by itself")
    def test_without_a_compiler_it_says_what_to_install(
        self, native: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(native.BuildError, match=r"no working C\+\+ compiler .* apt install g\+\+"):
            native.find_compiler({})
        with pytest.raises(native.BuildError, match="looked for no-such-compiler"):
            native.find_compiler({"CXX": "no-such-compiler"})

    def test_a_compiler_named_for_cmake_comes_first(self, native: ModuleType) -> None:
        named = {"CXX": "clang++ -m64", "CMAKE_ARGS": "-DCMAKE_CXX_COMPILER=/opt/bin/g++"}
        assert native.compiler_command(named) == ["/opt/bin/g++"]
        assert native.compiler_command({"CXX": "clang++ -m64"}) == ["clang++", "-m64"]

    def test_the_pin_comes_from_the_constraints(self, native: ModuleType, pins: dict[str, str]) -> None:
        assert native.pinned_version((ROOT / "constraints.txt").read_text()) == pins["llama-cpp-python"]
        with pytest.raises(native.BuildError, match="restore it"):
            native.pinned_version("numpy==2.4.6\n")


class FakePip:
    """Stands for `pip wheel`: writes what the real one would, or ends as told."""

    def __init__(self, end: int | BaseException = 0) -> None:
        self.end = end
        self.calls: list[list[str]] = []
        self.environment: Mapping[str, str] = {}

    def __call__(self, command: list[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        self.environment = env or {}
        if "wheel" in command:
            folder = Path(command[command.index("-w") + 1])
            folder.mkdir()
            (folder / "llama_cpp_python-0.3.36-py3-none-any.whl").write_bytes(b"half" if self.end else b"whole")
        if isinstance(self.end, BaseException):
            raise self.end
        return subprocess.CompletedProcess(command, self.end)


class TestNativeBuild:
    @pytest.fixture
    def plan(self, native: ModuleType) -> Any:
        return native.make_plan("0.3.36", gcc(native, 12, 2), {})

    def test_builds_once(self, native: ModuleType, plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pip = FakePip()
        monkeypatch.setattr(native.subprocess, "run", pip)
        first = native.build(plan, tmp_path)
        assert native.build(plan, tmp_path) == first
        assert len(pip.calls) == 1
        assert first.parent == tmp_path / plan.name
        assert pip.environment["CXXFLAGS"] == "-fno-tree-dse -fno-dse"
        assert {"--no-cache-dir", "--no-deps", "llama-cpp-python==0.3.36"} <= set(pip.calls[0])
        assert sorted(path.name for path in first.parent.iterdir()) == ["build.json", first.name]

    @pytest.mark.parametrize("end", [1, KeyboardInterrupt()])
    def test_an_unfinished_build_leaves_nothing(
        self, native: ModuleType, plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int | BaseException
    ) -> None:
        monkeypatch.setattr(native.subprocess, "run", FakePip(end))
        with pytest.raises((native.BuildError, KeyboardInterrupt)):
            native.build(plan, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_installs_once_a_build(self, native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pip = FakePip()
        monkeypatch.setattr(native.subprocess, "run", pip)
        monkeypatch.setattr(native.sys, "prefix", str(tmp_path))
        for name in ("one", "one", "two"):
            native.install(Path("llama.whl"), name)
        assert len(pip.calls) == 2
        assert "--force-reinstall" in pip.calls[0]

    def test_a_failed_installation_is_tried_again(
        self, native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(native.sys, "prefix", str(tmp_path))
        monkeypatch.setattr(native.subprocess, "run", FakePip(1))
        with pytest.raises(native.BuildError, match="could not install"):
            native.install(Path("llama.whl"), "one")
        assert list(tmp_path.iterdir()) == []

    def test_only_virtual_environments_are_written_to(
        self, native: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(native.sys, "prefix", native.sys.base_prefix)
        with pytest.raises(native.BuildError, match="not in a virtual environment"):
            native.install(Path("llama.whl"), "one")


class TestWheelCheck:
    INFO = "xraygpt_lite-0.1.0.dist-info"

    @pytest.fixture
    def tree(self, tmp_path: Path, check_wheel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """A small checkout, and the files of the wheel that would be right for it."""
        bundle = tmp_path / "models" / "tiny" / "bundle"
        bundle.mkdir(parents=True)
        (bundle / "llm.gguf").write_bytes(b"weights")
        monkeypatch.setattr(check_wheel, "ROOT", tmp_path)
        inside = ("py.typed", "converters/__init__.py", "models/__init__.py", "models/tiny/bundle/llm.gguf")
        metadata = "Metadata-Version: 2.4\nName: xraygpt-lite\nLicense-Expression: Apache-2.0\nLicense-File: LICENSE\n"
        return {
            **{f"xraygpt_lite/{name}": "" for name in inside},
            f"{self.INFO}/METADATA": metadata,
            f"{self.INFO}/licenses/LICENSE": "Apache License",
        }

    def check(self, check_wheel: ModuleType, folder: Path, files: dict[str, str]) -> None:
        wheel = folder / "xraygpt_lite-0.1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        check_wheel.check_contents(wheel)

    def test_a_right_wheel_passes(self, check_wheel: ModuleType, tmp_path: Path, tree: dict[str, str]) -> None:
        self.check(check_wheel, tmp_path, tree)

    @pytest.mark.parametrize(
        ("added", "message"),
        [
            ("converters/__init__.py", "installs .*'converters'"),
            ("xraygpt_lite/tests/test_a.py", "files of the repository"),
            ("xraygpt_lite/models/tiny/train/data.py", "files of the repository"),
        ],
    )
    def test_what_does_not_belong_is_found(
        self, check_wheel: ModuleType, tmp_path: Path, tree: dict[str, str], added: str, message: str
    ) -> None:
        with pytest.raises(check_wheel.CheckError, match=message):
            self.check(check_wheel, tmp_path, {**tree, added: ""})

    @pytest.mark.parametrize(
        ("removed", "message"),
        [
            ("xraygpt_lite/models/tiny/bundle/llm.gguf", "lacks .*llm.gguf"),
            ("xraygpt_lite/py.typed", "lacks .*py.typed"),
            (f"{INFO}/licenses/LICENSE", "does not carry LICENSE"),
        ],
    )
    def test_what_is_missing_is_found(
        self, check_wheel: ModuleType, tmp_path: Path, tree: dict[str, str], removed: str, message: str
    ) -> None:
        del tree[removed]
        with pytest.raises(check_wheel.CheckError, match=message):
            self.check(check_wheel, tmp_path, tree)

    def test_another_licence_is_found(self, check_wheel: ModuleType, tmp_path: Path, tree: dict[str, str]) -> None:
        tree[f"{self.INFO}/METADATA"] = "Metadata-Version: 2.4\nLicense-Expression: MIT\nLicense-File: LICENSE\n"
        with pytest.raises(check_wheel.CheckError, match=r"License-Expression is MIT, expected Apache-2\.0"):
            self.check(check_wheel, tmp_path, tree)

    @pytest.mark.parametrize(
        ("stated", "gpl"),
        [
            ("GPL-3.0-or-later", True),
            ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", True),
            ("AGPL-3.0-only", True),
            ("License :: OSI Approved :: GNU Affero General Public License v3", True),
            ("LGPL-2.1-or-later", False),
            ("License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", False),
            ("MIT | License :: OSI Approved :: MIT License", False),
        ],
    )
    def test_the_gpl_is_recognised(self, check_wheel: ModuleType, stated: str, gpl: bool) -> None:
        assert check_wheel.is_gpl(stated) is gpl

    def test_nothing_leads_back_to_the_checkout(
        self, check_wheel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("XRAYGPT_LITE_BUNDLE", "mine")
        environment = check_wheel.clean_environment(tmp_path)
        assert "PYTHONPATH" not in environment
        assert "XRAYGPT_LITE_BUNDLE" not in environment
        assert environment["XRAYGPT_LITE_CACHE"].startswith(str(tmp_path))


class TestContinuousIntegration:
    def test_it_runs_every_check_and_is_executable(self) -> None:
        script = ROOT / ".ci" / "run"
        steps = re.findall(r"^step (\S+)", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert steps == ["test", "lint", "types", "wheel-check"]
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(steps) <= set(targets)
        assert script.stat().st_mode & 0o111


class TestDocumentation:
    """What users copy from the pages into a shell."""

    PAGES = ("README.md", "docs/install.md")

    @pytest.mark.parametrize("page", PAGES)
    def test_requirements_can_be_installed_as_written(self, page: str, project: dict[str, Any]) -> None:
        extras = set(project["project"]["optional-dependencies"])
        text = (ROOT / page).read_text(encoding="utf-8")
        for written in re.findall(r'"(xraygpt-lite\b[^"]*|\.\[[^"]*|onnxruntime[^"]*)"', text):
            requirement = Requirement(written.replace(".[", "xraygpt-lite[", 1) if written[0] == "." else written)
            assert requirement.extras <= extras, written

    @pytest.mark.parametrize("page", [*PAGES, "xraygpt_lite/llm/library.py"])
    def test_pins_are_the_tested_ones(self, page: str, pins: dict[str, str]) -> None:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, version in re.findall(r"\b(torch|llama-cpp-python|onnxruntime)==([\d.]*\d)", text):
            assert version == pins[name], f"{page}: {name}=={version}"

    @pytest.mark.parametrize("page", PAGES)
    def test_links_lead_somewhere(self, page: str) -> None:
        text = (ROOT / page).read_text(encoding="utf-8")
        folder = (ROOT / page).parent
        links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        assert [link for link in links if link and not (folder / link).exists()] == []

    def test_anchors_exist(self) -> None:
        text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
