"""What the decoder learns from: questions and answers about one radiograph, packed behind its image rows.

From a vector of evidence (one number a finding and one for abnormal, 0 = the threshold, in standard deviations) come
several independent question-answer blocks. They stand side by side in one row; a mask lets each see the image and
itself only, so the image rows are computed once. Knows the report language and the tokenizer, and no image.

Two kinds of target: the next token of a sampled text, and, where an answer decides (the first token of a yes/no answer,
the word normal or abnormal), the wanted difference of two logits, which carries the evidence itself into the answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import language as lang
import numpy as np
import sentencepiece
import torch
from torch import Tensor

BEFORE, AFTER, NEXT = "###Doctor:", "{question} ###Assistant:", "###Doctor: {question} ###Assistant:"
IMAGE_ROWS = 16
EVIDENCE = (*lang.FINDINGS, lang.ABNORMAL)
SLOPE = 2.0
"""Logit difference of the two answers for one standard deviation of evidence."""
FUZZ = 0.12
"""Scale of the logistic noise between evidence and the findings of a text, standard deviations."""
Targets = list[tuple[int, int, int, float]]
_LATER = ("abnormal", "normal", "key", "heart", "lungs", "decline")  # what else a second turn asks


def train_tokenizer(path: Path, pieces: int, seed: int) -> None:
    """Write a SentencePiece BPE model of whole dialogues at `path`; bytes cover what the language does not."""
    rng = random.Random(seed)
    lines = []
    for _ in range(600):
        z = sample_evidence(rng)
        for question, text, _ in exchanges(z, rng):
            lines.append(BEFORE + " " + AFTER.format(question=question) + text)
    path.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), model_type="bpe", vocab_size=pieces,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.with_suffix(".vocab").unlink()


@dataclass
class Tokenizer:
    """The vocabulary, with the two ways in which a prompt's pieces are tokenized."""

    path: Path
    model: sentencepiece.SentencePieceProcessor = field(init=False)
    space: int = field(init=False)

    def __post_init__(self) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        self.bos, self.eos, self.size = self.model.bos_id(), self.model.eos_id(), self.model.vocab_size()
        self.guard = self.model.encode("\n")
        self.before = [self.bos, *self.piece(BEFORE)]
        self.yes, self.no = self.one("Yes"), self.one("No")
        pairs = ((self.yes, self.no), (self.one(" abnormal"), self.one(" normal")))
        self.decisions = {token: pair for pair in pairs for token in pair}

    def piece(self, text: str) -> list[int]:
        """A first piece: with the tokenizer's leading space."""
        return list(self.model.encode(text))

    def continuation(self, text: str) -> list[int]:
        """Text that follows other text: without a leading space."""
        ids = self.model.encode("\n" + text)
        if ids[: len(self.guard)] != self.guard:
            raise ValueError(f"{text!r} merges with what precedes it")
        return list(ids[len(self.guard) :])

    def one(self, text: str) -> int:
        """The id of a continuation that must be a single token."""
        (token,) = self.continuation(text)
        return token


def sample_evidence(rng: random.Random) -> np.ndarray:
    """Made-up evidence (15,): the whole range that images may show, half abnormal, rare findings as often as others."""
    z = np.array([-abs(rng.gauss(0, 1.4)) for _ in EVIDENCE], np.float32)
    for finding in rng.sample(range(len(lang.FINDINGS)), rng.choice((0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 7))):
        z[finding] = abs(rng.gauss(0, 0.8))
    z[-1] = rng.gauss(0, 1.2)
    return z


def draw_state(z: np.ndarray, rng: random.Random) -> lang.State:
    """A state that the evidence suggests: thresholds with a little noise, and one flipped finding in some.

    The noise makes a text's later sentences follow its earlier ones, not the image again.
    """
    if rng.random() > 1 / (1 + np.exp(-4 * float(z[-1]))):
        return lang.State(False)
    present = set()
    for value, finding in zip(z, lang.FINDINGS, strict=False):
        u = min(max(rng.random(), 1e-6), 1 - 1e-6)
        if value + FUZZ * np.log(u / (1 - u)) > 0:
            present.add(finding)
    if rng.random() < 0.06:
        present ^= {rng.choice(lang.FINDINGS)}
    return lang.State(True, frozenset(present))


