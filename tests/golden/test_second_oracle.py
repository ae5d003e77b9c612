"""llama.cpp's own converter writes the same tensors: names, shapes, types, bytes. Differences in metadata are listed.

The script lies in the source package of llama-cpp-python, which pip fetches once and `build/source` keeps.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import make_llama_files as files
import pytest
import torch

from xraygpt_lite.converters.llama import LlamaFolder

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "source"
NO_INDEX = re.compile(
    r"NewConnectionError|NameResolution|Max retries|Retrying \(|Looking in links|--no-index|timed out"
)

DIFFERENCES = {
    "general.name": "ours is the bundle's name, theirs is made of the folder's",
    "general.size_label": "theirs alone, a label for people (734K)",
    "tokenizer.ggml.add_bos_token": "ours says what llama.cpp assumes of a SentencePiece vocabulary: true",
    "tokenizer.ggml.add_eos_token": "the same: false",
    "tokenizer.ggml.add_space_prefix": "the same: true",
    "tokenizer.ggml.unknown_token_id": "ours is SentencePiece's own; llama.cpp assumes the same 0",
    "tokenizer.ggml.padding_token_id": "theirs repeats config.json's; nothing is ever padded here",
    "GGUF.kv_count": "counts the entries above",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`convert_hf_to_gguf.py` of the pinned release, with what it needs beside it."""
    wanted = version("llama-cpp-python")
    archive = KEPT / f"llama_cpp_python-{wanted}.tar.gz"
    if not archive.is_file():
        _download(wanted)
    folder = tmp_path_factory.mktemp("llama.cpp")
    with tarfile.open(archive) as package:
        inside = f"llama_cpp_python-{wanted}/vendor/llama.cpp/"
        needed = [
            entry
            for entry in package
            if entry.isfile()
            and re.match(re.escape(inside) + r"(convert_hf_to_gguf\.py|conversion/|gguf-py/gguf/)", entry.name)
        ]
        package.extractall(folder, needed, filter="data")
    return folder / inside / "convert_hf_to_gguf.py"


def _download(wanted: str) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--retries",
        "1",
    ]
    command += ["--no-binary", "llama-cpp-python", "-d", str(KEPT), f"llama-cpp-python=={wanted}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = NO_INDEX.search(done.stdout + done.stderr)
        if reason:
            pytest.skip(f"needs a package index for llama.cpp's own converter, and none is reachable ({reason[0]})")
        pytest.fail(f"pip could not fetch llama-cpp-python {wanted}: {done.stderr}")


def _oracle(request: pytest.FixtureRequest, _: Path) -> Path:
    return Path(request.getfixturevalue("shared")) / "data" / "oracle" / "llm"


def _grouped(_: pytest.FixtureRequest, folder: Path) -> Path:
    """Grouped-query attention, float16 shards, a padding token added: 385 rows for 384 pieces."""
    state = {name: value.half() for name, value in files.weights(seed=4, rows=files.PIECES + 1).items()}
    made = files.folder(folder / "grouped", state, shards=2)
    (made / "added_tokens.json").write_text('{"[PAD]": 384}')
    return made


def _tied(_: pytest.FixtureRequest, folder: Path) -> Path:
    """Tied embeddings, bfloat16, rows beyond the vocabulary, other sizes."""
    config = files.CONFIG | {"tie_word_embeddings": True, "hidden_size": 96, "num_attention_heads": 6}
    state = files.weights(config | {"num_key_value_heads": 3}, seed=6, rows=files.PIECES + 16)
    state = {name: value.to(torch.bfloat16) for name, value in state.items()}
    return files.folder(folder / "tied", state, config | {"num_key_value_heads": 3})


@pytest.mark.parametrize("source", [_oracle, _grouped, _tied])
def test_tensors_are_those_of_llama_cpps_own_converter(
    request: pytest.FixtureRequest, script: Path, tmp_path: Path, source: Callable[[pytest.FixtureRequest, Path], Path]
) -> None:
    from gguf import GGUFReader

    folder = source(request, tmp_path)
    command = [sys.executable, str(script), str(folder), "--outtype", "f16", "--outfile", str(tmp_path / "theirs.gguf")]
    environment = os.environ | {"PYTHONPATH": str(script.parent / "gguf-py")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    LlamaFolder(folder).write(tmp_path / "ours.gguf", "f16", "ours")
    ours, theirs = (GGUFReader(tmp_path / name) for name in ("ours.gguf", "theirs.gguf"))
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        other = expected[tensor.name]
        assert (tensor.tensor_type, list(tensor.shape)) == (other.tensor_type, list(other.shape)), tensor.name
        assert tensor.data.tobytes() == other.data.tobytes(), tensor.name
    facts = [{name: _value(field.contents()) for name, field in reader.fields.items()} for reader in (ours, theirs)]
    different = {name for name in set(facts[0]) | set(facts[1]) if facts[0].get(name) != facts[1].get(name)}
    assert different <= set(DIFFERENCES), {name: [str(side.get(name))[:200] for side in facts] for name in different}


def _value(content: Any) -> Any:
    return tuple(content) if isinstance(content, list) else content
