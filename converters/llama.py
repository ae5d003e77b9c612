"""A Hugging Face Llama folder → GGUF, one tensor at a time.

Knows Llama's tensor names, llama.cpp's names and metadata, and the row order that its rotary embedding wants. It never
holds more than one tensor and its converted copy; where the tensors come from (files, base and delta, a LoRA merged) is
all the same to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, RopeScalingType

from xraygpt_lite.converters import delta, llama_config, vocabulary
from xraygpt_lite.converters.checkpoint import BUFFERS, Checkpoint, take_all
from xraygpt_lite.converters.llama_config import Sizes
from xraygpt_lite.converters.lora import Lora, Merged
from xraygpt_lite.converters.tensors import Tensors, is_finite
from xraygpt_lite.errors import ConversionError

FILE_TYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16}
"""Weight types that are written here; llama.cpp's quantizer makes the others."""

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names within a layer: Hugging Face's → llama.cpp's."""


class LlamaFolder:
    """A language model's folder with its names, sizes and vocabulary checked; values are read while it is written.

    Parameters
    ----------
    folder
        A model, or a delta.
    base
        What a delta is added to; None where `folder` is a whole model.
    tokenizer
        A `tokenizer.model` elsewhere, where the folders have none.

    Attributes
    ----------
    path
        The folder: what messages name.
    sizes, vocabulary, ignored
        As named; `ignored` are tensors that nothing uses.
    notes
        What whoever converts has to know, a sentence each.
    files
        (role, path) of every file that was read, for the bundle's list of sources.

    Raises
    ------
    ConversionError
        It is no Llama, or names, shapes, configurations and vocabulary do not belong together.
    """

    def __init__(self, folder: Path, *, base: Path | None = None, tokenizer: Path | None = None) -> None:
        self.path = folder
        config, checkpoint = folder / "config.json", Checkpoint(folder)
        self._weights: Tensors = checkpoint
        self.sizes = _sizes(config, checkpoint)
        folders = {"llm" if base is None else "llm-delta": (folder, config, *checkpoint.files)}
        if base is not None:
            other = Checkpoint(base)
            delta.check_sizes(base / "config.json", _sizes(base / "config.json", other), config, self.sizes)
            self._weights = delta.Sum(other, checkpoint)
            folders["llm-base"] = (base, base / "config.json", *other.files)
        self._plan = list(self._tensors())
        self.ignored = self._check()
        places = [files[0] for files in folders.values()]
        self.vocabulary = vocabulary.read(places, self.sizes.rows, tokenizer)
        self.notes = () if not self.vocabulary.unnamed else (_padding(self.vocabulary.unnamed),)
        words = {path: "tokenizer" for path in self.vocabulary.files}
        words |= {path: role for role, (place, *_) in folders.items() for path in words if path.parent == place}
        read = [(role, path) for role, (_, *files) in folders.items() for path in files]
        self.files = (*read, *((role, path) for path, role in words.items()))

    @property
    def width(self) -> int:
        """Of one embedding."""
        return self.sizes.width

    @property
    def bos(self) -> int:
        """The id that begins a text."""
        return self.vocabulary.bos

    @property
    def eos(self) -> int:
        """The id that ends an answer."""
        return self.vocabulary.eos

    @property
    def own_type(self) -> str:
        """The type that a quantizer starts from: float16 where the matrices are stored in 16 bits."""
        return "f16" if self._weights.half else "f32"

    @property
    def default_type(self) -> str:
        """What is asked for where nobody says."""
        return "auto"

    def weight_type(self, asked: str) -> str:
        """What is written when `asked` is asked for."""
        return asked

    def merge(self, lora: Lora) -> None:
        """From here on, what is written has this LoRA merged into it.

        Raises
        ------
        ConversionError
            The LoRA was trained for another model.
        """
        self._weights = Merged(self._weights, lora)

    def write(self, path: Path, kind: str, name: str) -> None:
        """Write the GGUF file: matrices as `kind`, one of `FILE_TYPES`, vectors as float32.

        Raises
        ------
        ConversionError
            A value is not finite, or does not fit float16; the message names the tensor.
        OSError
            The file cannot be written.
        """
        writer = GGUFWriter(None, "llama")
        _metadata(writer, self.sizes, self.vocabulary, name, kind)
        for target, _, shape in self._plan:
            dtype = np.dtype(np.float16 if _is_half(kind, shape) else np.float32)
            writer.add_tensor_info(target, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for target, stored, shape in self._plan:
                written = torch.float16 if _is_half(kind, shape) else torch.float32
                writer.write_tensor_data(self._convert(target, stored, written))
        finally:
            writer.close()

    def _check(self) -> tuple[str, ...]:
        """Hold names and shapes against the plan; the names that nothing uses."""
        stored = [name for _, name, _ in self._plan]
        unused = () if "lm_head.weight" in stored else (r"^lm_head\.weight$",)
        ignored = take_all(self._weights, stored, (*BUFFERS, *unused))
        for _, name, expected in self._plan:
            if self._weights.shapes[name] != expected:
                raise ConversionError(
                    f"tensor {name!r} of {self.path} has shape {self._weights.shapes[name]}; config.json asks for "
                    f"{expected}"
                )
        return ignored

    def _convert(self, target: str, stored: str, dtype: torch.dtype) -> npt.NDArray[Any]:
        values = self._weights.read(stored)
        result = values.to(dtype)  # float16 stays the bytes that it is
        if result is not values and not is_finite(result):
            raise ConversionError(f"tensor {stored!r} of {self.path} holds values beyond float16; use --quant f32")
        array = result.numpy()
        if target.endswith("attn_q.weight"):
            array = rotary_order(array, self.sizes.heads)
        elif target.endswith("attn_k.weight"):
            array = rotary_order(array, self.sizes.kv_heads)
        return np.ascontiguousarray(array)

    def _tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """llama.cpp's name, the stored name and the expected shape of each tensor, in the order they are written."""
        s = self.sizes
        shapes = {
            "self_attn.q_proj": (s.heads * s.head, s.width),
            "self_attn.k_proj": (s.kv_heads * s.head, s.width),
            "self_attn.v_proj": (s.kv_heads * s.head, s.width),
            "self_attn.o_proj": (s.width, s.heads * s.head),
            "mlp.gate_proj": (s.feed_forward, s.width),
            "mlp.up_proj": (s.feed_forward, s.width),
            "mlp.down_proj": (s.width, s.feed_forward),
        }
        yield "token_embd.weight", "model.embed_tokens.weight", (s.rows, s.width)
        for n in range(s.layers):
            for theirs, ours in BLOCK.items():
                yield f"blk.{n}.{ours}.weight", f"model.layers.{n}.{theirs}.weight", shapes.get(theirs, (s.width,))
        yield "output_norm.weight", "model.norm.weight", (s.width,)
        if not s.tied:
            yield "output.weight", "lm_head.weight", (s.rows, s.width)


