"""The language model as a command names it: a folder, a base and a delta, or a GGUF. Knows no file's content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from xraygpt_lite.converters.gguf_file import GgufFile
from xraygpt_lite.converters.llama import LlamaFolder
from xraygpt_lite.converters.lora import Lora
from xraygpt_lite.errors import ConversionError, UsageError


class LanguageModel(Protocol):
    """What a conversion asks of its language model, whatever it is made of; see `LlamaFolder` and `GgufFile`."""

    @property
    def path(self) -> Path:
        """What messages name."""

    @property
    def width(self) -> int:
        """Of one embedding."""

    @property
    def bos(self) -> int:
        """The id that begins a text."""

    @property
    def eos(self) -> int:
        """The id that ends an answer."""

    @property
    def own_type(self) -> str:
        """The weight type in which nothing of what is stored is lost."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Tensors that nothing uses, by name."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever converts has to know, a sentence each."""

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """(role, path) of every file that was read."""

    @property
    def default_type(self) -> str:
        """What is asked for where nobody says: one of `weights.QUANTS`, or the type of a finished file."""

    def weight_type(self, asked: str) -> str:
        """What is written when `asked` is asked for."""

    def merge(self, lora: Lora) -> None:
        """From here on, what is written has this LoRA merged into it."""

    def write(self, path: Path, kind: str, name: str) -> None:
        """Write the GGUF file, with weights as `kind`."""


def read(inputs: Mapping[str, Path]) -> LanguageModel:
    """Check the language model's files.

    Parameters
    ----------
    inputs
        Role → path: "llm", or "llm-base" and "llm-delta"; with either, "tokenizer".

    Raises
    ------
    UsageError
        The roles do not go together.
    ConversionError
        The files cannot be used.
    """
    whole, base, delta, tokenizer = (inputs.get(role) for role in ("llm", "llm-base", "llm-delta", "tokenizer"))
    if whole is not None and base is None and delta is None:
        return _whole(whole, tokenizer)
    if whole is not None or base is None or delta is None:
        raise UsageError("the language model is either --llm, or --llm-base and --llm-delta together")
    for option, folder in (("--llm-base", base), ("--llm-delta", delta)):
        if not folder.is_dir():
            raise ConversionError(f"{option} {folder} is not a folder; expected a Hugging Face Llama folder")
    return LlamaFolder(delta, base=base, tokenizer=tokenizer)


def _whole(path: Path, tokenizer: Path | None) -> LanguageModel:
    if path.is_dir():
        return LlamaFolder(path, tokenizer=tokenizer)
    if not _is_gguf(path):
        raise ConversionError(
            f"--llm {path} is not a folder with a Hugging Face Llama (config.json, tokenizer.model, weights), and no "
            "GGUF file"
        )
    if tokenizer is not None:
        raise UsageError(f"--llm {path} is a GGUF, which has its own vocabulary; leave --tokenizer out")
    return GgufFile(path)


def _is_gguf(path: Path) -> bool:
    """By its first bytes, or by its name where those are damaged."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF" or path.suffix == ".gguf"
    except OSError as error:
        raise ConversionError(f"--llm {path} cannot be read: {error.strerror}") from error
