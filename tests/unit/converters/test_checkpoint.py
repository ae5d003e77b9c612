"""Checkpoints are read safely, and what does not fit is refused with file and tensor named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from xraygpt_lite.converters import opcodes
from xraygpt_lite.converters.checkpoint import Checkpoint, fill, take_all
from xraygpt_lite.errors import ConversionError


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["torch", "plain pickle"])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"model": {"llama_proj.weight": torch.zeros(2, 2)}, "config": Payload(mark)}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"config": Payload(mark)}, protocol=2))
    with pytest.raises(ConversionError, match=r"evil\.pth .*system.* not loaded"):
        Checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["archive", "legacy", "plain pickle"])
def test_what_a_pickle_asks_for_is_named_in_every_protocol(tmp_path: Path, form: str, protocol: int) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"module": OrderedDict(name="posix"), "again": "posix", "config": Payload(mark)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        new = form == "archive"
        torch.save(content, path, pickle_protocol=max(protocol, 1), _use_new_zipfile_serialization=new)
    with pytest.raises(ConversionError, match=r"evil\.pth asks for \w+\.system while .* not loaded"):
        Checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04", b"\x80\x04\x93.", b"\x80\x04j\xff\xff\xff\xff.", b"PK\x05\x06" + bytes(18)]
)
def test_opcodes_that_lead_nowhere_name_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert not opcodes.foreign_name(tmp_path / "x.pth")
    with pytest.raises(ConversionError, match=r"x\.pth is "):
        Checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("kept", [0, 3, 100, 1500])
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int, name: str) -> None:
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)({"a": torch.ones(20, 30)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConversionError, match=name):
        Checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {}}, torch.zeros(2)])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match=r"x\.pth holds"):
        Checkpoint(tmp_path / "x.pth")


def test_trainer_state_is_named_and_other_tensors_are_not_overlooked(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    weights = {"w": torch.ones(2, 2)}
    torch.save({"model": weights, "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3, "note": "x"}, path)
    assert Checkpoint(path).extras == ("optimizer", "epoch", "note")
    torch.save({"model": weights, "ema": {"w": torch.ones(2, 2)}}, path)
    with pytest.raises(ConversionError, match=r"'ema'"):
        Checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_name_their_tensor(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(3, 3, dtype=dtype)
    weight[1, 2] = value
    torch.save({"layer.weight": weight, "other": torch.ones(1)}, tmp_path / "x.bin")
    source = Checkpoint(tmp_path / "x.bin")
    assert source.read("other") == 1
    with pytest.raises(ConversionError, match=r"'layer\.weight' of .*x\.bin .*not finite"):
        source.read("layer.weight")


@pytest.mark.parametrize("shard", ["../outside.bin", "/etc/hostname", "sub/outside.bin", "..\\outside.bin"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "llm"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        torch.save({"w": torch.ones(2)}, place / "outside.bin")
    _index(folder, {"w": shard})
    with pytest.raises(ConversionError, match=r"leads out of its folder"):
        Checkpoint(folder)


def test_a_linked_shard_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "outside.bin")
    (folder / "a.bin").symlink_to(tmp_path / "outside.bin")
    _index(folder, {"w": "a.bin"})
    with pytest.raises(ConversionError, match=r"'a\.bin', which is a link; shards must be plain files.* \(cp -rL\)"):
        Checkpoint(folder)


def test_a_type_that_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.bin")
    with pytest.raises(ConversionError, match=r"'w' of .*x\.bin is of type torch\.float8_e4m3fn, which is no"):
        Checkpoint(tmp_path / "x.bin").read("w")


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_damaged_anywhere_is_told_in_a_sentence(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save({"layer.weight": torch.ones(3), "n": 1}, path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        at = random.integers(len(whole), size=3)
        damaged = bytearray(whole)
        for place in at:
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            source = Checkpoint(path)
            for name in source.shapes:
                source.read(name)
        except ConversionError as error:
            refused += str(path) in str(error)
    assert refused > 30


def test_missing_shards_and_absent_names_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.bin")
    _index(tmp_path, {"w": "a.bin", "v": "b.bin"})
    with pytest.raises(ConversionError, match=r"'b\.bin', which is missing"):
        Checkpoint(tmp_path)
    torch.save({"u": torch.ones(2)}, tmp_path / "b.bin")
    with pytest.raises(ConversionError, match=r"tensor 'v' is in b\.bin, and it is not"):
        Checkpoint(tmp_path)
    torch.save({"v": torch.ones(2), "w": torch.ones(2)}, tmp_path / "b.bin")
    with pytest.raises(ConversionError, match=r"'w' is in a.bin and again"):
        Checkpoint(tmp_path)
    torch.save({"v": torch.ones(2), "x": torch.ones(2)}, tmp_path / "b.bin")
    with pytest.raises(ConversionError, match=r"b\.bin holds 'x', which .*index\.json does not list"):
        Checkpoint(tmp_path)
    torch.save({"v": torch.ones(2), "a.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "b.bin")
    assert "a.rotary_emb.inv_freq" in Checkpoint(tmp_path).shapes
    torch.save({"v": torch.ones(2)}, tmp_path / "b.bin")
    assert set(Checkpoint(tmp_path).shapes) == {"v", "w"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 3}}', "{"])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(ConversionError, match=r"index\.json"):
        Checkpoint(tmp_path)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).files == (tmp_path / "model.safetensors",)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(ConversionError, match=r"holds no weights"):
        Checkpoint(tmp_path)


def test_names_then_shapes_then_values(tmp_path: Path) -> None:
    path, nan = tmp_path / "x.bin", float("nan")

    def load(**tensors: torch.Tensor) -> tuple[str, ...]:
        torch.save(tensors, path)
        return fill(nn.Linear(3, 2), Checkpoint(path), {"weight": "w", "bias": "b"}, ignored=("^head",))

    with pytest.raises(ConversionError, match=r"lacks 'b'"):
        load(w=torch.full((9, 9), nan))
    with pytest.raises(ConversionError, match=r"holds 'extra', which this family neither uses"):
        load(w=torch.full((9, 9), nan), b=torch.ones(2), extra=torch.ones(1))
    with pytest.raises(ConversionError, match=r"'w' of .* has shape \(9, 9\).* ask for \(2, 3\)"):
        load(w=torch.full((9, 9), nan), b=torch.ones(2))
    with pytest.raises(ConversionError, match=r"'w' of .* not finite"):
        load(w=torch.full((2, 3), nan), b=torch.ones(2))
    assert load(w=torch.ones(2, 3), b=torch.ones(2), head=torch.ones(1)) == ("head",)


def test_ignored_names_are_listed(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "a.position_ids": torch.ones(1)}, tmp_path / "x.bin")
    source = Checkpoint(tmp_path / "x.bin")
    assert take_all(source, ["w"], [r"position_ids$"]) == ("a.position_ids",)
    with pytest.raises(ConversionError, match=r"position_ids"):
        take_all(source, ["w"], [])


def _index(folder: Path, weights: dict[str, str]) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