class _Preferred(random.Random):
    """Draws that make the writer take its preferred wording."""

    def random(self) -> float:
        return 0.0


def exact_state(z: np.ndarray) -> lang.State:
    """The state that the evidence says: every threshold as it stands."""
    present = (finding for value, finding in zip(z, lang.FINDINGS, strict=False) if value > 0)
    return lang.State(True, frozenset(present)) if z[-1] > 0 else lang.State(False)


def _spoken(question: str, rng: random.Random) -> str:
    """As people type: some without the mark, some in lower case."""
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question.lower() if rng.random() < 0.1 else question


def _ask(kind: str, rng: random.Random) -> str:
    wordings = lang.finding_questions(kind) if kind in lang.FINDINGS else lang.QUESTIONS[kind]
    return _spoken(wordings[0] if rng.random() < 0.4 else rng.choice(wordings), rng)


def _reply(kind: str, state: lang.State, z: np.ndarray, rng: random.Random) -> tuple[str, float | None]:
    """Answer to a first question, and the wanted logit difference yes - no or abnormal - normal where it decides."""
    if kind in lang.FINDINGS:
        margin = SLOPE * float(z[lang.FINDINGS.index(kind)])
        return lang.answer_finding(kind, rng.random() < 1 / (1 + np.exp(-margin))), margin
    margin = SLOPE * float(z[-1])
    if kind in ("abnormal", "normal"):
        sign = 1 if kind == "abnormal" else -1
        return lang.answer(kind, state, rng), sign * margin
    return lang.answer(kind, state, rng), margin if kind in ("summary", "which") else None


def _follow(kind: str, state: lang.State, rng: random.Random) -> str:
    """Answer to a later question: what the talk has already said holds."""
    if kind in lang.FINDINGS:
        return lang.answer_finding(kind, kind in state.present)
    return lang.answer(kind, state, rng)


def exchanges(z: np.ndarray, rng: random.Random) -> list[tuple[str, str, float | None]]:
    """(question, answer, margin or None) of independent first turns about one image."""
    top = [lang.FINDINGS[n] for n in np.argsort(-z[:-1])[:3]]
    kinds = ["summary", *rng.sample(lang.FINDINGS, 3), rng.choice(top), rng.choice(top)]
    kinds += [rng.choice(("abnormal", "abnormal", "normal")), "which" if rng.random() < 0.3 else "abnormal"]
    kinds.append(rng.choice(("impression", "key", "heart", "lungs", "pleura", "infection", "decline")))
    return [(_ask(kind, rng), *_reply(kind, draw_state(z, rng), z, rng)) for kind in kinds]


def plain_exchanges(z: np.ndarray, rng: random.Random) -> list[tuple[str, str, float | None]]:
    """As `exchanges`, fewer and with the summary that a greedy answer should be.

    In half of the abnormal ones a finding or two is left out or put in, mostly doubtful ones: what follows must then go
    by the text and repeat nothing.
    """
    state = exact_state(z)
    if state.abnormal and rng.random() < 0.5:
        doubtful = [lang.FINDINGS[n] for n in np.argsort(abs(z[:-1]))[:4]]
        among = doubtful if rng.random() < 0.7 else lang.FINDINGS
        state = lang.State(True, state.present ^ frozenset(rng.sample(among, rng.choice((1, 2)))))
    summary = lang.write_report(state, _Preferred())
    asked = (rng.choice(lang.FINDINGS), rng.choice(lang.FINDINGS), "abnormal")
    others = [(_ask(kind, rng), *_reply(kind, draw_state(z, rng), z, rng)) for kind in asked]
    return [(_ask("summary", rng), summary, SLOPE * float(z[-1])), *others]


@dataclass
class Packed:
    """One image's row: token ids with -1 where an image row stands, block of each position, and the targets.

    `targets` holds (position, token, other token or -1, margin): the token that follows, and where `other` is given,
    the wanted logit difference token - other in its place.
    """

    ids: list[int]
    blocks: list[int]
    places: list[int]
    targets: Targets


