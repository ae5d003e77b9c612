"""What a Hugging Face `config.json` says of a Llama: sizes and constants. Knows neither tensors nor vocabularies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xraygpt_lite.errors import ConversionError


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


def read(path: Path, rows: int) -> Sizes:
    """Read a `config.json`; `rows` are those of the embedding table.

    Raises
    ------
    ConversionError
        It is no Llama's, or it says what the converter does not know.
    """
    config = _load(path)

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
    if not isinstance(scaling, dict):
        raise ConversionError(f"{path}: rope_scaling is {scaling!r}; expected an object")
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
        context=integer("max_position_embeddings", 2048),  # transformers' default: the first LLaMA folders lack it
        rows=rows,
        epsilon=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        rope_base=number("rope_theta", config.get("rope_theta", scaling.get("rope_theta", 10000.0))),
        rope_factor=number("rope_scaling.factor", scaling.get("factor")) if kind == "linear" else None,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(
            f"{path} cannot be read ({error.strerror}); --llm wants a Hugging Face Llama folder"
        ) from error
    except (ValueError, RecursionError) as error:
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
