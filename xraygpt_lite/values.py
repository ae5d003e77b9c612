"""The records that pass between rooms: frozen, typed, numpy only.

They know no file content, no native library and no model.

Shapes are written (B, N, E): B images, N image tokens, E the width of the language model's embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
Fit = Literal["stretch", "pad"]
Corners = tuple[float, float, float, float]
"""x0, y0, x1, y1 of a rectangle in pixels of the original image: edges, not centres of pixels; y downwards."""
Finish = Literal["stop", "length"]

RECORD_SCHEMA = "xraygpt-lite/record/1"


@dataclass(frozen=True)
class Radiograph:
    """One grey image on its way in.

    Attributes
    ----------
    pixels
        float32 (H, W) in [0, 1]; 0 = dark (air), 1 = bright (bone).
    source
        The path as the caller gave it, or "array" or "bytes".
    sha256
        Of the file's bytes; of shape, dtype and data for an array.
    warnings
        Sentences for the reader, e.g. that only the first of several frames was read.
    sop_instance_uid
        The only identifier kept, DICOM only.
    """

    pixels: Float32
    source: str
    sha256: str
    warnings: tuple[str, ...] = ()
    sop_instance_uid: str | None = None


@dataclass(frozen=True)
class ImageSpec:
    """How a radiograph becomes the encoder's input.

    Attributes
    ----------
    size
        Side of the square input, pixels.
    fit
        "stretch" to the square, or zero-"pad" to a square of at least `size` first.
    interpolation
        Pillow's filter by name: "bicubic" or "bilinear"; both antialias.
    mean, std
        Per channel, on values in [0, 1].
    """

    size: int
    fit: Fit
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Placement:
    """Where the original lies in the square input: maps a box back.

    original (x, y) = (input (x, y) - offset) / scale, in pixels; `size` is the original's (width, height).
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    size: tuple[int, int]


@dataclass(frozen=True)
class Pixels:
    """float32 (B, 3, S, S), C-contiguous, and one `Placement` for each image."""

    data: Float32
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class ImageTokens:
    """float32 (B, N, E), C-contiguous and finite; E is the language model's width."""

    data: Float32


@dataclass(frozen=True)
class TokenSegment:
    """int32 (n,): token ids that go into the context."""

    ids: Int32

    def __len__(self) -> int:
        return int(self.ids.shape[0])


@dataclass(frozen=True)
class EmbeddingSegment:
    """float32 (n, E): embedding rows that go into the context in place of tokens."""

    rows: Float32

    def __len__(self) -> int:
        return int(self.rows.shape[0])


Segment = TokenSegment | EmbeddingSegment


@dataclass(frozen=True)
class FindingSpec:
    """A finding that may be scored: the question, and the answers whose probabilities are compared."""

    name: str
    question: str
    yes: str
    no: str


@dataclass(frozen=True)
class PromptVariant:
    """One wording that a model was trained with.

    Attributes
    ----------
    before
        Text before the image, without BOS.
    after
        Text after the image; "{question}" stands for the question. Tokenized as one piece.
    next_turn
        Text between an answer and the next answer; "{question}" stands for the question. Without `next_turn_ids` it is
        tokenized as a continuation of the answer, which was cut where a stop string began.
    before_ids, next_turn_ids
        Control tokens put before `before` (BOS first) and before `next_turn`, as ids. A piece that follows the image or
        a control token starts with the tokenizer's leading space, as the slow Llama tokenizer has it.
    """

    before: str
    after: str
    next_turn: str
    before_ids: tuple[int, ...]
    next_turn_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskSpec:
    """A kind of question that a model was trained to be asked in its own form.

    Attributes
    ----------
    template
        What is asked: "{question}" stands for the caller's words, "{box}", if there, for a box's markup.
    default_question
        Asked when the caller asks nothing; "" where the task needs words of the caller's.
    """

    template: str
    default_question: str


