"""CPU kernels of GGML's 32-weight blocks: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, without an importance vector.

They run the single-precision operations of quantize_row_*_ref in ggml/src/ggml-quants.c in the same order, so the bytes
are those of ggml's x86-64 build. A block is two vectors: weights 0 to 15 and 16 to 31, which are also the low and the
high halves of its bytes. One corner of the C code is undefined there and fixed by what x86-64 does: where the scale is
so small that 1 / scale is infinite, the products are infinite or NaN, and their conversion to int8 gives 0.

Each kernel takes float32[r, n] and fills uint8[r, n / 32 * block bytes]; it returns the first row in which a scale (or
minimum) overflows float16, or -1.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import (
    ABS,
    INFINITY,
    SIGN,
    bits_float,
    float_bits,
    half_is_infinite,
    helper,
    kernel,
    put_half,
)
from streamquant.quant.kernels.vectors import (
    LANES,
    any_lane,
    bits,
    fill,
    fill_int,
    from_bits,
    lane_bits,
    largest,
    load,
    select,
    smallest,
    store_bytes,
    to_int,
)

QK = 32  # weights in a block, ggml's QK8_0 = QK4_0 = ...
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Lanes = Any

_HALF = 0x3EFFFFFF  # the float32 before 0.5
_MAGNITUDE = 0x7FFFFFFF


@helper
def magnitudes(x: Lanes) -> Lanes:
    """Magnitudes as integers: they order as the floats do."""
    return bits(x) & fill_int(np.int32(_MAGNITUDE))


@helper
def amax(a: Lanes, b: Lanes) -> np.float32:
    """The largest magnitude of a block."""
    x, y = magnitudes(a), magnitudes(b)
    return np.float32(bits_float(np.uint32(largest(select(x > y, x, y)))))


@helper
def _has(a: Lanes, b: Lanes, u: np.uint32) -> bool:
    """Whether a weight of the block has these bits."""
    wanted = fill_int(np.int32(u))
    return bool(any_lane((bits(a) == wanted) | (bits(b) == wanted)))


@helper
def _extreme(flat: Floats, start: int, a: Lanes, b: Lanes) -> np.float32:
    """The weight of the largest magnitude, with its sign; of several, the first. +0 for a block of zeros."""
    u = float_bits(amax(a, b))
    if u == np.uint32(0):
        return np.float32(0.0)
    negative = np.uint32(u | SIGN)
    if not _has(a, b, negative):
        return np.float32(bits_float(u))
    if not _has(a, b, u):
        return np.float32(bits_float(negative))
    for j in range(QK):  # both signs occur; the first one counts
        if (float_bits(flat[start + j]) & ABS) == u:
            return np.float32(flat[start + j])
    return np.float32(0.0)


@helper
def _ordered(x: Lanes) -> Lanes:
    """Floats as integers of the same order."""
    i = bits(x)
    return i ^ ((i >> fill_int(np.int32(31))) & fill_int(np.int32(_MAGNITUDE)))


@helper
def _from_ordered(i: np.int32) -> np.float32:
    return np.float32(bits_float(np.uint32(i ^ ((i >> np.int32(31)) & np.int32(_MAGNITUDE)))))


@helper
def _minimum(flat: Floats, start: int, a: Lanes, b: Lanes) -> np.float32:
    """The smallest weight. Of zeros of both signs it is the first, as with C's `<`."""
    x, y = _ordered(a), _ordered(b)
    value = _from_ordered(smallest(select(x < y, x, y)))
    if value == np.float32(0.0):
        for j in range(QK):
            if flat[start + j] == np.float32(0.0):
                return np.float32(flat[start + j])
    return value


@helper
def _maximum(a: Lanes, b: Lanes) -> np.float32:
    """The largest weight; the sign of a zero does not matter to its callers."""
    x, y = _ordered(a), _ordered(b)
    return _from_ordered(largest(select(x > y, x, y)))


@helper
def inverse_or_zero(scale: np.float32) -> np.float32:
    """1 / scale, or 0 where the quantized values are all 0: for scale 0, and where 1 / scale is infinite."""
    inverse = np.float32(1.0) / scale
    return np.float32(0.0) if (float_bits(np.float32(inverse)) & ABS) == INFINITY else np.float32(inverse)


@helper
def rounded(x: Lanes) -> Lanes:
    """C's roundf, half away from zero: add the float before 0.5 with the sign of x, truncate."""
    half = (bits(x) & fill_int(np.int32(-0x80000000))) | fill_int(np.int32(_HALF))
    return to_int(x + from_bits(half))


@helper
def _limited(x: Lanes, most: int) -> Lanes:
    """Truncated to an integer, at most `most`."""
    i, top = to_int(x), fill_int(np.int32(most))
    return select(i < top, i, top)


