"""JSON from a stranger: bounded in size and depth, no duplicate keys, no NaN, and an error that names the file."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamquant.files.reading import open_regular
from streamquant.quant.errors import StreamquantError

MAX_BYTES = 64 * 1024 * 1024
"""Far above any config or tokenizer in the wild (the largest tokenizer.json files are about 35 MB)."""
FETCH = "fetch the file again"
"""What to do about a broken file of a checkpoint; those who read other files say what helps there."""
MAX_DEPTH = 100
"""Objects and lists within each other. Python's own limit depends on who calls: what was parsed must print as well."""


def parse_json(text: bytes, where: str, hint: str = FETCH) -> Any:
    """Parse UTF-8 JSON.

    Raises StreamquantError, which names `where` and gives the hint, for anything that is not plain, strict JSON.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
        _check_depth(value)
        return value
    except UnicodeDecodeError as error:
        raise StreamquantError("JSON is not UTF-8", where=where, found=str(error), hint=hint) from error
    except RecursionError as error:
        raise StreamquantError(
            "JSON is nested too deeply", where=where, required=f"at most {MAX_DEPTH} levels", hint=hint
        ) from error
    except ValueError as error:
        raise StreamquantError("broken JSON", where=where, found=str(error), hint=hint) from error


def read_json(path: Path, max_bytes: int = MAX_BYTES, hint: str = FETCH) -> Any:
    """Read and parse a JSON file of at most `max_bytes` bytes.

    Raises StreamquantError, with the hint, if it cannot be read, is larger, or is not plain, strict JSON.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            # not the limit, of which Python would make a buffer
            data = b"" if size > max_bytes else file.read(size + 1)
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error
    if (size := max(size, len(data))) > max_bytes:
        raise StreamquantError("JSON file too large", where=str(path), found=f"{size:,} bytes", required=max_bytes)
    return parse_json(data, str(path), hint)


def read_json_object(path: Path, max_bytes: int = MAX_BYTES, hint: str = FETCH) -> dict[str, Any]:
    """`read_json` for a file whose top level must be an object."""
    value = read_json(path, max_bytes, hint)
    if not isinstance(value, dict):
        raise StreamquantError(
            "unexpected JSON",
            where=str(path),
            found=type(value).__name__,
            required="an object at the top level",
            hint=hint,
        )
    return value


def read_record(path: Path, hint: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """`read_json_object` for a file that this package wrote: no text in it has half of a character, by an escape."""
    record = read_json_object(path, max_bytes, hint)
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise StreamquantError("broken JSON", where=str(path), found=str(error), hint=hint) from error
    return record


def _check_depth(value: object) -> None:
    """Raise RecursionError for more than MAX_DEPTH levels."""
    level: Sequence[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [
            item
            for found in level
            for item in (found.values() if isinstance(found, dict) else found if isinstance(found, list) else ())
            if isinstance(item, dict | list)
        ]
        if not inner:
            return
        level = inner
    raise RecursionError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:100]!r}")
            seen.add(key)
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:100]} is too large")
    return value
