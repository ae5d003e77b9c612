"""Fixtures for every test: where the shared data lie, and small real files made on the spot."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Hear Ctrl-C also in a background job, which starts with it ignored; choose ggml's kernels for all models."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The first model of a process chooses (`llm.library.exact`), and here Q4_0 is not the first.
    os.environ.setdefault("GGML_CPU_TILED_MM", "0")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data beside the checkout; the test is skipped where they are absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs ../shared, which is absent")
    return folder


@pytest.fixture(scope="session")
def made_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle that runs; its self-test is a stand-in. Not to be changed."""
    import tiny_bundle

    return tiny_bundle.make(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def bundle_copy(made_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `made_bundle` that a test may spoil."""
    return Path(shutil.copytree(made_bundle, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def recorded_bundle(made_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`made_bundle` with the self-test that this machine recorded; not to be changed."""
    import tiny_bundle

    folder = Path(shutil.copytree(made_bundle, tmp_path_factory.mktemp("recorded") / "tiny"))
    tiny_bundle.record(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints in the layouts of the paper's model, with expected values; see `make_checkpoints`."""
    import make_checkpoints

    return make_checkpoints.make(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def talking_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle with tasks, boxes and a replaced word, whose real engine says `tiny_bundle.SAYS` to everything."""
    import tiny_bundle

    return tiny_bundle.make_talking(tmp_path_factory.mktemp("talking") / "talking")
