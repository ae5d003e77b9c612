"""A tiny language model on disk, an engine over it, and a simple reader."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.values import DevicePlan, Sampling, TokenSegment

PLAN = DevicePlan(threads=1, context=256, batch=32, sequences=3, float32_cache=True)


class SimpleReader:
    """Decodes UTF-8 and stops at one string; the slow, obvious way: over all bytes each time."""

    def __init__(self, stop: str = "") -> None:
        self.stop = stop.encode()
        self.data = b""
        self.shown = ""
        self.stopped = False
        self.kept_bytes = 0

    def feed(self, piece: bytes) -> str:
        self.data += piece
        found = self.data.find(self.stop) if self.stop else -1
        self.stopped = found >= 0
        self.kept_bytes = found if self.stopped else len(self.data)
        safe = self.data[: self.kept_bytes]
        if not self.stopped and self.stop:
            held = max((n for n in range(len(self.stop)) if safe.endswith(self.stop[:n])), default=0)
            safe = safe[: len(safe) - held]
        return self._show(safe, final=False)

    def finish(self) -> str:
        return self._show(self.data[: self.kept_bytes], final=True)

    def _show(self, data: bytes, *, final: bool) -> str:
        text = data.decode("utf-8", "replace")
        if not final:
            text = text.rstrip("\ufffd")
        new = text[len(self.shown) :]
        self.shown += new
        return new


@pytest.fixture(scope="session")
def tiny_llama() -> ModuleType:
    path = Path(__file__).parents[2] / "tiny_llama.py"
    spec = importlib.util.spec_from_file_location("tiny_llama", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_llama"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(tiny_llama: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_llama.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def plan() -> DevicePlan:
    return PLAN


@pytest.fixture(scope="module")
def engine(tiny: Any) -> Iterator[Engine]:
    with Engine(tiny.gguf, PLAN) as engine:
        yield engine


@pytest.fixture(scope="session")
def reader() -> type[SimpleReader]:
    return SimpleReader


@pytest.fixture
def prompt(engine: Engine) -> TokenSegment:
    """70 rows: more than two chunks of the plan's 32."""
    ids = engine.tokenize("the chest x-ray shows no pleural effusion and the heart is normal " * 9, leading_space=True)
    return TokenSegment(np.concatenate([[engine.bos], ids]).astype(np.int32)[:70])


@pytest.fixture
def greedy() -> Sampling:
    return Sampling(max_tokens=24)
