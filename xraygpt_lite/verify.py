"""Whether a bundle is whole and answers on this machine as it did where it was made.

The input is generated, not stored: a chest-like picture made with integers, so that it is the same everywhere. What the
bundle recorded about it is compared within bounds that allow for rounding: healthy machines differ, because CPUs and
compilers add in different orders.

- Image tokens at the recorded positions may differ by `tolerance` of the largest one. float32 graphs differ by about
  1e-4 between CPUs and 1e-3 on a GPU (TF32): at most 1e-2 is allowed; int8 graphs round more: at most 1e-1. In both
  cases at most a quarter of what noise in place of the image gives, so that this is always noticed.
- The recorded answer is scored step by step. Builds of llama.cpp move logits by about 1e-2 to 1e-1, where the first
  token's logit stands 10 to 20 above the mean. The bound is 4 % of that height (8 % for quantized weights): a step
  whose recorded margin is larger must have the same first token, and the margins must agree within it on average,
  which another model's do not.

It knows of a model only what `XrayModel` shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xraygpt_lite import model as models
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import BundleError, DeviceError, MissingPackageError, NativeError, XrayError
from xraygpt_lite.llm import selftest
from xraygpt_lite.model import XrayModel
from xraygpt_lite.values import Bundle, Check, Float32, Manifest, Radiograph, SelfTest

_SIDE = 256
_POSITIONS = 256
_STEPS = 48
_FLOAT_TYPES = ("f32", "f16", "bf16")
_Grid = npt.NDArray[np.int64]


class _Bounds(NamedTuple):
    """Largest and smallest useful tolerance of image tokens; bound on margins, a share of the first logit's height."""

    largest: float
    smallest: float
    share: float


class _BuildError(NativeError):
    """Of llama.cpp: it runs no bundle here."""


_MACHINE = (DeviceError, MissingPackageError, _BuildError)
_FLOAT, _QUANTIZED = _Bounds(0.01, 0.001, 0.04), _Bounds(0.1, 0.02, 0.08)


def run(path: Path, *, device: str = "auto") -> list[Check]:
    """Check a bundle from the folder's names to the recorded answer; what follows a failure is skipped.

    Parameters
    ----------
    path
        The bundle's folder. Every file is hashed, whatever is cached.
    device
        As for `load`.

    Returns
    -------
    list of Check
        In the order they were made; the bundle is good when none has failed.

    Raises
    ------
    DeviceError, MissingPackageError, NativeError
        It cannot be tried on this machine in this way, or llama.cpp's build runs no bundle here, which says nothing of
        this one.
    """
    checks: list[Check] = []
    with ExitStack() as opened:
        failed = ""
        for name, step in _steps(path, device, opened):
            if failed:
                checks.append(Check(name, "skipped", f"not reached: {failed} failed"))
                continue
            try:
                checks.append(Check(name, "ok", step()))
            except XrayError as error:
                if isinstance(error, _MACHINE):
                    raise
                failed = name
                checks.append(Check(name, "failed", str(error)))
    return checks


def record(model: XrayModel, question: str | None = None, seed: int = 1) -> SelfTest:
    """What `run` will expect, from a model that is known to be right.

    Parameters
    ----------
    question
        None asks the bundle's default question.
    seed
        Of the generated radiograph.

    Raises
    ------
    BundleError
        When the test would prove nothing: noise in place of the radiograph gives the same image tokens or the same
        logits, the answer is empty, or no step of it is decided clearly enough.
    """
    manifest = model.bundle.manifest
    image = test_radiograph(seed)
    tokens, noise = model.tokens_of(image), model.tokens_of(_noise_radiograph(seed))
    positions = _positions(tokens.data.size)
    expected = tokens.data.reshape(-1)[positions]
    distance = _distance(noise.data.reshape(-1)[positions], expected)
    bounds = _bounds(manifest, "vision", "projector")
    tolerance = min(bounds.largest, distance / 4)
    if tolerance < bounds.smallest:
        raise BundleError(
            f"noise in place of a radiograph changes the image tokens by only {distance:.2g} of the largest; "
            f"at least {4 * bounds.smallest:.2g} is expected: vision and projector do not see the image"
        )
    ids = model.generate_ids(image, question, _STEPS)
    if not ids:
        raise BundleError("the model answers the self-test with nothing, so there is no answer to record")
    logits = model.trace(tokens, question, ids)
    margins = _margins(logits, ids)
    bound = _bounds(manifest, "llm").share * float(np.median(logits.max(-1) - logits.mean(-1)))
    if margins.max() <= bound or margins.min() < -bound:
        raise BundleError(
            f"the margins of the self-test's answer lie between {margins.min():.3g} and {margins.max():.3g}; expected "
            f"some above {bound:.3g} and none below {-bound:.3g}: another machine's rounding would change it"
        )
    moved = float(np.abs(model.trace(noise, question, ids) - logits).max())
    if moved <= bound:
        raise BundleError(
            f"noise in place of a radiograph moves the logits by only {moved:.2g}; more than {bound:.2g} is expected: "
            "the language model does not see the image"
        )
    return SelfTest(
        seed=seed,
        positions=tuple(int(p) for p in positions),
        embeddings=tuple(float(f"{value:.6g}") for value in expected),
        tolerance=float(f"{tolerance:.3g}"),
        question=manifest.prompt.default_question if question is None else question,
        ids=ids,
        margins=tuple(float(f"{value:.5g}") for value in margins),
        margin_bound=float(f"{bound:.3g}"),
    )


