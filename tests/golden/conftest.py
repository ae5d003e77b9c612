"""Bundles converted once for all golden tests, from the shared oracle and from checkpoints made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.values import Bundle


@dataclass(frozen=True)
class Case:
    """Checkpoints of one origin: file names by encoder, the language model's folder, and expected values by encoder."""

    folder: Path
    vision: dict[str, str]
    checkpoint: dict[str, str]
    golden: Callable[[str], dict[str, Any]]

    @property
    def llm(self) -> Path:
        return self.folder / "llm"


def _oracle(folder: Path) -> Case:
    suffix = {"swin": "", "resnet": "_resnet"}

    def golden(encoder: str) -> dict[str, Any]:
        values = np.load(folder / f"xraygpt_paper{suffix[encoder]}_golden.npz")
        return {name: values[name] for name in values.files}

    return Case(
        folder,
        {"swin": "medclip_vit_pytorch_model.bin", "resnet": "medclip_resnet_pytorch_model.bin"},
        {key: f"xraygpt_paper{part}_checkpoint.pth" for key, part in suffix.items()},
        golden,
    )


def _made(folder: Path) -> Case:
    values = np.load(folder / "golden.npz")

    def golden(encoder: str) -> dict[str, Any]:
        return {
            "pixels": values["pixels"],
            "features": values[f"{encoder}_features"],
            "embeddings": values[f"{encoder}_linear_wide_embeddings"],
        }

    vision = {key: f"medclip_{key}.bin" for key in ("swin", "resnet")}
    return Case(folder, vision, dict.fromkeys(vision, "linear_wide.pth"), golden)


@pytest.fixture(scope="session", params=["oracle", "made"])
def case(request: pytest.FixtureRequest) -> Case:
    """The oracle's checkpoints (skipped where they are absent), then our own."""
    if request.param == "oracle":
        return _oracle(request.getfixturevalue("shared") / "data" / "oracle")
    return _made(request.getfixturevalue("made"))


@pytest.fixture(scope="session")
def converted(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Encoder → the float32 bundle converted with it."""
    from xraygpt_lite.converters.assemble import Request, convert

    @cache
    def convert_with(encoder: str) -> Bundle:
        inputs = {
            "vision": case.folder / case.vision[encoder],
            "checkpoint": case.folder / case.checkpoint[encoder],
            "llm": case.llm,
        }
        output = tmp_path_factory.mktemp("golden") / encoder
        convert(Request("xraygpt-paper", inputs, output, quant="f32"))
        return store.load(output, Cache(None))

    return convert_with
