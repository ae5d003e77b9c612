"""A Hugging Face Llama folder → GGUF, one tensor at a time.

Knows Llama's tensor names, llama.cpp's names and metadata, and the row order that its rotary embedding wants. It reads
through `checkpoint` and never holds more than one tensor and its converted copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, RopeScalingType

from xraygpt_lite.converters import vocabulary
from xraygpt_lite.converters.checkpoint import BUFFERS, Checkpoint, take_all
from xraygpt_lite.errors import ConversionError

DirectType = Literal["f32", "f16"]
FILE_TYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16}

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


@dataclass(frozen=True)
class Sizes:
    """What `config.json` says; `rows` (of the embedding table) comes from the tensor."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    feed_forward: int
    context: int
    rows: int
    epsilon: float
    rope_base: float
    rope_factor: float | None
    tied: bool


class LlamaFolder:
    """A language model's folder with its names, sizes and vocabulary checked; values are read while it is written.

    Attributes
    ----------
    sizes, vocabulary, ignored
        As named; `ignored` are tensors that nothing uses.
    files
        Every file that was read, for the bundle's list of sources.

    Raises
    ------
    ConversionError
        It is no Llama, or names, shapes and vocabulary do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConversionError(
                f"--llm {folder} is not a folder; expected a Hugging Face Llama folder with config.json"
            )
        self.folder = folder
        config = _config(folder / "config.json")
        self._weights = Checkpoint(folder)
        embedding = self._weights.shapes.get("model.embed_tokens.weight", (0, 0))
        self.sizes = _sizes(folder / "config.json", config, embedding[0])
        self._plan = list(self._tensors())
        unused = () if "lm_head.weight" in {stored for _, stored, _ in self._plan} else (r"^lm_head\.weight$",)
        self.ignored = take_all(self._weights, [stored for _, stored, _ in self._plan], (*BUFFERS, *unused))
        for _, stored, expected in self._plan:
            if self._weights.shapes[stored] != expected:
                raise ConversionError(
                    f"tensor {stored!r} of {folder} has shape {self._weights.shapes[stored]}; config.json asks "
                    f"for {expected}"
                )
        self.vocabulary = vocabulary.read(folder, self.sizes.rows)
        self.files = (folder / "config.json", *self._weights.files, *self.vocabulary.files)

    @property
    def own_type(self) -> DirectType:
        """The type that loses nothing of what is stored, for a quantizer to start from."""
        return "f16" if self._weights.half else "f32"

    def write(self, path: Path, kind: DirectType, name: str) -> None:
        """Write the GGUF file: matrices as `kind`, vectors as float32.

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
            dtype = _dtype(kind, shape)
            writer.add_tensor_info(target, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for target, stored, shape in self._plan:
                writer.write_tensor_data(self._convert(target, stored, _dtype(kind, shape)))
        finally:
            writer.close()

    def _convert(self, target: str, stored: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        values: npt.NDArray[np.float32] = self._weights.read(stored).float().numpy()
        if target.endswith("attn_q.weight"):
            values = rotary_order(values, self.sizes.heads)
        elif target.endswith("attn_k.weight"):
            values = rotary_order(values, self.sizes.kv_heads)
        with np.errstate(over="ignore"):
            result = np.ascontiguousarray(values.astype(dtype))
        if not np.isfinite(result).all():
            raise ConversionError(f"tensor {stored!r} of {self.folder} holds values beyond float16; use --quant f32")
        return result

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


def rotary_order(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from Hugging Face's order (halves of a head) to llama.cpp's (pairs); shape (rows, columns) stays.

    `heads` are the matrix's own: for k of a grouped-query model, the key-value heads.
    """
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _dtype(kind: DirectType, shape: tuple[int, ...]) -> np.dtype[Any]:
    return np.dtype(np.float16 if kind == "f16" and len(shape) > 1 else np.float32)


def _metadata(writer: Any, sizes: Sizes, words: vocabulary.Vocabulary, name: str, kind: DirectType) -> None:
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


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(
            f"{path} cannot be read ({error.strerror}); --llm wants a Hugging Face Llama folder"
        ) from error
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "llama":
        raise ConversionError(f"{path} describes a model of type {kind!r}; only 'llama' can be converted")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(name):
            raise ConversionError(
                f"{path} sets {name}, which no model of these families has and the converter does not know"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"{path} sets hidden_act to {config['hidden_act']!r}; Llama's is 'silu'")
    return dict(config)


def _sizes(path: Path, config: dict[str, Any], rows: int) -> Sizes:
    def integer(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConversionError(f"{path}: {name} is {value!r}; expected a positive integer")
        return value

    def number(name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise ConversionError(f"{path}: {name} is {value!r}; expected a positive number")
        return float(value)

    width, heads = integer("hidden_size"), integer("num_attention_heads")
    kv_heads, head = integer("num_key_value_heads", heads), integer("head_dim", max(1, width // heads))
    if heads % kv_heads or head % 2:
        raise ConversionError(
            f"{path}: {heads} heads, {kv_heads} key-value heads and a head width of {head} do not fit together"
        )
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ConversionError(f"{path}: rotary scaling of type {kind!r} is not known; 'linear' is")
    return Sizes(
        width=width,
        layers=integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        feed_forward=integer("intermediate_size"),
        context=integer("max_position_embeddings"),
        rows=rows,
        epsilon=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        rope_base=number("rope_theta", config.get("rope_theta", scaling.get("rope_theta", 10000.0))),
        rope_factor=number("rope_scaling.factor", scaling.get("factor")) if kind == "linear" else None,
        tied=bool(config.get("tie_word_embeddings", False)),
    )