@helper
def store_fifth_bits(out: Bytes, at: int, low: Lanes, high: Lanes) -> None:
    """Bit 4 of the 32 values as a little-endian uint32."""
    fifteen = fill_int(np.int32(15))
    fifth = np.uint32(lane_bits(low > fifteen)) | (np.uint32(lane_bits(high > fifteen)) << np.uint32(16))
    for k in range(4):
        out[at + k] = np.uint8((fifth >> np.uint32(8 * k)) & np.uint32(0xFF))


@helper
def nibbles(low: Lanes, high: Lanes) -> Lanes:
    """The low four bits of two vectors in one byte a lane."""
    fifteen = fill_int(np.int32(15))
    return (low & fifteen) | ((high & fifteen) << fill_int(np.int32(4)))


@kernel
def encode_q8_0(rows: Floats, out: Bytes) -> int:
    """Q8_0: float16 d, int8[32]; 34 bytes. d = amax / 127, q = roundf(x / d)."""
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // QK
    first_overflow = -1
    for block in range(rows.size // QK):
        at = block * 34
        a, b = load(flat, block * QK), load(flat, block * QK + LANES)
        d = np.float32(amax(a, b) / np.float32(127.0))
        inverse = fill(inverse_or_zero(d))
        if half_is_infinite(put_half(to, at, d)) and first_overflow < 0:
            first_overflow = block // per_row
        store_bytes(to, at + 2, rounded(a * inverse))
        store_bytes(to, at + 2 + LANES, rounded(b * inverse))
    return first_overflow


@helper
def _encode_signed(rows: Floats, out: Bytes, half: int, size: int) -> int:
    """Q4_0 and Q5_0: d = extreme / -half, q = min(2 half - 1, trunc(x / d + half + 0.5))."""
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // QK
    first_overflow = -1
    for block in range(rows.size // QK):
        at = block * size
        a, b = load(flat, block * QK), load(flat, block * QK + LANES)
        d = np.float32(_extreme(flat, block * QK, a, b) / np.float32(-half))
        inverse = np.float32(np.float32(1.0) / d)
        offset = np.float32(np.float32(half) + np.float32(0.5))
        if (float_bits(inverse) & ABS) == INFINITY:
            # d == 0: ggml uses 0 for 1 / d, all values are `half`. Otherwise the products overflow, all values are 0.
            inverse, offset = np.float32(0.0), offset if d == np.float32(0.0) else np.float32(0.0)
        if half_is_infinite(put_half(to, at, d)) and first_overflow < 0:
            first_overflow = block // per_row
        low = _limited(a * fill(inverse) + fill(offset), 2 * half - 1)
        high = _limited(b * fill(inverse) + fill(offset), 2 * half - 1)
        if half == 16:
            store_fifth_bits(to, at + 2, low, high)
        store_bytes(to, at + size - 16, nibbles(low, high))
    return first_overflow


@kernel
def encode_q4_0(rows: Floats, out: Bytes) -> int:
    """Q4_0: float16 d, 16 bytes of two 4-bit values; 18 bytes."""
    return _encode_signed(rows, out, 8, 18)


@kernel
def encode_q5_0(rows: Floats, out: Bytes) -> int:
    """Q5_0: float16 d, 32 fifth bits, 16 bytes of two 4-bit values; 22 bytes."""
    return _encode_signed(rows, out, 16, 22)


@helper
def _encode_with_minimum(rows: Floats, out: Bytes, levels: int, size: int) -> int:
    """Q4_1 and Q5_1: m = min, d = (max - min) / levels, q = min(levels, trunc((x - m) / d + 0.5))."""
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // QK
    half = fill(np.float32(0.5))
    first_overflow = -1
    for block in range(rows.size // QK):
        at = block * size
        a, b = load(flat, block * QK), load(flat, block * QK + LANES)
        m = _minimum(flat, block * QK, a, b)
        d = np.float32(np.float32(_maximum(a, b) - m) / np.float32(levels))
        inverse, low = fill(inverse_or_zero(d)), fill(m)
        d_bits, m_bits = put_half(to, at, d), put_half(to, at + 2, m)
        if (half_is_infinite(d_bits) or half_is_infinite(m_bits)) and first_overflow < 0:
            first_overflow = block // per_row
        qa = _limited((a - low) * inverse + half, levels)
        qb = _limited((b - low) * inverse + half, levels)
        if levels == 31:
            store_fifth_bits(to, at + 4, qa, qb)
        store_bytes(to, at + size - 16, nibbles(qa, qb))
    return first_overflow


@kernel
def encode_q4_1(rows: Floats, out: Bytes) -> int:
    """Q4_1: float16 d, float16 m, 16 bytes of two 4-bit values; 20 bytes."""
    return _encode_with_minimum(rows, out, 15, 20)


@kernel
def encode_q5_1(rows: Floats, out: Bytes) -> int:
    """Q5_1: float16 d, float16 m, 32 fifth bits, 16 bytes of two 4-bit values; 24 bytes."""
    return _encode_with_minimum(rows, out, 31, 24)
