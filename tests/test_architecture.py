"""The house, held against the code's own imports: this file is where its rules are written down.

Every rule is a table below; a change of the architecture is a change of a table. Imports under TYPE_CHECKING count:
what a room knows by type, it knows.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "xraygpt_lite"

# A room is a file or a folder of the package. It may import the rooms on rows below its own, never one on its own row.
ROWS: tuple[tuple[str, ...], ...] = (
    ("__main__",),  # `python -m xraygpt_lite` is the command
    ("cli",),  # parse, call, print
    ("serve", "viewer"),
    ("converters",),  # they check what they made by running it, so they stand above what runs
    ("report", "batch", "bench", "compare", "verify", "evaluate", "doctor"),
    ("__init__",),  # the public names
    ("model",),  # the main path
    ("chat",),
    ("vision", "llm", "imaging", "prompt", "answer", "options", "scoring"),
    ("bundle", "boxes"),
    ("device", "cache", "processors"),
    ("examples", "models"),  # data: synthetic radiographs; the default bundle, templates and cards
    ("records",),
    ("values", "errors", "closing", "turns"),
)

# Narrower than the rows: what these rooms may import at all.
ONLY: dict[str, set[str]] = {
    "examples": set(),
    "models": set(),
    "values": set(),
    "errors": set(),
    "closing": set(),
    "turns": set(),
    "vision": {"values", "errors"},  # given a DevicePlan, chooses nothing
    "llm": {"cache", "values", "errors", "closing"},  # the same; the cache keeps the self-test's verdict
    "imaging": {"values", "errors"},
    "boxes": {"values", "errors"},
    "chat": {"llm", "prompt", "answer", "boxes", "options", "scoring", "values", "errors", "closing"},
    "records": {"values", "errors"},
    "report": {"values", "errors", "records"},  # renders finished records
}

# Nothing imports these but what is named, and that inside a function: their packages are optional.
LAZY_GUESTS: dict[str, set[str]] = {"converters": {"cli/convert.py"}}

# A package and the only files or folders ("…/") that may import it.
FOREIGN: dict[str, set[str]] = {
    "onnxruntime": {"vision.py"},
    "onnxruntime.quantization": {"converters/"},
    "onnxruntime.transformers": {"converters/"},  # its float16 graphs
    "llama_cpp": {"llm/"},
    "pydicom": {"imaging/dicom.py"},
    "PIL": {"imaging/", "report/overlay.py", "report/thumbnail.py"},
    "click": {"cli/"},
    "rich": {"cli/"},
    "filelock": {"batch/", "converters/"},
    "watchdog": {"batch/watch.py"},
    "platformdirs": {"device.py", "bundle/store.py"},
    "torch": {"converters/"},
    "transformers": {"converters/"},
    "optimum": {"converters/"},
    "onnx": {"converters/"},
    "gguf": {"converters/"},
    "sentencepiece": {"converters/"},
    "safetensors": {"converters/"},
    "pickle": {"converters/"},  # for the name of its error, see USES
}

# Never imported, anywhere: the program is offline.
FORBIDDEN = {
    "aiohttp",
    "asyncio",
    "dill",
    "ftplib",
    "http",
    "httpx",
    "huggingface_hub",
    "joblib",
    "requests",
    "shelve",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "telnetlib",
    "urllib",
    "urllib3",
    "webbrowser",
    "websockets",
    "xmlrpc",
}

# A call or attribute, and the only files or folders that may use it.
USES: dict[str, set[str]] = {
    "print": {"cli/"},
    "input": {"cli/"},
    "sys.stdout": {"cli/"},
    "sys.stderr": {"cli/"},
    "sys.argv": {"cli/"},
    "sys.exit": {"cli/", "__main__.py"},
    "os._exit": {"cli/"},
    "os.environ": {"cli/", "device.py"},
    "os.getenv": {"cli/", "device.py"},
    "os.putenv": {"cli/"},
    "os.chdir": set(),
    "logging.basicConfig": {"cli/"},
    "pickle.load": set(),  # pickles run what they like
    "pickle.loads": set(),
    "pickle.Unpickler": set(),
    "eval": set(),
    "exec": set(),
}

# Exceptions to USES, each with its reason.
CHILD = "a program of its own: the child process whose exit status is the verdict on a build"
MEASURED = "a program of its own: the process whose start, import, load and peak of memory are measured"
ALLOWED: dict[tuple[str, str], str] = {
    ("llm/selftest.py", "sys.argv"): CHILD,
    ("llm/selftest.py", "sys.exit"): CHILD,
    ("llm/selftest.py", "sys.stderr"): CHILD,
    ("bench/child.py", "sys.stdout"): MEASURED,
    ("bench/child.py", "sys.exit"): MEASURED,
    ("__init__.py", "os.environ"): "switches a library's reports to its maker off before anybody can import it",
    ("llm/library.py", "os.environ"): "chooses kernels of ggml, which can be told in no other way",
    ("batch/workers.py", "os.environ"): "hands the environment on to its processes, with one thread for each library",
}

# Never loaded by `import xraygpt_lite` or by `--help`.
HEAVY = (
    "onnxruntime", "llama_cpp", "torch", "transformers", "pydicom", "PIL", "gguf", "onnx", "sentencepiece", "rich",
    "watchdog", "filelock",
)  # fmt: skip

MOST_LINES = 400  # the guide is 250
LONGER: dict[str, str] = {"values.py": "a catalogue: one record after another, most of it their documentation"}


@dataclass(frozen=True)
class Module:
    """One source file: its path as it is installed ("llm/native.py"), where it lies, and its syntax tree."""

    path: str
    file: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def package(self) -> str:
        """The package that a relative import starts from."""
        return ".".join((PACKAGE, *self.path.split("/")[:-1]))


@dataclass(frozen=True)
class Import:
    """One imported dotted name, its line, and whether it happens inside a function."""

    name: str
    line: int
    lazy: bool


@cache
def modules() -> tuple[Module, ...]:
    """Every file that is installed, under its installed path."""
    places = {"": ROOT / PACKAGE, "converters/": ROOT / "converters", "examples/": ROOT / "examples",
              "models/": ROOT / "models"}  # fmt: skip
    found = []
    for prefix, folder in places.items():
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder)
            if all(part.isidentifier() for part in inside.parent.parts):  # not models/nih-tiny/train: not installed
                tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
                found.append(Module(prefix + inside.as_posix(), file, tree))
    return tuple(found)


def imports(module: Module) -> Iterator[Import]:
    """Every import of a module; `from a import b` yields "a.b", which is a module or a name in one."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = module.package.rsplit(".", child.level - 1)[0] if child.level else ""
                source = ".".join(filter(None, (start, child.module)))
                yield from (Import(f"{source}.{alias.name}", child.lineno, lazy) for alias in child.names)
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, lazy or inner)

    return walk(module.tree, False)


