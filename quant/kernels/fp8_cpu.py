"""CPU kernels of FP8 E4M3: amax, scale, divide, round. The arithmetic is llm-compressor's, bit for bit.

    scale = T(amax / 448); 0 -> eps(T)         T is the dtype of the source weight: bfloat16, float16 or float32
    code  = e4m3(clamp(T(w / scale), -448, 448))

The quotient is rounded to T first and to E4M3 afterwards; both roundings are to nearest, ties to even.
(compressed_tensors/quantization/utils/helpers.py calculate_qparams, lifecycle/forward.py quantize)
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import ABS, ONE, SIGN, bits_float, float_bits, helper, kernel, round_bits
from streamquant.quant.kernels.rounding_cpu import BF16, F16

TILE = 128

_E4M3_MAX = np.float32(448.0)
_E4M3_MAX_BITS = np.uint32(0x43E00000)
_E4M3_MIN_NORMAL_BITS = np.uint32(0x3C800000)  # 2**-6


@helper
def e4m3(q: np.uint32) -> np.uint8:
    """Bits of a finite float32 -> E4M3 code, saturating at 448."""
    a = min(np.uint32(q & ABS), _E4M3_MAX_BITS)
    normal = np.uint32(((a + np.uint32(0x7FFFF) + ((a >> np.uint32(20)) & ONE)) >> np.uint32(20)) - np.uint32(120 << 3))
    # Below 2**-6 codes are multiples of 2**-9, the last place of 2**14 <= x < 2**15: adding 2**14 rounds.
    subnormal = np.uint32(float_bits(np.float32(bits_float(a) + np.float32(16384.0))) - np.uint32(0x46800000))
    code = normal if a >= _E4M3_MIN_NORMAL_BITS else subnormal
    return np.uint8(code | ((q & SIGN) >> np.uint32(24)))


@helper
def _to_bf16(x: np.float32) -> np.uint32:
    return round_bits(float_bits(np.float32(x)), np.uint32(16))


@helper
def _to_f16(x: np.float32) -> np.uint32:
    """Bits of the float32 nearest to float16(x). Below 2**-14 it keeps too many bits; E4M3 drops them."""
    return round_bits(float_bits(np.float32(x)), np.uint32(13))


@helper
def _f16_subnormal(x: np.float32) -> np.float32:
    """Round 0 <= x < 2**-14 to a multiple of 2**-24, the last place of float16 there."""
    return np.float32(np.float32(x + np.float32(0.5)) - np.float32(0.5))


@helper
def _scale(amax: np.float32, dtype: int) -> np.float32:
    """The scale of a row or tile, as the float32 of a value of `dtype`; never zero."""
    exact = np.float32(amax / _E4M3_MAX)
    if dtype == BF16:
        scale = bits_float(_to_bf16(exact))
        eps = np.float32(2.0**-7)
    elif dtype == F16:
        scale = _f16_subnormal(exact) if exact < np.float32(2.0**-14) else bits_float(_to_f16(exact))
        eps = np.float32(2.0**-10)
    else:
        scale = exact
        eps = np.float32(2.0**-23)
    return np.float32(scale) if scale != np.float32(0.0) else np.float32(eps)


@helper
def _quotient(w: np.float32, scale: np.float32, dtype: int) -> np.uint32:
    """Bits of w / scale, rounded to `dtype`."""
    quotient = np.float32(w / scale)
    if dtype == BF16:
        return _to_bf16(quotient)
    if dtype == F16:
        return _to_f16(quotient)
    return float_bits(quotient)


@kernel
def encode_channel(
    rows: NDArray[np.float32], codes: NDArray[np.uint8], scales: NDArray[np.float32], dtype: int
) -> None:
    """float32[r, n] -> codes uint8[r, n], scales float32[r]; `dtype` is BF16, F16 or F32."""
    for i in range(rows.shape[0]):
        row = rows[i]
        largest = np.uint32(0)
        for j in range(row.size):  # magnitudes order like the integers that store them
            largest = max(largest, np.uint32(float_bits(row[j]) & ABS))
        scale = _scale(bits_float(largest), dtype)
        scales[i] = scale
        for j in range(row.size):
            codes[i, j] = e4m3(_quotient(row[j], scale, dtype))


@kernel
def tensor_scale(amax: np.float32, dtype: int) -> np.float32:
    """The scale of a whole tensor, or of activations, whose largest magnitude is `amax`: a value of `dtype`."""
    return _scale(np.float32(amax), dtype)


@kernel
def encode_by_scales(
    rows: NDArray[np.float32], codes: NDArray[np.uint8], scales: NDArray[np.float32], dtype: int
) -> None:
    """float32[r, n], float32[r] -> codes uint8[r, n]: no quotient is -0.0, to which oneshot adds a zero point of 0."""
    least = np.uint32(0x33000000) if dtype == F16 else np.uint32(0)  # 2**-25 is 0 in float16
    for i in range(rows.shape[0]):
        row, scale = rows[i], scales[i]
        for j in range(row.size):
            q = _quotient(row[j], scale, dtype)
            codes[i, j] = e4m3(q) if np.uint32(q & ABS) > least else np.uint8(0)


@kernel
def encode_tiles(rows: NDArray[np.float32], codes: NDArray[np.uint8], scales: NDArray[np.float32], dtype: int) -> None:
    """float32[r, n] -> codes uint8[r, n], scales float32[ceil(r / 128), ceil(n / 128)]: one scale a 128x128 tile.

    Tiles at the right and lower edge may be smaller: the reference pads them with zeros, which cannot be the amax.
    Both passes run along whole rows, with one entry a column: loops of 128 would be too short to vectorize well.
    """
    r, n = rows.shape
    column_amax = np.empty(n, np.uint32)
    column_scale = np.empty(n, np.float32)
    for band in range(scales.shape[0]):
        first, last = band * TILE, min((band + 1) * TILE, r)
        column_amax[:] = 0
        for i in range(first, last):
            for j in range(n):
                column_amax[j] = max(column_amax[j], np.uint32(float_bits(rows[i, j]) & ABS))
        for tile in range(scales.shape[1]):
            start, stop = tile * TILE, min((tile + 1) * TILE, n)
            scale = _scale(bits_float(column_amax[start:stop].max()), dtype)
            scales[band, tile] = scale
            column_scale[start:stop] = scale
        for i in range(first, last):
            for j in range(n):
                codes[i, j] = e4m3(_quotient(rows[i, j], column_scale[j], dtype))


@helper
def e4m3_value(code: np.uint8) -> np.float32:
    """The value of a code that is not NaN; below 2**-6 codes are multiples of 2**-9."""
    a = np.uint32(code & np.uint8(0x7F))
    normal = np.uint32((a << np.uint32(20)) + np.uint32(120 << 23))
    subnormal = np.uint32(float_bits(np.float32(np.float32(np.int32(a)) * np.float32(2.0**-9))))
    magnitude = normal if a >= np.uint32(8) else subnormal
    return np.float32(bits_float(np.uint32(magnitude | (np.uint32(code & np.uint8(0x80)) << np.uint32(24)))))


@kernel
def decode(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], block: tuple[int, int, int], out: NDArray[np.float32]
) -> bool:
    """codes uint8[r, n] and the scales of the blocks that they lie in -> float32[r, n]; False if a value is not finite.

    `block` is (rows of the first block that come before the first row, rows in a block, columns in a block). NaN codes
    become NaN.
    """
    before, height, width = block
    r, n = codes.shape
    is_finite = True
    for i in range(r):
        row = scales[(before + i) // height]
        largest_code, largest = np.uint8(0), np.uint32(0)
        for j in range(n):
            largest_code = max(largest_code, np.uint8(codes[i, j] & np.uint8(0x7F)))
        for tile in range(row.size):
            start, stop = tile * width, min((tile + 1) * width, n)
            some, scaled, scale = codes[i, start:stop], out[i, start:stop], row[tile]
            for j in range(some.size):
                x = np.float32(e4m3_value(some[j]) * scale)
                largest = max(largest, np.uint32(float_bits(x) & ABS))
                scaled[j] = x
        if largest_code == np.uint8(0x7F):
            for j in range(n):
                if codes[i, j] & np.uint8(0x7F) == np.uint8(0x7F):
                    out[i, j] = np.float32(np.nan)
        is_finite &= bool(largest < np.uint32(0x7F800000)) and bool(largest_code < np.uint8(0x7F))
    return is_finite
