"""nih-tiny's training command from nothing: every stage in turn on a handful of pictures, cut and continued."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TRAIN = Path(__file__).resolve().parents[2] / "models" / "nih-tiny" / "train"
FINDINGS = ("No Finding", "Effusion", "Cardiomegaly|Effusion", "Mass")
SMALL = """
import sys, logging
sys.path.insert(0, sys.argv[1])
import train
from pathlib import Path
if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    train.LANGUAGE_STEPS = train.COPY_STEPS = train.IMAGE_STEPS = 1
    train.PLAIN_STEPS = (1, 1)
    train.EPOCHS = 1
    data, work = Path(sys.argv[2]), Path(sys.argv[3])
    encoder, few, val = train.findings(data, work)
    decoder, projector, carried = train.images(work, encoder, few, val)
    print("features", encoder.head.in_features, "projector", tuple(projector.weight.shape))
"""


def write(folder: Path, stem: str, size: int) -> None:
    """A zip and a csv in the data set's format: 128 train and 16 val pictures of noise."""
    rng = np.random.default_rng(size)
    with zipfile.ZipFile(folder / f"{stem}.zip", "w") as archive, (folder / f"{stem}.csv").open("w") as table:
        rows = csv.writer(table)
        rows.writerow(["image", "patient", "split", "view", "sex", "age", "follow_up", "findings"])
        for n in range(144):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(picture, "PNG")
            archive.writestr(f"{stem}/{n}.png", picture.getvalue())
            rows.writerow([f"{n}.png", n, "train" if n < 128 else "val", "PA", "F", 50, 0, FINDINGS[n % 4]])


@pytest.mark.slow
def test_every_stage_from_nothing_and_again(tmp_path: Path) -> None:
    for stem, size in (("nih128", 128), ("nih64", 64)):
        write(tmp_path, stem, size)
    script, work = tmp_path / "small.py", tmp_path / "work"
    script.write_text(SMALL)
    work.mkdir()
    command = [sys.executable, str(script), str(TRAIN), str(tmp_path), str(work)]
    first = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert first.returncode == 0, first.stderr
    assert first.stdout.split() == ["features", "1280", "projector", "(192,", "1280)"]
    stages = ("encoder", "language", "copying", "images", "features", "plain0", "plain1")
    made = {f"{stage}.pt" for stage in stages}
    assert made <= {path.name for path in work.iterdir()}
    for lost in ("plain1.pt", "images.pt"):  # as if it had been cut there
        (work / lost).unlink()
    kept = {name: (work / name).stat().st_mtime_ns for name in made if (work / name).exists()}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {name: (work / name).stat().st_mtime_ns for name in kept} == kept
    assert made <= {path.name for path in work.iterdir()}
