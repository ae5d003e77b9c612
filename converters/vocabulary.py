"""A SentencePiece vocabulary as llama.cpp stores it: pieces, scores, kinds, and the tokens added later.

Knows `tokenizer.model` and the JSON files that add tokens to it; knows no weights. llama.cpp's `llama` tokenizer merges
by score, which is what SentencePiece's BPE does; other kinds of model would give other ids and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from xraygpt_lite.errors import ConversionError

BPE = 2
FILE = "tokenizer.model"
MOST_PADDING = 255
"""Rows of an embedding table beyond the vocabulary: tables are rounded up, to multiples of 256 at most."""
ADDED_FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Vocabulary:
    """One entry for each row of the embedding table.

    Attributes
    ----------
    pieces
        UTF-8, with SentencePiece's ▁ for a space.
    scores, kinds
        Of each piece; kinds as in GGUF's `tokenizer.ggml.token_type`.
    bos, eos, unknown, padding
        Ids; padding is None where the vocabulary has none.
    files
        What was read.
    unnamed
        How many of the rows stand for no piece: padding of the table.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    bos: int
    eos: int
    unknown: int
    padding: int | None
    files: tuple[Path, ...]
    unnamed: int


def read(folders: Sequence[Path], rows: int, file: Path | None = None) -> Vocabulary:
    """The vocabulary of Hugging Face folders whose embedding table has `rows` rows.

    Parameters
    ----------
    folders
        Looked through in this order; the first that has a file wins. All vocabularies in them must be the same.
    file
        A `tokenizer.model` that takes the place of theirs.

    Raises
    ------
    ConversionError
        There is no `tokenizer.model`, it is no BPE model of SentencePiece or normalizes text, or it does not belong to
        that table.
    """
    path = file or _find(folders)
    model = _model(path)
    size = len(model.pieces)
    if size > rows:
        raise ConversionError(
            f"{path} has {size} pieces and the embedding table of {folders[0]} only {rows} rows; "
            "they belong to different models"
        )
    pieces = [piece.piece.encode() for piece in model.pieces]
    scores = [float(piece.score) for piece in model.pieces]
    kinds = [int(piece.type) for piece in model.pieces]
    folder, added, files = _added(folders)
    unnamed = rows - size - sum(size <= number < rows for number in added)
    if unnamed > MOST_PADDING:
        raise ConversionError(
            f"{path} has {size} pieces and the embedding table of {folders[0]} {rows} rows; "
            "they belong to different models"
        )
    for number in range(size, rows):
        pieces.append(f"[PAD{number}]".encode())
        scores.append(-10000.0)
        kinds.append(int(TokenType.UNUSED))
    for number, (text, special) in added.items():
        if number < size and pieces[number] == text.encode():
            continue
        if number < size or number >= rows:
            raise ConversionError(
                f"{folder} adds the token {text!r} with id {number}, which is "
                + (
                    f"{pieces[number].decode()!r} in {FILE}"
                    if number < size
                    else f"beyond the {rows} rows of the embedding table"
                )
            )
        pieces[number], scores[number] = text.encode(), -1000.0
        kinds[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    trainer = model.trainer_spec
    padding = trainer.pad_id if 0 <= trainer.pad_id < size else None
    return Vocabulary(
        tuple(pieces),
        tuple(scores),
        tuple(kinds),
        trainer.bos_id,
        trainer.eos_id,
        trainer.unk_id,
        padding,
        (path, *files),
        unnamed,
    )


def _model(path: Path) -> Any:
    messages: Any = sentencepiece_model_pb2  # its classes are made while it is imported
    model = messages.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise ConversionError(
            f"{path} cannot be read ({error.strerror}); the SentencePiece vocabulary is needed"
        ) from error
    except DecodeError as error:
        raise ConversionError(f"{path} is not a SentencePiece model") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces or not model.IsInitialized():
        raise ConversionError(f"{path} holds no pieces; it is empty or damaged")
    if not all(isinstance(piece.piece, str) for piece in model.pieces):
        raise ConversionError(f"{path} holds pieces that are no text in UTF-8; it is damaged")
    if trainer.model_type != BPE or not trainer.byte_fallback:
        raise ConversionError(
            f"{path} is not a BPE model with byte fallback; llama.cpp would split text into other tokens"
        )
    if (
        normalizer.name not in ("identity", "")
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
    ):
        raise ConversionError(
            f"{path} normalizes text (rule {normalizer.name!r}), which llama.cpp does not; ids would differ"
        )
    if not normalizer.add_dummy_prefix:
        raise ConversionError(f"{path} puts no space before a text, as Llama's tokenizers do; ids would differ")
    if not all(0 <= number < len(model.pieces) for number in (trainer.bos_id, trainer.eos_id, trainer.unk_id)):
        raise ConversionError(f"{path} lacks a beginning, end or unknown token")
    return model


def _find(folders: Sequence[Path]) -> Path:
    """The `tokenizer.model` of the first folder that has one; others must have the same pieces."""
    found = [folder / FILE for folder in folders if (folder / FILE).is_file()]
    if not found:
        raise ConversionError(
            f"there is no {FILE} in {' or '.join(map(str, folders))}, and the SentencePiece vocabulary is needed; put "
            "it there or give it with --tokenizer FILE"
        )
    first, *others = found
    for other in others:
        if _model(other).pieces != _model(first).pieces:
            raise ConversionError(
                f"{first} and {other} are different vocabularies; base and delta do not belong together"
            )
    return first


def _added(folders: Sequence[Path]) -> tuple[Path, dict[int, tuple[str, bool]], list[Path]]:
    """The first folder that has files beside the model's; id → (text, whether it is a control token); those files."""
    added: dict[int, tuple[str, bool]] = {}
    files = []
    folder = next((each for each in folders if any((each / name).is_file() for name in ADDED_FILES)), folders[0])
    for path in (folder / name for name in ADDED_FILES):
        if not path.is_file():
            continue
        files.append(path)
        try:
            data = json.loads(path.read_bytes())
            if path.name == "added_tokens.json":
                added |= {int(number): (str(text), False) for text, number in data.items()}
            elif path.name == "tokenizer_config.json":
                entries = data.get("added_tokens_decoder", {})
                added |= {
                    int(key): (str(entry["content"]), bool(entry.get("special"))) for key, entry in entries.items()
                }
            else:
                entries = data.get("added_tokens", [])
                added |= {int(entry["id"]): (str(entry["content"]), bool(entry.get("special"))) for entry in entries}
            for text, _ in added.values():
                text.encode()  # half a character, as JSON can hold, is none
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConversionError(f"{path} is not a tokenizer's JSON file: {error!r}") from error
    return folder, added, files
