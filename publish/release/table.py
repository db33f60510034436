"""A table of a release file: its values by key, each checked for its kind."""

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from streamquant.files.sizes import parse_size
from streamquant.quant.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Record = TypeVar("Record", bound=DataclassInstance)

Reader = Callable[["Table", str], Any]
"""Takes the value of a key from a table; None where it is not given."""


class Table:
    """Values by key, with underscores in place of hyphens. Every method raises UsageError, which names the place."""

    def __init__(self, record: object, where: str, base: Path, known: Sequence[str]) -> None:
        """`known` are the keys that may be given, `base` is the folder that paths are relative to."""
        if not isinstance(record, Mapping):
            required = f"a table of {', '.join(known)}"
            raise UsageError("not a table", where=where, found=f"{record!r:.100}", required=required)
        self.where, self.base = where, base
        self._values: dict[str, Any] = {}
        for key, value in record.items():
            name = str(key).replace("-", "_")
            if name not in known:
                required, hint = f"of {', '.join(known)}", nearest(name, known)
                raise UsageError("unknown key", where=where, found=f"{key!r:.100}", required=required, hint=hint)
            if name in self._values:
                raise UsageError("a key is given twice", where=where, found=f"{key!r:.100}")
            self._values[name] = value

    def at(self, key: str) -> str:
        """The place of a value, for messages."""
        return f"{self.where}, {key}"

    def take(self, key: str) -> Any:
        """The value as it stands; None if there is none."""
        return self._values.get(key)

    def part(self, keys: Collection[str]) -> "Table":
        """A table with some of the keys alone."""
        values = {key: value for key, value in self._values.items() if key in keys}
        return Table(values, self.where, self.base, (*keys,))

    def hyphenated(self, keys: Collection[str]) -> dict[str, Any]:
        """Those of the keys that are given, spelled as the options of the command line."""
        return {key.replace("_", "-"): value for key, value in self._values.items() if key in keys}

    def within(self, key: str, known: Sequence[str]) -> "Table | None":
        """A table within; `{}` is one, no value is none."""
        value = self.take(key)
        return None if value is None else Table(value, self.at(key), self.base, known)

    def record(self, kind: type["Record"], **others: Any) -> "Record":
        """A dataclass whose fields say how they are read (see `key`); `others` are values of the rest."""
        found = {each.name: each.metadata["reader"](self, each.name) for each in fields(kind) if each.metadata}
        return kind(**others, **{name: value for name, value in found.items() if value is not None})

    def text(self, key: str) -> str | None:
        """A text that is not empty."""
        found: str | None = self._of(str, key, "a text", lambda value: bool(value.strip()) and value.isprintable())
        return found

    def flag(self, key: str) -> bool:
        """true or false; false if it is not given."""
        return bool(self.switch(key))

    def switch(self, key: str) -> bool | None:
        """true or false, or None."""
        found: bool | None = self._of(bool, key, "true or false")
        return found

    def count(self, key: str, least: int = 1) -> int | None:
        """A whole number."""
        found: int | None = self._of(int, key, f"a whole number, {least} or more", lambda value: value >= least)
        return found

    def number(self, key: str) -> float | None:
        """A positive number."""
        value = self.take(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def size(self, key: str) -> int | None:
        """Bytes, as a whole number or a text like 45G."""
        value = self.take(key)
        if value is None or (type(value) is int and value > 0):
            return value
        if not isinstance(value, str):
            raise self.wrong(key, value, "a size, like 45G")
        return parse_size(value, self.at(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, or one alone."""
        value = self.take(key)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        for item in listed:
            if not isinstance(item, str) or not item.strip():
                raise self.wrong(key, item, "a list of texts")
        return tuple(listed)

    def path(self, key: str) -> Path | None:
        """A path, made absolute."""
        value = self.text(key)
        return None if value is None else self.base / Path(value).expanduser()

    def paths(self, key: str) -> tuple[Path, ...]:
        """A list of paths, or one alone, made absolute."""
        return tuple(self.base / Path(value).expanduser() for value in self.texts(key))

    def _of(self, kind: type, key: str, required: str, rule: Callable[[Any], bool] = lambda _value: True) -> Any:
        value = self.take(key)
        if value is None or (type(value) is kind and rule(value)):
            return value
        raise self.wrong(key, value, required)

    def wrong(self, key: str, value: object, required: str, hint: str | None = None) -> UsageError:
        """The error of a value that is not what it should be."""
        return UsageError("wrong value", where=self.at(key), found=f"{value!r:.100}", required=required, hint=hint)


def key(reader: Reader, default: Any = None) -> Any:
    """A field of a dataclass that is a key of a table, with what reads it."""
    return field(default=default, metadata={"reader": reader})


def keys_of(kind: type["DataclassInstance"]) -> tuple[str, ...]:
    """The keys that the fields of a dataclass are read from."""
    return tuple(each.name for each in fields(kind) if each.metadata)


def one_of(words: Sequence[str]) -> Reader:
    """A reader of one of some words."""

    def read(table: Table, key: str) -> str | None:
        value = table.text(key)
        if value is None or value in words:
            return value
        raise table.wrong(key, value, ", ".join(words), nearest(value, words))

    return read


def some_of(words: Sequence[str]) -> Reader:
    """A reader of a list of some words, or of one alone."""

    def read(table: Table, key: str) -> tuple[str, ...] | None:
        for value in (found := table.texts(key)):
            if value not in words:
                raise table.wrong(key, value, f"of {', '.join(words)}", nearest(value, words))
        return None if table.take(key) is None else found

    return read


def nearest(name: str, known: Collection[str]) -> str | None:
    """A hint that proposes the nearest of the names that are known."""
    found = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"did you mean {found[0]}?" if found else None