def rotary_order(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of q or k from Hugging Face's order (halves of a head) to llama.cpp's (pairs); shape (rows, columns) stays.

    `heads` are the matrix's own: for k of a grouped-query model, the key-value heads.
    """
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _is_half(kind: str, shape: tuple[int, ...]) -> bool:
    return kind == "f16" and len(shape) > 1


def _sizes(config: Path, weights: Checkpoint) -> Sizes:
    return llama_config.read(config, weights.shapes.get("model.embed_tokens.weight", (0, 0))[0])


def _padding(rows: int) -> str:
    which = "row of the embedding table stands" if rows == 1 else "rows of the embedding table stand"
    return f"{rows} {which} for no piece of the vocabulary (padding)"


def _metadata(writer: Any, sizes: Sizes, words: vocabulary.Vocabulary, name: str, kind: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_vocab_size(sizes.rows)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.width)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.feed_forward)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head)
    writer.add_value_length(sizes.head)
    writer.add_rope_dimension_count(sizes.head)
    writer.add_rope_freq_base(sizes.rope_base)
    if sizes.rope_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(sizes.rope_factor)
    writer.add_layer_norm_rms_eps(sizes.epsilon)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(words.pieces))
    writer.add_token_scores(list(words.scores))
    writer.add_token_types(list(words.kinds))
    writer.add_bos_token_id(words.bos)
    writer.add_eos_token_id(words.eos)
    writer.add_unk_token_id(words.unknown)
    if words.padding is not None:
        writer.add_pad_token_id(words.padding)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
