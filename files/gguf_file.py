"""The GGUF container (version 3, little endian): its header written, and read with suspicion.

magic "GGUF", u32 version, u64 tensors, u64 keys; the keys; the tensor infos; padding; then the data, each tensor
padded to the alignment. Dimensions are written in ggml's order, the reverse of torch's.
(ggml/include/gguf.h; gguf-py/gguf/gguf_writer.py writes the same bytes)
"""

import math
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.gguf_writer import GGUFValue

from streamquant.quant.errors import StreamquantError

ALIGNMENT: int = GGUF_DEFAULT_ALIGNMENT

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""The names that llama-gguf-split and the loader of llama.cpp give to the files of a set."""


def pad(size: int) -> int:
    """`size` rounded up to the alignment.

    >>> pad(0), pad(33)
    (0, 64)
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack_key(key: str, value: GGUFValue) -> bytes:
    """A key and its value as they stand in a header."""
    kind = struct.pack("<I", value.type)
    return _pack_string(key) + kind + _pack_value(value.value, value.type, value.sub_type)


def pack_header(
    metadata: Mapping[str, GGUFValue | bytes], tensors: Iterable[tuple[str, tuple[int, ...], str, int]]
) -> bytes:
    """Everything before the data: `metadata` in its order, and the (name, shape, ggml type name, nbytes) of tensors.

    A value may be what `pack_key` gave for it: a vocabulary is large, and the same in every file. Shapes are in torch's
    order. Data offsets are those of tensors stored one after another, each padded.
    """
    tensors = list(tensors)
    out = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(tensors), len(metadata))]
    out += [value if isinstance(value, bytes) else pack_key(key, value) for key, value in metadata.items()]
    offset = 0
    for name, shape, ggml_type, nbytes in tensors:
        dimensions = tuple(reversed(shape)) or (1,)
        out += [
            _pack_string(name),
            struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions),
            struct.pack("<IQ", GGMLQuantizationType[ggml_type], offset),
        ]
        offset += pad(nbytes)
    header = b"".join(out)
    return header + bytes(pad(len(header)) - len(header))


def _pack_string(text: str | bytes) -> bytes:
    encoded = text.encode("utf-8") if isinstance(text, str) else bytes(text)
    return struct.pack("<Q", len(encoded)) + encoded


def _pack_value(value: Any, kind: GGUFValueType, sub_type: GGUFValueType | None) -> bytes:
    if kind == GGUFValueType.STRING:
        return _pack_string(value)
    if kind == GGUFValueType.ARRAY:
        item = sub_type if sub_type is not None else GGUFValueType.get_type(value[0])
        head = struct.pack("<IQ", item, len(value))
        if item in _SCALARS:
            return head + struct.pack(f"<{len(value)}{_SCALARS[item][1]}", *value)
        texts = [text.encode("utf-8") if isinstance(text, str) else bytes(text) for text in value]
        return head + b"".join([len(text).to_bytes(8, "little") + text for text in texts])
    return struct.pack(_SCALARS[kind], value)


# Reading


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor info: shape in torch's order, `start` and `stop` count bytes from the beginning of the file."""

    name: str
    stored_as: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself. `metadata` values are Python's, arrays are lists; `types` are (type, item type)."""

    metadata: dict[str, Any]
    types: dict[str, tuple[GGUFValueType, GGUFValueType | None]]
    tensors: tuple[GgufTensor, ...]


