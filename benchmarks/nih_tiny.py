"""Does nih-tiny look at the image? Every figure of its card, from a bundle, through the public API.

    python -m benchmarks.nih_tiny [--images X.zip --labels X.csv] [--bundle B] [--reference B32] [--json]

Each image is asked for its greedy summary and for the yes/no answers that the bundle lists; these also for the mirror
image, and a score is the mean of the two log-odds. Intervals are 95 %, from a bootstrap over patients. `--reference`
is the same model with a float32 language model (the training command leaves one in its work folder). Without it the
bundle is compared with its own weights in float32: that tells what 8-bit sums cost, not what rounding the weights did.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import xraygpt_lite
from xraygpt_lite.bundle.manifest import dump
from xraygpt_lite.imaging.read import read
from xraygpt_lite.llm.library import library, set_fields
from xraygpt_lite.llm.quantize import FILE_TYPES
from xraygpt_lite.model import XrayModel, checked
from xraygpt_lite.values import FileEntry
from xraygpt_lite.verify import notices_noise

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "nih-chestxray14"
LANGUAGE = ROOT / "models" / "nih-tiny" / "train" / "language.py"
ABNORMAL = "Abnormal"
RARE = "Hernia"
RESAMPLES = 1000
SEED = 0

Array = npt.NDArray[np.float64]


def report_language() -> Any:
    """The module of the report language, which lies beside the training code and is in no package."""
    name = "nih_tiny_report_language"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, LANGUAGE)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(LANGUAGE)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@dataclass(frozen=True)
class Case:
    """One labelled image of the data set's format."""

    name: str
    patient: str
    findings: frozenset[str]


@dataclass(frozen=True)
class Answers:
    """What one bundle said: odds float64 (n, K, 2), the log-odds of yes for image and mirror image; n summaries."""

    names: tuple[str, ...]
    odds: Array
    texts: tuple[str, ...]
    seconds: float


def cases_of(labels: Path, split: str | None) -> list[Case]:
    """The table's rows of `split`; None takes the test split where the table has one, else every row."""
    with labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = split or ("test" if any(row.get("split") == "test" for row in rows) else None)
    return [
        Case(row["image"], row.get("patient") or row["image"], frozenset(row["findings"].split("|")) - {"No Finding"})
        for row in rows
        if wanted is None or row.get("split") == wanted
    ]


def ask(model: XrayModel, images: Path, cases: Sequence[Case], tell: Callable[[int], None]) -> Answers:
    """Summaries and log-odds for every case, in order."""
    names = tuple(spec.name for spec in model.bundle.manifest.prompt.findings)
    odds, texts = np.empty((len(cases), len(names), 2)), []
    began = time.monotonic()
    with zipfile.ZipFile(images) as archive:
        inside = {Path(name).name: name for name in archive.namelist()}
        for n, case in enumerate(cases):
            radiograph = read(archive.read(inside[case.name]))
            mirrored = replace(radiograph, pixels=np.ascontiguousarray(radiograph.pixels[:, ::-1]))
            texts.append(model.summarize(radiograph).text)
            for side, picture in enumerate((radiograph, mirrored)):
                p = np.array([finding.probability for finding in model.findings(picture)], np.float64)
                odds[n, :, side] = np.log(p.clip(1e-12)) - np.log((1 - p).clip(1e-12))
            tell(n + 1)
    return Answers(names, odds, tuple(texts), time.monotonic() - began)


def auc(truth: npt.NDArray[np.bool_], scores: Array) -> float:
    """Area under the ROC curve by ranks, ties counted half; NaN where a class is absent."""
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return float("nan")
    _, order, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[order]
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def balanced_accuracy(truth: npt.NDArray[np.bool_], said: Array) -> float:
    """Mean of sensitivity and specificity; `said` is 1, 0 or, where nothing was said, NaN, which counts as wrong."""
    if truth.all() or not truth.any():
        return float("nan")
    return float(((said[truth] == 1).mean() + (said[~truth] == 0).mean()) / 2)