def names_used(module: Module) -> Iterator[tuple[str, int]]:
    """Called bare names and attributes of bare names: ("print", 12), ("os.environ", 40)."""
    renamed = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}", node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield renamed.get(node.id, node.id), node.lineno


def room_of(name: str) -> str | None:
    """The room that a dotted name lies in, None for another package; a name of the package itself is `__init__`."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    return parts[1] if len(parts) > 1 and any(parts[1] in row for row in ROWS) else "__init__"


def row_of(room: str) -> int:
    return next(number for number, row in enumerate(ROWS) if room in row)


def is_in(path: str, places: set[str]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def violations(check: Callable[[Module], Iterator[tuple[int, str]]]) -> list[str]:
    return [
        f"{module.file.relative_to(ROOT)}:{line}: {message}" for module in modules() for line, message in check(module)
    ]


def test_the_code_is_there_to_be_checked() -> None:
    assert {"cli", "model", "llm", "vision", "imaging", "bundle", "converters"} <= {found.room for found in modules()}


def test_every_room_stands_on_one_row() -> None:
    rooms = [room for row in ROWS for room in row]
    assert len(rooms) == len(set(rooms))
    homeless = sorted({module.room for module in modules()} - set(rooms))
    assert not homeless, f"say in ROWS where these stand: {homeless}"


def test_rooms_import_downward_only() -> None:
    def check(module: Module) -> Iterator[tuple[int, str]]:
        for found in imports(module):
            room = room_of(found.name)
            if room is None or room == module.room:
                continue
            if row_of(room) <= row_of(module.room):
                yield found.line, f"{module.room} may not import {room}: it does not stand below"
            elif module.room in ONLY and room not in ONLY[module.room]:
                yield found.line, f"{module.room} may import {sorted(ONLY[module.room])} only, not {room}"

    # The public names are offered from above what they name, lazily; rooms import each other, not the shop window.
    assert violations(check) == []


def test_optional_rooms_are_imported_lazily_and_by_their_door_only() -> None:
    def check(module: Module) -> Iterator[tuple[int, str]]:
        for found in imports(module):
            room = room_of(found.name)
            if room in LAZY_GUESTS and room != module.room:
                if not is_in(module.path, LAZY_GUESTS[room]):
                    yield found.line, f"only {sorted(LAZY_GUESTS[room])} may import {room}"
                elif not found.lazy:
                    yield found.line, f"import {room} inside the function that needs it"

    assert violations(check) == []


def test_each_library_has_one_door() -> None:
    def check(module: Module) -> Iterator[tuple[int, str]]:
        for found in imports(module):
            known = [name for name in FOREIGN if f"{found.name}.".startswith(f"{name}.")]
            if known and not is_in(module.path, FOREIGN[max(known, key=len)]):
                yield found.line, f"{found.name} belongs to {sorted(FOREIGN[max(known, key=len)])}"

    assert violations(check) == []


def test_nothing_reaches_the_network() -> None:
    def check(module: Module) -> Iterator[tuple[int, str]]:
        for found in imports(module):
            if found.name.split(".")[0] in FORBIDDEN:
                yield found.line, f"{found.name} may not be imported"

    assert violations(check) == []


def test_only_the_command_line_prints_exits_and_reads_the_environment_and_nobody_unpickles() -> None:
    def check(module: Module) -> Iterator[tuple[int, str]]:
        for name, line in names_used(module):
            if name in USES and not is_in(module.path, USES[name]) and (module.path, name) not in ALLOWED:
                yield line, f"{name} is allowed in {sorted(USES[name]) or 'no file'} only"

    assert violations(check) == []


def test_no_exception_to_a_rule_outlives_its_need() -> None:
    used = {(module.path, name) for module in modules() for name, _ in names_used(module)}
    assert set(ALLOWED) <= used


def test_checkpoints_are_loaded_with_weights_only() -> None:
    def check(module: Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if given.get("weights_only") != "True":
                    yield node.lineno, "torch.load needs weights_only=True"

    assert violations(check) == []


def test_modules_say_what_they_do_and_stay_short() -> None:
    def check(module: Module) -> Iterator[tuple[int, str]]:
        lines = len(module.file.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES and module.path not in LONGER:
            yield lines, f"{lines} lines: split what has become two things (at most {MOST_LINES})"
        if not ast.get_docstring(module.tree):
            yield 1, "a module opens with what it does and what it does not know"

    assert violations(check) == []


@pytest.mark.parametrize(
    "program",
    [
        "import xraygpt_lite",
        "import xraygpt_lite.cli",
        "from xraygpt_lite.cli import main; main(['--help'], standalone_mode=False)",
        "from xraygpt_lite.cli import main; main(['--version'], standalone_mode=False)",
    ],
)
def test_starting_loads_nothing_heavy(program: str) -> None:
    script = f"""