class GgufKeys:
    """Metadata read for what it should be. A key that is not there is None, or empty.

    Every method raises StreamquantError, which names the file and the key, for a value of another type: llama.cpp does
    not load such a file (src/llama-model-loader.cpp, GGUFMeta).

    >>> keys = GgufKeys(Path("a.gguf"), {"split.count": "2"})
    >>> keys.text("split.count"), keys.whole("split.no"), keys.texts("tokenizer.ggml.tokens")
    ('2', None, [])
    >>> keys.whole("split.count")
    Traceback (most recent call last):
    ...
    streamquant.quant.errors.StreamquantError: a key of the wrong type
      where:    a.gguf, key 'split.count'
      found:    '2'
      required: a whole number
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self._metadata = path, metadata

    def text(self, key: str) -> str | None:
        """A text."""
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def whole(self, key: str) -> int | None:
        """A whole number."""
        value = self._metadata.get(key)
        if value is not None and type(value) is not int:
            raise self._wrong(key, value, "a whole number")
        return value

    def flag(self, key: str) -> bool | None:
        """true or false."""
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self._metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value[:1]):  # all are of one type
            raise self._wrong(key, value, "a list of texts")
        return value

    def wholes(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self._metadata.get(key, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value[:1]):
            raise self._wrong(key, value, "a list of whole numbers")
        return value

    def _wrong(self, key: str, value: object, required: str) -> StreamquantError:
        return StreamquantError(
            "a key of the wrong type",
            where=f"{self.path}, key {key!r:.200}",
            found=f"{value!r:.100}",
            required=required,
        )


def read_keys(path: Path) -> GgufKeys:
    """The metadata of a GGUF file. Raises as `read_header`."""
    return GgufKeys(path, read_header(path).metadata)


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file, version 2 or 3, little endian.

    Raises StreamquantError for a file that breaks a rule of the format: counts and lengths that do not fit the file,
    unknown types, duplicate names, tensors that are misaligned, overlap, or end beyond the file. Never reads more than
    the header. (The package gguf's GGUFReader reads the same, and takes many seconds for a large vocabulary.)
    """
    return _read_header(path)


