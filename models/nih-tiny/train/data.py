"""Reads the data set's zip and csv pairs into memory; knows no network.

Labels are the 14 findings of ChestX-ray14 in a fixed order and a 15th output, `abnormal`: any finding at all.
"""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip


@dataclass(frozen=True)
class Split:
    """One split: images uint8 (n, S, S), 0 = black; labels and side (AP, male, age / 100) float32 (n, 15), (n, 3)."""

    images: np.ndarray
    labels: np.ndarray
    side: np.ndarray
    names: list[str]


def read(folder: Path, stem: str, split: str, size: int = 128) -> Split:
    """The rows of `stem`.csv whose split is `split`, images brought to `size` bicubically."""
    with (folder / f"{stem}.csv").open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["split"] == split]
    images = np.empty((len(rows), size, size), np.uint8)
    labels = np.zeros((len(rows), len(FINDINGS) + 1), np.float32)
    side = np.zeros((len(rows), 3), np.float32)
    with zipfile.ZipFile(folder / f"{stem}.zip") as archive:
        inside = {Path(name).name: name for name in archive.namelist()}
        for n, row in enumerate(rows):
            with Image.open(io.BytesIO(archive.read(inside[row["image"]]))) as picture:
                grey = picture.convert("L")
                if grey.size != (size, size):
                    grey = grey.resize((size, size), Image.Resampling.BICUBIC)
                images[n] = np.asarray(grey)
            present = set(row["findings"].split("|")) - {"No Finding"}
            for finding in present:
                labels[n, FINDINGS.index(finding)] = 1
            labels[n, -1] = bool(present)
            side[n] = (row["view"] == "AP", row["sex"] == "M", min(float(row["age"]), 100) / 100)
    return Split(images, labels, side, [row["image"] for row in rows])


def join(*parts: Split) -> Split:
    """The parts one after another."""
    return Split(
        np.concatenate([p.images for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.side for p in parts]),
        [name for p in parts for name in p.names],
    )


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve by ranks, ties counted half; NaN where one class is absent."""
    order = np.unique(scores, return_inverse=True)[1]
    counts = np.bincount(order)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[order]
    positive = labels > 0.5
    n = int(positive.sum())
    m = len(labels) - n
    if not n or not m:
        return float("nan")
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))