def test_radiograph(seed: int) -> Radiograph:
    """A chest-like picture, 256 × 256, the same on every machine: dark lungs crossed by ribs, heart, spine, diaphragm.

    Parameters
    ----------
    seed
        Moves and resizes the parts a little, and their grain.
    """
    y, x = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.int64)
    jitter = [int(value) for value in _hash(np.arange(8, dtype=np.int64), seed) % 17 - 8]
    lungs = np.zeros_like(x)
    for centre, move in ((78, jitter[0]), (178, jitter[1])):
        lungs = np.maximum(lungs, _lobe(x - centre - move // 2, y - 118 - jitter[2], 48, 92))
    inside = np.minimum(2 * lungs, 1024)
    ribs = np.abs((3 * y - (x - 128) ** 2 // 40 + jitter[3]) % 78 - 39)
    value = 150 + y // 8 - 112 * inside // 1024 + inside * ribs // 39 * 26 // 1024
    value += 96 * np.minimum(2 * _lobe(x - 142 - jitter[4], y - 160, 44 + jitter[5] // 2, 46), 1024) // 1024
    value += 34 * np.maximum(0, 16 - np.abs(x - 128)) // 16
    value += 80 * np.minimum(3 * _lobe(x - 76, y - 240 - jitter[6], 70, 44), 1024) // 1024
    value += 70 * np.minimum(3 * _lobe(x - 184, y - 246 - jitter[7], 66, 44), 1024) // 1024
    value += _hash(_SIDE * y + x, seed + 1) % 7 - 3
    edge = np.minimum(np.minimum(x, _SIDE - 1 - x), 24) * 1024 // 24
    return _radiograph(np.clip(value * (512 + edge // 2) // 1024, 0, 255), "self-test")


def notices_noise(model: XrayModel) -> bool:
    """Whether `run` would fail if the model saw noise in place of the test picture."""
    try:
        _check_tokens(model, _noise_radiograph(model.bundle.manifest.self_test.seed))
    except BundleError:
        return True
    return False


def _noise_radiograph(seed: int) -> Radiograph:
    y, x = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.int64)
    return _radiograph(_hash(_SIDE * y + x, seed) % 256, "noise")


def _steps(path: Path, device: str, opened: ExitStack) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names and steps in order; each step relies on those before it and returns what it found."""
    found: dict[str, Bundle] = {}
    running: list[XrayModel] = []

    def inspect() -> str:
        manifest, identity = store.inspect(path)
        found["bundle"] = Bundle(path, manifest, identity)
        return f"{manifest.name}, schema {manifest.schema}, {len(manifest.files)} files, id {identity[:12]}"

    def hashes() -> str:
        files = found["bundle"].manifest.files
        for entry in files:
            store.check_hash(path, entry, Cache(None))
        return f"{sum(entry.size for entry in files) / 1e6:.1f} MB hashed, all as listed"

    def header() -> str:
        store.check_llm(path, found["bundle"].manifest)
        store.check_graphs(path, found["bundle"].manifest)
        return f"both have the width {found['bundle'].manifest.width}"

    def native() -> str:
        verdict = selftest.probe(found["bundle"].llm)  # a child process: a file that crashes it does no harm here
        if not verdict.healthy:
            try:
                selftest.check(store.find(None) / "llm.gguf", Cache(None))
            except NativeError as error:
                raise _BuildError(str(error)) from error
            raise BundleError(f"llama.cpp runs the default bundle's, but not this llm.gguf: {verdict.cause}")
        return f"a child process decoded in {verdict.seconds:.1f} s"

    def load() -> str:
        running.append(opened.enter_context(models.open_bundle(found["bundle"], device=device)))
        return f"on {running[0].plan.device}, vision by {', '.join(running[0].providers)}"

    yield "manifest and files", inspect
    yield "sha256 of every file", hashes
    yield "language model fits projector", header
    yield "language model runs", native
    yield "model opens", load
    yield "image tokens", lambda: _check_tokens(running[0], test_radiograph(running[0].bundle.manifest.self_test.seed))
    yield "recorded answer", lambda: _check_answer(running[0])


def _check_tokens(model: XrayModel, picture: Radiograph) -> str:
    test = model.bundle.manifest.self_test
    tokens = model.tokens_of(picture).data.reshape(-1)
    distance = _distance(tokens[list(test.positions)], np.asarray(test.embeddings, np.float32))
    if not distance <= test.tolerance:
        raise BundleError(
            f"the image tokens of the test picture differ by {distance:.2g} of the largest from the recorded ones; at "
            f"most {test.tolerance:.2g} is rounding: vision.onnx or projector.onnx is another model's, or runs wrongly"
        )
    return f"differ by {distance:.1e} of the largest, at most {test.tolerance:.2g} is allowed"


def _check_answer(model: XrayModel) -> str:
    test = model.bundle.manifest.self_test
    logits = model.trace(model.tokens_of(test_radiograph(test.seed)), test.question, test.ids)
    margins, recorded = _margins(logits, test.ids), np.asarray(test.margins)
    clear = recorded > test.margin_bound
    wrong = np.flatnonzero(clear & ~(margins > 0))
    drift = float(np.abs(margins - recorded).mean())
    if wrong.size:
        raise BundleError(
            f"step {wrong[0] + 1} of the recorded answer has another first token here, although its margin was "
            f"{recorded[wrong[0]]:.2g} and {test.margin_bound:.2g} is rounding: llm.gguf is another model's, or runs "
            "wrongly here"
        )
    if not drift <= test.margin_bound:
        raise BundleError(
            f"the margins of the recorded answer differ by {drift:.2g} on average, and {test.margin_bound:.2g} is "
            "rounding: llm.gguf is another model's, or runs wrongly here"
        )
    return f"{int(clear.sum())} of {len(recorded)} steps decided clearly, all agree; margins differ by {drift:.1e}"


def _bounds(manifest: Manifest, *roles: str) -> _Bounds:
    return _FLOAT if all(manifest.weight_types[role].lower() in _FLOAT_TYPES for role in roles) else _QUANTIZED


def _positions(size: int) -> npt.NDArray[np.int64]:
    """At most 256 positions spread over all rows and, by a step aside each time, over all columns."""
    count = min(_POSITIONS, size)
    step = size // count
    index = np.arange(count, dtype=np.int64)
    return index * step + index % step


def _distance(seen: Float32, expected: Float32) -> float:
    """Largest |difference| relative to the largest |expected|."""
    return float(np.abs(seen - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def _margins(logits: Float32, ids: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Logit of each id minus the largest of the others, (n,); positive where the id is the arg-max."""
    rest = logits.astype(np.float64)
    rows = np.arange(len(ids))
    chosen = rest[rows, list(ids)]
    rest[rows, list(ids)] = -np.inf
    margins: npt.NDArray[np.float64] = chosen - rest.max(-1)
    return margins


def _lobe(dx: _Grid, dy: _Grid, a: int, b: int) -> _Grid:
    """A smooth hill over an ellipse with the half-axes a and b: 1024 in the middle, 0 at the rim and outside."""
    hill: _Grid = np.maximum(0, 1024 - 1024 * (dx**2 * b**2 + dy**2 * a**2) // (a**2 * b**2))
    return hill


def _hash(index: _Grid, seed: int) -> _Grid:
    """Whole numbers below 2**16 that look random; only integers, so they are the same everywhere."""
    value = (index + 0x9E3779B9 * (seed % 65536 + 1)) & 0xFFFFFFFF
    for factor in (0x45D9F3B, 0x45D9F3B):
        value = ((value ^ (value >> 16)) * factor) & 0xFFFFFFFF
    return (value ^ (value >> 16)) & 0xFFFF


def _radiograph(values: _Grid, name: str) -> Radiograph:
    data = values.astype(np.uint8)
    return Radiograph(data.astype(np.float32) / np.float32(255), name, hashlib.sha256(data.tobytes()).hexdigest())