def _read_header(path: Path, raw: dict[str, bytes] | None = None) -> GgufHeader:
    """`raw` gets the bytes of each key and its value."""
    try:
        size = path.stat().st_size
        if size < 24:
            raise _Broken(f"{size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, size).header(raw)
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error
    except _Broken as error:
        raise StreamquantError(
            "not a readable GGUF file", where=str(path), found=str(error), hint="fetch the file again"
        ) from error


def read_raw_metadata(path: Path) -> tuple[GgufHeader, dict[str, bytes]]:
    """The header, and the bytes of every key with its value, which `pack_header` takes. Raises as `read_header`."""
    raw: dict[str, bytes] = {}
    return _read_header(path, raw), raw


class _Broken(Exception):  # noqa: N818 - internal: becomes a StreamquantError that names the file
    pass


class _Reader:
    """Reads values one after another; every length is checked against what is left of the file first."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def header(self, raw: dict[str, bytes] | None = None) -> GgufHeader:
        magic, version, tensor_count, key_count = self.unpack("<IIQQ")
        if magic != GGUF_MAGIC:
            raise _Broken(f"magic {magic:#010x}, not {GGUF_MAGIC:#010x}")
        if version not in (2, 3):
            raise _Broken(f"version {version}, not 2 or 3")
        metadata, types = {}, {}
        for _ in range(self.count(key_count, 13)):
            start = self.at
            key = self.string()
            if key in metadata:
                raise _Broken(f"key {key!r} occurs twice")
            metadata[key], types[key] = self.typed_value(key)
            if raw is not None:
                raw[key] = self.data[start : self.at]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _Broken(f"general.alignment {alignment!r}")
        infos = [self.tensor_info() for _ in range(self.count(tensor_count, 24))]
        begin = -(-self.at // alignment) * alignment
        return GgufHeader(metadata, types, tuple(self.place(infos, begin, alignment)))

    def place(
        self, infos: list[tuple[str, str, tuple[int, ...], int, int]], begin: int, alignment: int
    ) -> Iterator[GgufTensor]:
        """Tensor infos -> tensors, checked: aligned, inside the file, without overlap."""
        end = begin
        names: set[str] = set()
        for name, stored_as, shape, nbytes, offset in sorted(infos, key=lambda info: info[4]):
            start, stop = begin + offset, begin + offset + nbytes
            if name in names:
                raise _Broken(f"tensor {name!r} occurs twice")
            if offset % alignment:
                raise _Broken(f"tensor {name!r} is not aligned to {alignment}")
            if start < end:
                raise _Broken(f"tensor {name!r} overlaps the one before it")
            if stop > self.size:
                raise _Broken(f"tensor {name!r} ends at {stop:,} of {self.size:,} bytes: the file is truncated")
            names.add(name)
            end = stop
            yield GgufTensor(name, stored_as, shape, start, stop)

    def tensor_info(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """(name, type, shape, nbytes, offset)."""
        name = self.string()
        (rank,) = self.unpack("<I")
        if rank > 8:
            raise _Broken(f"tensor {name!r} has {rank} dimensions")
        dimensions = self.unpack(f"<{rank}Q")
        number, offset = self.unpack("<IQ")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise _Broken(f"tensor {name!r} has the unknown type {number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = math.prod(dimensions)
        if dimensions and dimensions[0] % block:
            raise _Broken(f"tensor {name!r}: rows of {dimensions[0]} are not a multiple of {kind.name}'s {block}")
        return name, kind.name, tuple(reversed(dimensions)), count // block * block_bytes, offset

    def typed_value(self, key: str) -> tuple[Any, tuple[GGUFValueType, GGUFValueType | None]]:
        kind = self.kind(key)
        if kind != GGUFValueType.ARRAY:
            return self.value(kind), (kind, None)
        item = self.kind(key)
        (length,) = self.unpack("<Q")
        if item == GGUFValueType.ARRAY:
            raise _Broken(f"key {key!r} is an array of arrays")
        if item == GGUFValueType.STRING:
            return [self.string() for _ in range(self.count(length, 8))], (kind, item)
        code = _SCALARS[item]
        self.count(length, struct.calcsize(code))
        return list(self.unpack(f"<{length}{code[1]}")), (kind, item)

    def kind(self, key: str) -> GGUFValueType:
        (number,) = self.unpack("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _Broken(f"key {key!r} has the unknown type {number}") from None

    def value(self, kind: GGUFValueType) -> Any:
        return self.string() if kind == GGUFValueType.STRING else self.unpack(_SCALARS[kind])[0]

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        raw = self.take(length)
        # Tokens of old files are not always UTF-8; what cannot be decoded stays visible and distinct.
        return raw.decode("utf-8", errors="backslashreplace")

    def unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(code, self.take(struct.calcsize(code)))

    def take(self, length: int) -> bytes:
        if length > self.size - self.at:
            raise _Broken(f"the header ends beyond the file's {self.size:,} bytes")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw

    def count(self, number: int, smallest: int) -> int:
        """A number of items of at least `smallest` bytes each, if so many fit into the rest of the file."""
        if number * smallest > self.size - self.at:
            raise _Broken(f"{number:,} items do not fit into the file's {self.size:,} bytes")
        return number


def first_of_split(path: Path) -> Path:
    """The first file of the split set that `path` belongs to, or `path` itself."""
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return path
    return path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")


def read_split_set(path: Path) -> dict[Path, GgufHeader]:
    """The headers of a file, or of all files of the split set that it is the first of, by path in their order.

    Raises StreamquantError for a file that is missing, truncated, of another set, or without its share of tensors.
    (llama-gguf-split and src/llama-model-loader.cpp of llama.cpp: split.no counts from 0, split.tensors.count is that
    of the set.)
    """
    match = SPLIT_NAME.fullmatch(path.name)
    first = read_header(path)
    count = GgufKeys(path, first.metadata).whole("split.count") or 0
    if match is None or count in (0, 1):
        if count not in (0, 1):
            raise StreamquantError(
                "one file of a split set, renamed",
                where=str(path),
                found=f"split.count {count}",
                required=f"names like NAME-00001-of-{count:05d}.gguf",
                hint="give the files their names back",
            )
        return {path: first}
    if count != int(match["count"]):
        raise StreamquantError("split set of another size than its names say", where=str(path), found=count)
    headers = {path: first}
    for number in range(2, count + 1):
        sibling = path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        if not sibling.is_file():
            raise StreamquantError(
                "a file of the split set is missing", where=str(sibling), found="no such file", hint="download it"
            )
        headers[sibling] = read_header(sibling)
    for number, (file, header) in enumerate(headers.items()):
        keys = GgufKeys(file, header.metadata)
        found = keys.whole("split.no"), keys.whole("split.count")
        if found != (number, count):
            raise StreamquantError(
                "a file of another split set, or out of order",
                where=str(file),
                found=f"split.no {found[0]}, split.count {found[1]}",
                required=f"split.no {number}, split.count {count}",
            )
    tensors = sum(len(header.tensors) for header in headers.values())
    declared = GgufKeys(path, first.metadata).whole("split.tensors.count")
    if declared not in (None, tensors):
        raise StreamquantError(
            "the split set does not have all its tensors",
            where=str(path),
            found=f"{tensors} tensors",
            required=f"{declared} tensors",
            hint="files of two versions may be mixed; fetch the set again",
        )
    return headers
