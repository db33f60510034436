"""Typed reads of config.json: every value is checked where it is read, and every error names its key."""

import math
from collections.abc import Mapping

from streamquant.quant.errors import StreamquantError

# GGUF stores these counts as uint32 and ggml works with int32 and int64 sizes; nothing real comes near.
LARGEST_INTEGER = 2**31 - 1
LARGEST_FLOAT32 = 3.4028234663852886e38
SMALLEST_FLOAT32 = 2.0**-126


class ConfigValues:
    """config.json as a source of checked values.

    A key that is missing takes its value from `defaults` (what the family's configuration class of transformers
    assumes) and is remembered in `assumed`; one that is in neither is an error. `null` counts as a value: it is allowed
    for the keys of `nullable` only, where transformers allows it. Every read raises StreamquantError on a bad value.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        *,
        defaults: Mapping[str, object] | None = None,
        nullable: frozenset[str] = frozenset(),
        prefix: str = "",
    ) -> None:
        self.values = values
        self.defaults = {} if defaults is None else defaults
        self.nullable = nullable
        self.prefix = prefix
        self.assumed: dict[str, object] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def has_value(self, key: str) -> bool:
        """Whether the key, or its default, is anything but null."""
        return self.values.get(key, self.defaults.get(key)) is not None

    def where(self, key: str) -> str:
        """The key as error messages name it, e.g. "config.json, key 'rope_scaling.factor'"."""
        return f"config.json, key {self.prefix + key!r}"

    def refuse(self, key: str, what: str, *, required: object, hint: str | None = None) -> StreamquantError:
        """The error to raise when the value of a key cannot be used."""
        found = self.values.get(key, self.defaults.get(key))
        return StreamquantError(what, where=self.where(key), found=shorten(found), required=required, hint=hint)

    def raw(self, key: str) -> object:
        """The value as it stands, or its default. Raises StreamquantError if there is neither, or on a null."""
        if key in self.values:
            value = self.values[key]
            if value is None and key not in self.nullable:
                raise self.refuse(key, "null where config.json must have a value", required="a value")
            return value
        if key not in self.defaults:
            raise StreamquantError(
                "a required key is missing",
                where=self.where(key),
                found="no such key",
                required="the key and its value",
                hint="is this the config.json of the checkpoint itself, and complete?",
            )
        self.assumed[key] = self.defaults[key]
        return self.defaults[key]

    def integer(self, key: str, *, least: int = 1, most: int = LARGEST_INTEGER) -> int:
        """An integer in least..most; 8.0, "8" and true are not integers."""
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, f"{describe_type(value)} where an integer is required", required="an integer")
        if not least <= value <= most:
            raise self.refuse(key, "an integer out of range", required=f"{least} to {most}")
        return value

    def integer_or_null(self, key: str, *, most: int = LARGEST_INTEGER) -> int | None:
        """An integer of at least 1, or null."""
        return None if self.raw(key) is None else self.integer(key, most=most)

    def number(self, key: str, *, above: float = 0.0) -> float:
        """A finite number greater than `above` that float32 can hold, as a float; integers count as numbers."""
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, f"{describe_type(value)} where a number is required", required="a number")
        # In this form NaN fails, and an integer too large for a float is compared too.
        if not (value == 0 or SMALLEST_FLOAT32 <= abs(value) <= LARGEST_FLOAT32):
            raise self.refuse(key, "not a number that float32 can hold", required="a finite number")
        if not value > above:
            raise self.refuse(key, "a number out of range", required=f"more than {above:g}")
        return float(value)

    def boolean(self, key: str) -> bool:
        """True or false; 0, 1 and "true" are not booleans."""
        value = self.raw(key)
        if not isinstance(value, bool):
            raise self.refuse(key, f"{describe_type(value)} where true or false is required", required="true or false")
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self.raw(key)
        if not isinstance(value, str):
            raise self.refuse(key, f"{describe_type(value)} where a string is required", required="a string")
        return value

    def section(self, key: str) -> Mapping[str, object]:
        """A nested object; a missing key and null are the empty one."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.refuse(key, f"{describe_type(value)} where an object is required", required="an object, or null")
        return value


def describe_type(value: object) -> str:
    """The JSON type of a value, with an article, for messages."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null" if value is None else f"a value of type {type(value).__name__}")


def shorten(value: object) -> str:
    """The value as JSON-like text of at most 120 characters; config.json may hold megabytes under a key."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"  # str() of a huge int is slow, and an error above 4300 digits
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
