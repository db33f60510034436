"""Objects of JSON files that this package writes itself, read back with suspicion: each value is checked for its kind.

A file on a disk may be damaged, forged or of another version; its paths are opened, its numbers reckoned with and its
texts printed. Unlike in files/records.py, unknown keys are left alone, and the reader says what a place must hold and
what to do if it does not.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from streamquant.quant.errors import StreamquantError

LARGEST = 2**63 - 1
"""Number that a record of ours can hold: beyond every size, count and place."""


class JsonRecord:
    """One object. Every method takes a key, and raises StreamquantError, which names the place, for a wrong value.

    >>> record = JsonRecord({"size": 3, "name": None}, "a.json", "broken file")
    >>> record.count("size"), record.optional_text("name"), record.texts("tags")
    (3, None, ())
    >>> record.text("name")
    Traceback (most recent call last):
    ...
    streamquant.quant.errors.StreamquantError: broken file
      where:    a.json.name
      found:    None
      required: a text
    """

    def __init__(self, value: object, where: str, what: str, hint: str | None = None) -> None:
        """`what` is the first line of every error and `hint` its last, `where` the place of the object."""
        self.where, self.what, self.hint = where, what, hint
        if not isinstance(value, dict):
            raise self.broken(None, value, "an object")
        self._values: Mapping[str, Any] = value

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._values)

    def broken(self, key: str | None, found: object, required: str) -> StreamquantError:
        """The error of a wrong value."""
        where = self.where if key is None else f"{self.where}.{key}"
        return _error(self.what, where, found, required, self.hint)

    def take(self, key: str) -> Any:
        """The value as it stands; None if there is none."""
        return self._values.get(key)

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.take(key)
        if not isinstance(value, str) or not value:
            raise self.broken(key, value, "a text")
        return value

    def optional_text(self, key: str) -> str | None:
        """A text, or None."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise self.broken(key, value, "a text")
        return value

    def count(self, key: str) -> int:
        """A whole number that is not negative, and at most LARGEST."""
        value = self.take(key)
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise self.broken(key, value, "a whole number that is not negative")
        return value

    def magnitude(self, key: str) -> float:
        """A finite number that is not negative."""
        value = self.take(key)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self.broken(key, value, "a finite number that is not negative")
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false; false if there is none."""
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self.broken(key, value, "true or false")
        return bool(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty if there is none."""
        value = self.take(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.broken(key, value, "a list of texts")
        return tuple(value)

    def object(self, key: str) -> "JsonRecord":
        """An object within."""
        return JsonRecord(self.take(key), f"{self.where}.{key}", self.what, self.hint)

    def objects(self, key: str) -> list["JsonRecord"]:
        """A list of objects."""
        value = self.take(key)
        if not isinstance(value, list):
            raise self.broken(key, value, "a list")
        where = f"{self.where}.{key}"
        return [JsonRecord(item, f"{where}[{at}]", self.what, self.hint) for at, item in enumerate(value)]

    def text_map(self, key: str) -> dict[str, str]:
        """An object whose values are texts; empty if there is none."""
        if self.take(key) is None:
            return {}
        record = self.object(key)
        return {name: record.text(name) for name in record}

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object within, as it stands; empty if there is none."""
        value = self.take(key)
        return {} if value is None else self.object(key)._values


def _error(what: str, where: str, found: object, required: str, hint: str | None) -> StreamquantError:
    return StreamquantError(what, where=where, found=f"{found!r:.200}", required=required, hint=hint)
