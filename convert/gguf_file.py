"""The GGUF container (version 3, little endian): the bytes of a header, and how its tensors are laid out.

magic "GGUF", u32 version, u64 tensors, u64 keys; the keys; the tensor infos; padding; then the data, each tensor
padded to the alignment. Dimensions are written in ggml's order, the reverse of torch's.
(ggml/include/gguf.h; gguf-py/gguf/gguf_writer.py writes the same bytes)
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGMLQuantizationType, GGUFValueType
from gguf.gguf_writer import GGUFValue

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


def pad(size: int) -> int:
    """`size` rounded up to the alignment.

    >>> pad(0), pad(33)
    (0, 64)
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack_header(metadata: Mapping[str, GGUFValue], tensors: Iterable[tuple[str, tuple[int, ...], str, int]]) -> bytes:
    """Everything before the data: `metadata` in its order, and the (name, shape, ggml type name, nbytes) of tensors.

    Shapes are in torch's order. Data offsets are those of tensors stored one after another, each padded.
    """
    tensors = list(tensors)
    out = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out += [_pack_string(key), struct.pack("<I", value.type), _pack_value(value.value, value.type, value.sub_type)]
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
        return head + b"".join(_pack_value(element, item, None) for element in value)
    return struct.pack(_SCALARS[kind], value)
