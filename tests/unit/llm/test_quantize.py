"""llama.cpp's quantizer: every type loads and answers like the float32 model; failures leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.errors import ConversionError, UsageError
from xraygpt_lite.llm.quantize import FILE_TYPES, quantize
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.values import DevicePlan, Float32, TokenSegment


def logits(gguf: Path, plan: DevicePlan) -> Float32:
    with Engine(gguf, replace(plan, context=64)) as engine, engine.open() as slot:
        found: Float32 = slot.trace([TokenSegment(np.arange(1, 20, dtype=np.int32))], [5])[0]
        return found


@pytest.fixture(scope="module")
def expected(tiny: Any, plan: DevicePlan) -> Float32:
    return logits(tiny.gguf, plan)


@pytest.mark.parametrize(
    ("kind", "cosine", "share"),
    [
        ("f32", 1 - 1e-6, 1.001),
        ("f16", 0.9999, 0.55),
        ("q8_0", 0.999, 0.35),
        ("q6_k", 0.99, 0.3),
        ("q5_k_m", 0.96, 0.3),
        ("q4_k_m", 0.92, 0.3),
        ("q4_0", 0.9, 0.25),
        ("iq4_xs", 0.9, 0.25),
    ],
)
def test_every_type(
    tiny: Any,
    plan: DevicePlan,
    tmp_path: Path,
    expected: Float32,
    kind: str,
    cosine: float,
    share: float,
    capfd: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "q.gguf"
    assert quantize(tiny.gguf, target, kind, threads=1) == ()
    found = logits(target, plan)
    assert float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)) > cosine
    assert target.stat().st_size <= share * tiny.gguf.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]
    assert capfd.readouterr() == ("", "")


def test_all_types_are_tested() -> None:
    assert set(FILE_TYPES) == {"f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs"}


def test_a_width_that_is_no_multiple_of_the_block_is_reported(tiny_llama: ModuleType, tmp_path: Path) -> None:
    made = tiny_llama.make(tmp_path, width=128)
    fallbacks = quantize(made.gguf, tmp_path / "q.gguf", "q4_k_m", threads=1)
    assert {(f.width, f.block) for f in fallbacks} == {(128, 256)}
    found = {f.tensor: (f.wanted, f.got) for f in fallbacks}
    assert found["blk.0.attn_q.weight"] == ("q4_K", "q5_0")


def test_an_unknown_type(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'q3_k' is unknown; expected one of f32, "):
        quantize(tiny.gguf, tmp_path / "q.gguf", "q3_k")


@pytest.mark.parametrize("size", [100, 30_000, 3_000_000])
def test_a_damaged_source_leaves_the_target_as_it_was(tiny: Any, tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "s.gguf", tmp_path / "q.gguf"
    source.write_bytes(tiny.gguf.read_bytes()[:size])
    target.write_bytes(b"old")
    with pytest.raises(ConversionError, match=r"could not quantize s\.gguf to q8_0: ") as caught:
        quantize(source, target, "q8_0")
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.gguf", "s.gguf"]


def test_no_gguf_and_no_place_to_write(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "s.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConversionError, match="not a GGUF"):
        quantize(tmp_path / "s.gguf", tmp_path / "q.gguf", "q8_0")
    with pytest.raises(ConversionError, match="cannot be written to"):
        quantize(tiny.gguf, tmp_path / "absent" / "q.gguf", "q8_0")
