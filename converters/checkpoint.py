"""Reads published checkpoints safely, one tensor at a time, and fills torch modules from them.

Knows torch's and safetensors' files, single and sharded; knows no model family. A pickle is only ever opened with
`weights_only=True`, so that a file cannot run code.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from xraygpt_lite.converters import opcodes
from xraygpt_lite.converters.tensors import Tensors, is_finite
from xraygpt_lite.errors import ConversionError

WRAPPERS = ("model", "state_dict", "module")
"""Keys under which trainers put the weights, beside what they need to resume."""

TRAINER_STATE = frozenset(
    {"optimizer", "config", "scaler", "epoch", "iters", "scheduler", "lr_scheduler", "args", "step"}
)
"""Keys beside the weights whose content is never used, tensors included."""

BUFFERS = (r"position_ids$", r"rotary_emb\.inv_freq$", r"num_batches_tracked$", r"relative_position_index$")
"""Buffers that older libraries stored and that the network computes itself."""

REOPEN_BYTES = 512 * 2**20
"""Mapped pages count as memory of this process until the file is closed: it is reopened after so many bytes."""

FOLDER_FILES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip


@dataclass(frozen=True)
class Derived:
    """A tensor of a network that is computed from stored ones.

    Attributes
    ----------
    shapes
        Stored name → the shape that it must have, in the order in which `make` takes them.
    make
        The stored tensors, as float32 → the network's.
    """

    shapes: Mapping[str, tuple[int, ...]]
    make: Callable[..., Tensor]


class Checkpoint:
    """Named tensors of one file, or of a folder with one file or an index of shards.

    Attributes
    ----------
    path
        As given: what messages name.
    files
        Every file that was opened, for the bundle's list of sources.
    shapes
        Tensor name → shape, over all files.
    half
        Whether the matrices are stored in 16 bits.
    extras
        Entries that are no weights: the trainer's state, by name.

    Raises
    ------
    ConversionError
        The file is missing, truncated, no checkpoint, holds more than tensors, or an index leads out of its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.extras: tuple[str, ...] = ()
        self.half = True
        self._where: dict[str, Path] = {}
        self._open: tuple[Path, Mapping[str, Tensor] | Any] | None = None
        self._read_bytes = 0
        shards, index = _shards(path)
        for shard in shards:
            self._list(shard)
        self.files: tuple[Path, ...] = (*shards, *index)
        if index:
            self._check_index(index[0])

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> Tensor:
        """One tensor in its stored type, on the CPU.

        Raises
        ------
        ConversionError
            It holds a value that is not finite, or cannot be read; the message names file and tensor.
        """
        path = self._where[name]
        if self._open is None or self._open[0] != path or self._read_bytes > REOPEN_BYTES:
            self._open, self._read_bytes = None, 0
            self._open = (path, _open(path)[0])
        source = self._open[1]
        try:
            tensor: Tensor = source[name] if isinstance(source, Mapping) else source.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError, OSError) as error:
            raise ConversionError(f"tensor {name!r} of {path} cannot be read; the file is damaged: {error}") from error
        self._read_bytes += tensor.nbytes
        try:
            finite = not tensor.is_floating_point() or is_finite(tensor)
        except RuntimeError as error:  # torch counts float8 as floating-point and cannot compare it
            raise ConversionError(
                f"tensor {name!r} of {path} is of type {tensor.dtype}, which is not converted; get the weights in 16 "
                "or 32 bits"
            ) from error
        if not finite:
            raise ConversionError(
                f"tensor {name!r} of {path} holds values that are not finite (NaN or infinity); get an undamaged copy"
            )
        return tensor

    def _list(self, path: Path) -> None:
        source, extras = _open(path)
        self.extras += extras
        names = list(source) if isinstance(source, Mapping) else list(source.keys())
        for name in names:
            if name in self.shapes:
                raise ConversionError(f"tensor {name!r} is in {self._where[name].name} and again in {path}")
            part = source[name] if isinstance(source, Mapping) else source.get_slice(name)
            self.shapes[name] = tuple(part.shape) if isinstance(part, Tensor) else tuple(part.get_shape())
            kind = str(part.dtype) if isinstance(part, Tensor) else part.get_dtype()
            self.half &= len(self.shapes[name]) < 2 or kind in {"torch.float16", "torch.bfloat16", "F16", "BF16"}
            self._where[name] = path

    def _check_index(self, index: Path) -> None:
        listed = _weight_map(index)
        for name, shard in listed.items():
            if name not in self._where or self._where[name].name != shard:
                raise ConversionError(
                    f"{index} says that tensor {name!r} is in {shard}, and it is not; get all files anew"
                )
        unlisted = [name for name in self._where if name not in listed and not _is_buffer(name)]
        if unlisted:
            raise ConversionError(
                f"{self._where[unlisted[0]]} holds {_some(unlisted)}, which {index} does not list; get all files anew"
            )


