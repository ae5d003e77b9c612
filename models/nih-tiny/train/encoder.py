"""Stage (a): train the towers of the encoder on the findings, one after another, resumably.

Each tower is a classifier of its own: mean over the grid, one linear layer, 15 sigmoid outputs, and view, sex and age
as side tasks. What is kept is an exponential moving average of its weights.
"""

from __future__ import annotations

import logging
import math
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from data import FINDINGS, Split, auc
from torch import Tensor, nn
from torch.nn import functional as F

from xraygpt_lite.converters.families.nih_tiny import GridEncoder

log = logging.getLogger(__name__)
MEAN, STD = 0.5, 0.25
LABELS = len(FINDINGS) + 1


def normalize(images: np.ndarray) -> Tensor:
    """uint8 (n, S, S) → float32 (n, 1, S, S), the arithmetic of the bundle's image spec."""
    return (torch.from_numpy(images).float().unsqueeze(1) / 255 - MEAN) / STD


def augment(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random small rotation, zoom, shift and mirror; gamma and contrast; one erased rectangle in some.

    float32 (n, 1, S, S) → (n, 1, size, size).
    """
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    angle, zoom = uniform(-0.2, 0.2), uniform(0.82, 1.12)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([
        torch.stack([cos * mirror, -sin, uniform(-0.1, 0.1)], 1),
        torch.stack([sin * mirror, cos, uniform(-0.1, 0.1)], 1),
    ], 1)  # fmt: skip
    grid = F.affine_grid(theta, [n, 1, size, size], align_corners=False)
    unit = F.grid_sample(x * STD + MEAN, grid, align_corners=False, padding_mode="zeros").clamp(0, 1)
    unit = unit.pow(uniform(-0.35, 0.35).exp().view(n, 1, 1, 1))
    unit = ((unit - 0.5) * uniform(0.75, 1.25).view(n, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1).view(n, 1, 1, 1)).clamp(0, 1)
    side = uniform(0.1, 0.35) * size
    top, left = uniform(0, 1) * size - side / 2, uniform(0, 1) * size - side / 2
    at = torch.arange(size).float()
    rows = (at >= top[:, None]) & (at < (top + side)[:, None])
    columns = (at >= left[:, None]) & (at < (left + side)[:, None])
    erased = rows[:, None, :, None] & columns[:, None, None, :] & (uniform(0, 1) < 0.3).view(n, 1, 1, 1)
    return (torch.where(erased, torch.rand(n, 1, 1, 1, generator=generator), unit) - MEAN) / STD


def classify(model: nn.ModuleDict, x: Tensor) -> Tensor:
    """(n, 1, S, S) → (n, 15 + 3) logits."""
    return model["head"](model["drop"](model["tower"](x).mean((2, 3))).float())  # type: ignore[no-any-return]


@torch.inference_mode()
def predict(model: nn.ModuleDict, images: np.ndarray) -> np.ndarray:
    """Mean over image and mirror image of the 15 logits, float32 (n, 15)."""
    model.eval()
    out = []
    for start in range(0, len(images), 128):
        x = normalize(images[start : start + 128]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            both = classify(model, x) + classify(model, x.flip(3))
        out.append(both[:, :LABELS].float() / 2)
    return torch.cat(out).numpy()


def macro(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Macro-AUC over the 13 findings without Hernia, and the AUC of normal / abnormal."""
    each = [auc(labels[:, n], scores[:, n]) for n, name in enumerate(FINDINGS) if name != "Hernia"]
    return float(np.nanmean(each)), auc(labels[:, -1], scores[:, -1])


def train_tower(
    index: int, train: Split, val: Split, path: Path, seed: int, cycles: tuple[int, ...], batch: int = 64
) -> None:
    """Train tower `index` and save it at `path` after every epoch; continue from there where a run was cut.

    `cycles` are epochs of one learning-rate cycle each. The first begins at 96 pixels, for most of the learning at half
    the cost; a later one restarts from the averaged weights, at 128 pixels and half the rate.
    """
    torch.manual_seed(seed + index)
    source = GridEncoder(towers=1)
    model = nn.ModuleDict({"tower": source.towers[0], "head": source.heads[0], "drop": nn.Dropout(0.3)})
    model = model.to(memory_format=torch.channels_last)
    average = deepcopy(model).requires_grad_(False)
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=2e-3
    )
    steps = len(train.images) // batch
    ends = np.cumsum(cycles)
    start, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["epoch"] >= ends[-1]:
            return
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["epoch"], state["seconds"]
    images = normalize(train.images)
    labels = torch.from_numpy(train.labels)
    side = torch.from_numpy(train.side)
    for epoch in range(start, int(ends[-1])):
        cycle = int(np.searchsorted(ends, epoch, side="right"))
        first = int(ends[cycle]) - cycles[cycle]
        if cycle and epoch == first:
            model.load_state_dict(average.state_dict())
            optimizer.state.clear()
        peak, total = (2e-3, 1e-3)[bool(cycle)], steps * cycles[cycle]
        size = 96 if epoch < 0.65 * cycles[0] else 128
        generator = torch.Generator().manual_seed(1000 * (seed + index) + epoch)
        began, losses = time.monotonic(), []
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            now = (epoch - first) * steps + step
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, now / 300) * 0.5 * (1 + math.cos(math.pi * now / total))
            rows = order[step * batch : (step + 1) * batch]
            x, y, z = augment(images[rows], size, generator), labels[rows], side[rows]
            mix = torch.distributions.Beta(0.3, 0.3).sample((len(rows), 1)).clamp(0, 1)
            mix = torch.maximum(mix, 1 - mix)
            x = mix[..., None, None] * x + (1 - mix[..., None, None]) * x.flip(0)
            y, z = mix * y + (1 - mix) * y.flip(0), mix * z + (1 - mix) * z.flip(0)
            with torch.autocast("cpu", torch.bfloat16):
                logits = classify(model, x.to(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits[:, :LABELS], y)
            loss = loss + 0.1 * F.binary_cross_entropy_with_logits(logits[:, LABELS:], z)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            with torch.no_grad():
                seen = epoch * steps + step
                keep = min(0.998, (1 + seen) / (10 + seen))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
                for mean, value in zip(average.buffers(), model.buffers(), strict=True):
                    mean.copy_(value)
        seconds += time.monotonic() - began
        findings, normal = macro(val.labels, predict(average, val.images))
        log.info("tower %d epoch %d/%d loss %.4f val macro-AUC %.4f normal %.4f, %.0f s in all",
                 index, epoch + 1, ends[-1], float(np.mean(losses)), findings, normal, seconds)  # fmt: skip
        part = path.with_suffix(".part")
        torch.save({"epoch": epoch + 1, "seconds": seconds, "model": model.state_dict(),
                    "average": average.state_dict(), "optimizer": optimizer.state_dict()}, part)  # fmt: skip
        part.replace(path)
