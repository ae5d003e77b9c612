"""The shipped default model: it speaks its report language, repeats itself, and looks at the image."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import xraygpt_lite
from benchmarks.nih_tiny import report_language
from xraygpt_lite import compare, verify
from xraygpt_lite.bundle import store
from xraygpt_lite.model import XrayModel
from xraygpt_lite.values import Radiograph

ROWS = 16


@pytest.fixture(scope="module")
def model() -> Iterator[XrayModel]:
    with xraygpt_lite.load() as opened:
        yield opened


@pytest.fixture(scope="module")
def texts(model: XrayModel, shared: Path) -> dict[str, str]:
    """The summary of each of the 24 full-size radiographs."""
    return {path.name: model.summarize(path).text for path in sorted((shared / "data" / "png1024").glob("*.png"))}


def test_its_weights_are_small(model: XrayModel) -> None:
    assert sum(entry.size for entry in model.bundle.manifest.files) < 40e6


def test_every_summary_parses_and_differs_between_images(texts: dict[str, str], shared: Path) -> None:
    language = report_language()
    readings = {name: language.parse_report(text) for name, text in texts.items()}
    with (shared / "data" / "png1024" / "labels.csv").open(newline="") as file:
        normal = {row["image"]: row["findings"] == "No Finding" for row in csv.DictReader(file)}
    pairs = [(a, b) for a in texts for b in texts if normal[a] and not normal[b]]
    changed = sum(texts[a] != texts[b] for a, b in pairs) / len(pairs)
    assert changed >= 0.5
    assert {reading.abnormal for reading in readings.values()} == {True, False}


def test_the_same_image_gives_the_same_text(model: XrayModel, texts: dict[str, str], shared: Path) -> None:
    for name in list(texts)[:4]:
        assert model.summarize(shared / "data" / "png1024" / name).text == texts[name]


def test_summary_and_answers_agree_on_a_made_radiograph(model: XrayModel) -> None:
    """Needs no data: the statement, the yes/no answer and its score are one opinion."""
    language = report_language()
    for seed in range(4):
        radiograph = verify.test_radiograph(seed)
        stated = language.parse_report(model.summarize(radiograph).text).abnormal
        answer = model.summarize(radiograph, "Is this radiograph abnormal?").text
        score = model.score(radiograph, "Is this radiograph abnormal?", ("Yes", "No"))
        assert answer.startswith("Yes" if score["Yes"] > 0.5 else "No")
        assert language.parse(answer).abnormal == (score["Yes"] > 0.5)
        if abs(score["Yes"] - 0.5) > 0.2:
            assert stated == (score["Yes"] > 0.5)


def test_a_second_turn_keeps_to_what_the_first_said(model: XrayModel) -> None:
    """Two turns, as it was trained, on the examples: one answer in twelve may differ, see its card."""
    language = report_language()
    kept = []
    for radiograph in compare.check_images(None):
        for finding in ("Effusion", "Cardiomegaly", "Pneumothorax", "Atelectasis"):
            with model.chat(radiograph) as chat:
                summary = language.parse_report(chat.ask().text)
                answer = language.parse(chat.ask(language.finding_questions(finding)[0]).text)
            kept.append((finding in answer.present) == (finding in summary.present))
    assert (len(kept), sum(kept) >= 11) == (12, True)


@pytest.mark.parametrize("question", ["Hello", "¿Dónde está el corazón?", "List the ribs.", "Is it big?"])
def test_questions_it_never_saw_end_in_sentences(model: XrayModel, question: str) -> None:
    summary = model.summarize(verify.test_radiograph(2), question)
    assert summary.finish == "stop"
    assert summary.text.endswith(".")


def test_noise_in_place_of_the_image_is_noticed(model: XrayModel) -> None:
    """The image tokens of noise lie outside the tolerance that the self-test allows."""
    test = model.bundle.manifest.self_test
    draw = np.random.default_rng(0)
    noise = Radiograph(draw.random((256, 256), dtype=np.float32), "noise", "0" * 64)
    rows = model.tokens_of(noise).data
    assert rows.shape[1] == ROWS
    expected = np.array(test.embeddings, np.float32)
    off = np.abs(rows.reshape(-1)[list(test.positions)] - expected).max()
    assert off > 2 * test.tolerance * np.abs(expected).max()


def test_the_shipped_bundle_passes_its_own_checks() -> None:
    assert [check.name for check in verify.run(store.find(None)) if check.status == "failed"] == []
