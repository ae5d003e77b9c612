"""`bundle.json`: bytes to a checked `Manifest` and back, and the bundle's id.

It opens no file and knows nothing of the other files but what the manifest says of them. Whether the manifest tells the
truth about them is for `store`, `vision` and `verify` to find out.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

from xraygpt_lite.bundle import typed_json
from xraygpt_lite.errors import BundleError
from xraygpt_lite.values import OPTION_RANGES, GenerationOptions, Manifest, PromptSpec, Sampling

SCHEMA = 3
FILE_NAME = "bundle.json"
REQUIRED_FILES = ("vision.onnx", "projector.onnx", "llm.gguf")
MAX_BYTES = 4 << 20


def _tasks_and_beams(raw: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 → 2: no tasks, no boxes, no replaced words, no warnings, one beam."""
    new = {"tasks": {}, "box_grid": 0, "replaced": {}}
    presets = {name: {**_object(preset), "beams": None} for name, preset in _object(raw.get("presets")).items()}
    return {
        **raw,
        "prompt": {**new, **_object(raw.get("prompt"))},
        "defaults": {"beams": 1, **_object(raw.get("defaults"))},
        "presets": presets,
        "warnings": [],
    }


def _object(value: Any) -> dict[str, Any]:
    """`value`, which an upgrade reads before it is checked."""
    if not isinstance(value, dict):
        raise BundleError(f"{FILE_NAME}: prompt, defaults and presets must be JSON objects")
    return value


def _phrases(raw: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 → 3: no phrases."""
    return {**raw, "prompt": {"phrases": [], **_object(raw.get("prompt"))}}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _tasks_and_beams, 2: _phrases}
"""Schema n → the step that turns a manifest of schema n, as decoded JSON, into one of schema n + 1."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_FLAT_FILE = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
_DEVICE_NAMES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)  # reserved on Windows
_Problem = tuple[str, str]  # JSON path, what is wrong with it


def parse(data: bytes) -> Manifest:
    """Read and check a manifest; one of an older schema is upgraded first.

    Parameters
    ----------
    data
        The bytes of `bundle.json`.

    Raises
    ------
    BundleError
        Naming the JSON path of the first thing that is wrong.
    """
    raw = _upgrade(_decode(data))
    manifest = cast(Manifest, typed_json.build(Manifest, raw, f"{FILE_NAME}:"))
    for where, problem in _problems(manifest):
        raise BundleError(f"{FILE_NAME}: {where} {problem}")
    return manifest


def dump(manifest: Manifest) -> bytes:
    """Canonical bytes of a manifest: sorted keys, fixed separators, UTF-8, a newline; `parse` gives it back.

    Raises
    ------
    BundleError
        When `parse` would refuse them.
    """
    data = typed_json.encode(manifest)
    parse(data)
    return data


def bundle_id(data: bytes) -> str:
    """sha256 of the canonical form of `bundle.json`, as it stands and before any upgrade.

    White space and the order of keys do not matter, and a newer version of this package gives the same id.
    """
    return hashlib.sha256(typed_json.encode(_decode(data))).hexdigest()


def is_bundle_name(name: str) -> bool:
    """Whether a bundle may be called so: it is also its folder's name."""
    return _NAME.fullmatch(name) is not None and not _DEVICE_NAMES.fullmatch(name)