@dataclass(frozen=True)
class PromptSpec:
    """How a question is put to one model.

    Attributes
    ----------
    variants, default_variant
        The wordings by name, and the one used unless another is asked for.
    stops
        Strings that end an answer; they and what follows are cut.
    stop_ids
        Token ids that end an answer (EOS).
    keep_after
        An answer is cut to what follows the last of these strings, as the authors do; "" keeps all.
    refused
        Strings that a question may not contain (role markers, stop strings).
    default_question
        Asked when the caller asks nothing.
    findings
        What `score` may be asked by name; empty where the model was not trained for it.
    tasks
        Name → form of the question; empty where the model knows no tasks.
    box_grid
        Answers and questions may hold boxes `{<x0><y0><x1><y1>}` in so many parts of the image's sides; 0 where not.
    replaced
        Words in an answer → what a reader sees instead, as the authors have it.
    phrases
        Texts that answers often begin with or hold. They change no answer: the next tokens are guessed from them.
    """

    variants: Mapping[str, PromptVariant]
    default_variant: str
    stops: tuple[str, ...]
    stop_ids: tuple[int, ...]
    keep_after: str
    refused: tuple[str, ...]
    default_question: str
    findings: tuple[FindingSpec, ...] = ()
    tasks: Mapping[str, TaskSpec] = field(default_factory=dict)
    box_grid: int = 0
    replaced: Mapping[str, str] = field(default_factory=dict)
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationOptions:
    """What may be asked of one generation; `None` means: the preset's value, else the bundle's.

    Attributes
    ----------
    preset
        A named set of options of the bundle, e.g. "greedy" or "authors".
    max_tokens, min_tokens
        Bounds on generated tokens.
    temperature
        0 is greedy: the arg-max, whatever the seed.
    top_p, top_k
        Nucleus and top-k cuts; 1.0 and 0 switch them off.
    repeat_penalty, penalty_last_n
        On generated tokens only; 1.0 switches it off. Last n = -1 means all of them.
    seed
        Of the sampler; the same seed gives the same text.
    beams
        Above 1: beam search with so many, which is deterministic and excludes sampling.
    stops
        Further stop strings, beside the bundle's.
    """

    preset: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repeat_penalty: float | None = None
    penalty_last_n: int | None = None
    seed: int | None = None
    beams: int | None = None
    stops: tuple[str, ...] | None = None


OPTION_RANGES: Mapping[str, tuple[float, float]] = {
    "max_tokens": (1, 100_000),
    "min_tokens": (0, 100_000),
    "temperature": (0, 10),
    "top_p": (0, 1),
    "top_k": (0, 1_000_000),
    "repeat_penalty": (0.01, 10),
    "penalty_last_n": (-1, 1_000_000),
    "seed": (0, 2**32 - 2),  # llama.cpp takes the largest 32-bit number to mean "a random seed"
    "beams": (1, 10),
}
"""Smallest and largest value of each number in `GenerationOptions` and `Sampling`."""


@dataclass(frozen=True)
class Sampling:
    """`GenerationOptions` with every value decided; what the language model is given and a record reports."""

    max_tokens: int = 300
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repeat_penalty: float = 1.0
    penalty_last_n: int = 64
    seed: int = 0
    beams: int = 1
    stops: tuple[str, ...] = ()
    preset: str = "default"

    def fault(self) -> str:
        """What is wrong with the first number of another type or outside its range; "" where none is."""
        for name, (low, high) in OPTION_RANGES.items():
            value, kind = getattr(self, name), (int if isinstance(getattr(Sampling, name), int) else float)
            if isinstance(value, bool) or not isinstance(value, kind | int):
                return f"{name} is {value!r}; it must be a {'whole number' if kind is int else 'number'}"
            if not low <= value <= high:
                return f"{name} is {value}; it must lie between {low} and {high}"
        return ""


@dataclass(frozen=True)
class DevicePlan:
    """What runs where, decided once by `device`, with the reasons.

    Attributes
    ----------
    providers
        ONNX Runtime providers in order of preference, e.g. ("CPUExecutionProvider",).
    gpu_layers
        Layers of the language model that are offloaded; -1 = all, 0 = none.
    threads
        Threads of the language model.
    step_threads
        Most threads of a call with one row.
    encoder_threads
        Threads of the encoder; 0: the same ones, in turn.
    context
        Cells of the KV cache for each sequence.
    batch
        Rows of one decode call.
    sequences
        Sequences that share the context.
    engines
        Copies of the language model, each with its part of the sequences and so many threads.
    float32_cache
        A float32 KV cache without flash attention, for parity with float32 references.
    reasons
        One sentence a choice.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    gpu_layers: int = 0
    threads: int = 1
    step_threads: int = 1024
    encoder_threads: int = 0
    context: int = 2048
    batch: int = 512
    sequences: int = 1
    engines: int = 1
    float32_cache: bool = False
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A finding that an answer states or that was scored; probability in [0, 1], or None where it was not scored."""

    name: str
    present: bool
    probability: float | None = None


