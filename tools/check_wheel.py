"""Proves that the wheel works where the checkout is not: builds it, installs it in an empty environment, uses it there.

Knows the installed program by its command line alone. llama.cpp comes from the build that `tools/native.py` keeps.
Only the standard library and the `build` package are needed.
"""

from __future__ import annotations

import email
import email.message
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel-check"
EXAMPLE = ROOT / "examples" / "synthetic-cr-monochrome1.dcm"
PACKAGE = "xraygpt_lite"
REPOSITORY_ONLY = {"tests", "tools", "benchmarks", "docs", "train"}

# Run by the empty environment's own Python: what is installed there, and under which licence.
INVENTORY = """
import importlib.metadata, json
print(json.dumps([
    {
        "name": found.metadata["Name"],
        "licence": [
            found.metadata.get("License-Expression") or "",
            (found.metadata.get("License") or "").split("\\n")[0],
            *(line for line in found.metadata.get_all("Classifier") or () if line.startswith("License")),
        ],
    }
    for found in importlib.metadata.distributions()
]))
"""


class CheckError(Exception):
    """The wheel is not what it should be; the message says in what."""


def expect(condition: bool, message: str) -> None:
    """Raise CheckError with `message` unless `condition` holds."""
    if not condition:
        raise CheckError(message)


def run(command: Sequence[str | Path], *, cwd: Path, environment: Mapping[str, str]) -> str:
    """What the command wrote to stdout; CheckError with both streams if it fails."""
    outcome = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    expect(
        outcome.returncode == 0,
        f"{' '.join(map(str, command))} ended with {outcome.returncode}:\n{outcome.stdout}{outcome.stderr}",
    )
    return outcome.stdout


def clean_environment(scratch: Path) -> dict[str, str]:
    """The caller's environment without anything that would lead back to the checkout, and with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XRAYGPT_LITE_"))}
    kept.pop("VIRTUAL_ENV", None)
    return kept | {"XRAYGPT_LITE_CACHE": str(scratch / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def check_contents(wheel: Path) -> None:
    """One top-level package, the bundles whole, the licence stated, nothing that belongs to the repository alone."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        described = next((name for name in names if name.endswith(".dist-info/METADATA")), None)
        expect(described is not None, f"{wheel.name} has no METADATA")
        metadata = email.message_from_bytes(archive.read(str(described)))
    info = str(described).split("/")[0]
    tops = {name.split("/")[0] for name in names}
    expect(tops == {PACKAGE, info}, f"{wheel.name} installs {sorted(tops)}, expected {PACKAGE} and {info} alone")
    strays = [name for name in names if REPOSITORY_ONLY & set(name.split("/")[:-1])]
    expect(not strays, f"{wheel.name} carries files of the repository: {strays[:5]}")
    check_licence(metadata, f"{info}/licenses/LICENSE" in names)
    shipped = [path for path in (ROOT / "models").glob("*/bundle/*") if path.is_file()]
    shipped += [path for path in (ROOT / "examples").glob("synthetic-*") if path.is_file()]
    expect(bool(shipped), "models/*/bundle/ is empty: there is no default bundle to ship")
    wanted = {f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}" for path in shipped}
    wanted |= {f"{PACKAGE}/py.typed", f"{PACKAGE}/converters/__init__.py", f"{PACKAGE}/models/__init__.py"}
    missing = sorted(wanted - set(names))
    expect(not missing, f"{wheel.name} lacks {missing}")


def check_licence(metadata: email.message.Message, has_text: bool) -> None:
    """The metadata say Apache-2.0, and the text of the licence is inside."""
    stated = metadata["License-Expression"]
    expect(stated == "Apache-2.0", f"the wheel's License-Expression is {stated}, expected Apache-2.0")
    expect(metadata.get_all("License-File") == ["LICENSE"] and has_text, "the wheel does not carry LICENSE")


def is_gpl(stated: str) -> bool:
    """The GPL or AGPL; the LGPL is another licence."""
    return re.search(r"(?<!L)GPL|(?<!Lesser )General Public License|Affero", stated) is not None


def check_installed(python: Path, cwd: Path, environment: Mapping[str, str]) -> int:
    """No installed package is under the GPL or AGPL; returns how many were looked at."""
    installed = json.loads(run([python, "-c", INVENTORY], cwd=cwd, environment=environment))
    for found in installed:
        stated = " | ".join(filter(None, found["licence"]))
        expect(
            not is_gpl(stated), f"{found['name']} is under {stated}: the default install may hold nothing under the GPL"
        )
    names = {found["name"].lower().replace("_", "-") for found in installed}
    expect("pylibjpeg-libjpeg" not in names, "pylibjpeg-libjpeg (GPL-3) came in")
    expect("torch" not in names, "torch came in: the runtime never needs it")
    return len(installed)


def check_program(program: Path, cwd: Path, environment: Mapping[str, str]) -> None:
    """The commands of a first session, by absolute paths, from a folder that is not the checkout."""
    version = run([program, "--version"], cwd=cwd, environment=environment).strip()
    expect(bool(re.search(r"\d+\.\d+\.\d+", version)), f"--version printed {version!r}")
    summary = run([program, "summarize", EXAMPLE], cwd=cwd, environment=environment).strip()
    expect(len(summary.split()) >= 3, f"summarize printed {summary!r}, expected a summary")
    say(f"  {version}: {summary}")
    record = json.loads(run([program, "summarize", "--json", EXAMPLE], cwd=cwd, environment=environment))
    expect(record["schema"].startswith("xraygpt-lite/record/"), f"--json printed schema {record['schema']!r}")
    run([program, "verify"], cwd=cwd, environment=environment)


def build_wheel(environment: Mapping[str, str]) -> Path:
    """The wheel, from the checkout's files, in WORK."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would pack what an earlier build left there
    run([sys.executable, "-m", "build", "--wheel", "--outdir", WORK, ROOT], cwd=WORK, environment=environment)
    wheels = list(WORK.glob("*.whl"))
    expect(len(wheels) == 1, f"{len(wheels)} wheels were built, expected one")
    return wheels[0]


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    started = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            elsewhere = Path(scratch)
            environment = clean_environment(elsewhere)
            native = run([sys.executable, ROOT / "tools" / "native.py"], cwd=ROOT, environment=environment).strip()
            wheel = build_wheel(environment)
            check_contents(wheel)
            say(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, contents and licence as they should be")
            run([sys.executable, "-m", "venv", WORK / "venv"], cwd=elsewhere, environment=environment)
            binaries = WORK / "venv" / ("Scripts" if os.name == "nt" else "bin")
            pip: list[str | Path] = [binaries / "python", "-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt"]
            run([*pip, native, f"{wheel}[cpu]"], cwd=elsewhere, environment=environment)
            count = check_installed(binaries / "python", elsewhere, environment)
            say(f"installed in an empty environment: {count} packages, none under the GPL")
            check_program(binaries / "xraygpt-lite", elsewhere, environment)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(WORK)
    say(f"The wheel works from another folder ({time.monotonic() - started:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
