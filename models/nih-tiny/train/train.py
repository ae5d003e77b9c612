"""Makes nih-tiny from the data set, one command:

    python models/nih-tiny/train/train.py --data ../shared/data/nih-chestxray14 --work build/nih-tiny -o BUNDLE

(a) the encoder learns the findings, (b) the decoder learns the report language, (c) the projector joins them, then the
project's own converter makes the bundle and, in the work folder, a float32 twin to compare it with. Every stage saves
as it goes: run the command again after an interruption and it continues. The test split is never read.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from data import Split, join, read
from decoder import learn, made_up, new_decoder, new_image_map
from dialogue import Tokenizer, train_tokenizer
from encoder import published, train_encoder
from projector import (
    Evidence,
    cached_features,
    calibrate,
    features_of,
    new_projector,
    on_images,
    retarget,
    settle,
    trained,
    with_findings,
)
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

import xraygpt_lite
from xraygpt_lite.converters import assemble
from xraygpt_lite.converters.families.nih_tiny import GridEncoder

log = logging.getLogger("train")
SEED = 2026
EPOCHS = 8
PIECES = 640
WIDTH = 192
LANGUAGE_STEPS, LANGUAGE_RATE = 900, 2e-3
COPY_STEPS, COPY_RATE = 350, 1.5e-3
IMAGE_STEPS, IMAGE_RATE = 350, 8e-4
PLAIN_STEPS, PLAIN_RATE = (450, 450, 400, 400), 1e-3
SETTLING = 3  # rounds, each by what is left


def findings(data: Path, work: Path) -> tuple[GridEncoder, Split, Split]:
    """Stage (a); also nih128's train and val, which the later stages use."""
    path = work / "encoder.pt"
    small, large = ([read(data, stem, split) for split in ("train", "val")] for stem in ("nih64", "nih128"))
    train_encoder(published(), join(large[0], small[0]), join(large[1], small[1]), path, SEED, EPOCHS)
    return trained(path), *large


def language(work: Path) -> tuple[LlamaForCausalLM, nn.Linear, Tokenizer]:
    """Stage (b)."""
    vocabulary = work / "llm" / "tokenizer.model"
    if not vocabulary.exists():
        train_tokenizer(vocabulary, PIECES, SEED)
    tokens = Tokenizer(vocabulary)
    torch.manual_seed(SEED)
    decoder, image_map = new_decoder(tokens, WIDTH), new_image_map(WIDTH)
    path = work / "language.pt"
    learn(decoder, image_map, tokens, made_up, path, steps=LANGUAGE_STEPS, rate=LANGUAGE_RATE, seed=SEED)
    path = work / "copying.pt"
    learn(decoder, image_map, tokens, made_up, path, steps=COPY_STEPS, rate=COPY_RATE, seed=SEED + 1, copies=2)
    return decoder, image_map, tokens


def images(work: Path, encoder: GridEncoder, train: Split, val: Split) -> tuple[LlamaForCausalLM, nn.Linear, Evidence]:
    """Stages (b) and (c): the decoder, the projector that fits the encoder, and what the projector carries."""
    decoder, image_map, tokens = language(work)
    seen = torch.cat([features_of(encoder, val.images), features_of(encoder, val.images, mirror=True)])
    labels = torch.from_numpy(val.labels).repeat(2, 1).numpy()
    evidence = calibrate(encoder, seen, labels)
    projector = new_projector(evidence, image_map)
    features = cached_features(encoder, train.images[::2], work / "features.pt")
    path, source = work / "images.pt", on_images(features, evidence, made=0.5, jitter=0.0, abnormal=0.5)
    learn(decoder, projector, tokens, source, path, steps=IMAGE_STEPS, rate=IMAGE_RATE, seed=SEED + 2, copies=1)
    source = on_images(features, evidence, made=0.2, jitter=0.3, abnormal=0.8)
    for n, steps in enumerate(PLAIN_STEPS):
        learn(
            decoder, projector, tokens, source, work / f"plain{n}.pt",
            steps=steps, rate=PLAIN_RATE, seed=SEED + 3 + n, copies=min(1 + n, 2), plain=True,
        )  # fmt: skip
    carried = with_findings(evidence, seen, labels)
    return decoder, retarget(projector, evidence, carried), carried


def export(
    work: Path, encoder: GridEncoder, decoder: LlamaForCausalLM, projector: nn.Linear, output: Path, quant: str
) -> None:
    """Write the converter's three sources and convert them."""
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, work / "vision.safetensors")
    save_file({f"projector.{name}": value.contiguous() for name, value in projector.state_dict().items()},
              work / "projector.safetensors")  # fmt: skip
    decoder.save_pretrained(work / "llm")
    inputs = {"vision": work / "vision.safetensors", "checkpoint": work / "projector.safetensors", "llm": work / "llm"}
    assemble.convert(assemble.Request("nih-tiny", inputs, output, quant, force=True))
    log.info("%s: %s", output, quant)


def answers(bundle: Path, val: Split) -> np.ndarray:
    """The log-odds of "Is this radiograph abnormal?" for each image, float64 (n,)."""
    with xraygpt_lite.load(bundle) as model:
        *_, abnormal = model.bundle.manifest.prompt.findings
        choices = (abnormal.yes, abnormal.no)
        scores = [model.score(image, abnormal.question, choices) for image in val.images]
    return np.array([np.log(score[abnormal.yes] / score[abnormal.no]) for score in scores])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with nih128 and nih64, zip and csv")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything between data and bundle")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the bundle")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    encoder, train, val = findings(options.data, options.work)
    decoder, projector, carried = images(options.work, encoder, train, val)
    parts, reference = (options.work, encoder, decoder, projector), options.work / "reference"
    seen = features_of(encoder, val.images)
    for _ in range(SETTLING):
        export(*parts, reference, "f32")
        off = settle(projector, carried, seen, answers(reference, val), val.labels)
        log.info("answers were best balanced at %.3f", off)
    export(*parts, reference, "f32")
    export(*parts, options.output, "q8_0")
    log.info("done in %.0f s (this call)", time.monotonic() - began)


if __name__ == "__main__":
    main()
