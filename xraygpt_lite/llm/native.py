"""A GGUF model and a context: one class for each native object, each native call in one place. A batch is in `rows`.

Every buffer that llama.cpp is given a pointer to is owned by the object that made the call. Close order: samplers,
context, model. Knows nothing of requests, threads or text that stops.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError, ClosedError, DeviceError, NativeError, UsageError, XrayError
from ..values import DevicePlan, Float32, Int32, UInt8
from .embedding import Embedding
from .library import brief, build_id, exact, gpu_memory, library, log, set_fields, supports_gpu, system_info
from .quantize import FILE_TYPES
from .rows import Batch

__all__ = ["Batch", "Context", "Model", "build_id", "exact", "gpu_memory", "set_fields", "supports_gpu", "system_info"]

# Reads the weights into memory of their own. Mapped pages of weights that are repacked for the CPU count twice (a 3.65
# GB model peaks at 7.5 GB instead of 4.1), and a bundle was hashed just before, so its pages are in the file cache.
LOAD_READ = 0
_TYPE_NAMES = {number: name for name, number in FILE_TYPES.items()}
_SENTENCEPIECE = 1
_BOOL_OVERRIDE = 2
_FLOAT32_TYPE = 0
_FLASH_ATTENTION_OFF = 0
# Of the cached values on a CPU. Keys and values of one type take another way through llama.cpp's attention where a row
# is alone and more than 256 are in the cache: its sums depend on the number of threads, and differ from those of rows
# decoded together. This one is as large and as near to float32: those sums are then not rounded to float16.
_BFLOAT16_TYPE = 30
_BYTES = ctypes.POINTER(ctypes.c_uint8)
_KNOWN_TEXTS = 64  # a template's and the questions that are asked of every radiograph: not tokenized again
_DAMAGED = "the language model's logits are not finite: its weights or the image rows are damaged"


class Model:
    """Weights and vocabulary of one GGUF file.

    Parameters
    ----------
    path
        The GGUF file; only files whose hash was checked should come here.
    gpu_layers
        Layers to offload; -1 = all.
    vocabulary_only
        Load no weights: for `tokenize` and `piece` alone.

    Raises
    ------
    BundleError
        It is no GGUF file, a damaged one, or one without a SentencePiece vocabulary.
    DeviceError
        Layers are to be offloaded and this build of llama.cpp cannot.
    """

    def __init__(self, path: Path, gpu_layers: int = 0, *, vocabulary_only: bool = False) -> None:
        self._lib = library()
        self._pointer: Any = None
        self._contexts = 0
        self._embedding: Embedding | None = None
        _check_header(path)
        if gpu_layers and not supports_gpu():
            raise DeviceError(
                f"{gpu_layers} layers were to run on a GPU, but this llama.cpp was built without one; use the CPU "
                "or reinstall llama-cpp-python with CUDA"
            )
        mark = log.mark()
        params = self._parameters(gpu_layers, vocabulary_only)
        self._pointer = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._pointer:
            raise BundleError(f"llama.cpp cannot load {path.name}{log.reason(mark)}; make the bundle anew")
        exact(_TYPE_NAMES.get(self._lib.llama_model_ftype(self._pointer), ""))  # before anything is decoded
        self._vocabulary = self._lib.llama_model_get_vocab(self._pointer)
        kind = self._lib.llama_vocab_type(self._vocabulary)
        if kind != _SENTENCEPIECE:
            self.close()
            raise BundleError(f"{path.name} has a vocabulary of type {kind}; expected 1, SentencePiece")
        self.width = int(self._lib.llama_model_n_embd(self._pointer))
        self.trained_context = int(self._lib.llama_model_n_ctx_train(self._pointer))
        self.vocab = int(self._lib.llama_vocab_n_tokens(self._vocabulary))
        self.bos = int(self._lib.llama_vocab_bos(self._vocabulary))
        self.eos = int(self._lib.llama_vocab_eos(self._vocabulary))
        self._pieces: dict[int, bytes] = {}
        self._tokenized: dict[tuple[str, bool], Int32] = {}
        if not vocabulary_only:
            try:
                self._embedding = Embedding(path, self.width)
            except XrayError:
                self.close()
                raise

    def _parameters(self, gpu_layers: int, vocabulary_only: bool) -> Any:
        # Switched off in the vocabulary, so that llama.cpp never adds a space and `tokenize` alone decides.
        overrides = (self._lib.llama_model_kv_override * 2)()
        set_fields(overrides[0], tag=_BOOL_OVERRIDE, key=b"tokenizer.ggml.add_space_prefix")
        overrides[0].value.val_bool = False
        self._overrides = overrides
        params = self._lib.llama_model_default_params()
        set_fields(
            params, n_gpu_layers=gpu_layers, load_mode=LOAD_READ, kv_overrides=overrides, vocab_only=vocabulary_only
        )
        return params

    @property
    def pointer(self) -> Any:
        """The native model; `ClosedError` after `close`."""
        if not self._pointer:
            raise ClosedError("the language model was closed; load it again")
        return self._pointer

    def tokenize(self, text: str, *, leading_space: bool) -> Int32:
        """Turn text into token ids (n,); text that looks like a control token stays plain characters.

        Parameters
        ----------
        text
            Any text; the empty text has no tokens.
        leading_space
            True as the slow Llama tokenizer treats a piece of its own: a space is put before it. False for a text that
            continues another.
        """
        if not text:
            return np.zeros(0, np.int32)
        _ = self.pointer
        known = self._tokenized.get((text, leading_space))
        if known is not None:
            return known.copy()
        try:
            data = (" " + text if leading_space else text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("the text holds half a character (a lone surrogate), which has no UTF-8 form") from error
        ids = np.empty(len(data) + 1, np.int32)
        target = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), target, ids.size, False, False)
        if count < 0:
            raise NativeError(f"llama.cpp could not tokenize {len(data)} bytes (returned {count})")
        if len(self._tokenized) < _KNOWN_TEXTS:
            self._tokenized[text, leading_space] = ids[:count]
        return ids[:count].copy()

    def embed(self, ids: Int32) -> Float32:
        """Return the rows (n, E) that stand for token ids (n,), which must lie inside the vocabulary."""
        if self._embedding is None:
            raise NativeError("a model that was loaded for its vocabulary alone has no embeddings")
        return self._embedding.rows(ids)

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; a control token stands for none, a byte token for part of one."""
        known = self._pieces.get(token)
        if known is not None:
            return known
        _ = self.pointer
        if not 0 <= token < self.vocab:
            raise NativeError(f"token id {token} lies outside the vocabulary of {self.vocab}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._lib.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, False)
            if count >= 0:
                break
            size = -count
        self._pieces[token] = buffer.raw[:count]
        return self._pieces[token]

    def close(self) -> None:
        """Free the weights; idempotent. Every context of this model must be closed before."""
        if self._contexts:
            raise NativeError("a model cannot be closed before its context")
        if self._embedding is not None:
            self._embedding.close()
        if self._pointer:
            self._lib.llama_model_free(self._pointer)
            self._pointer = None


class Context:
    """The KV cache and compute buffers of a model: `plan.sequences` streams of `cells` rows each."""

    def __init__(self, model: Model, plan: DevicePlan, cells: int) -> None:
        self._lib = library()
        self.model = model
        self.sequences = plan.sequences
        self.copying = False  # a copy waits for the next decode
        self.batch = max(plan.batch, plan.sequences)
        params = self._lib.llama_context_default_params()
        set_fields(
            params,
            n_ctx=cells * plan.sequences,
            n_batch=self.batch,
            n_ubatch=self.batch,
            n_seq_max=plan.sequences,
            n_threads=min(plan.threads, plan.step_threads),
            n_threads_batch=plan.threads,
            offload_kqv=plan.gpu_layers != 0,
            op_offload=plan.gpu_layers != 0,
            kv_unified=False,
            no_perf=True,
        )
        if plan.float32_cache:
            set_fields(params, type_k=_FLOAT32_TYPE, type_v=_FLOAT32_TYPE, flash_attn_type=_FLASH_ATTENTION_OFF)
        elif plan.gpu_layers == 0:
            set_fields(params, type_v=_BFLOAT16_TYPE)
        mark = log.mark()
        self._pointer = self._lib.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise NativeError(
                f"llama.cpp cannot make a context of {plan.sequences} x {cells} rows{log.reason(mark)}; "
                "ask for a smaller context or fewer beams"
            )
        model._contexts += 1
        self._memory = self._lib.llama_get_memory(self._pointer)
        self._remove, self._copy = brief(self._lib.llama_memory_seq_rm), brief(self._lib.llama_memory_seq_cp)
        self._last = brief(self._lib.llama_memory_seq_pos_max)
        self._results = brief(self._lib.llama_get_logits, ctypes.c_void_p)
        self._waits = plan.gpu_layers != 0
        self._seen: tuple[int, Float32] = (0, np.empty((0, 0), np.float32))
        self._row_type = ctypes.c_float * model.vocab
        self._outputs = np.zeros(0, np.bool_)
        self._likeliest: dict[int, int] = {}

    @property
    def pointer(self) -> Any:
        """The native context; `ClosedError` after `close`."""
        if not self._pointer:
            raise ClosedError("the language model's context was closed; load it again")
        return self._pointer

    def decode(self, batch: Batch) -> None:
        """Run the model over a batch: its rows enter the cache.

        Raises
        ------
        NativeError
            With llama.cpp's return code. After it, cut the sequences of this batch to what they held before.
        """
        mark = log.mark()
        self._outputs, self._likeliest = batch.outputs, {}
        code = self._lib.llama_decode(self.pointer, batch.struct)
        if code != 0:
            raise NativeError(f"llama.cpp could not decode {batch.rows} rows (returned {code}){log.reason(mark)}")
        self.copying = False

    def logits(self, row: int) -> Float32:
        """Return a copy (V,) of the logits of one row of the last batch, which was marked for output."""
        values = self._logits(row).copy()
        if not np.isfinite(values).all():
            raise NativeError(_DAMAGED)
        return values

    def likeliest(self, row: int) -> int:
        """Return the arg-max of one row's logits, the first of equal ones."""
        if not self._likeliest:  # of all rows at once: asked one by one, they would take longer than small models do
            rows = self._outputs.nonzero()[0]
            values = self._all(len(rows))
            if values is None:
                raise NativeError(f"row {row} of the last batch has no logits")
            most = values.argmax(1).tolist()  # what is no number counts as the largest
            self._likeliest = {
                number: token if math.isfinite(values.item(at, token)) else -1
                for at, (number, token) in enumerate(zip(rows.tolist(), most, strict=True))
            }
        token = self._likeliest.get(row)
        if token is None:
            raise NativeError(f"row {row} of the last batch has no logits")
        if token < 0:
            raise NativeError(_DAMAGED)
        return token

    def _all(self, count: int) -> Float32 | None:
        """A view (count, V) of the logits of all rows that give some, which the next call overwrites; None: of none."""
        if self._waits:
            self._lib.llama_synchronize(self.pointer)
        address = self._results(self.pointer)
        if not address or not count:
            return None
        known, values = self._seen
        if known != address or len(values) != count:
            memory: Any = (self._row_type * count).from_address(address)
            values = np.frombuffer(memory, np.float32).reshape(count, -1)
            self._seen = address, values
        return values

    def _logits(self, row: int) -> Float32:
        """A view (V,) of what the next call overwrites."""
        found = self._lib.llama_get_logits_ith(self.pointer, row)
        if not found:
            raise NativeError(f"row {row} of the last batch has no logits")
        memory: Any = self._row_type.from_address(ctypes.addressof(found.contents))
        return np.frombuffer(memory, np.float32)

    def cut(self, sequence: int, rows: int) -> None:
        """Drop a sequence's rows from position `rows` on."""
        if not self._remove(self._memory, sequence, rows, -1):
            raise NativeError(f"llama.cpp could not cut sequence {sequence} to {rows} rows")

    def copy(self, source: int, target: int) -> None:
        """Make a sequence hold what another one holds; the next `decode` moves the bytes, a whole stream's."""
        self._copy(self._memory, source, target, -1, -1)
        self.copying = True

    def save(self, sequence: int) -> UInt8:
        """Return what a sequence holds, at least one row, for `restore` on any context of this model and precision."""
        size = self._lib.llama_state_seq_get_size(self.pointer, sequence)
        state = np.empty(size, np.uint8)
        written = self._lib.llama_state_seq_get_data(self.pointer, state.ctypes.data_as(_BYTES), size, sequence)
        if written != size:
            raise NativeError(f"llama.cpp could not save sequence {sequence} (returned {written} of {size} bytes)")
        # Eight bytes, the number of streams, then of each stream the count of this sequence's rows, and these: zero in
        # all streams but one. It becomes, in place, the state of a context that has that one only.
        begin, end = 12 + 4 * sequence, size - 4 * (self.sequences - 1 - sequence)
        state[begin - 12 : begin] = np.concatenate([state[:8], _streams(1)])
        return state[begin - 12 : end]

    def restore(self, sequence: int, state: UInt8) -> None:
        """Replace what a sequence holds by what `save` returned."""
        if self.sequences > 1:
            empty = np.zeros(4 * (self.sequences - 1), np.uint8)
            state = np.concatenate([state[:8], _streams(self.sequences), state[12:], empty])
        mark = log.mark()
        if not self._lib.llama_state_seq_set_data(self.pointer, state.ctypes.data_as(_BYTES), state.size, sequence):
            raise NativeError(f"llama.cpp could not restore sequence {sequence}{log.reason(mark)}")

    def length(self, sequence: int) -> int:
        """Return how many rows a sequence holds in the native cache."""
        _ = self.pointer
        return int(self._last(self._memory, sequence)) + 1

    def close(self) -> None:
        """Free the cache and buffers; idempotent."""
        if self._pointer:
            self._lib.llama_free(self._pointer)
            self._pointer = None
            self.model._contexts -= 1


def _streams(count: int) -> UInt8:
    return np.array([count], np.uint32).view(np.uint8)


def _check_header(path: Path) -> None:
    """Refuse what is no GGUF file before the native parser sees it."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise BundleError(f"{path.name} cannot be read: {error.strerror}") from error
    version = int.from_bytes(head[4:8], "little")
    if head[:4] != b"GGUF" or len(head) < 24 or version not in (2, 3):
        raise BundleError(f"{path.name} is not a GGUF file of version 2 or 3; make the bundle anew")
