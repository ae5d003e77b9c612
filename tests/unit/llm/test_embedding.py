"""Rows of token embeddings read from a GGUF file are those that llama.cpp takes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.errors import BundleError, ClosedError, NativeError
from xraygpt_lite.llm.embedding import Embedding
from xraygpt_lite.llm.native import Batch, Context, Model
from xraygpt_lite.llm.quantize import quantize
from xraygpt_lite.values import DevicePlan, Float32, Int32

IDS = (np.arange(24) * 13 % 300).astype(np.int32)


@pytest.fixture(scope="module")
def typed(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("embedding")

    def make(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        quantize(tiny.gguf, path, kind)
        return path

    return make


@pytest.fixture
def file(tiny: Any, tmp_path: Path) -> Path:
    path = tmp_path / "copy.gguf"
    path.write_bytes(tiny.gguf.read_bytes())
    return path


def logits(model: Model, content: Int32 | Float32) -> Float32:
    context = Context(model, DevicePlan(threads=1, batch=64), 64)
    batch = Batch(64)
    batch.put(content, np.arange(len(content)), 0, True)
    context.decode(batch)
    found = np.stack([context.logits(row) for row in range(len(content))])
    context.close()
    return found


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs"])
def test_rows_give_the_logits_of_their_tokens(typed: Callable[[str], Path], kind: str) -> None:
    model = Model(typed(kind))
    try:
        assert np.array_equal(logits(model, model.embed(IDS)), logits(model, IDS))
    finally:
        model.close()


def test_rows_of_float32_are_the_checkpoint_s(tiny: Any) -> None:
    embedding = Embedding(tiny.gguf, tiny.token_embeddings.shape[1])
    ids = np.array([5, 299, 5], np.int32)
    assert np.array_equal(embedding.rows(ids), tiny.token_embeddings[ids])
    assert embedding.rows(np.zeros(0, np.int32)).shape == (0, tiny.token_embeddings.shape[1])
    embedding.close()


def test_another_width_is_refused(tiny: Any) -> None:
    with pytest.raises(BundleError, match="no token embeddings of width 7; make the bundle anew"):
        Embedding(tiny.gguf, 7)


def test_a_file_that_is_deleted_can_still_be_read_and_a_short_one_is_told(tiny: Any, file: Path) -> None:
    width = tiny.token_embeddings.shape[1]
    embedding = Embedding(file, width)
    known = embedding.rows(IDS)
    with file.open("r+b") as opened:
        opened.truncate(2000)
    assert np.array_equal(embedding.rows(IDS), known)  # what was read is kept
    with pytest.raises(NativeError, match=r"copy\.gguf has become shorter since it was loaded"):
        embedding.rows(np.array([297], np.int32))
    embedding.close()
    with pytest.raises(ClosedError):
        embedding.rows(np.array([298], np.int32))


def test_a_vocabulary_alone_has_none(tiny: Any) -> None:
    model = Model(tiny.gguf, vocabulary_only=True)
    with pytest.raises(NativeError, match="vocabulary alone"):
        model.embed(IDS)
    model.close()
