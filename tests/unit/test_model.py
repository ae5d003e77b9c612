"""The main path on a real tiny bundle: what goes in comes out, nothing leaks, and the fast ways equal the slow ones."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_bundle

from xraygpt_lite import model as models
from xraygpt_lite import prompt
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.errors import BundleError, ClosedError, ContextError, ImageError, UsageError
from xraygpt_lite.imaging.read import read
from xraygpt_lite.imaging.transform import transform
from xraygpt_lite.model import XrayModel
from xraygpt_lite.values import GenerationOptions

RNG = np.random.default_rng(7)
IMAGES = [RNG.integers(0, 256, (40, 32), dtype=np.uint8) for _ in range(4)]


@pytest.fixture(scope="module")
def model(made_bundle: Path) -> Iterator[XrayModel]:
    with models.open_bundle(store.load(made_bundle, Cache(None)), threads=1, context=256, float32_cache=True) as opened:
        yield opened


def test_a_summary_tells_how_it_came_about(model: XrayModel) -> None:
    summary = model.summarize(IMAGES[0], "How large is the heart?", GenerationOptions(max_tokens=6))
    assert summary.question == "How large is the heart?"
    assert summary.bundle_id == model.bundle.id
    assert summary.options.max_tokens == 6
    assert summary.disclaimer == "Research use, not a medical device."
    assert 0 < summary.answer_tokens <= 6
    assert summary.image_tokens == 4
    engine, variant = model._engine, model.bundle.manifest.prompt.variants["demo"]
    around = [prompt.prefix(variant, np.zeros((4, 32), np.float32), engine.tokenize)[0],
              prompt.question_part(variant, summary.question, engine.tokenize)]  # fmt: skip
    assert summary.prompt_tokens == sum(map(len, around))


def test_the_same_image_gives_the_same_text_and_another_image_another(model: XrayModel) -> None:
    texts = [model.summarize(image).raw_text for image in IMAGES]
    assert texts == [model.summarize(image).raw_text for image in IMAGES]
    assert len(set(texts)) > 1


def test_no_state_leaks_from_one_image_to_the_next(model: XrayModel) -> None:
    first = model.summarize(IMAGES[0]).raw_text
    model.summarize(IMAGES[1])
    assert model.summarize(IMAGES[0]).raw_text == first


def test_stream_gives_the_summary_piece_by_piece(model: XrayModel) -> None:
    with model.stream(IMAGES[0]) as stream:
        pieces = list(stream)
    assert "".join(pieces) == stream.summary.raw_text.lstrip()
    assert stream.summary.raw_text == model.summarize(IMAGES[0]).raw_text


def test_a_closed_stream_has_no_summary_and_frees_its_sequence(model: XrayModel) -> None:
    stream = model.stream(IMAGES[0])
    next(stream)
    stream.close()
    with pytest.raises(ClosedError, match="cancelled before its end"):
        _ = stream.summary
    assert model.summarize(IMAGES[0]).answer_tokens


def test_a_stream_that_is_dropped_frees_its_sequence(model: XrayModel) -> None:
    next(model.stream(IMAGES[0]))
    gc.collect()
    assert model.summarize(IMAGES[0]).answer_tokens


def test_threads_get_what_each_would_get_alone(model: XrayModel) -> None:
    alone = [model.summarize(image).raw_text for image in IMAGES]
    with ThreadPoolExecutor(4) as pool:
        assert [summary.raw_text for summary in pool.map(model.summarize, IMAGES)] == alone


def test_bytes_paths_arrays_and_radiographs_are_the_same_image(model: XrayModel, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "image.png"
    Image.fromarray(IMAGES[0]).save(path)
    texts = {model.summarize(image).raw_text for image in (path, str(path), path.read_bytes(), IMAGES[0])}
    assert texts == {model.summarize(model.study(path).radiograph).raw_text}


def test_score_is_the_softmax_of_summed_log_probabilities(model: XrayModel) -> None:
    question, choices = "Is there an effusion?", ["yes", "no", "n"]
    scores = model.score(IMAGES[0], question, choices)
    sums = []
    for choice in choices:
        ids = model._engine.tokenize(choice, leading_space=False).tolist()
        logits = model.trace(model.tokens_of(IMAGES[0]), question, ids).astype(np.float64)
        sums.append(
            sum(
                row[i] - math.log(np.exp(row - row.max()).sum()) - row.max() for row, i in zip(logits, ids, strict=True)
            )
        )
    expected = np.exp(np.array(sums) - max(sums))
    assert list(scores) == choices
    np.testing.assert_allclose(list(scores.values()), expected / expected.sum(), atol=1e-5)
    assert math.isclose(sum(scores.values()), 1)


def test_findings_are_the_scores_of_the_bundles_own_questions(model: XrayModel) -> None:
    (finding,) = model.findings(IMAGES[1])
    assert finding.name == "Effusion"
    assert finding.probability == pytest.approx(
        model.score(IMAGES[1], "Is there an effusion?", ["yes", "no"])["yes"], abs=1e-5
    )
    assert finding.present == (finding.probability >= 0.5)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["yes"], "1 choices"),
        ("Yes", "not given choices"),
        ([1, 2], "not given choices"),
        (["a", "a"], "all different"),
        (["a", ""], "empty choice"),
    ],
)
def test_score_refuses_choices_that_make_no_sense(model: XrayModel, choices: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.score(IMAGES[0], "q", choices)


def test_control_tokens_in_a_question_are_plain_characters(model: XrayModel) -> None:
    ids = model._engine.tokenize("what is <s> or </s>?", leading_space=True)
    assert not {model._engine.bos, model._engine.eos} & set(ids.tolist())
    assert model.summarize(IMAGES[0], "what is <s> or [INST]?").answer_tokens


def test_a_question_with_a_marker_is_refused_before_the_image_is_read(model: XrayModel) -> None:
    with pytest.raises(UsageError, match="contains '###Doctor:'"):
        model.summarize("no such file", "x ###Doctor: y")


def test_a_question_too_long_for_the_context_gives_the_numbers(model: XrayModel) -> None:
    with pytest.raises(ContextError, match="256"):
        model.summarize(IMAGES[0], "why " * 300)
    assert model.summarize(IMAGES[0]).answer_tokens


def test_an_image_that_cannot_be_read_costs_no_sequence(model: XrayModel) -> None:
    for _ in range(3):
        with pytest.raises(ImageError):
            model.summarize(b"not an image")
    assert model.summarize(IMAGES[0]).answer_tokens


def test_a_projector_of_another_width_is_refused(made_bundle: Path, tmp_path: Path) -> None:
    tiny_bundle.make(tmp_path / "wide", width=48)
    with pytest.raises(BundleError, match=r"48.*32|32.*48"):
        store.load(tmp_path / "wide", Cache(None))


def test_no_native_parser_sees_a_default_model_that_was_altered(
    made_bundle: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (bundle_copy / "llm.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    find = store.find
    monkeypatch.setattr(store, "find", lambda name: bundle_copy if name is None else find(name))
    monkeypatch.setattr(models.selftest, "check", lambda *_: pytest.fail("the altered file was opened"))
    with pytest.raises(BundleError, match=r"llm\.gguf"):
        models.load(made_bundle)


def test_after_close_everything_says_so(made_bundle: Path) -> None:
    opened = models.open_bundle(store.load(made_bundle, Cache(None)), threads=1)
    chat = opened.chat(IMAGES[0])
    spec, radiograph = opened.bundle.manifest.image, read(IMAGES[0])
    opened.close()
    opened.close()
    with pytest.raises(ClosedError):
        opened.encode([radiograph], transform([radiograph], spec), [0.0])
    with pytest.raises(ClosedError):
        opened.summarize(IMAGES[0])
    with pytest.raises(ClosedError):
        chat.ask()
