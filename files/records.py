"""Dataclasses <-> JSON, strictly: a file is what the types of its record say, to the last field, or it is refused.

Reading is pydantic's, on the dataclasses as they are; its errors become ours. A field with a default may be missing.
Infinity, which JSON does not have, is the string "Infinity"; NaN is in no record.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from streamquant.files.json_record import LARGEST
from streamquant.quant.errors import StreamquantError, UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")
INFINITY = {"Infinity": math.inf, "-Infinity": -math.inf}
REQUIRED = {
    "bool_type": "true or false",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "a text",
    "tuple_type": "a list",
}
"""pydantic's type of an error -> what JSON should have had there; for all others its own message says so."""


def to_json(value: Any, where: str) -> Any:
    """Dataclasses, mappings, tuples, paths, plain values -> what json.dumps writes.

    Raises StreamquantError, which names the place after `where`, for NaN.
    """
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
            raise StreamquantError("a number is NaN", where=where, hint="this is a bug of streamquant")
        return "Infinity" if value > 0 else "-Infinity"
    return value


def from_json(kind: type[T], value: Any, where: str, hint: str | None = None) -> T:
    """The dataclass `kind` from what `to_json` made of it.

    Raises StreamquantError, which names the place after `where` and gives the hint, for a missing or unknown field and
    for a value of another type or one that the record itself refuses.
    """
    from pydantic import ValidationError

    _check_numbers(value, where, hint)
    infinite: list[ErrorDetails] = []
    for _ in range(2):
        try:
            adapter = _adapter(kind)  # type: ignore[arg-type] # a class is hashable
            record: T = adapter.validate_json(json.dumps(_with_numbers(value, infinite)))
            return record
        except UsageError as error:  # of a record that checks its own values, such as Gates
            raise StreamquantError(
                "a value of another type",
                where=where,
                found=f"{error.where}: {error.found!r:.80}",
                required=error.required,
                hint=hint,
            ) from error
        except ValidationError as error:
            others: list[ErrorDetails] = []
            infinite = []
            for fault in error.errors():
                (infinite if _is_infinity(fault) else others).append(fault)
            if others:
                raise _refusal(others, where, hint) from error
    raise AssertionError("infinite numbers have been put in place of their names")


def _check_numbers(value: Any, where: str, hint: str | None) -> None:
    """Raise StreamquantError for a whole number that no count of ours reaches, and float has no place for."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(item, where + _path((key,)), hint)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            _check_numbers(item, f"{where}[{at}]", hint)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise StreamquantError(
            "a value of another type", where=where, found=f"{value!r:.80}", required="64 bits", hint=hint
        )


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import ConfigDict, TypeAdapter

    # "or None" because pydantic takes no settings for a dataclass alone; nested ones have those of the outermost.
    return TypeAdapter(kind | None, config=ConfigDict(extra="forbid", strict=True))


def _is_infinity(fault: "ErrorDetails") -> bool:
    return fault["type"] == "float_type" and isinstance(fault["input"], str) and fault["input"] in INFINITY


def _with_numbers(value: Any, infinite: "Sequence[ErrorDetails]") -> Any:
    """A copy with infinite numbers where pydantic found their names."""
    if not infinite:
        return value
    value = json.loads(json.dumps(value))
    for fault in infinite:
        place = value
        for step in fault["loc"][:-1]:
            place = place[step]
        place[fault["loc"][-1]] = INFINITY[fault["input"]]
    return value


def _refusal(faults: "Sequence[ErrorDetails]", where: str, hint: str | None) -> StreamquantError:
    """The first record of other fields, or else the first value of another type."""
    odd: dict[tuple[int | str, ...], list[str]] = {}
    for fault in faults:
        name = fault["loc"][-1] if fault["loc"] else None
        if isinstance(name, str) and fault["type"] in ("missing", "unexpected_keyword_argument"):
            what = "no" if fault["type"] == "missing" else "unknown"
            odd.setdefault(fault["loc"][:-1], []).append(f"{what} field {name!r:.60}")
    for place, found in odd.items():
        return StreamquantError(
            "a record of another version of streamquant",
            where=where + _path(place),
            found=", ".join(found[:5]),
            required="the fields that this version writes",
            hint=hint,
        )
    fault = faults[0]
    place, required = fault["loc"], REQUIRED.get(fault["type"], fault["msg"])
    if fault["type"] == "literal_error":
        required = fault["ctx"]["expected"].replace("'", "")
    elif fault["type"] == "missing":  # an item of a tuple
        place, required = (
            place[:-1],
            f"{1 + max(int(item['loc'][-1]) for item in faults if item['loc'][:-1] == place[:-1])} values",
        )
    elif fault["type"] == "too_long":
        required = f"{fault['ctx']['max_length']} values"
    return StreamquantError(
        "a value of another type",
        where=where + _path(place),
        found=f"{fault['input']!r:.80}",
        required=required,
        hint=hint,
    )


def _path(place: tuple[int | str, ...]) -> str:
    """A place in a record as Python writes it.

    >>> _path(("comparison", "variants", 0, "by_category", "a b"))
    ".comparison.variants[0].by_category['a b']"
    """
    return "".join(f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r:.60}]" for step in place)
