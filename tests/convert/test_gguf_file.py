"""GGUF headers: written as gguf's own writer writes them, read as its reader reads them, and hostile files refused."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from hypothesis import given, settings
from hypothesis import strategies as st

from streamquant.files.gguf_file import ALIGNMENT, pack_header, pad, read_header
from streamquant.quant.errors import StreamquantError

T = GGUFValueType
METADATA = {
    "general.architecture": GGUFValue("llama", T.STRING),
    "a.u8": GGUFValue(200, T.UINT8),
    "a.i8": GGUFValue(-3, T.INT8),
    "a.u16": GGUFValue(65535, T.UINT16),
    "a.i16": GGUFValue(-300, T.INT16),
    "a.u32": GGUFValue(4_000_000_000, T.UINT32),
    "a.i32": GGUFValue(-5, T.INT32),
    "a.f32": GGUFValue(1e-5, T.FLOAT32),
    "a.u64": GGUFValue(2**63 + 1, T.UINT64),
    "a.i64": GGUFValue(-(2**40), T.INT64),
    "a.f64": GGUFValue(0.1, T.FLOAT64),
    "a.bool": GGUFValue(True, T.BOOL),
    "a.text": GGUFValue("grüße 🦙 \n", T.STRING),
    "a.strings": GGUFValue(["a", "", "bé"], T.ARRAY),
    "a.ints": GGUFValue([1, 2, -3], T.ARRAY),
    "a.floats": GGUFValue([0.5, -2.0], T.ARRAY),
    "a.bytes": GGUFValue(bytes(range(8)), T.ARRAY, T.UINT8),
}
TENSORS = [("one.weight", (3, 64), "Q8_0", 3 * 68), ("two.bias", (5,), "F32", 20), ("three.weight", (2, 3), "BF16", 12)]


def write_file(path: Path, header: bytes | None = None) -> Path:
    data = b"".join(bytes(range(7)) * (nbytes // 7 + 1) for _, _, _, nbytes in TENSORS)
    body, at = b"", 0
    for _, _, _, nbytes in TENSORS:
        body += data[at : at + nbytes] + bytes(pad(nbytes) - nbytes)
        at += nbytes
    path.write_bytes((pack_header(METADATA, TENSORS) if header is None else header) + body)
    return path


def reference_header(path: Path) -> bytes:
    """The same header by gguf's GGUFWriter."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in METADATA.items():
        if key != "general.architecture":
            writer.add_key_value(key, value.value, value.type, value.sub_type)
    for name, shape, kind, nbytes in TENSORS:
        quantization = gguf.GGMLQuantizationType[kind]
        stored = (shape[0], shape[1] // 32 * 34) if kind == "Q8_0" else shape
        dtype = {"Q8_0": np.uint8, "F32": np.float32, "BF16": np.uint16}[kind]
        raw = None if kind == "F32" else quantization
        writer.add_tensor_info(name, stored, np.dtype(dtype), nbytes, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path.read_bytes()


def test_header_is_what_gguf_py_writes(tmp_path: Path) -> None:
    expected = reference_header(tmp_path / "reference.gguf")
    found = pack_header(METADATA, TENSORS)
    assert found[: len(expected)] == expected
    assert len(found) % ALIGNMENT == 0
    assert not any(found[len(expected) :])


def test_read_header_agrees_with_gguf_reader(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gguf")
    header = read_header(path)
    reader = gguf.GGUFReader(path)
    for key, value in header.metadata.items():
        assert value == reader.fields[key].contents(), key
        assert [kind for kind in header.types[key] if kind is not None] == list(dict.fromkeys(reader.fields[key].types))
    assert set(header.metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}
    expected = [
        (t.name, t.tensor_type.name, tuple(map(int, t.shape[::-1])), int(t.data_offset)) for t in reader.tensors
    ]
    assert [(t.name, t.stored_as, t.shape, t.start) for t in header.tensors] == expected
    assert [t.stop - t.start for t in header.tensors] == [nbytes for _, _, _, nbytes in TENSORS]


def key_count(header: bytes, count: int) -> bytes:
    return header[:16] + struct.pack("<Q", count) + header[24:]


def tensor_count(header: bytes, count: int) -> bytes:
    return header[:8] + struct.pack("<Q", count) + header[16:]


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (lambda h: b"GGML" + h[4:], "magic"),
    "version 1": (lambda h: h[:4] + struct.pack("<I", 1) + h[8:], "version 1"),
    "big endian": (lambda h: h[:4] + struct.pack(">I", 3) + h[8:], "version"),
    "2**63 keys": (lambda h: key_count(h, 2**63), "items do not fit"),
    "2**64-1 tensors": (lambda h: tensor_count(h, 2**64 - 1), "items do not fit"),
    "endless key": (lambda h: h[:24] + struct.pack("<Q", 2**62) + h[32:], "ends beyond"),
    "unknown key type": (
        lambda h: h.replace(b"a.u8" + struct.pack("<I", T.UINT8), b"a.u8" + struct.pack("<I", 77)),
        "type 77",
    ),
    "endless array": (
        lambda h: h.replace(struct.pack("<IQ", T.INT32, 3), struct.pack("<IQ", T.INT32, 2**60)),
        "items do not fit",
    ),
    "array of arrays": (
        lambda h: h.replace(struct.pack("<IQ", T.INT32, 3), struct.pack("<IQ", T.ARRAY, 3)),
        "array of arrays",
    ),
    "key twice": (lambda h: h.replace(b"a.i8", b"a.u8"), "occurs twice"),
    "unknown tensor type": (
        lambda h: h.replace(struct.pack("<QQI", 64, 3, 8), struct.pack("<QQI", 64, 3, 99)),
        "type 99",
    ),
    "nine dimensions": (
        lambda h: h.replace(b"two.bias" + struct.pack("<I", 1), b"two.bias" + struct.pack("<I", 9)),
        "9 dim",
    ),
    "rows of a part of a block": (
        lambda h: h.replace(struct.pack("<QQI", 64, 3, 8), struct.pack("<QQI", 63, 3, 8)),
        "multiple",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused(name: str, tmp_path: Path) -> None:
    change, words = HOSTILE[name]
    original = pack_header(METADATA, TENSORS)
    header = change(original)
    assert header != original
    with pytest.raises(StreamquantError, match=words):
        read_header(write_file(tmp_path / "a.gguf", header))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("a.weight", (2, 33), "F32", 264)], None),
        ([("a.weight", (2, 64), "Q8_0", 136), ("a.weight", (1, 32), "Q8_0", 34)], "twice"),
        ([("a.weight", (2**40, 64), "F32", 136)], "truncated"),
    ],
)
def test_tensor_infos_are_checked(
    tensors: list[tuple[str, tuple[int, ...], str, int]], words: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(pack_header({}, tensors) + bytes(512))
    if words is None:
        assert read_header(path).tensors[0].name == "a.weight"
    else:
        with pytest.raises(StreamquantError, match=words):
            read_header(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = bytearray(pack_header({}, [("a", (16,), "F32", 64), ("b", (16,), "F32", 64)]))
    at = bytes(header).rindex(struct.pack("<Q", 64))
    header[at : at + 8] = struct.pack("<Q", 32)
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(header) + bytes(256))
    with pytest.raises(StreamquantError, match="overlaps"):
        read_header(path)


def test_missing_and_short_files(tmp_path: Path) -> None:
    with pytest.raises(StreamquantError, match="cannot read"):
        read_header(tmp_path / "nothing.gguf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    with pytest.raises(StreamquantError, match="not a readable GGUF"):
        read_header(tmp_path / "short.gguf")


@settings(max_examples=300, deadline=None)
@given(draws=st.data())
def test_damaged_headers_never_give_anything_but_our_error(
    draws: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = bytearray(pack_header(METADATA, TENSORS))
    for _ in range(draws.draw(st.integers(1, 4))):
        at = draws.draw(st.integers(0, len(header) - 1))
        header[at] = draws.draw(st.integers(0, 255))
    length = draws.draw(st.integers(0, len(header) + 400))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes((bytes(header) + bytes(400))[:length])
    try:
        read_header(path)
    except StreamquantError as error:
        assert str(path) in str(error)  # noqa: PT017 - both outcomes are fine, a traceback is not
