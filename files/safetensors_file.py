"""The safetensors container: its header read with suspicion, its header written.

A file is a little-endian u64 header length, that many bytes of JSON, then the data. The JSON maps a tensor's name to
its dtype, shape and [start, end) within the data; the tensors cover the data without overlap or hole.
(format: github.com/huggingface/safetensors, README; the rules here are at least as strict as its Rust reader's)
"""

import json
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamquant.files.strict_json import parse_json
from streamquant.quant.errors import StreamquantError

MAX_HEADER = 8 * 1024 * 1024
"""Bytes of JSON that are read at most: room for 50,000 tensors a shard. (The safetensors library stops at 100 MB.)"""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Every dtype of the safetensors format -> bits per element."""


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One entry of a header. `start` and `stop` count bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, SafetensorsTensor], dict[str, str], bytes]:
    """Read and check the header of a safetensors file.

    Returns the tensors by name in the order of their data, the `__metadata__`, and the bytes of the header with its
    length prefix. Raises StreamquantError for a file that breaks any rule of the format, before anything else is
    read of it.
    """
    where = str(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            raise StreamquantError("not a regular file", where=where, required="a safetensors file")
        size = found.st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            data = prefix + file.read(header_length(prefix, size, where))
    except OSError as error:
        raise StreamquantError("cannot read a shard", where=where, found=error.strerror) from error
    return (*parse_header(data, size, where), data)


def parse_header(data: bytes, size: int, where: str) -> tuple[dict[str, SafetensorsTensor], dict[str, str]]:
    """Check the header of a file of `size` bytes, `data` with its length prefix: (tensors, `__metadata__`).

    Raises StreamquantError as read_header does.
    """
    length = header_length(data[:8], size, where)
    if len(data) != 8 + length:
        raise StreamquantError("file shrank while it was read", where=where, hint="is something still writing it?")
    entries = parse_json(data[8:], f"{where}, header")
    if not isinstance(entries, dict):
        raise StreamquantError("header is not a JSON object", where=where, found=type(entries).__name__)
    metadata = _check_metadata(entries.pop("__metadata__", {}), where)
    begin = 8 + length
    tensors = [_check_entry(name, entry, begin, size, where) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_cover(tensors, begin, size, where)
    return {tensor.name: tensor for tensor in tensors}, metadata


def write_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds (name, dtype, shape, nbytes) one after another, padded so that data is aligned.

    >>> write_header([("a", "U8", (2,), 2)], {})
    b'8\\x00\\x00\\x00\\x00\\x00\\x00\\x00{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   '
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Bytes of JSON by the first 8 bytes of a file of `size` bytes. Raises StreamquantError if they cannot be."""
    if len(prefix) < 8:
        raise StreamquantError(
            "not a safetensors file", where=where, found=f"{size} bytes", required="at least 8 bytes"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise StreamquantError(
            "safetensors header too large",
            where=where,
            found=f"a length of {length:,} bytes",
            required=f"at most {MAX_HEADER:,}",
            hint="this is not a safetensors file, or it is damaged or hostile",
        )
    if length > size - 8:
        raise StreamquantError(
            "truncated safetensors file",
            where=where,
            found=f"{size:,} bytes",
            required=f"{8 + length:,} bytes for the header alone",
            hint="fetch the file again",
        )
    return length


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StreamquantError("broken header", where=f"{where}, __metadata__", required="an object of strings")
    return metadata


def _shown(value: object) -> str:
    """What a header says, as part of a message: escaped and of bounded length."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # of JSON, where a subclass is a bool


def _place(where: str, name: str) -> str:
    return f"{where}, tensor {_shown(name)}"


def _check_entry(name: str, entry: object, begin: int, size: int, where: str) -> SafetensorsTensor:
    """One header entry -> SafetensorsTensor, every field checked."""
    if not name or not name.isprintable() or ".." in name or "/" in name or len(name) > 1024:
        raise StreamquantError(
            "tensor name not allowed",
            where=_place(where, name),
            required="printable, without '..' or '/', at most 1024 characters",
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = _shown(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise StreamquantError(
            "broken header", where=_place(where, name), found=found, required="dtype, shape, data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise StreamquantError(
            "unknown dtype", where=_place(where, name), found=_shown(dtype), required=", ".join(DTYPE_BITS)
        )
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(dim) for dim in shape):
        raise StreamquantError(
            "broken shape", where=_place(where, name), found=_shown(shape), required="at most 8 non-negative integers"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(at) for at in offsets):
        raise StreamquantError(
            "broken offsets", where=_place(where, name), found=_shown(offsets), required="two non-negative integers"
        )
    start, stop = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if stop < start or bits % 8 or stop - start != bits // 8:
        raise StreamquantError(
            "offsets do not fit shape and dtype",
            where=_place(where, name),
            found=f"[{start}, {stop}), {stop - start} bytes",
            required=f"{bits / 8:g} bytes for {dtype}{shape}",
        )
    if begin + stop > size:
        raise StreamquantError(
            "truncated safetensors file",
            where=_place(where, name),
            found=f"{size:,} bytes",
            required=f"at least {begin + stop:,} bytes",
            hint="fetch the file again",
        )
    return SafetensorsTensor(name, dtype, tuple(shape), begin + start, begin + stop)


def _check_cover(tensors: list[SafetensorsTensor], begin: int, size: int, where: str) -> None:
    """The tensors, sorted by offset, must cover the data without overlap or hole."""
    at = begin
    for tensor in tensors:
        if tensor.start != at:
            problem = "overlaps the tensor before it" if tensor.start < at else "leaves a hole before it"
            raise StreamquantError(
                f"tensor {problem}",
                where=f"{where}, tensor {tensor.name!r}",
                found=f"start {tensor.start - begin}",
                required=f"start {at - begin}",
            )
        at = tensor.stop
    if at != size:
        raise StreamquantError(
            "file does not end where its last tensor ends",
            where=where,
            found=f"{size:,} bytes",
            required=f"{at:,} bytes",
            hint="fetch the file again",
        )
