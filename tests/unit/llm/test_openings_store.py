"""A prompt's fixed text is prefilled once for all processes; a store that lies, lacks or is gone changes no answer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.cache import Cache
from xraygpt_lite.llm.beginnings import Beginnings
from xraygpt_lite.llm.native import Batch, Context, Model
from xraygpt_lite.llm.openings import Openings
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.values import DevicePlan, EmbeddingSegment, Float32, Sampling, Segment, TokenSegment

OPENING, IMAGE, QUESTION = 12, 9, 5


@pytest.fixture(scope="module")
def segments(tiny: Any) -> list[Segment]:
    return [
        TokenSegment(np.arange(20, 20 + OPENING, dtype=np.int32)),
        EmbeddingSegment(tiny.token_embeddings[100 : 100 + IMAGE]),
        TokenSegment(np.arange(40, 40 + QUESTION, dtype=np.int32)),
    ]


@pytest.fixture
def answer(
    tiny: Any, plan: DevicePlan, segments: list[Segment], reader: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[tuple[int, ...], list[int]]]:
    """A fresh engine's answer, and the rows of its decode calls."""

    def run(
        folder: Path | None, model: str = "a", segments: list[Segment] = segments, **changes: Any
    ) -> tuple[tuple[int, ...], list[int]]:
        store = None if folder is None else Openings(Cache(folder), model, plan)
        rows: list[int] = []
        with Engine(tiny.gguf, replace(plan, **changes), openings=store) as engine:
            decode = engine._core.context.decode
            with monkeypatch.context() as patch:
                patch.setattr(engine._core.context, "decode", lambda batch: (rows.append(batch.rows), decode(batch))[1])
                with engine.open() as slot:
                    stream = slot.generate(segments, Sampling(max_tokens=6), stop_ids=(), reader=reader())
                    list(stream)
                    assert slot.rows == sum(map(len, segments)) + 6
        return stream.result.ids, rows

    return run


def blocks(folder: Path) -> list[Path]:
    return sorted((folder / "openings").glob("*.bin"))


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_second_engine_does_not_prefill_it(answer: Any, tmp_path: Path, sequences: int) -> None:
    expected, plain = answer(None)
    first = answer(tmp_path)
    second = answer(tmp_path, sequences=sequences)
    assert first == (expected, plain)
    assert second == (expected, plain[1:])
    assert plain[0] == OPENING
    assert len(blocks(tmp_path)) == 1


def test_another_model_has_its_own(answer: Any, tmp_path: Path) -> None:
    answer(tmp_path, "a")
    _, rows = answer(tmp_path, "b")
    assert OPENING in rows
    assert len(blocks(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["shorter", "other", "empty", "gone", "form", "rows"])
def test_what_is_damaged_is_prefilled_anew(
    answer: Any, segments: list[Segment], plan: DevicePlan, tmp_path: Path, damage: str
) -> None:
    expected, plain = answer(tmp_path)
    (path,) = blocks(tmp_path)
    data = path.read_bytes()
    store = Openings(Cache(tmp_path), "a", plan)
    opening_ids = np.arange(20, 20 + OPENING, dtype=np.int32)
    if damage == "gone":
        path.unlink()
    elif damage == "form":  # whole, but nothing that llama.cpp wrote
        store.put(opening_ids.tobytes(), lambda: np.arange(1000).astype(np.uint8))
    elif damage == "rows":  # whole, of a text of one row less
        shorter = [TokenSegment(opening_ids[:-1]), *segments[1:]]
        answer(tmp_path, "shorter", segments=shorter)
        state = Openings(Cache(tmp_path), "shorter", plan).get(opening_ids[:-1].tobytes())
        assert state is not None
        store.put(opening_ids.tobytes(), lambda: state)
    else:
        path.write_bytes({"shorter": data[:-1], "other": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage])
    assert answer(tmp_path) == (expected, plain)
    assert answer(tmp_path) == (expected, plain[1:])  # and kept again


def test_a_folder_that_cannot_be_written_is_done_without(answer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    expected, plain = answer(None)
    assert answer(tmp_path / "file") == (expected, plain)
    assert answer(tmp_path / "file") == (expected, plain)


def test_nothing_but_the_opening_is_kept(answer: Any, tmp_path: Path, segments: list[Segment]) -> None:
    """Its size is that of its rows: two layers of keys and values, float32 here, and some bytes about them."""
    answer(tmp_path)
    (path,) = blocks(tmp_path)
    row = 2 * 2 * 256 * 4
    assert OPENING * row < path.stat().st_size < OPENING * row + row
    assert [each.parent.name for each in tmp_path.rglob("*") if each.is_file()] == ["openings"]


def test_what_is_kept_does_not_take_the_place_of_what_is_still_to_be_copied(
    tiny: Any, plan: DevicePlan, tmp_path: Path
) -> None:
    one, other = (np.arange(start, start + OPENING, dtype=np.int32) for start in (20, 200))
    store = Openings(Cache(tmp_path), "a", plan)
    model = Model(tiny.gguf)
    context = Context(model, plan, 64)
    batch, shared = Batch(context.batch), Beginnings(context, store)

    def logits(sequence: int) -> Float32:
        batch.put(np.array([7], np.int32), OPENING, sequence, True)
        context.decode(batch)
        found = context.logits(0).copy()
        context.cut(sequence, OPENING)
        return found

    for opening in (other, one):
        context.cut(0, 0)
        batch.put(opening, np.arange(OPENING), 0, False)
        context.decode(batch)
        shared.keep(0, opening.tobytes())
    expected = logits(0)
    assert shared.share(1, one.tobytes())  # copied from 0 by the next call
    assert not shared.share(0, other.tobytes())  # so it is not restored there now
    np.testing.assert_array_equal(logits(1), expected)
    assert shared.share(0, other.tobytes())
    context.close()
    model.close()


def test_two_processes_share_a_folder(tiny: Any, tmp_path: Path) -> None:
    """Both write and read the same block again and again; each answer is the same."""
    program = f"""
import sys
from pathlib import Path
import numpy as np
from xraygpt_lite.cache import Cache
cache = Cache(Path({str(tmp_path)!r}))
block = np.arange(300_000, dtype=np.int32).tobytes()
for _ in range(60):
    cache.put_bytes("openings", "one", block)
    found = cache.get_bytes("openings", "one")
    assert found is None or bytes(found) == block
"""
    children = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert bytes(Cache(tmp_path).get_bytes("openings", "one") or b"")[:8] == np.arange(2, dtype=np.int32).tobytes()