import json, sys
try:
    {program}
except SystemExit:
    pass
print()
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout.splitlines()[-1]) == []


def test_the_rules_would_notice(tmp_path: Path) -> None:
    """The reader of imports sees what it must: lazy and typed imports, renamed names, sub-modules."""
    text = '''"""Doc."""
from typing import TYPE_CHECKING
from os import environ as e
import onnxruntime.quantization
if TYPE_CHECKING:
    from xraygpt_lite.model import XrayModel
from . import sibling
from ..bundle import store
def f():
    from xraygpt_lite import converters
    return e["X"]
'''
    module = Module("llm/bad.py", tmp_path / "bad.py", ast.parse(text))
    seen = {found.name: found.lazy for found in imports(module)}
    assert seen["xraygpt_lite.model.XrayModel"] is False
    assert seen["xraygpt_lite.converters"] is True
    assert "onnxruntime.quantization" in seen
    assert "xraygpt_lite.llm.sibling" in seen
    assert "xraygpt_lite.bundle.store" in seen
    assert "os.environ" in {name for name, _ in names_used(module)}
    assert room_of("xraygpt_lite.converters") == "converters"
    assert room_of("xraygpt_lite.__version__") == "__init__"
    assert room_of("numpy.typing") is None
    assert row_of("model") < row_of("llm")
