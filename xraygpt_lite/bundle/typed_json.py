"""JSON bytes to frozen dataclasses and back, driven by the type hints alone.

It knows no manifest: which values make sense together is the caller's to check. Every field is required, whatever its
default; every key has to be a field; a bool is not a number; numbers are finite.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from xraygpt_lite.errors import BundleError

_SHOWN = 60


def decode(data: bytes, what: str) -> Any:
    """Strict JSON: UTF-8, no duplicate key, no NaN, no nesting that exhausts the stack.

    Parameters
    ----------
    data
        The file's bytes.
    what
        The file's name, for messages.

    Raises
    ------
    BundleError
        For anything else.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BundleError(f"{what} is not valid JSON: {error or type(error).__name__}") from error


def encode(value: Any) -> bytes:
    """Canonical JSON of dataclasses, mappings, sequences and scalars: sorted keys, fixed separators, one newline.

    Raises
    ------
    BundleError
        When a value has no JSON form: a non-finite number, a numpy scalar, half a surrogate pair.
    """
    try:
        text = json.dumps(_plain(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise BundleError(f"a value cannot be written as JSON: {error}") from error


def build(kind: Any, value: Any, where: str) -> Any:
    """`value`, out of `decode`, as `kind`.

    Parameters
    ----------
    kind
        A dataclass, str, int, float, bool, None, Literal, union, tuple[T, ...], tuple[A, B], or Mapping[str, T].
    where
        The JSON path of `value`, for messages, e.g. "bundle.json: image.size".

    Raises
    ------
    BundleError
        Naming the path, the value seen and what was expected.
    """
    if is_dataclass(kind):
        return _record(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (present,) = (a for a in arguments if a is not NoneType)
        return build(present, value, where)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise _refuse(where, value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        return _sequence(arguments, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _refuse(where, value, "an object")
        return {_string(key, where): build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return _SCALARS[kind](value, where)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Field name → type, in order; resolving the annotations is slow."""
    resolved = get_type_hints(kind)
    return {f.name: resolved[f.name] for f in fields(kind)}


def _record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _refuse(where, value, "an object")
    hints = _hints(kind)
    names = list(hints)
    if missing := [name for name in names if name not in value]:
        raise BundleError(f"{where} lacks the key {missing[0]!r}")
    if unknown := sorted(set(value) - set(names)):
        raise BundleError(f"{where} has the unknown key {unknown[0][:_SHOWN]!r}; known are {', '.join(names)}")
    return kind(**{name: build(hints[name], value[name], _join(where, name)) for name in names})


def _sequence(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _refuse(where, value, "a list")
    if arguments[-1] is Ellipsis:
        kinds = arguments[:1] * len(value)
    elif len(arguments) == len(value):
        kinds = arguments
    else:
        raise BundleError(f"{where} has {len(value)} items; expected {len(arguments)}")
    return tuple(build(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _refuse(where, value, "a string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BundleError(f"{where} holds half a surrogate pair, which is no character")
    return value


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise _refuse(where, value, "an integer of 64 bits")
    return value


def _number(value: Any, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 2**1000:
        raise _refuse(where, value, "a finite number")
    return float(value)


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _refuse(where, value, "true or false")
    return value


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {str: _string, int: _integer, float: _number, bool: _boolean}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:_SHOWN]!r} stands twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _join(where: str, name: str) -> str:
    return f"{where} {name}" if where.endswith(":") else f"{where}.{name}"


def _refuse(where: str, value: Any, expected: str) -> BundleError:
    try:
        shown = json.dumps(value)
    except ValueError:  # an integer too long to print
        shown = "a very long number"
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
    return BundleError(f"{where} is {shown}; expected {expected}")
