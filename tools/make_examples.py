"""Makes the synthetic radiographs of this folder: samples from an eigen-radiograph model, no patient's picture.

    python tools/make_examples.py --data ../shared/data/nih-chestxray14 [--output examples]

The model: principal components of aligned PA chest radiographs of the train split (128 x 128, grey). A sample is the
mean picture plus every component times a random number, shrunken towards the mean; it is then enlarged and given fine
grain. The same data and seed give the same pictures and the same DICOM identifiers.

It knows nothing of the package and is not needed to use it.
"""

from __future__ import annotations

import argparse
import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

Float = npt.NDArray[np.float64]

SIDE = 128
SIZE = 768
PEOPLE = 1000
COMPONENTS = 150
ABNORMAL = frozenset({"Cardiomegaly", "Effusion"})
LABEL = "SYNTHETIC: sampled from a principal component model of NIH ChestX-ray14; not a picture of a patient."
ACKNOWLEDGEMENT = "Data provided by the NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC"


@dataclass(frozen=True)
class Recipe:
    """One sample: seed, how far from the mean (1 = as far as patients) and how far from normal to abnormal."""

    seed: int
    spread: float = 0.7
    abnormal: float = 0.0


PNG = Recipe(seed=1)
MONOCHROME1 = Recipe(seed=6)
JPEG2000 = Recipe(seed=2, spread=0.6, abnormal=2.5)


@dataclass(frozen=True)
class Model:
    """Mean (d,), principal directions (k, d), standard deviations (k,), mean abnormal minus mean normal (d,)."""

    mean: Float
    directions: Float
    spread: Float
    difference: Float
    pictures: Float


