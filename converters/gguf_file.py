"""An existing GGUF as a bundle's language model: checked, then copied as it is or made smaller.

Knows what the prompts and the runtime need of it; whether llama.cpp can run it, the bundle's self-test tells.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, LlamaFileType

from xraygpt_lite.bundle import gguf_header
from xraygpt_lite.converters.llama import BLOCK
from xraygpt_lite.converters.lora import Lora
from xraygpt_lite.converters.tensors import is_finite
from xraygpt_lite.errors import BundleError, ConversionError
from xraygpt_lite.llm.quantize import quantize

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Where the float16 numbers of a block lie, in bytes: all that can be NaN or infinite in it."""


@dataclass(frozen=True)
class _Stored:
    """One tensor: its type's name, and where its bytes are."""

    name: str
    kind: str
    dimensions: int
    offset: int
    size: int


class GgufFile:
    """A language model's GGUF with its header and vocabulary checked; values are checked while it is written.

    Attributes
    ----------
    path, files
        The file; `files` as (role, path).
    width, bos, eos
        Of one embedding; the ids that begin a text and end an answer.
    own_type
        Weight type, in the words of `--quant`.
    ignored, notes
        Nothing: it is kept whole.

    Raises
    ------
    ConversionError
        It is damaged, no Llama, or has a vocabulary or weight type that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (("llm", path),)
        self.ignored: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        facts, self._tensors = _read(path)
        self.width: int = facts["llama.embedding_length"]
        self.bos, self.eos = (_token(path, facts, name) for name in ("bos", "eos"))
        self.own_type = _own_type(self._tensors, facts.get("general.file_type"))

    @property
    def default_type(self) -> str:
        """What is asked for where nobody says: the file as it is."""
        return self.own_type

    def weight_type(self, asked: str) -> str:
        """What is written when `asked` is asked for.

        Raises
        ------
        ConversionError
            The weights are quantized already, in another type.
        """
        if asked != self.own_type and self.own_type.upper() not in FLOATS:
            raise ConversionError(
                f"--llm {self.path} is quantized already ({self.own_type}) and cannot become {asked} without loss; "
                "give the f16 or f32 file, or leave --quant out to keep this one as it is"
            )
        return asked

    def merge(self, lora: Lora) -> None:
        """Refuse: see Raises.

        Raises
        ------
        ConversionError
            Always.
        """
        raise ConversionError(
            f"the LoRA of {lora.source.path} cannot be merged into --llm {self.path}, a GGUF; give the Hugging Face "
            "folder of that language model"
        )

    def write(self, path: Path, kind: str, name: str) -> None:  # noqa: ARG002 - it keeps its own name
        """Write the file as it is, or in the weight type `kind`.

        Raises
        ------
        ConversionError
            A value is not finite; the message names the tensor.
        OSError
            The file cannot be written.
        """
        for tensor in self._tensors:
            _check_values(self.path, tensor)
        if kind == self.own_type:
            shutil.copyfile(self.path, path)
        else:
            quantize(self.path, path, kind)


def _read(path: Path) -> tuple[dict[str, Any], list[_Stored]]:
    """Metadata without long lists, and the table of tensors, both held to what a Llama has."""
    try:
        header = gguf_header.read(path)  # bounded: a damaged file is refused before the library below opens it
        reader = GGUFReader(path)
        facts = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
        tensors = [
            _Stored(each.name, each.tensor_type.name, len(each.shape), int(each.data_offset), int(each.n_bytes))
            for each in reader.tensors
        ]
    except BundleError as error:
        raise ConversionError(f"--llm {path}: {error}") from error
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ConversionError(f"--llm {path} is truncated or damaged ({error}); get it anew") from error
    if header.architecture != "llama":
        raise ConversionError(
            f"--llm {path} is a model of architecture {header.architecture!r}; these families use 'llama'"
        )
    if facts.get("split.count", 1) > 1:
        raise ConversionError(f"--llm {path} is one of {facts['split.count']} parts; join them with llama-gguf-split")
    if facts.get("tokenizer.ggml.model") != "llama":
        raise ConversionError(
            f"--llm {path} has a vocabulary of kind {facts.get('tokenizer.ggml.model')!r}; these families use "
            "SentencePiece's ('llama'), and ids would differ"
        )
    _check_tensors(path, tensors, facts.get("llama.block_count"))
    return facts, tensors


def _check_tensors(path: Path, tensors: list[_Stored], layers: Any) -> None:
    if not isinstance(layers, int) or not 0 < layers <= len(tensors):
        raise ConversionError(f"--llm {path} has {len(tensors)} tensors and says {layers!r} layers; it is damaged")
    wanted = {"output_norm.weight", *(f"blk.{n}.{name}.weight" for n in range(layers) for name in BLOCK.values())}
    if missing := wanted - {tensor.name for tensor in tensors}:
        raise ConversionError(f"--llm {path} lacks tensor {min(missing)!r}; it is incomplete")
    size = path.stat().st_size
    for tensor in tensors:
        if tensor.kind not in FLOATS and tensor.kind not in SCALES:
            raise ConversionError(
                f"tensor {tensor.name!r} of {path} is stored as {tensor.kind}; known are "
                f"{', '.join((*FLOATS, *SCALES))}"
            )
        if tensor.offset + tensor.size > size:
            raise ConversionError(f"tensor {tensor.name!r} lies beyond the end of {path}; the file is truncated")


def _token(path: Path, facts: dict[str, Any], name: str) -> int:
    number = facts.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(number, int):
        raise ConversionError(f"--llm {path} does not say its {name.upper()} token, which the prompts need")
    return number


def _own_type(tensors: list[_Stored], file_type: Any) -> str:
    """The matrices' type where it is one, else what the file says of its mixture."""
    kinds = {tensor.kind for tensor in tensors if tensor.dimensions > 1}
    if len(kinds) == 1:
        return kinds.pop().lower()
    try:
        return LlamaFileType(file_type).name.removeprefix("MOSTLY_").lower()
    except ValueError:
        return "mixed"


def _check_values(path: Path, tensor: _Stored) -> None:
    data: npt.NDArray[np.uint8] = np.fromfile(path, np.uint8, tensor.size, offset=tensor.offset)
    if tensor.kind in FLOATS:
        finite = is_finite(torch.from_numpy(data).view(FLOATS[tensor.kind]))
    else:
        _, block = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.kind]]
        blocks = data.reshape(-1, block)
        scales = (np.ascontiguousarray(blocks[:, at : at + 2]) for at in SCALES[tensor.kind])
        finite = all(is_finite(torch.from_numpy(each).view(torch.float16)) for each in scales)
    if not finite:
        raise ConversionError(
            f"tensor {tensor.name!r} of {path} holds values that are not finite (NaN or infinity); get an undamaged "
            "copy"
        )