def take_all(source: Tensors, used: Iterable[str], ignored: Sequence[str]) -> tuple[str, ...]:
    """Hold a checkpoint's names against what a network uses.

    Parameters
    ----------
    used
        Names that are needed.
    ignored
        Patterns (searched) of names that may be there and are not needed.

    Returns
    -------
    tuple of str
        The names that are ignored, the trainer's state among them.

    Raises
    ------
    ConversionError
        A name is missing, or one is neither used nor known to be ignored.
    """
    wanted = set(used)
    missing = sorted(wanted - set(source.shapes))
    if missing:
        raise ConversionError(f"{source.path} lacks {_some(missing)}; it is incomplete or of another model")
    rest = [name for name in source.shapes if name not in wanted]
    unknown = [name for name in rest if not any(re.search(pattern, name) for pattern in ignored)]
    if unknown:
        raise ConversionError(
            f"{source.path} holds {_some(unknown)}, which this family neither uses nor knows to be unneeded; "
            "it belongs to another model or version"
        )
    return (*source.extras, *rest)


def fill(
    module: nn.Module,
    source: Checkpoint,
    names: Mapping[str, str | Derived],
    *,
    ignored: Sequence[str] = (),
    own: Sequence[str] = (),
) -> tuple[str, ...]:
    """Put a checkpoint's tensors into a module: first all names are checked, then all shapes, then the values.

    Parameters
    ----------
    module
        May lie on the meta device: what is read becomes its parameters, and nothing is held twice.
    names
        The module's own name → the checkpoint's, or how it is made of several.
    ignored
        As in `take_all`.
    own
        Patterns of the module's tensors that it computes or does not need, and that stay as they are.

    Returns
    -------
    tuple of str
        The checkpoint's entries that were ignored.

    Raises
    ------
    ConversionError
        Names, shapes or values do not fit.
    """
    state = module.state_dict()
    unfilled = sorted(
        name for name in set(state) - set(names) if not any(re.search(pattern, name) for pattern in (*own, *BUFFERS))
    )
    if unfilled:
        raise ConversionError(f"nothing in {source.path} is known to be the network's {_some(unfilled)}")
    wanted = {
        name: _shapes(entry, tuple(state[name].shape) if name in state else None) for name, entry in names.items()
    }
    left = take_all(source, [stored for shapes in wanted.values() for stored in shapes], (*ignored, *BUFFERS))
    for shapes in wanted.values():
        for stored, expected in shapes.items():
            if source.shapes[stored] != expected:
                raise ConversionError(
                    f"tensor {stored!r} of {source.path} has shape {source.shapes[stored]}; the sizes of the other "
                    f"tensors ask for {expected}"
                )
    values = {name: _value(source, entry) for name, entry in names.items()}
    module.load_state_dict(values, strict=False, assign=True)
    module.eval().requires_grad_(False)
    return left


def _shapes(entry: str | Derived, own: tuple[int, ...] | None) -> Mapping[str, tuple[int, ...] | None]:
    """Stored name → expected shape, of what one tensor of the network needs; `own` is that tensor's shape."""
    return entry.shapes if isinstance(entry, Derived) else {entry: own}