def load(data: Path, *, abnormal: bool) -> Float:
    """Adult PA pictures of the train split, float64 (n, 128, 128) in [0, 1]."""
    with (data / "nih128.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["split"] == "train" and r["view"] == "PA" and int(r["age"]) >= 18]
    found = [frozenset(r["findings"].split("|")) for r in rows]
    keep = [r["image"] for r, f in zip(rows, found, strict=True) if (f & ABNORMAL if abnormal else f == {"No Finding"})]
    with zipfile.ZipFile(data / "nih128.zip") as archive:
        paths = {Path(name).name: name for name in archive.namelist()}
        pictures = [Image.open(io.BytesIO(archive.read(paths[name]))).convert("L") for name in keep]
    return np.stack([np.asarray(p, np.float64) for p in pictures]) / 255


def standardize(pictures: Float) -> Float:
    """Each picture with mean 0 and standard deviation 1 over its middle, where no frame or marker lies."""
    middle = pictures[:, 12:116, 12:116]
    mean = middle.mean((1, 2), keepdims=True)
    standard: Float = (pictures - mean) / (middle.std((1, 2), keepdims=True) + 1e-6)
    return np.clip(standard, -3.0, 3.0)


def warp(picture: Float, move: tuple[float, float, float]) -> Float:
    """Scaled about the centre, then moved: (scale, dx, dy), dx and dy as parts of the side; edges repeated."""
    side = len(picture)
    scale, dx, dy = move
    padded = Image.fromarray(np.pad(picture, side // 4, mode="edge").astype(np.float32))
    centre = side / 2 + side // 4
    x, y = (centre - (centre + d * side) / scale for d in (dx, dy))
    moved = padded.transform(
        padded.size, Image.Transform.AFFINE, (1 / scale, 0.0, x, 0.0, 1 / scale, y), Image.Resampling.BILINEAR
    )
    inner = slice(side // 4, side // 4 + side)
    return np.asarray(moved, np.float64)[inner, inner]


def align(pictures: Float, target: Float) -> Float:
    """Move and scale each picture onto `target`; the search runs on pictures of a quarter of the size."""

    def small(a: Float) -> Float:
        return np.asarray(a.reshape(*a.shape[:-2], SIDE // 4, 4, SIDE // 4, 4).mean((-3, -1)))

    little, goal = small(pictures), small(target)
    best = [(1.0, 0.0, 0.0)] * len(pictures)
    for step in (1.0, 0.5, 0.25):
        for i, centre in enumerate(best):
            moves = [
                (centre[0] + s * step, centre[1] + x * step, centre[2] + y * step)
                for s in (-0.06, 0.0, 0.06)
                for x in (-0.04, 0.0, 0.04)
                for y in (-0.05, 0.0, 0.05)
            ]
            best[i] = moves[int(correlation(np.stack([warp(little[i], m) for m in moves]), goal).argmax())]
    return np.stack([warp(p, m) for p, m in zip(pictures, best, strict=True)])


def correlation(pictures: Float, target: Float) -> Float:
    """Pearson's r of each picture with `target`."""
    a = pictures.reshape(len(pictures), -1)
    b = target.ravel()
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean()
    return np.asarray((a @ b) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b) + 1e-12))


def fit(data: Path) -> Model:
    """The eigen-radiograph model: the `PEOPLE` normal pictures most like the mean, aligned to it."""
    normal = standardize(load(data, abnormal=False))
    target = normal.mean(0)
    normal = align(normal[np.argsort(-correlation(normal, target))[:PEOPLE]], target)
    abnormal = standardize(load(data, abnormal=True))
    abnormal = align(abnormal[np.argsort(-correlation(abnormal, target))[: len(abnormal) * 3 // 4]], target)
    flat = normal.reshape(len(normal), -1)
    mean = flat.mean(0)
    centred = flat - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    length = np.sqrt(values[::-1][:COMPONENTS])
    directions = (vectors[:, ::-1][:, :COMPONENTS] / length).T @ centred
    directions *= np.sign(directions[np.arange(COMPONENTS), np.abs(directions).argmax(1)])[:, None]
    difference = abnormal.mean(0).ravel() - mean
    return Model(mean, directions, length / np.sqrt(len(flat) - 1), difference, flat)


def sample(model: Model, recipe: Recipe) -> tuple[Float, str]:
    """A picture (SIZE, SIZE) in [0, 1], and a sentence on how near it comes to any picture of the model."""
    rng = np.random.default_rng(recipe.seed)
    scores = rng.normal(size=COMPONENTS) * model.spread * recipe.spread
    flat = model.mean + recipe.abnormal * model.difference + scores @ model.directions
    low, high = np.percentile(flat, [1.0, 99.5])
    small = Image.fromarray(((flat - low) / (high - low)).reshape(SIDE, SIDE).astype(np.float32))
    large = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float64)
    grain = rng.normal(size=(SIZE, SIZE))
    grain = (grain + np.roll(grain, 1, 0) + np.roll(grain, 1, 1) + np.roll(grain, (1, 1), (0, 1))) / 2
    picture = np.clip(0.03 + 0.92 * large + 0.008 * grain, 0.0, 1.0)
    whole = correlation(model.pictures, flat).max()
    detail = correlation(model.pictures - model.mean, flat - model.mean).max()
    people = model.pictures - model.mean
    people = people / np.linalg.norm(people, axis=1, keepdims=True)
    among = people @ people.T - 2 * np.eye(len(people))
    return picture, (
        f"nearest of {len(people)} pictures: r = {whole:.3f}, {detail:.3f} without the mean "
        f"(between different pictures of the model: median {np.median(among.max(1)):.3f})"
    )


def identifier(*names: str) -> UID:
    """A DICOM UID that depends on the names only."""
    return generate_uid(entropy_srcs=["xraygpt-lite examples", *names])


def dicom(stored: npt.NDArray[np.uint16], name: str, **values: object) -> FileDataset:
    """A CR image with 12 bits stored in 16; `values` are further elements by keyword."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = identifier(name, "image")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(name, {}, file_meta=meta, preamble=b"\0" * 128)
    elements: dict[str, object] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "ImageType": ["DERIVED", "SECONDARY"],
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": identifier(name, "study"),
        "SeriesInstanceUID": identifier(name, "series"),
        "StudyDate": "20000101",
        "StudyTime": "000000",
        "AccessionNumber": "",
        "StudyID": "SYNTHETIC",
        "ReferringPhysicianName": "",
        "Manufacturer": "xraygpt-lite examples",
        "Modality": "CR",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "PatientName": "SYNTHETIC^EIGENRADIOGRAPH",
        "PatientID": "SYNTHETIC",
        "PatientBirthDate": "",
        "PatientSex": "",
        "PatientOrientation": ["L", "F"],
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "DerivationDescription": LABEL,
        "ImageComments": f"{LABEL} {ACKNOWLEDGEMENT}",
        "BurnedInAnnotation": "NO",
        "LossyImageCompression": "00",
        "ImagerPixelSpacing": [round(350 / SIZE, 4)] * 2,
        "SamplesPerPixel": 1,
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelData": stored.astype("<u2").tobytes(),
        **values,
    }
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    ds["PixelData"].VR = "OW"
    return ds


def monochrome1(picture: Float) -> FileDataset:
    """Bright = low. Stored 400..3700, rescaled by 0.5 x + 100 to 300..1950, which is the window."""
    stored = np.rint(400 + (1 - picture) * 3300).astype(np.uint16)
    return dicom(
        stored,
        "synthetic-cr-monochrome1",
        PhotometricInterpretation="MONOCHROME1",
        RescaleSlope="0.5",
        RescaleIntercept="100",
        RescaleType="US",
        WindowCenter="1125",
        WindowWidth="1650",
    )


def jpeg2000(picture: Float) -> FileDataset:
    """Bright = high, 0..4095, compressed without loss."""
    stored = np.rint(picture * 4095).astype(np.uint16)
    ds = dicom(
        stored,
        "synthetic-cr-jpeg2000",
        PhotometricInterpretation="MONOCHROME2",
        WindowCenter="2048",
        WindowWidth="4096",
    )
    ds.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    return ds


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the synthetic radiographs of this folder.")
    parser.add_argument("--data", type=Path, required=True, help="folder with nih128.zip and nih128.csv")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "examples")
    arguments = parser.parse_args()
    model = fit(arguments.data)
    picture, nearness = sample(model, PNG)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", LABEL)
    text.add_text("Source", ACKNOWLEDGEMENT)
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(
        arguments.output / "synthetic-normal.png", pnginfo=text, optimize=True
    )
    print("synthetic-normal.png", nearness)
    for name, recipe, make in (
        ("synthetic-cr-monochrome1.dcm", MONOCHROME1, monochrome1),
        ("synthetic-cr-jpeg2000.dcm", JPEG2000, jpeg2000),
    ):
        picture, nearness = sample(model, recipe)
        make(picture).save_as(arguments.output / name, enforce_file_format=True)
        print(name, nearness)


if __name__ == "__main__":
    main()