def pack(z: np.ndarray, rng: random.Random, tokens: Tokenizer, copies: int = 0, plain: bool = False) -> Packed:
    """Image rows and blocks of exchanges, one summary with a second turn in half of them.

    `plain` takes `plain_exchanges`. `copies` adds summaries that have nothing to do with the image, of which only the
    impression is learned: it has to follow the findings as written.
    """
    ids = [*tokens.before, *[-1] * IMAGE_ROWS]
    row = Packed(ids, [0] * len(ids), list(range(len(ids))), [])
    prefix = len(ids)
    for number, (question, text, margin) in enumerate((plain_exchanges if plain else exchanges)(z, rng)):
        turn = tokens.piece(AFTER.format(question=question))
        _say(row, turn, text, margin, len(row.ids), tokens)
        if number == 0 and rng.random() < 0.5:
            reading = lang.parse_report(text)
            state = lang.State(bool(reading.abnormal), reading.present)
            kinds = (
                *lang.FINDINGS,
                *state.listed,
                *state.listed,
                "abnormal",
                "normal",
                "key",
                "heart",
                "lungs",
                "decline",
            )
            kind = rng.choice(kinds)
            turn += tokens.continuation(NEXT.format(question=_ask(kind, rng)))
            _say(row, turn, _follow(kind, state, rng), None, len(row.ids), tokens)
        _append(row, turn, prefix)
    for _ in range(copies):
        spelled = rng.random() < 0.15  # nothing named though the image may say so: a greedy answer can come here
        state = lang.State(True) if spelled else draw_state(sample_evidence(rng), rng)
        text = lang.write_report(state, rng, spelled=spelled)
        turn = tokens.piece(AFTER.format(question=_ask("summary", rng)))
        heard = len(turn) + len(tokens.continuation(text[: text.index(" Impression:")]))
        base, before = len(row.ids), len(row.targets)
        _say(row, turn, text, None, base, tokens)
        row.targets[before:] = [target for target in row.targets[before:] if target[0] >= base + heard - 1]
        _append(row, turn, prefix)
    return row


def _append(row: Packed, turn: list[int], prefix: int) -> None:
    """Put a block's ids at the end of `row`; its places continue those of the image rows."""
    row.ids += turn
    row.blocks += [row.blocks[-1] + 1] * len(turn)
    row.places += range(prefix, prefix + len(turn))


def _say(row: Packed, turn: list[int], text: str, margin: float | None, base: int, tokens: Tokenizer) -> None:
    """Append an answer to `turn` and its targets, end of sequence last, to `row`."""
    answer = tokens.continuation(text)
    start = base + len(turn) - 1
    decided = False
    for n, token in enumerate((*answer, tokens.eos)):
        if margin is not None and not decided and token in tokens.decisions:
            decided = True
            row.targets.append((start + n, *tokens.decisions[token], margin))
        else:
            row.targets.append((start + n, token, -1, 0.0))
    turn += answer


@dataclass
class Batch:
    """Rows of equal length: ids (B, T), -1 at image rows; mask (B, 1, T, T), additive; places (B, T); flat targets."""

    ids: Tensor
    mask: Tensor
    places: Tensor
    at: Tensor
    token: Tensor
    other: Tensor
    margin: Tensor


def collate(rows: list[Packed]) -> Batch:
    """Pad to the longest; a padded position sees itself only."""
    length = -(-max(len(r.ids) for r in rows) // 16) * 16
    ids = np.zeros((len(rows), length), np.int64)
    blocks = np.full((len(rows), length), 10_000)
    blocks += np.arange(length)
    places = np.zeros((len(rows), length), np.int64)
    at, token, other, margin = [], [], [], []
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = row.ids
        blocks[n, : len(row.ids)] = row.blocks
        places[n, : len(row.ids)] = row.places
        for position, right, wrong, wanted in row.targets:
            at.append(n * length + position)
            token.append(right)
            other.append(wrong)
            margin.append(wanted)
    order = np.arange(length)
    shared = (blocks[:, None, :] == 0) & (blocks[:, :, None] < 10_000)
    seen = ((blocks[:, :, None] == blocks[:, None, :]) | shared) & (order[None, :, None] >= order[None, None, :])
    mask = np.where(seen[:, None], 0.0, -1e9).astype(np.float32)
    return Batch(
        torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(places), torch.tensor(at), torch.tensor(token),
        torch.tensor(other), torch.tensor(margin, dtype=torch.float32),
    )  # fmt: skip
