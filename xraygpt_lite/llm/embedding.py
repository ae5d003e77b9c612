"""The rows that a language model looks its tokens up in, read from its GGUF file as llama.cpp itself would read them.

A decode call takes token ids or rows of embeddings, not both. With these rows a question's tokens go into the same call
as the image rows before them. Knows ggml's reader of GGUF and its decoders of weight types. Knows no prompts.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import numpy as np

from ..errors import BundleError, ClosedError, NativeError
from ..values import Float32, Int32
from .library import ggml

_TENSOR = b"token_embd.weight"
_FLOAT32_TYPE = 0
_KNOWN_ROWS = 512  # of the questions that are asked of every radiograph: 8 MB at 7 billion weights
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", _POINTER))


class _Traits(ctypes.Structure):  # the beginning of ggml's
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", _NUMBER),
        ("blck_size_interleave", _NUMBER),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _NUMBER)),
    )


class Embedding:
    """Token embeddings of one GGUF file, which stays open: bit for bit what llama.cpp takes for these token ids.

    Parameters
    ----------
    path
        A file that llama.cpp has loaded.
    width
        E, the width of a row.

    Raises
    ------
    BundleError
        It has no embeddings of this width, or cannot be read.
    """

    def __init__(self, path: Path, width: int) -> None:
        self._name, self._width = path.name, width
        self._kind, self._begin = _find(path, width)
        traits = ggml("ggml_get_type_traits", ctypes.POINTER(_Traits), ctypes.c_int)(self._kind).contents
        self._decode = traits.to_float
        self._size = width // traits.blck_size * traits.type_size
        self._known: dict[int, Float32] = {}
        self._lock = threading.Lock()
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise BundleError(f"{path.name} cannot be read: {error.strerror}") from error

    def rows(self, ids: Int32) -> Float32:
        """Return the rows (n, E) of token ids (n,) of the vocabulary; from any thread.

        Raises
        ------
        NativeError, ClosedError
            The file can no longer be read, or was closed.
        """
        found = np.empty((len(ids), self._width), np.float32)
        for place, token in enumerate(ids.tolist()):
            row = self._known.get(token)
            if row is None:
                row = self._read(token)
                if len(self._known) < _KNOWN_ROWS:
                    self._known[token] = row
            found[place] = row
        return found

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            self._file.close()

    def _read(self, token: int) -> Float32:
        with self._lock:
            if self._file.closed:
                raise ClosedError("the language model was closed; load it again")
            try:
                self._file.seek(self._begin + token * self._size)
                data = self._file.read(self._size)
            except OSError as error:
                raise NativeError(
                    f"{self._name} can no longer be read ({error.strerror}); load the model again from where it is"
                ) from error
        if len(data) < self._size:
            raise NativeError(f"{self._name} has become shorter since it was loaded; run: xraygpt-lite verify")
        if self._kind == _FLOAT32_TYPE:
            return np.frombuffer(data, np.float32)
        row = np.empty(self._width, np.float32)
        self._decode(data, row.ctypes.data, self._width)
        return row


def _find(path: Path, width: int) -> tuple[int, int]:
    """The weight type of the token embeddings (V, E), as ggml numbers it, and the byte at which they begin."""
    header = ggml("gguf_init_from_file", _POINTER, ctypes.c_char_p, _Parameters)(os.fsencode(path), _Parameters(True))
    if not header:
        raise BundleError(f"{path.name} cannot be read as GGUF; make the bundle anew")
    try:
        tensor = ggml("gguf_find_tensor", _NUMBER, _POINTER, ctypes.c_char_p)(header, _TENSOR)
        shape = ggml("gguf_get_tensor_ne", ctypes.POINTER(_NUMBER), _POINTER, _NUMBER)
        if tensor < 0 or shape(header, tensor)[0] != width:
            raise BundleError(f"{path.name} has no token embeddings of width {width}; make the bundle anew")
        kind = ggml("gguf_get_tensor_type", ctypes.c_int, _POINTER, _NUMBER)(header, tensor)
        begin = ggml("gguf_get_data_offset", ctypes.c_size_t, _POINTER)(header)
        return kind, begin + ggml("gguf_get_tensor_offset", ctypes.c_size_t, _POINTER, _NUMBER)(header, tensor)
    finally:
        ggml("gguf_free", None, _POINTER)(header)
