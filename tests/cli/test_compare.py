"""`xraygpt-lite verify --against`: two precisions of a model side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bundle
from PIL import Image

from xraygpt_lite import cli, compare, verify


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", *arguments])
    return int(end.value.code or 0)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = (verify.test_radiograph(1).pixels * 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    return str(folder)


def test_the_table(made_bundle: Path, pictures: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(made_bundle), "--against", str(made_bundle), "--check-images", pictures) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["FIGURE", "VALUE", "WHAT"]
    assert [line.split()[0] for line in lines[1:]] == list(compare.FIGURES)
    assert lines[1].split()[:2] == ["images", "1"]


def test_another_model_of_the_same_shape_fails(
    made_bundle: Path, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_bundle.make(tmp_path / "other", seed=1)
    code = run(str(other), "--against", str(made_bundle), "--check-images", pictures, "--json")
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (code, found["schema"], found["passed"]) == (4, "xraygpt-lite/compare/1", False)
    assert set(found["figures"]) == set(compare.FIGURES)
    assert "cosine" in printed.err


def test_pictures_without_a_reference(made_bundle: Path, pictures: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(made_bundle), "--check-images", pictures) == 2
    assert "goes with --against" in capsys.readouterr().err
