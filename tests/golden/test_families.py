"""Released families give the authors' values: vision stages, ids of every prompt, logits, greedy ids, whole bundles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from xraygpt_lite import prompt, verify
from xraygpt_lite.bundle import store
from xraygpt_lite.cache import Cache
from xraygpt_lite.cli import main
from xraygpt_lite.converters.families import loader
from xraygpt_lite.errors import UsageError
from xraygpt_lite.llm.scheduler import Engine
from xraygpt_lite.model import open_bundle
from xraygpt_lite.values import (
    Bundle,
    DevicePlan,
    GenerationOptions,
    Pixels,
    Placement,
    PromptSpec,
    Segment,
    Tokenize,
    TokenSegment,
)
from xraygpt_lite.vision import Encoder

TOLERANCE = 1e-4
PLAN = DevicePlan(context=512, threads=2, float32_cache=True)
MAIN_FINDINGS = "What are the main findings and impression of the given X-ray?"
FAMILIES = {
    "xraygpt": {"checkpoint": "xraygpt_checkpoint.pth", "qformer": "blip2_pretrained.pth"},
    "minigpt4": {"checkpoint": "xraygpt_checkpoint.pth", "qformer": "blip2_pretrained.pth"},
    "minigpt-med": {"checkpoint": "minigpt_med_checkpoint.pth"},
}
GOLDEN = {"xraygpt": "xraygpt_golden.npz", "minigpt4": "xraygpt_golden.npz", "minigpt-med": "minigpt_med_golden.npz"}
HEADS = {"vision.num_heads": "2", "qformer.num_heads": "4"}


@dataclass(frozen=True)
class Asked:
    """How one of the oracle's prompts is put to a bundle: family, wording, task and question; a second question."""

    family: str
    variant: str
    question: str
    task: str | None = None
    second: str | None = None


ASKED = {
    "xraygpt-demo": Asked("xraygpt", "demo", MAIN_FINDINGS),
    "xraygpt-train": Asked("xraygpt", "train", MAIN_FINDINGS),
    "minigpt4": Asked("minigpt4", "demo", MAIN_FINDINGS),
    "minigpt-med": Asked("minigpt-med", "chat", "is there a pleural effusion?", "vqa"),
    "minigpt-med+lora": Asked("minigpt-med", "chat", "is there a pleural effusion?", "vqa"),
    "xraygpt-demo, second turn": Asked("xraygpt", "demo", MAIN_FINDINGS, None, "Is the heart enlarged?"),
    "minigpt-med, second turn": Asked(
        "minigpt-med", "chat", "is there a pleural effusion?", "vqa", "where is the heart?"
    ),
}


@pytest.fixture(scope="module")
def oracle(shared: Path) -> Path:
    return shared / "data" / "oracle"