def _decode(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise BundleError(f"{FILE_NAME} has {len(data)} bytes; at most {MAX_BYTES} are read")
    raw = typed_json.decode(data, FILE_NAME)
    if not isinstance(raw, dict):
        raise BundleError(f"{FILE_NAME} is not a JSON object")
    return raw


def _upgrade(raw: dict[str, Any]) -> dict[str, Any]:
    version = raw.get("schema")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{FILE_NAME}: schema is not a positive integer; this is not a bundle of xraygpt-lite")
    if version > SCHEMA:
        raise BundleError(
            f"{FILE_NAME} has a newer schema than this version of xraygpt-lite reads (up to {SCHEMA}); "
            "upgrade xraygpt-lite, or convert the model again with this version"
        )
    for step in range(version, SCHEMA):
        if step not in UPGRADES:
            raise BundleError(f"{FILE_NAME} has schema {version}, which is no longer read; convert the model again")
        raw = {**UPGRADES[step](raw), "schema": step + 1}
    return raw


def _problems(m: Manifest) -> Iterator[_Problem]:
    if not is_bundle_name(m.name):
        yield "name", "may hold a-z, 0-9, '.', '_' and '-' only, 64 at most, and begins and ends with a letter or digit"
    if not m.family:
        yield "family", "is empty"
    for name, value, top in (("image.size", m.image.size, 4096), ("image_tokens", m.image_tokens, 65536),
                             ("width", m.width, 65536)):  # fmt: skip
        if not 1 <= value <= top:
            yield name, f"is {value}; expected 1 to {top}"
    if min(m.image.std) <= 0:
        yield "image.std", "holds a value that is not positive"
    if set(m.weight_types) != {"vision", "projector", "llm"}:
        yield "weight_types", "must name vision, projector and llm, and nothing else"
    for i, source in enumerate(m.sources):
        if not _SHA256.fullmatch(source.sha256):
            yield f"sources[{i}].sha256", "is not 64 lower-case hexadecimal digits"
        if re.search(r"[/\\\x00-\x1f]", source.name) or not source.name:
            yield f"sources[{i}].name", "is not a base name"
    yield from _file_problems(m)
    yield from _prompt_problems(m.prompt)
    yield from _option_problems("defaults", m.defaults)
    for name, preset in m.presets.items():
        yield from _option_problems(f"presets.{name}", preset)
    yield from _self_test_problems(m)


def _file_problems(m: Manifest) -> Iterator[_Problem]:
    seen = {FILE_NAME}
    for i, entry in enumerate(m.files):
        if not _FLAT_FILE.fullmatch(entry.name) or _DEVICE_NAMES.fullmatch(entry.name):
            yield f"files[{i}].name", "is not a flat file name of letters, digits, '.', '_' and '-'"
        if entry.name.lower() in seen:
            yield f"files[{i}].name", f"{entry.name} is listed twice, or is the manifest itself"
        seen.add(entry.name.lower())
        if not _SHA256.fullmatch(entry.sha256):
            yield f"files[{i}].sha256", "is not 64 lower-case hexadecimal digits"
        if entry.size < 1:
            yield f"files[{i}].size", f"is {entry.size}; expected at least 1 byte"
    names = {entry.name for entry in m.files}
    if "projector.onnx" not in names:
        yield "files", "lacks projector.onnx: without the projector the language model would never see the image"
    for name in REQUIRED_FILES:
        if name not in names:
            yield "files", f"lacks {name}"


def _prompt_problems(p: PromptSpec) -> Iterator[_Problem]:
    if p.default_variant not in p.variants:
        yield "prompt.default_variant", "is not among prompt.variants"
    for name, variant in p.variants.items():
        for part in ("after", "next_turn"):
            if getattr(variant, part).count("{question}") != 1:
                yield f"prompt.variants.{name}.{part}", "must hold {question} once"
        for part in ("before_ids", "next_turn_ids"):
            if any(i < 0 for i in getattr(variant, part)):
                yield f"prompt.variants.{name}.{part}", "holds a negative id"
    if any(i < 0 for i in p.stop_ids):
        yield "prompt.stop_ids", "holds a negative id"
    for part in ("stops", "refused"):
        if "" in getattr(p, part):
            yield f"prompt.{part}", "holds an empty string, which every text contains"
    if not p.default_question.strip():
        yield "prompt.default_question", "is empty"
    for name, task in p.tasks.items():
        if not name or task.template.count("{question}") != 1 or task.template.count("{box}") > bool(p.box_grid):
            yield (
                f"prompt.tasks.{name}.template",
                "must hold {question} once, and {box} at most once and with a box_grid",
            )
    if not 0 <= p.box_grid <= 10_000:
        yield "prompt.box_grid", f"is {p.box_grid}; expected 0 to 10000"
    if "" in p.phrases:
        yield "prompt.phrases", "holds an empty string, from which nothing can be guessed"
    if "" in p.replaced:
        yield "prompt.replaced", "holds an empty string, which every text contains"
    if len({f.name for f in p.findings}) != len(p.findings):
        yield "prompt.findings", "names a finding twice"
    for i, finding in enumerate(p.findings):
        if not (finding.name and finding.question and finding.yes and finding.no) or finding.yes == finding.no:
            yield f"prompt.findings[{i}]", "needs a name, a question and two different answers"


def _option_problems(where: str, options: Sampling | GenerationOptions) -> Iterator[_Problem]:
    for name, (low, high) in OPTION_RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            yield f"{where}.{name}", f"is {value}; expected {low} to {high}"
    if (options.min_tokens or 0) > (options.max_tokens or math.inf):
        yield f"{where}.min_tokens", f"is {options.min_tokens}, more than max_tokens, {options.max_tokens}"
    if "" in (options.stops or ()):
        yield f"{where}.stops", "holds an empty string, which every text contains"


def _self_test_problems(m: Manifest) -> Iterator[_Problem]:
    t = m.self_test
    if not t.positions or len(t.positions) != len(t.embeddings):
        yield "self_test.positions", f"has {len(t.positions)} items for {len(t.embeddings)} embeddings"
    if any(not 0 <= p < m.image_tokens * m.width for p in t.positions):
        yield "self_test.positions", f"holds an index outside image_tokens x width = {m.image_tokens * m.width}"
    if not any(t.embeddings):
        yield "self_test.embeddings", "are all zero and would test nothing"
    if not 0 < t.tolerance < 1:
        yield "self_test.tolerance", f"is {t.tolerance}; expected more than 0 and less than 1"
    if not t.ids or len(t.ids) != len(t.margins):
        yield "self_test.ids", f"has {len(t.ids)} items for {len(t.margins)} margins"
    if any(i < 0 for i in t.ids):
        yield "self_test.ids", "holds a negative id"
    if not 0 < t.margin_bound < max(t.margins, default=0.0):
        yield "self_test.margin_bound", f"is {t.margin_bound}; no recorded margin exceeds it, or it is not positive"
    if not 0 <= t.seed < 2**32:
        yield "self_test.seed", f"is {t.seed}; expected 0 to {2**32 - 1}"