@dataclass(frozen=True)
class Box:
    """A rectangle that an answer gives: what it is said to hold ("" where nothing is said), and its corners.

    Corners are in pixels of the original image, edges and not centres of pixels: 0 <= x0 < x1 <= width, y downwards.
    """

    phrase: str
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Timings:
    """Seconds of each stage of one answer."""

    read: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    generate: float = 0.0


@dataclass(frozen=True)
class Summary:
    """One answer about one radiograph, and all that is needed to tell how it came about.

    `question`, `task` and `asked_box` are what the caller asked; with the bundle's templates they give what the model
    was sent. `raw_text` is what it said up to a stop string; `text` is that as a reader sees it.
    """

    source: str
    sha256: str
    sop_instance_uid: str | None
    question: str
    prompt_variant: str
    text: str
    raw_text: str
    finish: Finish
    warnings: tuple[str, ...]
    options: Sampling
    device: str
    bundle_id: str
    bundle_name: str
    timings: Timings
    prompt_tokens: int
    image_tokens: int
    answer_tokens: int
    disclaimer: str
    findings: tuple[Finding, ...] = ()
    task: str | None = None
    asked_box: Corners | None = None
    boxes: tuple[Box, ...] = ()
    schema: str = field(default=RECORD_SCHEMA, kw_only=True)


@dataclass(frozen=True)
class Failure:
    """One radiograph that could not be answered for; a run over many goes on."""

    source: str
    sha256: str | None
    question: str
    stage: str
    error: str
    message: str
    schema: str = field(default=RECORD_SCHEMA, kw_only=True)


Record = Summary | Failure
JSON = dict[str, Any]


@dataclass(frozen=True)
class SourceFile:
    """A file that a bundle was made from: its role ("vision", "checkpoint", "llm" …), base name and sha256."""

    role: str
    name: str
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle: flat name, sha256 and size in bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class SelfTest:
    """What a healthy installation answers on an input that is generated, not stored.

    Attributes
    ----------
    seed
        Of the generated radiograph (`verify.test_radiograph`).
    positions
        Indices into the flattened (N, E) embeddings.
    embeddings
        The values expected there.
    tolerance
        Largest allowed |difference|, relative to the largest |expected value|.
    question
        What is asked, with the default prompt variant.
    ids
        Token ids of the recorded greedy answer.
    margins
        Logit of the first minus logit of the second token at each step, as recorded.
    margin_bound
        Steps with a larger margin must have the recorded id as arg-max; others are free.
    """

    seed: int
    positions: tuple[int, ...]
    embeddings: tuple[float, ...]
    tolerance: float
    question: str
    ids: tuple[int, ...]
    margins: tuple[float, ...]
    margin_bound: float


@dataclass(frozen=True)
class Manifest:
    """`bundle.json`, parsed. Every field is required and typed; an unknown key is an error.

    Attributes
    ----------
    image_tokens, width
        N and E of `ImageTokens`.
    defaults, presets
        Generation options: the bundle's own and further named sets.
    weight_types
        Of "vision", "projector" and "llm", e.g. "f32", "int8", "q8_0".
    agreement
        What the converter measured: figure name → value.
    warnings
        Sentences that every answer carries, e.g. that a weight type was forced against what was measured.
    """

    schema: int
    name: str
    family: str
    licence: str
    intended_use: str
    disclaimer: str
    sources: tuple[SourceFile, ...]
    image: ImageSpec
    image_tokens: int
    width: int
    prompt: PromptSpec
    defaults: Sampling
    presets: Mapping[str, GenerationOptions]
    weight_types: Mapping[str, str]
    agreement: Mapping[str, float]
    warnings: tuple[str, ...]
    files: tuple[FileEntry, ...]
    self_test: SelfTest


@dataclass(frozen=True)
class Bundle:
    """A folder whose files have passed every check. `id` is the sha256 of its canonical `bundle.json`."""

    folder: Path
    manifest: Manifest
    id: str

    @property
    def vision(self) -> Path:
        return self.folder / "vision.onnx"

    @property
    def projector(self) -> Path:
        return self.folder / "projector.onnx"

    @property
    def llm(self) -> Path:
        return self.folder / "llm.gguf"


@dataclass(frozen=True)
class Check:
    """One line of `verify` or `doctor`: what was looked at, how it stands, and a sentence about it."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str


class Tokenize(Protocol):
    """Text → ids, int32 (n,); control tokens are never parsed out of the text."""

    def __call__(self, text: str, *, leading_space: bool) -> Int32: ...
