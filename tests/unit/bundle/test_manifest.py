"""`bundle.json`: what is written is read back, and nothing else is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from xraygpt_lite.bundle import manifest
from xraygpt_lite.errors import BundleError

GOOD = tiny_bundle.plain_manifest()
RAW: dict[str, Any] = json.loads(manifest.dump(GOOD))


def test_parse_gives_back_what_dump_wrote() -> None:
    assert manifest.parse(manifest.dump(GOOD)) == GOOD


def test_dump_is_canonical() -> None:
    data = manifest.dump(GOOD)
    assert data == manifest.dump(manifest.parse(data))
    assert data.endswith(b"}\n")
    keys = list(json.loads(data))
    assert keys == sorted(keys)


def test_dump_writes_characters_as_utf8() -> None:
    data = manifest.dump(replace(GOOD, licence="Lizenz für Ärzte"))
    assert "Lizenz für Ärzte".encode() in data


def test_id_ignores_formatting_and_notices_content() -> None:
    shuffled = json.dumps(dict(reversed(RAW.items())), indent=7).encode()
    assert manifest.bundle_id(shuffled) == manifest.bundle_id(manifest.dump(GOOD))
    assert manifest.bundle_id(manifest.dump(replace(GOOD, licence="MIT"))) != manifest.bundle_id(manifest.dump(GOOD))


def test_dump_refuses_what_parse_would_refuse() -> None:
    with pytest.raises(BundleError, match="image_tokens is 0"):
        manifest.dump(replace(GOOD, image_tokens=0))
    with pytest.raises(BundleError, match="cannot be written"):
        manifest.dump(replace(GOOD, agreement={"vision": float("nan")}))
    with pytest.raises(BundleError, match="cannot be written"):
        manifest.dump(replace(GOOD, agreement={"vision": np.float32(1)}))  # type: ignore[dict-item]


def change(path: str, value: Any) -> bytes:
    raw = json.loads(json.dumps(RAW))
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = raw
    for part in way:
        place = place[part]
    place[last] = value
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("width", True, r"bundle.json: width is true; expected an integer"),
        ("width", 32.0, r"width is 32.0; expected an integer"),
        ("width", 2**70, r"width is \d+; expected an integer of 64 bits"),
        ("name", 3, r"name is 3; expected a string"),
        ("name", "../x", r"name may hold"),
        ("name", "con", r"name may hold"),
        ("name", "x\ud800", r"half a surrogate"),
        ("surprise", 1, r"unknown key 'surprise'"),
        ("image/size", 0, r"image.size is 0"),
        ("image/fit", "crop", r'image.fit is "crop"; expected one of .stretch., .pad.'),
        ("image/mean", [0.5, 0.5], r"image.mean has 2 items; expected 3"),
        ("image/mean", 0.5, r"image.mean is 0.5; expected a list"),
        ("image/std/1", 0, r"image.std holds a value that is not positive"),
        ("image/std/1", False, r"image.std\[1\] is false; expected a finite number"),
        ("image/colour", 1, r"image has the unknown key 'colour'"),
        ("agreement", {"vision": 10**400}, r"agreement.vision is .*; expected a finite number"),
        ("agreement", [], r"agreement is \[\]; expected an object"),
        ("weight_types", {"vision": "f32"}, r"weight_types must name"),
        ("prompt/default_variant", "other", r"default_variant is not among"),
        ("prompt/variants/demo/after", "no place", r"must hold \{question\} once"),
        ("prompt/variants/demo/before_ids", [-1], r"negative id"),
        ("prompt/variants/demo/next_turn_ids", [-1], r"negative id"),
        ("prompt/stop_ids", [-2], r"negative id"),
        ("prompt/stops", [""], r"prompt.stops holds an empty string"),
        ("prompt/default_question", " ", r"default_question is empty"),
        ("prompt/findings/0/no", "yes", r"two different answers"),
        ("defaults/temperature", None, r"defaults.temperature is null; expected a finite number"),
        ("defaults/top_p", -0.5, r"defaults.top_p is -0.5; expected 0 to 1"),
        ("defaults/min_tokens", 17, r"defaults.min_tokens is 17, more than max_tokens, 16"),
        ("presets/authors/seed", -1, r"presets.authors.seed is -1"),
        ("presets/authors/stops", [""], r"presets.authors.stops holds an empty string"),
        ("sources/0/sha256", "0" * 63, r"sources\[0\].sha256 is not 64"),
        ("sources/0/name", "/home/someone/x", r"sources\[0\].name is not a base name"),
        ("files/0/sha256", "A" * 64, r"files\[0\].sha256 is not 64"),
        ("files/0/size", 0, r"files\[0\].size is 0"),
        ("files/0/size", "1", r'files\[0\].size is "1"; expected an integer'),
        ("self_test/embeddings", [], r"self_test.positions has 1 items for 0"),
        ("self_test/embeddings", [0], r"would test nothing"),
        ("self_test/positions", [10**6], r"outside image_tokens"),
        ("self_test/tolerance", 1, r"self_test.tolerance is 1.0"),
        ("self_test/ids", [], r"self_test.ids has 0 items"),
        ("self_test/ids", [-1], r"self_test.ids holds a negative"),
        ("self_test/margin_bound", 3, r"no recorded margin exceeds it"),
        ("self_test/seed", -1, r"self_test.seed is -1"),
        ("image_tokens", 0, r"image_tokens is 0"),
        ("family", "", r"family is empty"),
    ],
)  # fmt: skip
def test_refuses(path: str, value: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        manifest.parse(change(path, value))


@pytest.mark.parametrize("key", list(RAW))
def test_every_key_is_required(key: str) -> None:
    raw = {k: v for k, v in RAW.items() if k != key}
    with pytest.raises(BundleError, match="schema" if key == "schema" else f"lacks the key '{key}'"):
        manifest.parse(json.dumps(raw).encode())


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "a\\b", ".hidden", "..", "", "a\x00b", "ä.onnx", "NUL", "nul.txt", "x.", "a b", "x" * 129,
     "/etc/passwd", "C:x", "bundle.json", "Bundle.JSON", "llm.gguf", "LLM.gguf"],
)  # fmt: skip
def test_file_names_are_flat_portable_and_unique(name: str) -> None:
    entry = {"name": name, "sha256": "0" * 64, "size": 1}
    with pytest.raises(BundleError, match=r"files\[3\].name"):
        manifest.parse(change("files", [*RAW["files"], entry]))


@pytest.mark.parametrize("name", ["vision.onnx_data", "weights.bin", "README.md", "_x", "a-b_c.1"])
def test_further_flat_files_may_be_listed(name: str) -> None:
    entry = {"name": name, "sha256": "0" * 64, "size": 1}
    assert manifest.parse(change("files", [*RAW["files"], entry])).files[3].name == name


@pytest.mark.parametrize("name", manifest.REQUIRED_FILES)
def test_required_files(name: str) -> None:
    files = [entry for entry in RAW["files"] if entry["name"] != name]
    reason = "never see the image" if name == "projector.onnx" else f"lacks {name}"
    with pytest.raises(BundleError, match=reason):
        manifest.parse(change("files", files))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"schema": 1, "schema": 1}', "'schema' stands twice"),
        (b'{"schema": NaN}', "NaN is no JSON number"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{}", "not a bundle"),
        (b'{"schema": true}', "not a bundle"),
        (b'{"schema": 0}', "not a bundle"),
        (b'{"schema": "1"}', "not a bundle"),
        (b" " * (manifest.MAX_BYTES + 1), "at most"),
    ],
)
def test_refuses_bytes(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        manifest.parse(data)


def test_a_newer_schema_is_refused_with_advice() -> None:
    with pytest.raises(BundleError, match=r"newer schema.*upgrade xraygpt-lite"):
        manifest.parse(change("schema", manifest.SCHEMA + 1))


def test_an_older_schema_goes_through_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SCHEMA", 3)

    def rename(raw: dict[str, Any]) -> dict[str, Any]:
        return {("licence" if key == "license" else key): value for key, value in raw.items()}

    def add(raw: dict[str, Any]) -> dict[str, Any]:
        return {**raw, "family": raw["family"] + "!"}

    monkeypatch.setattr(manifest, "UPGRADES", {1: rename, 2: add})
    old = {("license" if key == "licence" else key): value for key, value in RAW.items()} | {"schema": 1}
    data = json.dumps(old).encode()
    assert manifest.parse(data) == replace(GOOD, schema=3, family="tiny!")
    assert manifest.bundle_id(data) == manifest.bundle_id(json.dumps(old, indent=3).encode())


def test_a_schema_without_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SCHEMA", 2)
    monkeypatch.setattr(manifest, "UPGRADES", {})
    with pytest.raises(BundleError, match="no longer read"):
        manifest.parse(change("schema", 1))


def test_schema_1_had_no_tasks_beams_or_warnings(v1: dict[str, Any]) -> None:
    read = manifest.parse(json.dumps(v1).encode())
    assert (read.schema, read.warnings, read.defaults.beams) == (manifest.SCHEMA, (), 1)
    assert (read.prompt.tasks, read.prompt.box_grid, read.prompt.replaced) == ({}, 0, {})


def test_schema_2_had_no_phrases() -> None:
    data = json.dumps(RAW | {"schema": 2, "prompt": {k: v for k, v in RAW["prompt"].items() if k != "phrases"}})
    assert manifest.parse(data.encode()) == replace(GOOD, prompt=replace(GOOD.prompt, phrases=()))


@pytest.mark.parametrize("key", ["prompt", "defaults", "presets"])
@pytest.mark.parametrize("value", [None, 3, [], {"greedy": 1}])
def test_schema_1_that_is_no_manifest_is_refused(v1: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(BundleError):
        manifest.parse(json.dumps({**v1, key: value}).encode())


@pytest.fixture
def v1() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "golden" / "bundles" / "v1" / manifest.FILE_NAME
    raw: dict[str, Any] = json.loads(path.read_bytes())
    assert raw["schema"] == 1
    return raw


def test_every_older_schema_has_a_step_and_every_schema_a_stored_bundle() -> None:
    assert set(manifest.UPGRADES) == set(range(1, manifest.SCHEMA))
    stored = Path(__file__).parents[2] / "golden" / "bundles"
    assert {path.name for path in stored.iterdir()} == {f"v{n}" for n in range(1, manifest.SCHEMA + 1)}


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, item in items for place in places(item, (*way, key)))]


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NESTED = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(max_size=5), SCALAR, max_size=3)
ANYTHING = NESTED | st.lists(NESTED, max_size=3) | st.dictionaries(st.text(max_size=5), NESTED, max_size=3)


@settings(max_examples=200, deadline=None)
@given(way=st.sampled_from(places(RAW)[1:]), value=ANYTHING, drop=st.booleans())
def test_only_a_bundle_error_comes_out_of_a_changed_manifest(way: tuple[Any, ...], value: Any, drop: bool) -> None:
    raw = json.loads(json.dumps(RAW))
    place = raw
    for part in way[:-1]:
        place = place[part]
    if drop:
        del place[way[-1]]
    else:
        place[way[-1]] = value
    try:
        parsed = manifest.parse(json.dumps(raw).encode())
    except BundleError:
        return
    assert manifest.parse(manifest.dump(parsed)) == parsed


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200) | st.tuples(st.integers(0, 5000), st.binary(max_size=4)).map(
    lambda cut: manifest.dump(GOOD)[: cut[0]] + cut[1] + manifest.dump(GOOD)[cut[0] + len(cut[1]) :]
))  # fmt: skip
def test_only_a_bundle_error_comes_out_of_any_bytes(data: bytes) -> None:
    try:
        manifest.parse(data)
    except BundleError:
        return
    assert manifest.bundle_id(data)