def truth_of(cases: Sequence[Case], names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """bool (n, K): the labels in the order of the bundle's findings."""
    return np.array([[bool(c.findings) if name == ABNORMAL else name in c.findings for name in names] for c in cases])


def bootstrap(cases: Sequence[Case], figures: Callable[[npt.NDArray[np.int64]], dict[str, float]]) -> dict[str, Any]:
    """Each figure of all rows, and its interval (2.5 % and 97.5 %) under resampling of patients."""
    patients: dict[str, list[int]] = {}
    for n, case in enumerate(cases):
        patients.setdefault(case.patient, []).append(n)
    groups = [np.array(rows) for rows in patients.values()]
    draw = np.random.default_rng(SEED)
    drawn = [
        figures(np.concatenate([groups[g] for g in draw.integers(0, len(groups), len(groups))]))
        for _ in range(RESAMPLES)
    ]
    result: dict[str, Any] = {}
    for key, value in figures(np.arange(len(cases))).items():
        result[key] = value
        spread = np.array([each[key] for each in drawn])
        spread = spread[~np.isnan(spread)]
        result[f"{key}_interval"] = np.quantile(spread, (0.025, 0.975)).tolist() if len(spread) else None
    return result


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def accuracy(cases: Sequence[Case], answers: Answers, said: Array) -> dict[str, Any]:
    """AUCs of the yes/no answers and balanced accuracy of the summaries' own statement, with intervals."""
    truth, odds = truth_of(cases, answers.names), answers.odds.mean(-1)
    whole = answers.names.index(ABNORMAL)
    listed = [n for n, name in enumerate(answers.names) if name not in (ABNORMAL, RARE)]

    def figures(rows: npt.NDArray[np.int64]) -> dict[str, float]:
        each = {answers.names[n]: auc(truth[rows, n], odds[rows, n]) for n in listed}
        return {
            "macro_auc_13": _mean(list(each.values())),
            "normal_abnormal_auc": auc(truth[rows, whole], odds[rows, whole]),
            "balanced_accuracy": balanced_accuracy(truth[rows, whole], said[rows]),
            **{f"auc_{name}": value for name, value in each.items()},
        }

    return bootstrap(cases, figures)


def consistency(cases: Sequence[Case], answers: Answers) -> tuple[dict[str, Any], Array]:
    """The summaries against the yes/no answers and each other; also their statements (1, 0 or NaN), float64 (n,)."""
    language = report_language()
    yes, names = answers.odds[:, :, 0] >= 0, answers.names
    said, agree, refused = np.full(len(cases), np.nan), [], []
    for n, text in enumerate(answers.texts):
        try:
            reading = language.parse_report(text)
        except language.LanguageError as error:
            refused.append(f"{cases[n].name}: {error}")
            continue
        said[n] = float(reading.abnormal)
        agree.append([(name in reading.present) == yes[n, k] for k, name in enumerate(names) if name != ABNORMAL])
    swapped, changed = np.random.default_rng(SEED), []
    truth = truth_of(cases, names)[:, names.index(ABNORMAL)]
    for _ in range(RESAMPLES if truth.any() and not truth.all() else 0):
        normal, abnormal = swapped.choice(np.flatnonzero(~truth)), swapped.choice(np.flatnonzero(truth))
        changed.append(answers.texts[normal] != answers.texts[abnormal])
    return {
        "statement_agreement": float((said == yes[:, names.index(ABNORMAL)]).mean()),
        "finding_agreement": float(np.mean(agree)) if agree else 0.0,
        "parse_failures": len(refused),
        "refused": refused[:5],
        "called_abnormal": float(np.nanmean(said)) if agree else float("nan"),
        "swap_changes": float(np.mean(changed)) if changed else float("nan"),
        "distinct_texts": len(set(answers.texts)),
        "seconds": answers.seconds,
    }, said


def measure(bundle: str | None, images: Path, cases: Sequence[Case], label: str) -> tuple[Answers, dict[str, Any]]:
    """All figures of one bundle; its first summaries are asked for twice, for `repeatable`."""

    def tell(done: int) -> None:
        if done % 50 == 0 or done == len(cases):
            print(f"{label}: {done} of {len(cases)} images", file=sys.stderr, flush=True)

    with xraygpt_lite.load(bundle) as model:
        answers = ask(model, images, cases, tell)
        first = ask(model, images, cases[:10], lambda _: None).texts
        noticed = notices_noise(model)
    figures, said = consistency(cases, answers)
    figures |= {"repeatable": first == answers.texts[:10], "verify_notices_noise": noticed}
    return answers, {"images": len(cases), **accuracy(cases, answers, said), **figures}


def compare(quantized: dict[str, Any], reference: dict[str, Any], texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What quantization costs: drops of the two AUCs and the share of identical summaries."""
    return {
        "reference_macro_auc_13": reference["macro_auc_13"],
        "reference_normal_abnormal_auc": reference["normal_abnormal_auc"],
        "macro_auc_13_drop": reference["macro_auc_13"] - quantized["macro_auc_13"],
        "normal_abnormal_auc_drop": reference["normal_abnormal_auc"] - quantized["normal_abnormal_auc"],
        "identical_texts": float(np.mean([a == b for a, b in texts])),
    }


def widened(bundle: str | None, folder: Path) -> Path:
    """A copy of a bundle in `folder`, its language model's weights as they are, but in float32."""
    found = checked(bundle)
    manifest = found.manifest
    shutil.copytree(found.folder, folder)
    lib = library()
    params = lib.llama_model_quantize_default_params()
    set_fields(params, ftype=FILE_TYPES["f32"], allow_requantize=True)
    target = folder / found.llm.name
    if lib.llama_model_quantize(os.fsencode(found.llm), os.fsencode(target), params):
        raise SystemExit(f"llama.cpp could not widen {found.llm}")
    entry = FileEntry(target.name, hashlib.sha256(target.read_bytes()).hexdigest(), target.stat().st_size)
    files = tuple(entry if file.name == target.name else file for file in manifest.files)
    types = {**manifest.weight_types, "llm": "f32"}
    (folder / "bundle.json").write_bytes(dump(replace(manifest, files=files, weight_types=types)))
    return folder


def table(figures: dict[str, Any]) -> str:
    """One line a figure, with its interval where it has one."""
    lines = []
    for key, value in figures.items():
        if key.endswith("_interval"):
            continue
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        interval = figures.get(f"{key}_interval")
        lines.append(f"{key:32} {shown}" + (f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; the arguments are those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=DATA / "nih128.zip")
    parser.add_argument("--labels", type=Path, default=DATA / "nih128.csv")
    parser.add_argument("--split", help="rows to take; default: test where the table has it, else all")
    parser.add_argument("--bundle", help="name or folder; default: the shipped one")
    parser.add_argument("--reference", help="the float32 twin, to compare with")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    cases = cases_of(options.labels, options.split)
    if not cases:
        parser.error(f"{options.labels} has no rows of this split")
    answers, figures = measure(options.bundle, options.images, cases, "bundle")
    with tempfile.TemporaryDirectory() as folder:
        twin = options.reference or str(widened(options.bundle, Path(folder, "float32")))
        other, reference = measure(twin, options.images, cases, "reference")
    figures |= compare(figures, reference, list(zip(answers.texts, other.texts, strict=True)))
    figures["reference"] = "the float32 model" if options.reference else "the same weights in float32"
    print(table(figures))
    if options.json:
        known = {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in figures.items()}
        print(json.dumps(known, allow_nan=False))


if __name__ == "__main__":
    main()
