"""JSON from a stranger: bounded in size and depth, no duplicate keys, no NaN, and an error that names the file."""

import json
import math
import os
from pathlib import Path
from typing import Any

from streamquant.files.reading import open_regular
from streamquant.quant.errors import StreamquantError

MAX_BYTES = 64 * 1024 * 1024
"""Far above any config or tokenizer in the wild (the largest tokenizer.json files are about 35 MB)."""


def parse_json(text: bytes, where: str) -> Any:
    """Parse UTF-8 JSON. Raises StreamquantError, which names `where`, for anything that is not plain, strict JSON."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise StreamquantError("JSON is not UTF-8", where=where, found=str(error)) from error
    except RecursionError as error:
        raise StreamquantError("JSON is nested too deeply", where=where) from error
    except ValueError as error:
        raise StreamquantError("broken JSON", where=where, found=str(error), hint="fetch the file again") from error


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read and parse a JSON file of at most `max_bytes` bytes.

    Raises StreamquantError if it cannot be read, is larger, or is not plain, strict JSON.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > max_bytes else file.read(max_bytes + 1)
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error
    if (size := max(size, len(data))) > max_bytes:
        raise StreamquantError("JSON file too large", where=str(path), found=f"{size:,} bytes", required=max_bytes)
    return parse_json(data, str(path))


def read_json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """`read_json` for a file whose top level must be an object."""
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise StreamquantError(
            "unexpected JSON", where=str(path), found=type(value).__name__, required="an object at the top level"
        )
    return value


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
