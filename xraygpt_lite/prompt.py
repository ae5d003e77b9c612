"""A question becomes the segments that a model was trained to read: tokens, image rows, tokens.

Knows the wording (`PromptSpec`) and is given a tokenizer; knows no model, image or native library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xraygpt_lite import boxes
from xraygpt_lite.errors import UsageError
from xraygpt_lite.values import (
    Corners,
    EmbeddingSegment,
    Float32,
    Manifest,
    PromptSpec,
    PromptVariant,
    Segment,
    TaskSpec,
    Tokenize,
    TokenSegment,
)


@dataclass(frozen=True)
class Asked:
    """What the caller asked, checked: the words (or the default ones), the bundle's task, and the rectangle."""

    question: str
    task: str | None = None
    box: Corners | None = None


def variant_of(spec: PromptSpec, name: str | None) -> tuple[str, PromptVariant]:
    """The wording called `name`, or the default one.

    Raises
    ------
    UsageError
        The bundle has no such variant.
    """
    chosen = name or spec.default_variant
    if chosen not in spec.variants:
        raise UsageError(
            f"prompt variant {chosen!r} is unknown to this bundle; it has: {', '.join(sorted(spec.variants))}"
        )
    return chosen, spec.variants[chosen]


def ask(spec: PromptSpec, question: str | None, task: str | None = None, box: Sequence[float] | None = None) -> Asked:
    """Check what is asked, so far as that can be told without an image.

    Raises
    ------
    UsageError
        As `check_question`; the bundle has no such task; the task has no question of its own and none is given; a box
        is missing, superfluous or no rectangle.
    """
    form = _task(spec, task)
    if form is None:
        asked = check_question(spec, question)
    elif question is None:
        if not form.default_question:
            raise UsageError(f"task {task!r} has no question of its own; say what to ask (--question)")
        asked = form.default_question
    else:
        asked = check_question(spec, question)
    if form is None or "{box}" not in form.template:
        if box is not None:
            takers = ", ".join(sorted(name for name, one in spec.tasks.items() if "{box}" in one.template))
            raise UsageError(
                f"a box can be given only with a task that asks about one; this bundle has: {takers or 'none'}"
            )
        return Asked(asked, task)
    if box is None:
        raise UsageError(
            f"task {task!r} asks about a box; give its X0,Y0,X1,Y1 in pixels of the original image (--box)"
        )
    return Asked(asked, task, boxes.corners(box))


def wording(spec: PromptSpec, asked: Asked, markup: str) -> str:
    """The text that stands for the question: its task's template with the question in it, and `markup` for the box."""
    if asked.task is None:
        return asked.question
    return _fill(spec.tasks[asked.task].template.replace("{box}", markup), asked.question)


def check_question(spec: PromptSpec, question: str | None) -> str:
    """The question to ask: the given one, stripped, or the bundle's default.

    Role markers and stop strings as plain text would be read as the model's own turn marks, so they are refused.

    Raises
    ------
    UsageError
        The question is empty or contains a refused string.
    """
    if question is None:
        return spec.default_question
    text = question.strip()
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("the question holds half a character (a lone surrogate); give it as Unicode text")
    if not text:
        raise UsageError("the question is empty; leave it out to ask the bundle's default question")
    folded = text.casefold()
    for marker in (*spec.refused, *spec.stops):
        if marker.casefold() in folded:
            raise UsageError(
                f"the question contains {marker!r}, a turn marker of this model; rephrase it without the marker"
            )
    return text


def prefix(variant: PromptVariant, rows: Float32, tokenize: Tokenize) -> list[Segment]:
    """What stands before any question: control ids, the text before the image, and the image rows (N, E)."""
    return [_tokens(variant.before_ids, variant.before, True, tokenize), EmbeddingSegment(rows)]


def question_part(variant: PromptVariant, question: str, tokenize: Tokenize) -> TokenSegment:
    """What follows the image: the template with the question in it, tokenized as one piece."""
    return _tokens((), _fill(variant.after, question), True, tokenize)


def build(variant: PromptVariant, question: str, rows: Float32, tokenize: Tokenize) -> list[Segment]:
    """The whole first turn: `prefix`, then `question_part`."""
    return [*prefix(variant, rows, tokenize), question_part(variant, question, tokenize)]


def most_rows(manifest: Manifest, variant: PromptVariant, question: str, answer: int) -> int:
    """No fewer rows than a first turn takes with an answer of so many tokens; needs no tokenizer.

    A token stands for one byte of UTF-8 at least, and a piece of text begins with one space more.
    """
    texts = (variant.before, _fill(variant.after, question))
    letters = sum(len(text.encode("utf-8", "replace")) + 1 for text in texts if text)
    return len(variant.before_ids) + letters + manifest.image_tokens + answer


def next_turn(variant: PromptVariant, question: str, carry: str, tokenize: Tokenize) -> TokenSegment:
    """What follows an answer that is in the cache; `carry` is the answer's end where it had to leave the cache."""
    text = _fill(variant.next_turn, question)
    if not variant.next_turn_ids:
        return _tokens((), carry + text, False, tokenize)
    head = tokenize(carry, leading_space=False) if carry else np.empty(0, np.int32)
    tail = _tokens(variant.next_turn_ids, text, True, tokenize)
    return TokenSegment(np.concatenate([head, tail.ids]).astype(np.int32))


def _task(spec: PromptSpec, name: str | None) -> TaskSpec | None:
    if name is None:
        return None
    if not spec.tasks:
        raise UsageError(f"task {name!r} is unknown: this bundle has no tasks; ask a question without one")
    if name not in spec.tasks:
        raise UsageError(f"task {name!r} is unknown to this bundle; it has: {', '.join(sorted(spec.tasks))}")
    return spec.tasks[name]


def _fill(template: str, question: str) -> str:
    return template.replace("{question}", question)


def _tokens(control: tuple[int, ...], text: str, leading_space: bool, tokenize: Tokenize) -> TokenSegment:
    ids = tokenize(text, leading_space=leading_space) if text else np.empty(0, np.int32)
    return TokenSegment(np.concatenate([np.asarray(control, np.int32), ids]).astype(np.int32))
