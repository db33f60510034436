"""INT4 and INT8 weights as compressed-tensors stores them and vLLM and SGLang load them.

| format                         | codes                       | beside                                             |
| ------------------------------ | --------------------------- | -------------------------------------------------- |
| INT4_GROUP_128_BF16            | weight_packed I32[N, K / 8] | weight_scale BF16[N, K / 128], weight_shape I64[2] |
| INT4_GROUP_128_ZERO_POINT_BF16 | the same                    | and weight_zero_point I32[ceil(N / 8), K / 128]    |
| INT8_GROUP_128_BF16            | weight_packed I32[N, K / 4] | weight_scale BF16[N, K / 128], weight_shape I64[2] |
| INT8_CHANNEL_BF16              | weight I8[N, K]             | weight_scale BF16[N, 1]                            |

and the same with groups of 32, and with F16 and F32: scales have the dtype of the source weight, and every operation is
rounded to it. Packed codes have 2^(bits - 1) added; the first is in the lowest bits of a word. Zero points are packed
in the same way along the rows. This is what llm-compressor's model_free_ptq writes, byte for byte (integers_cpu.py of
quant/kernels has the arithmetic; pack_to_int32 of compressed_tensors/compressors/pack_quantized).
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.format import WHOLE, Encoded, Format, Importance, Part, Rows, StoredType, same_shape
from streamquant.quant.kernels import integers_cpu
from streamquant.quant.scales import DTYPES, load_scales, store_scales
from streamquant.quant.widen import SOURCE_DTYPES

WORDS = StoredType("I32", None, 11, 1.0)
BYTES = StoredType("I8", None, 24, 1.0)
_ROWS_OF_A_WORD = 8


def _pack_zeros(zeros: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """uint8[r, g], 4 bits in each -> the bytes of int32[ceil(r / 8), g]: 8 rows in a word, missing ones 0."""
    rows, groups = zeros.shape
    padded = np.zeros((len(out) * _ROWS_OF_A_WORD, groups), np.uint32)
    padded[:rows] = zeros
    shifts = 4 * np.arange(_ROWS_OF_A_WORD, dtype=np.uint32)[:, None]
    words = np.bitwise_or.reduce(padded.reshape(-1, _ROWS_OF_A_WORD, groups) << shifts, axis=1)
    out[:] = words.astype("<u4").view(np.uint8).reshape(out.shape)


def _unpack_zeros(packed: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
    words = np.ascontiguousarray(packed).view("<u4")
    shifts = 4 * np.arange(_ROWS_OF_A_WORD, dtype=np.uint32)[:, None]
    zeros = (words[:, None, :] >> shifts) & np.uint32(15)
    return zeros.reshape(-1, words.shape[1])[:rows].astype(np.float32)


def _shape_bytes(shape: tuple[int, ...]) -> bytes:
    return np.array(shape, "<i8").tobytes()


def _groups(width: int, group: int, dtype: str, *, has_zero_point: bool = False) -> Format:
    """Packed codes of `width` bits, a scale for each `group` columns."""
    half = np.float32(1 << (width - 1))
    size = SOURCE_DTYPES[dtype]

    def encode_into(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
        r, n = rows.shape
        codes = out[0] if width == 8 else np.empty((r, n), np.uint8)
        scales = np.empty((r, n // group), np.float32)
        zeros = np.empty((r, n // group if has_zero_point else 0), np.uint8)
        overflow = integers_cpu.encode(rows, codes, scales, zeros, width, DTYPES[dtype])
        if width == 4:
            integers_cpu.pack_pairs(codes, out[0])
        store_scales(scales, dtype, out[1])
        if has_zero_point:
            _pack_zeros(zeros, out[2])
        out[-1][:] = np.frombuffer(_shape_bytes(rows.shape), np.uint8)
        return int(overflow)

    def decode_from(encoded: Encoded, n: int) -> Rows:
        packed = encoded[0]
        if width == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=-1)
        codes = packed.reshape(-1, n // group, group).astype(np.float32)
        zeros = _unpack_zeros(encoded[2], len(codes)) if has_zero_point else np.full(codes.shape[:2], half, np.float32)
        rows: Rows = (codes - zeros[:, :, None]) * load_scales(encoded[1], dtype)[:, :, None]
        return rows.reshape(-1, n)

    packed = Part("_packed", WORDS.name, 1, lambda n: n * width // 8, lambda s: (s[0], s[1] * width // 32))
    scale = Part("_scale", dtype, 1, lambda n: n // group * size, lambda s: (s[0], s[1] // group))
    zero = Part(
        "_zero_point", "I32", _ROWS_OF_A_WORD, lambda n: n // group * 4, lambda s: (-(-s[0] // 8), s[1] // group)
    )
    shape = Part("_shape", "I64", WHOLE, lambda _n: 16, lambda _s: (2,), _shape_bytes)
    name = f"INT{width}_GROUP_{group}{'_ZERO_POINT' if has_zero_point else ''}_{dtype}"
    parts = (packed, scale, zero, shape) if has_zero_point else (packed, scale, shape)
    rows = _ROWS_OF_A_WORD if has_zero_point else 1
    return Format(name, WORDS, group, rows, parts, encode_into, decode_from, source_dtype=dtype)


def _channel(dtype: str) -> Format:
    """INT8 codes, a scale for each row."""
    size = SOURCE_DTYPES[dtype]

    def encode_into(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
        r = rows.shape[0]
        scales = np.empty((r, 1), np.float32)
        overflow = integers_cpu.encode(rows, out[0], scales, np.empty((r, 0), np.uint8), 8, DTYPES[dtype])
        np.bitwise_xor(out[0], np.uint8(0x80), out=out[0])  # takes away the 128 that was added
        store_scales(scales, dtype, out[1])
        return int(overflow)

    def decode_from(encoded: Encoded, n: int) -> Rows:
        codes = encoded[0].reshape(-1, n).view(np.int8).astype(np.float32)
        rows: Rows = codes * load_scales(encoded[1], dtype)
        return rows

    codes = Part("", BYTES.name, 1, lambda n: n, same_shape)
    scale = Part("_scale", dtype, 1, lambda _n: size, lambda shape: (shape[0], 1))
    return Format(f"INT8_CHANNEL_{dtype}", BYTES, 1, 1, (codes, scale), encode_into, decode_from, source_dtype=dtype)


INT4 = {group: {dtype: _groups(4, group, dtype) for dtype in DTYPES} for group in (128, 32)}
INT4_ZERO_POINT = {
    group: {dtype: _groups(4, group, dtype, has_zero_point=True) for dtype in DTYPES} for group in (128, 32)
}
"""By the columns of a group, then by the dtype of the source."""
INT8 = {dtype: _groups(8, 128, dtype) for dtype in DTYPES}
INT8_CHANNEL = {dtype: _channel(dtype) for dtype in DTYPES}
"""By the dtype of the source."""
FORMATS = tuple(
    format_
    for by_dtype in (*INT4.values(), *INT4_ZERO_POINT.values(), INT8, INT8_CHANNEL)
    for format_ in by_dtype.values()
)
