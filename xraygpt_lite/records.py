"""Records to plain JSON values and back, and any value as one line of JSON.

Knows the fields of records, no file. Importing it does not load numpy: `--help` passes here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from xraygpt_lite.values import Record

_DIGITS = 6
_AS_IT_IS = {str, int, bool, NoneType}
_ENCODER = json.JSONEncoder(allow_nan=False)
_T = TypeVar("_T")
_Reader = Callable[[Any], Any]
_NAMES = {
    dict: "an object", list: "a list", str: "text", bool: "true or false", NoneType: "null", int: "a whole number",
    float: "a number",
}  # fmt: skip


def to_json(record: Record) -> dict[str, Any]:
    """A `Summary` or a `Failure` as JSON values, "schema" first; floats are rounded to six decimals."""
    written = plain(record)
    return {"schema": written.pop("schema"), **written}


def from_json(value: Any) -> Record:
    """The record that `to_json` wrote.

    Fields that were added to the schema later may be absent, and keys that this version does not know are passed over.

    Raises
    ------
    ValueError
        Naming the field; it never holds a value, which may be an answer's text.
    """
    from xraygpt_lite.values import RECORD_SCHEMA, Failure, Summary

    if not isinstance(value, dict):
        raise ValueError(f"the record is {_name(value)}, expected an object")
    if value.get("schema") != RECORD_SCHEMA:
        raise ValueError(f"schema is not {RECORD_SCHEMA}")
    return parse(Failure, value) if "error" in value else parse(Summary, value)


def parse(kind: type[_T], value: Any) -> _T:
    """`value`, out of `json.loads`, as the dataclass `kind`, driven by its type hints.

    Parameters
    ----------
    kind
        Its fields are str, int, float, bool, Literal, dict, tuples, dataclasses, or one of these or None. A field with
        a default may be absent.

    Raises
    ------
    ValueError
        Naming the field, without its value.
    """
    try:
        result: _T = _reader(kind)(value)  # type: ignore[arg-type]  # mypy does not see that a type is hashable
        return result
    except _WrongError as error:
        raise ValueError(f"{error.at or 'the value'} {error}") from None


def line(value: Any) -> str:
    """`value` as one line of JSON, newline included, ASCII only.

    Raises
    ------
    ValueError
        A float is not finite: JSON cannot say it.
    """
    return line_of(plain(value))


def line_of(value: Any) -> str:
    """As `line`, for a value that is plain already."""
    return _ENCODER.encode(value) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses → dicts, tuples → lists, floats rounded; the rest as it is."""
    if type(value) in _AS_IT_IS:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value


class _WrongError(Exception):
    """What is wrong with a value; its place is put together on the way out, since most values are right."""

    at = ""

    def under(self, name: str) -> _WrongError:
        self.at = name + (self.at if self.at.startswith("[") or not self.at else f".{self.at}")
        return self


@cache  # hints are resolved once: an archive's journal has hundreds of thousands of records
def _reader(kind: Any) -> _Reader:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _object(kind)
    if origin in (Union, UnionType):
        (present,) = (_reader(argument) for argument in arguments if argument is not NoneType)
        return lambda value: None if value is None else present(value)
    if origin is Literal:
        return _one_of(arguments)
    if origin is tuple:
        return _sequence(arguments)
    return _number if kind is float else _exactly(origin or kind)


def _object(kind: Any) -> _Reader:
    hints = get_type_hints(kind)
    known = [
        (field.name, _reader(hints[field.name]), field.default is MISSING and field.default_factory is MISSING)
        for field in fields(kind)
    ]

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _WrongError(f"is {_name(value)}, expected an object")
        found = {}
        name = ""
        try:
            for name, reader, required in known:
                if name in value:
                    found[name] = reader(value[name])
                elif required:
                    raise _WrongError("is missing")
        except _WrongError as error:
            raise error.under(name) from None
        return kind(**found)

    return read


def _sequence(arguments: tuple[Any, ...]) -> _Reader:
    readers = [_reader(argument) for argument in arguments if argument is not Ellipsis]
    length = None if Ellipsis in arguments else len(arguments)

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or length not in (None, len(value)):
            expected = "a list" if length is None else f"a list of {length}"
            raise _WrongError(f"is {_name(value)}, expected {expected}")
        found: list[Any] = []
        try:
            for reader, item in zip(readers if length else readers * len(value), value, strict=True):
                found.append(reader(item))
        except _WrongError as error:
            raise error.under(f"[{len(found)}]") from None
        return tuple(found)

    return read


def _one_of(allowed: tuple[Any, ...]) -> _Reader:
    def read(value: Any) -> Any:
        if type(value) is not str or value not in allowed:
            raise _WrongError(f"is none of {', '.join(allowed)}")
        return value

    return read


def _exactly(kind: type) -> _Reader:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise _WrongError(f"is {_name(value)}, expected {_NAMES[kind]}")
        return value

    return read


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300:  # NaN is not below
        raise _WrongError(f"is {_name(value)}, expected a finite number")
    return float(value)


def _name(value: Any) -> str:
    return _NAMES[type(value)]