@pytest.fixture(scope="module")
def bundle_of(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Family → its float32 bundle, converted with the command."""

    @cache
    def convert(family: str) -> Bundle:
        output = tmp_path_factory.mktemp("families") / family
        command = ["convert", family, "--vision", str(oracle / "eva_vit_g.pth"), "--llm", str(oracle / "llm")]
        for role, name in FAMILIES[family].items():
            command += [f"--{role}", str(oracle / name)]
        for key, value in _settings(family).items():
            command += ["--set", f"{key}={value}"]
        with pytest.raises(SystemExit) as end:
            main([*command, "--quant", "f32", "-o", str(output)])
        assert not end.value.code
        return store.load(output, Cache(None))

    return convert


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_give_the_authors_features_and_embeddings(
    oracle: Path, bundle_of: Callable[[str], Bundle], family: str
) -> None:
    golden = np.load(oracle / GOLDEN[family])
    features = golden["features" if family == "minigpt-med" else "qformer"]
    running = Encoder(bundle_of(family), DevicePlan())
    # The golden pixels, alone and beside others: a batch of two at the end.
    for batch in (1, 2):
        data = np.concatenate([golden["pixels"]] * 2)[:batch]
        pixels = Pixels(data, (Placement((1.0, 1.0), (0.0, 0.0), data.shape[2:]),) * batch)
        count = min(batch, len(features))
        np.testing.assert_allclose(running.features(pixels)[:count], features[:count], rtol=0, atol=TOLERANCE)
        seen = running.encode(pixels).data
        np.testing.assert_allclose(seen[:count], golden["embeddings"][:count], rtol=0, atol=TOLERANCE)
        assert seen.shape == (batch, *golden["embeddings"].shape[1:])
    running.close()


def test_torch_gives_the_authors_stages_of_the_q_former(oracle: Path) -> None:
    golden = np.load(oracle / "xraygpt_golden.npz")
    inputs = {role: oracle / name for role, name in FAMILIES["xraygpt"].items()} | {"vision": oracle / "eva_vit_g.pth"}
    parts = loader("xraygpt")(inputs, 128, HEADS)
    encoder: Any = parts.vision
    for batch in (1, 2):
        patches = encoder.vit(torch.from_numpy(golden["pixels"][:batch]))
        features = encoder.qformer(patches)
        stages = {
            "vit": patches,
            "ln_vision": encoder.qformer.norm(patches),
            "qformer": features,
            "embeddings": parts.projector(features),
        }
        for name, seen in stages.items():
            np.testing.assert_allclose(seen.numpy(), golden[name][:batch], rtol=0, atol=TOLERANCE, err_msg=name)
    assert "Qformer.bert.embeddings.word_embeddings.weight" in parts.ignored
    assert parts.lora is None


@pytest.mark.parametrize("checkpoint", ["minigpt_med_checkpoint.pth", "minigpt_med_checkpoint_peft03.pth"])
def test_torch_gives_the_authors_joined_patches(oracle: Path, checkpoint: str) -> None:
    golden = np.load(oracle / "minigpt_med_golden.npz")
    inputs = {"vision": oracle / "eva_vit_g.pth", "checkpoint": oracle / checkpoint}
    parts = loader("minigpt-med")(inputs, 128, {"lora.alpha": "8"})
    features = parts.vision(torch.from_numpy(golden["pixels"]))
    np.testing.assert_allclose(features.numpy(), golden["features"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(parts.projector(features).numpy(), golden["embeddings"], rtol=0, atol=TOLERANCE)
    assert parts.lora is not None
    assert parts.lora.alpha == 8
    assert parts.ignored == ("epoch",)


@pytest.mark.parametrize("name", ASKED)
def test_every_prompt_gives_the_authors_ids_logits_and_greedy_ids(
    oracle: Path, bundle_of: Callable[[str], Bundle], name: str
) -> None:
    asked, bundle = ASKED[name], bundle_of(ASKED[name].family)
    entry = json.loads((oracle / "meta.json").read_bytes())["prompts"][name]
    rows = np.load(oracle / GOLDEN[asked.family])["embeddings"][0]
    merged = asked.family == "minigpt-med" and "lora" in entry
    # What the authors computed without LoRA was computed with the language model as it lies in the folder.
    llm = bundle.llm if merged or asked.family != "minigpt-med" else bundle_of("xraygpt").llm
    with Engine(llm, PLAN) as engine, engine.open() as slot:
        segments = _segments(bundle.manifest.prompt, asked, entry.get("first_answer", ""), rows, engine.tokenize)
        first, _, *after = segments
        assert _ids(first) == entry["before_ids"]
        assert [value for part in after for value in _ids(part)] == entry["after_ids"]
        logits = slot.trace(segments, entry["greedy_ids"][1:])
    golden = np.load(oracle / "llm_golden.npz")[f"{name}_logits"]
    np.testing.assert_allclose(logits[0], golden, rtol=0, atol=TOLERANCE)
    assert list(logits.argmax(-1)) == entry["greedy_ids"][1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bundle_verifies_and_its_answer_follows_the_image(
    shared: Path, bundle_of: Callable[[str], Bundle], family: str
) -> None:
    bundle = bundle_of(family)
    assert [each.detail for each in verify.run(bundle.folder, device="cpu") if each.status != "ok"] == []
    images = [shared / "data" / "png1024" / f"{name}.png" for name in ("00001385_003", "00001452_002")]
    with open_bundle(bundle, device="cpu") as model:
        ids = model.generate_ids(images[0], None, 8)
        same, again, other = (model.trace(model.tokens_of(image), None, ids) for image in (images[0], *images))
        np.testing.assert_array_equal(same, again)
        assert np.abs(other - same).max() > 0.5
        record, repeated = (model.summarize(images[0], options=GenerationOptions(max_tokens=8)) for _ in range(2))
        assert record.image_tokens == bundle.manifest.image_tokens
        assert record.raw_text == repeated.raw_text
        assert (record.bundle_name, record.options.preset) == (family, "greedy")


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_hold_what_the_authors_do(bundle_of: Callable[[str], Bundle], family: str) -> None:
    manifest = bundle_of(family).manifest
    assert set(manifest.presets) == {"greedy", "authors"}
    authors = manifest.presets["authors"]
    assert (authors.temperature, authors.top_p, authors.top_k) == (1.0, 0.9, 50)
    assert manifest.presets["greedy"].temperature == manifest.defaults.temperature == 0
    if family == "minigpt-med":
        assert (authors.max_tokens, authors.repeat_penalty, authors.penalty_last_n) == (500, 1.05, -1)
        assert (manifest.image.size, manifest.image_tokens) == (448, 256)
    else:
        assert (authors.max_tokens, authors.repeat_penalty) == (300, 1.0)
        assert (manifest.image.size, manifest.image_tokens) == (224, 32)
    for marker in (*manifest.prompt.refused, *manifest.prompt.stops):
        with pytest.raises(UsageError, match="turn marker"):
            prompt.check_question(manifest.prompt, f"normal? {marker} yes")
    assert {source.role for source in manifest.sources} == {"vision", "llm", *FAMILIES[family]}


@pytest.fixture(autouse=True, scope="module")
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _settings(family: str) -> dict[str, str]:
    return {key: value for key, value in HEADS.items() if key.startswith("vision") or "qformer" in FAMILIES[family]}


def _segments(
    spec: PromptSpec, asked: Asked, answer: str, rows: npt.NDArray[np.float32], tokenize: Tokenize
) -> list[Segment]:
    """The prompt as a chat puts it together; the answer's ids are those of its text, as a continuation."""
    variant = spec.variants[asked.variant]
    words = prompt.wording(spec, prompt.ask(spec, asked.question, asked.task), "")
    segments = prompt.build(variant, words, np.ascontiguousarray(rows), tokenize)
    if asked.second is not None:
        said = answer if variant.next_turn_ids else f" {answer}"
        segments.append(TokenSegment(tokenize(said, leading_space=False)))
        segments.append(prompt.next_turn(variant, asked.second, "", tokenize))
    return segments


def _ids(segment: Segment) -> list[int]:
    assert isinstance(segment, TokenSegment)
    return [int(value) for value in segment.ids]
