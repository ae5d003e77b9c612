"""Damaged and foreign language models end a conversion with exit code 1: file and tensor named, target untouched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import make_checkpoints
import make_llama_files as files
import pytest
import torch

from xraygpt_lite import cli
from xraygpt_lite.converters import language


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def _sharded(path: Path, spoil: Callable[[Path], object]) -> list[str]:
    folder = files.folder(path / "llm", files.weights(), shards=2)
    spoil(folder)
    return ["--llm", str(folder)]


def _index(folder: Path, **changes: str) -> None:
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_bytes())
    content["weight_map"] |= {name.replace("__", "."): shard for name, shard in changes.items()}
    index.write_text(json.dumps(content))


def _missing_shard(path: Path) -> list[str]:
    return _sharded(path, lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink())


def _absent_file(path: Path) -> list[str]:
    return _sharded(path, lambda folder: _index(folder, extra__weight="pytorch_model-00003-of-00003.bin"))


def _parent_folder(path: Path) -> list[str]:
    return _sharded(path, lambda folder: _index(folder, extra__weight="../outside.bin"))


def _link(path: Path) -> list[str]:
    def spoil(folder: Path) -> None:
        shard = folder / "pytorch_model-00001-of-00002.bin"
        shard.rename(path / "outside.bin")
        shard.symlink_to(path / "outside.bin")

    return _sharded(path, spoil)


def _code(path: Path) -> list[str]:
    shard = "pytorch_model-00001-of-00002.bin"
    return _sharded(path, lambda folder: torch.save({"x": Payload(path / "ran")}, folder / shard))


def _values(value: float, *more: str) -> Callable[[Path], list[str]]:
    def make(path: Path) -> list[str]:
        state = files.weights()
        state["model.layers.1.mlp.up_proj.weight"][5, 5] = value
        return ["--llm", str(files.folder(path / "llm", state, shards=2)), *more]

    return make


def _vocabulary(path: Path) -> list[str]:
    return ["--llm", str(files.folder(path / "llm", files.weights(rows=300)))]


def _delta(path: Path) -> list[str]:
    larger = files.CONFIG | {"intermediate_size": 192}
    base = files.folder(path / "base", files.weights(larger), files.CONFIG)
    return ["--llm-base", str(base), "--llm-delta", str(files.folder(path / "delta", files.weights()))]


def _garbage(path: Path) -> list[str]:
    (path / "llm.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 9)
    return ["--llm", str(path / "llm.gguf")]


def _truncated(path: Path) -> list[str]:
    language.read({"llm": files.folder(path / "llm", files.weights())}).write(path / "llm.gguf", "f16", "x")
    (path / "llm.gguf").write_bytes((path / "llm.gguf").read_bytes()[:-100])
    return ["--llm", str(path / "llm.gguf")]


def _narrow(path: Path) -> list[str]:
    config = files.CONFIG | {"hidden_size": 48}
    folder = files.folder(path / "llm", files.weights(config), config)
    return ["--llm", str(folder)]


CASES: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "missing shard": (_missing_shard, ("index.json", "pytorch_model-00002-of-00002.bin", "missing")),
    "absent file": (_absent_file, ("index.json", "pytorch_model-00003-of-00003.bin", "missing")),
    "parent folder": (_parent_folder, ("index.json", "../outside.bin", "leads out of its folder")),
    "link": (_link, ("index.json", "pytorch_model-00001-of-00002.bin", "plain files")),
    "code": (_code, ("pytorch_model-00001-of-00002.bin", "not loaded")),
    "nan": (_values(float("nan")), ("pytorch_model-0000", "'model.layers.1.mlp.up_proj.weight'", "not finite")),
    "infinity": (_values(float("inf")), ("pytorch_model-0000", "'model.layers.1.mlp.up_proj.weight'", "not finite")),
    "beyond float16": (_values(1e6, "--quant", "f16"), ("'model.layers.1.mlp.up_proj.weight'", "beyond float16")),
    "beyond q8_0": (_values(1e9), ("llama.cpp could not quantize llm.gguf to q8_0",)),
    "vocabulary": (_vocabulary, ("tokenizer.model has 384 pieces", "only 300 rows")),
    "another base": (_delta, ("'model.layers.", "in {path}/base and", "the delta was made for another base")),
    "garbage": (_garbage, ("llm.gguf is not a readable GGUF file",)),
    "truncated": (_truncated, ("llm.gguf",)),
    "another width": (_narrow, ("linear.pth", "the language model is 48 wide")),
}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, bundle: Path, family: str, inputs: list[str]) -> str:
    """Run a command that has to end with exit code 1, the bundle at its target untouched; its last line of stderr."""
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", family, *inputs, "-o", str(bundle), "--force"])
    printed = capsys.readouterr()
    assert end.value.code == 1
    assert "Traceback" not in printed.err
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    return printed.err.splitlines()[-1]


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_leaves_the_target_as_it_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle_copy: Path, case: str
) -> None:
    make, parts = CASES[case]
    (tmp_path / "in").mkdir()
    inputs = ["--vision", str(made / "medclip_resnet.bin"), "--checkpoint", str(made / "linear.pth")]
    inputs += make(tmp_path / "in")
    error = refused(capsys, tmp_path, bundle_copy, "xraygpt-paper", inputs)
    assert [part for part in parts if part.format(path=tmp_path / "in") not in error] == []
    assert not (tmp_path / "in" / "ran").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "width",
            r"q_proj.lora_A.default.weight' \(4, 96\) .*med.pth .* trained for a language model of another width",
        ),
        ("gguf", r"the LoRA of .*med.pth cannot be merged into --llm .*llm.gguf, a GGUF; give the Hugging Face folder"),
    ],
)
def test_a_lora_that_cannot_be_merged_leaves_the_target_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle_copy: Path, case: str, message: str
) -> None:
    (tmp_path / "in").mkdir()
    given = make_checkpoints.released(tmp_path / "in", files.CONFIG["hidden_size"])
    llm = files.folder(tmp_path / "in" / "llm", files.weights())
    if case == "gguf":
        language.read({"llm": llm}).write(llm / "llm.gguf", "f16", "x")
        llm = llm / "llm.gguf"
    else:
        root = torch.load(given / "med.pth", weights_only=True)
        kept = {name: value for name, value in root["model"].items() if "lora_" not in name}
        torch.save({"model": kept | files.lora(files.CONFIG | {"hidden_size": 96})}, given / "med.pth")
    inputs = ["--vision", str(given / "eva.pth"), "--checkpoint", str(given / "med.pth"), "--llm", str(llm)]
    sizes = [
        "--set",
        "vision.num_heads=4",
        "--set",
        f"vision.image_size={make_checkpoints.LARGE * make_checkpoints.PATCH}",
    ]
    assert re.search(message, refused(capsys, tmp_path, bundle_copy, "minigpt-med", [*inputs, *sizes]))
