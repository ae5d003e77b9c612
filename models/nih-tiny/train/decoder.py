"""Stages (b) and (c): the decoder learns the report language from evidence, then from the encoder's features.

(b) Its image rows are a learned linear map of made-up evidence, a different vector in each row around the true mean,
so the whole language is learned without a picture. (c) The rows come from the projector on real features. The
classifier heads that trained the encoder are linear in those features, so the projector starts as heads followed by the
map of (b), and is then trained with the decoder at a low rate. Knows tensors of features and evidence, no image files.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from dialogue import EVIDENCE, IMAGE_ROWS, Batch, Tokenizer, collate, pack, sample_evidence
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

log = logging.getLogger(__name__)
IMAGES = 12  # a step
Source = Callable[[random.Random, int], tuple[Tensor, np.ndarray]]
"""(generator, n) → inputs of the image map (n, 16, D) and the evidence they carry (n, 15)."""


def new_decoder(tokens: Tokenizer, width: int = 192) -> LlamaForCausalLM:
    """A Llama with 4 layers and random weights."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=tokens.size, hidden_size=width, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=1024, rms_norm_eps=1e-6, rope_theta=10000.0,
        initializer_range=0.05, bos_token_id=tokens.bos, eos_token_id=tokens.eos, pad_token_id=None,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], attn_implementation="eager",
    ))  # fmt: skip


def new_image_map(width: int) -> nn.Linear:
    """Evidence → image row: orthogonal directions beside a larger constant, which keeps RMSNorm nearly linear."""
    image_map = nn.Linear(len(EVIDENCE), width)
    nn.init.orthogonal_(image_map.weight)
    with torch.no_grad():
        image_map.weight.mul_(0.5)
        image_map.bias.normal_(0, 6 / math.sqrt(width))
    return image_map


def made_up(rng: random.Random, n: int) -> tuple[Tensor, np.ndarray]:
    """A `Source` of made-up evidence; the rows scatter about it as the regions of an image do."""
    evidence = np.stack([sample_evidence(rng) for _ in range(n)])
    draw = np.random.default_rng(rng.getrandbits(32))
    scatter = draw.normal(0, draw.uniform(0.6, 2.2, (n, 1, len(EVIDENCE))), (n, IMAGE_ROWS, len(EVIDENCE)))
    scatter += draw.normal(0, 1.2, (n, IMAGE_ROWS, 1)) * draw.uniform(0, 1, (n, 1, len(EVIDENCE)))
    scatter -= scatter.mean(1, keepdims=True)
    return torch.from_numpy((evidence[:, None] + scatter).astype(np.float32)), evidence


def loss_of(
    decoder: LlamaForCausalLM, image_map: nn.Linear, probe: nn.Linear, inputs: Tensor, evidence: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """The three losses of a batch.

    Cross-entropy of the texts; that of the decisions, with the distance of their logit differences; and how far the
    evidence that the probe reads lies from the true one, which teaches the first layer to gather it at every position.
    """
    is_image = batch.ids < 0
    embeddings = decoder.model.embed_tokens(batch.ids.clamp(min=0))
    embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), image_map(inputs).to(embeddings.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder.model(
            inputs_embeds=embeddings,
            attention_mask=batch.mask.bfloat16(),
            position_ids=batch.places,
            use_cache=False,
            output_hidden_states=True,
        )
    read = probe(out.hidden_states[1].flatten(0, 1)[batch.at].float())
    gathered = F.smooth_l1_loss(read, evidence[batch.at // batch.ids.shape[1]])
    logits = decoder.lm_head(out.last_hidden_state.flatten(0, 1)[batch.at].float())
    decides = batch.other >= 0
    text = F.cross_entropy(logits[~decides], batch.token[~decides])
    logp = logits[decides].log_softmax(-1)
    first = logp.gather(1, batch.token[decides, None]).squeeze(1)
    second = logp.gather(1, batch.other[decides, None]).squeeze(1)
    margin = batch.margin[decides]
    wanted = margin.sigmoid()
    entropy = -(wanted * first + (1 - wanted) * second).mean()
    return text, entropy + 0.5 * F.smooth_l1_loss(first - second, margin), gathered


def learn(
    decoder: LlamaForCausalLM,
    image_map: nn.Linear,
    tokens: Tokenizer,
    source: Source,
    path: Path,
    *,
    steps: int,
    rate: float,
    seed: int,
    copies: int = 0,
    plain: bool = False,
) -> None:  # fmt: skip
    """Train both in place for `steps` of 12 images each; the state at `path` is continued and, at the end, loaded."""
    probe = nn.Linear(image_map.out_features, len(EVIDENCE))
    model = nn.ModuleDict({"decoder": decoder, "image_map": image_map, "probe": probe})
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    start, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
    decoder.train()
    began = time.monotonic()
    recent: list[list[float]] = []
    for step in range(start, steps):
        rng = random.Random(1_000_000 * seed + step)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 60) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        inputs, evidence = source(rng, IMAGES)
        batch = collate([pack(z, rng, tokens, copies, plain) for z in evidence])
        losses = loss_of(decoder, image_map, probe, inputs, torch.from_numpy(evidence), batch)
        optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append([loss.item() for loss in losses])
        if (step + 1) % 50 == 0 or step + 1 == steps:
            elapsed = seconds + time.monotonic() - began
            log.info(
                "%s step %d/%d text %.4f decisions %.4f gathered %.4f, %.0f s in all",
                path.stem, step + 1, steps, *np.mean(recent, 0), elapsed,
            )  # fmt: skip
            recent = []
            part = path.with_suffix(".part")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"step": step + 1, "seconds": elapsed, **state}, part)
            part.replace(path)
    decoder.eval()