def _value(source: Checkpoint, entry: str | Derived) -> Tensor:
    if isinstance(entry, Derived):
        return entry.make(*(source.read(name).float() for name in entry.shapes))
    return source.read(entry).float()


def shape(source: Checkpoint, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with so many dimensions.

    Raises
    ------
    ConversionError
        It is not.
    """
    found = source.shapes.get(name)
    if found is None:
        raise ConversionError(f"{source.path} lacks {name!r}; it is incomplete or of another model")
    if len(found) != dimensions or min(found) < 1:
        raise ConversionError(f"tensor {name!r} of {source.path} has shape {found}; expected {dimensions} dimensions")
    return found


def _shards(path: Path) -> tuple[list[Path], tuple[Path, ...]]:
    """The weight files behind a path, and the index that named them, if one did."""
    if not path.is_dir():
        return [path], ()
    found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        raise ConversionError(f"{path} holds no weights; expected one of {', '.join(FOLDER_FILES)}")
    if not found.name.endswith(".index.json"):
        return [found], ()
    shards = []
    for name in sorted(set(_weight_map(found).values())):
        shard = path / name
        if PurePosixPath(name).name != name or "\\" in name:
            raise ConversionError(f"{found} names the shard {name!r}, which leads out of its folder")
        if shard.is_symlink():
            raise ConversionError(
                f"{found} names the shard {name!r}, which is a link; shards must be plain files. Copy a model hub's "
                "cache first (cp -rL)"
            )
        if not shard.is_file():
            raise ConversionError(f"{found} names the shard {name!r}, which is missing; download all shards")
        shards.append(shard)
    return shards, (found,)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        entries = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversionError(f"{index} is not an index of shards: {error!r}") from error
    if (
        not isinstance(entries, dict)
        or not entries
        or not all(isinstance(shard, str) and shard for shard in entries.values())
    ):
        raise ConversionError(f"{index}: weight_map must map tensor names to file names")
    return entries


def _open(path: Path) -> tuple[Mapping[str, Tensor] | Any, tuple[str, ...]]:
    """A file's tensors (a mapping, or an open safetensors file) and the names of its other entries."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        try:
            return safe_open(path, framework="pt"), ()
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{path} is not a whole safetensors file: {error}") from error
    return _unwrap(path, _load_pickle(path))


def _load_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # of a protocol that torch does not write: what follows says more
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        name = found[1] if found else opcodes.foreign_name(path)
        if name:
            raise ConversionError(
                f"{path} asks for {name[:100]} while it is loaded, so it could run code; it was not loaded. Use a file "
                "that holds tensors alone"
            ) from error
        raise ConversionError(f"{path} is not a torch checkpoint, or a damaged one") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle ends wherever its opcodes lead
        raise ConversionError(f"{path} is truncated or not a torch checkpoint ({type(error).__name__})") from error


def _unwrap(path: Path, root: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights of a trainer's file, and the names of everything beside them."""
    if not isinstance(root, Mapping):
        raise ConversionError(f"{path} holds a {type(root).__name__}; expected named tensors")
    key = next((key for key in WRAPPERS if isinstance(root.get(key), Mapping)), None)
    beside = {} if key is None else {name: value for name, value in root.items() if name != key}
    entries = root if key is None else root[key]
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, Tensor)}
    beside |= {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
    for name, value in beside.items():
        if str(name) not in TRAINER_STATE and _has_tensors(value):
            raise ConversionError(
                f"{path} holds tensors under {str(name)!r}, beside the weights; it is of an unknown layout"
            )
    if not tensors:
        raise ConversionError(f"{path} holds no tensors")
    return tensors, tuple(str(name) for name in beside)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(part) for part in value.values())
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(_has_tensors(part) for part in value))


def _is_buffer(name: str) -> bool:
    return any(re.search(pattern, name) for pattern in BUFFERS)


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
