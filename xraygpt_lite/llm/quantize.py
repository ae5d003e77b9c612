"""Makes a smaller GGUF of a float one with llama.cpp's own quantizer. Knows nothing of bundles or of other formats."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConversionError, UsageError
from .library import WARNING, library, log, set_fields

# llama.cpp's llama_ftype for each name.
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "iq4_xs": 30}
_FALLBACK = re.compile(
    r"warning: (?P<name>\S+)\s+- ncols\s+(?P<width>\d+) not divisible by\s+(?P<block>\d+) \(required for type\s+"
    r"(?P<wanted>\S+)\s*\).*-> falling back to\s+(?P<got>\S+)"
)


@dataclass(frozen=True)
class Fallback:
    """A tensor that could not have the type asked for, since its width is not a multiple of the type's block."""

    tensor: str
    width: int
    block: int
    wanted: str
    got: str


def quantize(src: Path, dst: Path, type: str, *, threads: int = 0) -> tuple[Fallback, ...]:
    """Write `dst` as `src` with its weights in another type; all of it or nothing.

    Parameters
    ----------
    src
        A float32 or float16 GGUF.
    dst
        Replaced when it exists.
    type
        One of `FILE_TYPES`.
    threads
        0 = one for each core.

    Returns
    -------
    tuple of Fallback
        The tensors that got another type than asked for; they are larger and no less precise.

    Raises
    ------
    UsageError
        The type is unknown.
    ConversionError
        llama.cpp failed, e.g. on a damaged file or a full disk; `dst` is untouched.
    """
    if type not in FILE_TYPES:
        raise UsageError(f"weight type {type!r} is unknown; expected one of {', '.join(FILE_TYPES)}")
    with src.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConversionError(f"{src.name} is not a GGUF file; it cannot be quantized")
    lib = library()
    params = lib.llama_model_quantize_default_params()
    set_fields(params, ftype=FILE_TYPES[type], nthread=threads)
    part = dst.with_name(dst.name + ".part")
    mark = log.mark()
    try:
        _claim(part)
        code = lib.llama_model_quantize(os.fsencode(src), os.fsencode(part), params)
        if code != 0:
            raise ConversionError(f"llama.cpp could not quantize {src.name} to {type}{log.reason(mark)}")
        os.replace(part, dst)
    finally:
        part.unlink(missing_ok=True)
    return tuple(
        Fallback(found["name"], int(found["width"]), int(found["block"]), found["wanted"], found["got"])
        for line in log.since(mark, WARNING)
        if (found := _FALLBACK.search(line))
    )


def _claim(path: Path) -> None:
    """Make sure that the file can be written, in Python's words: llama.cpp's say nothing of the reason."""
    try:
        path.write_bytes(b"")
    except OSError as error:
        raise ConversionError(f"{path.parent} cannot be written to: {error.strerror}") from error
