"""How far a smaller model has moved from its reference: the same radiographs through both, figure by figure.

One model is opened at a time, so that two of full size need the memory of the larger one. Knows of a model only what
`XrayModel` shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import UsageError
from xraygpt_lite.imaging.read import read
from xraygpt_lite.model import XrayModel, open_bundle
from xraygpt_lite.scoring import log_softmax
from xraygpt_lite.values import Float32, Manifest, Radiograph

Float64 = npt.NDArray[np.float64]

MOST_TOKENS = 48
"""Greedy answers are compared over so many tokens."""

FIGURES: Mapping[str, str] = {
    "images": "radiographs that both models were given",
    "cosine_mean": "cosine of each image token with the reference's, mean",
    "cosine_worst": "the same, of the worst token",
    "relative_error": "largest difference of image tokens, relative to the largest value",
    "first_token_kl": "Kullback-Leibler divergence of the first answer token's distribution, nats, mean",
    "first_token_top1": "share of radiographs with the same likeliest first token",
    "texts_identical": f"share of greedy answers that are the same in their first {MOST_TOKENS} tokens",
}
"""What `agreement` gives, in this order."""

MEAN_COSINE, WORST_COSINE = 0.99, 0.95
"""Image tokens that agree less with the reference's are not good enough."""

SUFFIXES = frozenset({".dcm", ".png", ".jpg", ".jpeg", ".tif", ".tiff"})
"""Of the radiographs in a folder to compare on."""


@dataclass(frozen=True)
class Observation:
    """What a model makes of one radiograph.

    Attributes
    ----------
    tokens
        Image tokens, float32 (N, E).
    logits
        Of the answer's first token to the bundle's default question, float32 (V,).
    ids
        Of the greedy answer's beginning.
    """

    tokens: Float32
    logits: Float32
    ids: tuple[int, ...]


def observe(model: XrayModel, radiographs: Iterable[Radiograph]) -> Iterator[Observation]:
    """One observation a radiograph, as they are made. Raises as `XrayModel.summarize`."""
    for radiograph in radiographs:
        tokens = model.tokens_of(radiograph)
        ids = model.generate_ids(radiograph, None, MOST_TOKENS)
        yield Observation(tokens.data[0], model.trace(tokens, None, ids[:1] or (0,))[0], ids)


def agreement(seen: Sequence[Observation], reference: Sequence[Observation]) -> dict[str, float]:
    """The figures of `FIGURES`.

    Raises
    ------
    UsageError
        The models differ in more than precision: other numbers or widths of image tokens, or another vocabulary.
    """
    pairs = list(zip(seen, reference, strict=True))
    for one, other in pairs:
        if one.tokens.shape != other.tokens.shape or one.logits.shape != other.logits.shape:
            raise UsageError(
                f"these are different models: image tokens of shape {one.tokens.shape} and {other.tokens.shape}, "
                f"vocabularies of {len(one.logits)} and {len(other.logits)}; a comparison needs the same model twice"
            )
    cosines = np.concatenate([_cosines(one.tokens, other.tokens) for one, other in pairs])
    scale = max(float(np.abs(other.tokens).max()) for _, other in pairs)
    return {
        "images": float(len(pairs)),
        "cosine_mean": float(cosines.mean()),
        "cosine_worst": float(cosines.min()),
        "relative_error": max(float(np.abs(one.tokens - other.tokens).max()) for one, other in pairs) / scale,
        "first_token_kl": float(np.mean([_divergence(other.logits, one.logits) for one, other in pairs])),
        "first_token_top1": float(np.mean([one.logits.argmax() == other.logits.argmax() for one, other in pairs])),
        "texts_identical": float(np.mean([one.ids == other.ids for one, other in pairs])),
    }


def shortfall(figures: Mapping[str, float]) -> str | None:
    """What is not good enough, as the beginning of a sentence; None where all is."""
    mean, worst = figures["cosine_mean"], figures["cosine_worst"]
    if mean >= MEAN_COSINE and worst >= WORST_COSINE:
        return None
    return (
        f"the image tokens agree with the reference's by a cosine of {mean:.4f} on average and {worst:.4f} at worst, "
        f"and at least {MEAN_COSINE} and {WORST_COSINE} are good enough"
    )


def bundles(path: Path, against: Path, images: Path | None, *, device: str = "auto") -> dict[str, float]:
    """The figures of the bundle in one folder against a reference bundle in another.

    Parameters
    ----------
    images
        As `check_images` takes it.
    device
        As for `load`.

    Raises
    ------
    UsageError
        They are not the same model, or there is no radiograph to compare on.
    BundleError, ImageError, DeviceError, NativeError
        As `load` and `summarize`.
    """
    checked = [store.load(folder, Cache(None)) for folder in (against, path)]
    check_comparable(checked[1].manifest, checked[0].manifest)
    radiographs = check_images(images)
    observed = []
    for bundle in checked:
        with open_bundle(bundle, device=device) as model:
            observed.append(list(observe(model, radiographs)))
    return agreement(observed[1], observed[0])


def check_comparable(one: Manifest, other: Manifest) -> None:
    """Refuse two bundles that are given different pixels or prompts.

    Raises
    ------
    UsageError
        Names what differs.
    """
    for name in ("family", "image", "prompt"):
        if getattr(one, name) != getattr(other, name):
            raise UsageError(
                f"{one.name} and {other.name} differ in {name}; a comparison needs the same model in two precisions"
            )


def check_images(folder: Path | None) -> list[Radiograph]:
    """The radiographs of a folder, sorted by name, without its subfolders; None: the examples that are installed.

    Raises
    ------
    UsageError
        The folder holds no radiograph.
    ImageError
        A DICOM, PNG, JPEG or TIFF file in it cannot be read.
    """
    if folder is None:
        with resources.as_file(resources.files("xraygpt_lite.examples")) as examples:
            return [read(path) for path in image_files(examples)]
    return [read(path) for path in image_files(folder)]


def image_files(folder: Path) -> list[Path]:
    """The files that `check_images` reads, and raises as it does where there are none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; it must hold the radiographs to compare on")
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise UsageError(f"{folder} holds no .dcm, .png, .jpg or .tif file; radiographs to compare on are needed")
    return found


def _cosines(one: Float32, other: Float32) -> Float64:
    """Cosine of each row with its counterpart, (N,); 1 where both are zero."""
    wide, other_wide = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(other_wide, axis=1)
    products = (wide * other_wide).sum(1)
    same = (one == other).all(1)
    return np.where(same, 1.0, products / np.maximum(lengths, 1e-30))


def _divergence(reference: Float32, seen: Float32) -> float:
    """Σ p · (log p - log q) of the distributions that two rows of logits stand for, nats."""
    p, q = log_softmax(reference), log_softmax(seen)
    return max(0.0, float((np.exp(p) * (p - q)).sum()))
