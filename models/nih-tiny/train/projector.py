"""Stage (c): thresholds for the evidence, cached features, and the projector that carries them to the decoder.

The classifier heads are linear and read the mean over the grid, so a row's features give evidence by one linear map.
Its zero is set on val: `abnormal` where balanced accuracy is best, a finding where it is called about as often as it
occurs. Knows features and heads; the texts and the loop are those of stage (b).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from decoder import Source
from dialogue import EVIDENCE, sample_evidence
from encoder import normalize
from torch import Tensor, nn
from torch.nn import functional as F

from xraygpt_lite.converters.families.nih_tiny import GridEncoder

LABELS = len(EVIDENCE)
CALLS = 1.3
"""A finding is called this many times as often as it is labelled: one more false than missed, not many."""

SHARE = 0.5
"""Weight of the findings' mean evidence in that of `abnormal`; chosen on val (AUC 0.754 → 0.756)."""


@dataclass(frozen=True)
class Evidence:
    """features (…, F) → evidence (…, 15): weight (15, F), bias (15,); 0 = threshold, 1 = one standard deviation."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


def trained(path: Path) -> GridEncoder:
    """The encoder of stage (a), with its averaged weights."""
    encoder = GridEncoder()
    encoder.load_state_dict(torch.load(path, weights_only=True)["average"])
    return encoder.eval()


@torch.no_grad()
def features_of(encoder: GridEncoder, images: np.ndarray, mirror: bool = False) -> Tensor:
    """uint8 (n, S, S) → float16 (n, 16, F)."""
    out = []
    for start in range(0, len(images), 128):
        x = normalize(images[start : start + 128])
        out.append(encoder((x.flip(3) if mirror else x).contiguous(memory_format=torch.channels_last)).half())
    return torch.cat(out)


def calibrate(encoder: GridEncoder, features: Tensor, labels: np.ndarray) -> Evidence:
    """Scale and thresholds from the features (n, 16, F) and labels (n, 15) of val."""
    weight, bias = encoder.head.weight[:LABELS].detach(), encoder.head.bias[:LABELS].detach()
    logits = F.linear(features.float().mean(1), weight, bias)
    scale = logits.std(0)
    rates = torch.from_numpy(labels.mean(0)) * CALLS
    thresholds = torch.stack([logits[:, n].quantile(1 - rates[n].clamp(0.002, 0.5)) for n in range(LABELS)])
    thresholds[-1] = _even_threshold(logits[:, -1].numpy(), labels[:, -1])
    return Evidence(weight / scale[:, None], (bias - thresholds) / scale)


def with_findings(evidence: Evidence, features: Tensor, labels: np.ndarray) -> Evidence:
    """The same, with the findings' mean evidence in that of `abnormal`: what speaks for any of them speaks for it.

    Scale and threshold of `abnormal` are set anew on val, features (n, 16, F) and labels (n, 15).
    """
    weight, bias = evidence.weight.clone(), evidence.bias.clone()
    weight[-1] += SHARE * weight[:-1].mean(0)
    bias[-1] += SHARE * bias[:-1].mean()
    logits = F.linear(features.float().mean(1), weight[-1:], bias[-1:])[:, 0]
    scale, threshold = logits.std(), _even_threshold(logits.numpy(), labels[:, -1])
    weight[-1] /= scale
    bias[-1] = (bias[-1] - threshold) / scale
    return Evidence(weight, bias)


def retarget(projector: nn.Linear, old: Evidence, new: Evidence) -> nn.Linear:
    """Let the decoder, which learned to read `old` through this projector, read `new`: linear, so nothing is trained.

    The pseudo-inverse of `old` gives the direction in features, and so in embeddings, that moves one evidence alone.
    """
    with torch.no_grad():
        directions = projector.weight @ torch.linalg.pinv(old.weight)
        projector.bias += directions @ (new.bias - old.bias)
        projector.weight += directions @ (new.weight - old.weight)
    return projector


def settle(projector: nn.Linear, evidence: Evidence, features: Tensor, odds: np.ndarray, labels: np.ndarray) -> float:
    """Let the whole model's answers change sign where the evidence of `abnormal` does; returns how far they were off.

    The decoder need not change its mind exactly there: on val the first `odds` (n,), the log-odds of its answers for
    features (n, 16, F) and labels (n, 15), were 0.5 where the evidence was zero. Nor are they without a trace of the
    other findings' evidence. Both are linear, and taken out.
    """
    found = evidence(features.float().mean(1))
    means, off = found.mean(0), _even_threshold(odds, labels[:, -1])
    fitted = np.linalg.lstsq(np.c_[found.numpy(), np.ones(len(odds))], odds, rcond=None)[0]
    traces = torch.from_numpy(fitted[:-2] / fitted[-2]).float()
    weight, bias = evidence.weight.clone(), evidence.bias.clone()
    weight[-1] -= traces @ evidence.weight[:-1]
    bias[-1] -= traces @ (evidence.bias[:-1] - means[:-1]) + off / fitted[-2]
    retarget(projector, evidence, Evidence(weight, bias))
    return off


def _even_threshold(logits: np.ndarray, labels: np.ndarray) -> float:
    """Where a logistic fit gives the prevalence: best balanced accuracy if the fit holds, steadier than a search."""
    x = torch.from_numpy((logits - logits.mean()) / logits.std()).double()
    y = torch.from_numpy(labels).double()
    line = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(line[0] + line[1] * x, y)
        value.backward()
        return value

    optimizer.step(loss)
    offset, slope = line.tolist()
    rate = float(labels.mean())
    return float(logits.mean() + logits.std() * (np.log(rate / (1 - rate)) - offset) / slope)


def new_projector(evidence: Evidence, image_map: nn.Linear) -> nn.Linear:
    """The heads' evidence followed by stage (b)'s image map, as one linear layer F → E."""
    projector = nn.Linear(evidence.weight.shape[1], image_map.out_features)
    with torch.no_grad():
        projector.weight.copy_(image_map.weight @ evidence.weight)
        projector.bias.copy_(image_map.weight @ evidence.bias + image_map.bias)
    return projector


def on_images(features: Tensor, evidence: Evidence, *, made: float, jitter: float, abnormal: float) -> Source:
    """A `Source` of real features.

    Features are moved along the directions that the heads read, so that rare findings and every range of evidence are
    seen on the scatter of real images.

    Parameters
    ----------
    made
        Share of images whose evidence is replaced by made-up evidence.
    jitter
        Standard deviation of what is added to the evidence of the others.
    abnormal
        Share of images whose own evidence is abnormal.
    """
    found = torch.cat([evidence(part.float().mean(1)) for part in features.split(2048)]).numpy()
    groups = [np.flatnonzero(found[:, -1] <= 0), np.flatnonzero(found[:, -1] > 0)]
    inverse = torch.linalg.pinv(evidence.weight)

    def source(rng: random.Random, n: int) -> tuple[Tensor, np.ndarray]:
        rows = [int(rng.choice(groups[rng.random() < abnormal])) for _ in range(n)]
        inputs, wanted = features[rows].float(), found[rows].copy()
        for k in range(n):
            drawn = rng.random() < made
            wanted[k] = sample_evidence(rng) if drawn else [value + rng.gauss(0, jitter) for value in wanted[k]]
        shift = torch.from_numpy(wanted - found[rows]) @ inverse.T
        return inputs + shift[:, None], wanted

    return source


def cached_features(encoder: GridEncoder, images: np.ndarray, path: Path) -> Tensor:
    """Features of every image and its mirror image, float16 (2n, 16, F), kept at `path`."""
    if not path.exists():
        both = torch.cat([features_of(encoder, images), features_of(encoder, images, mirror=True)])
        part = path.with_suffix(".part")
        torch.save(both, part)
        part.replace(path)
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]
