"""Dataclasses <-> JSON, strictly: a file is what the types say, to the last field, or it is refused.

Infinity, which JSON does not have, is the string "Infinity"; NaN is nothing that a report may hold.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from streamquant.quant.errors import StreamquantError

T = TypeVar("T")
INFINITY = {"Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any, where: str = "report") -> Any:
    """Dataclasses, mappings, tuples, paths, plain values -> what json.dumps writes. Raises StreamquantError for NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: to_json(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            raise StreamquantError("a number of the report is NaN", where=where, hint="this is a bug of streamquant")
        return "Infinity" if value > 0 else "-Infinity"
    return value


def from_json(kind: type[T], value: Any, where: str = "report") -> T:
    """The dataclass `kind` from what `to_json` made of it.

    Raises StreamquantError, which names the place, for a missing or unknown field and for a value of another type.
    """
    return typing.cast(T, _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is Literal:
        return value if value in arguments and type(value) is str else _wrong(value, arguments, where)
    if origin in (typing.Union, types.UnionType):
        others = [member for member in arguments if member is not type(None)]
        assert len(others) == 1, "a field is of one type, or None"
        return None if value is None else _read(others[0], value, where)
    if origin is not None and issubclass(origin, Mapping):
        found = value if isinstance(value, dict) else _wrong(value, ("an object",), where)
        return {key: _read(arguments[1], item, f"{where}[{key!r}]") for key, item in found.items()}
    return _plain(kind, value, where)


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        if isinstance(value, str) and value in INFINITY:
            return INFINITY[value]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number else _wrong(value, ("a number",), where)
    if kind is Path:
        return Path(value) if isinstance(value, str) else _wrong(value, ("a path",), where)
    assert kind in (int, str, bool), kind
    return value if type(value) is kind else _wrong(value, (kind.__name__,), where)


def _record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _wrong(value, ("an object",), where)
    hints = _hints(kind)
    if value.keys() != hints.keys():
        odd = sorted(value.keys() ^ hints.keys())
        raise StreamquantError(
            "not a report of this version of streamquant",
            where=where,
            found=", ".join(f"{'unknown' if name in value else 'no'} field {name!r:.60}" for name in odd[:5]),
            required=f"the fields of {kind.__name__}",
            hint="validate again, or render with the version that wrote it",
        )
    return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _wrong(value, ("a list",), where)
    if len(arguments) == 2 and arguments[1] is ...:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        _wrong(value, (f"{len(arguments)} values",), where)
    return tuple(
        _read(kind, item, f"{where}[{at}]") for at, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _wrong(value: Any, required: tuple[Any, ...], where: str) -> typing.NoReturn:
    raise StreamquantError(
        "a value of the report is of another type",
        where=where,
        found=f"{value!r:.80}",
        required=" or ".join(map(str, required)),
    )
