"""CPU kernels of GGML's 32-weight blocks: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, without an importance vector.

They run the single-precision operations of quantize_row_*_ref in ggml/src/ggml-quants.c in the same order, so the bytes
are those of ggml's x86-64 build. Two corners of the C code are undefined there and fixed by what x86-64 does: a block
whose scale is so small that 1 / scale is infinite gives products that are infinite or NaN, and their conversion to
int8 gives 0.

Each kernel takes float32[r, n] and fills uint8[r, n / 32 * block bytes]; it returns the first row in which a scale (or
minimum) overflows float16, or -1.
"""

import numpy as np
from numpy.typing import NDArray

from quant.kernels.bits import (
    ABS,
    INFINITY,
    SIGN,
    bits_float,
    float_bits,
    half_bits,
    half_is_infinite,
    helper,
    kernel,
)

QK = 32  # weights in a block, ggml's QK8_0 = QK4_0 = ...
LANES = 8
_HALF = np.uint32(0x3EFFFFFF)  # the float32 before 0.5


@helper
def _amax_bits(block: NDArray[np.float32], lanes: NDArray[np.uint32]) -> np.uint32:
    """Bits of the largest magnitude. Eight lanes first: three times faster than the tree that LLVM makes of 32."""
    for k in range(LANES):
        a, b = float_bits(block[k]) & ABS, float_bits(block[8 + k]) & ABS
        c, d = float_bits(block[16 + k]) & ABS, float_bits(block[24 + k]) & ABS
        lanes[k] = max(max(a, b), max(c, d))
    for k in range(4):
        lanes[k] = max(lanes[k], lanes[4 + k])
    return np.uint32(max(max(lanes[0], lanes[1]), max(lanes[2], lanes[3])))


@helper
def _extreme(block: NDArray[np.float32], lanes: NDArray[np.uint32]) -> np.float32:
    """The weight of the largest magnitude, with its sign; of several, the first. +0 for a block of zeros."""
    largest = _amax_bits(block, lanes)
    if largest == np.uint32(0):
        return np.float32(0.0)
    positive, negative = np.uint32(0), np.uint32(0)
    for j in range(QK):
        u = float_bits(block[j])
        positive |= np.uint32(u == largest)
        negative |= np.uint32(u == (largest | SIGN))
    if positive == negative:  # both signs occur; the first one counts
        for j in range(QK):
            if (float_bits(block[j]) & ABS) == largest:
                return np.float32(block[j])
    return np.float32(bits_float(largest) if positive else bits_float(np.uint32(largest | SIGN)))


@helper
def _ordered(u: np.uint32) -> np.int32:
    """Bits of a float32 -> an integer of the same order; its own inverse."""
    i = np.int32(u)
    return np.int32(i ^ ((i >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@helper
def _minimum(block: NDArray[np.float32], lanes: NDArray[np.int32]) -> np.float32:
    """The smallest weight. Of zeros of both signs it is the first, as with C's `<`."""
    for k in range(LANES):
        a, b = _ordered(float_bits(block[k])), _ordered(float_bits(block[8 + k]))
        c, d = _ordered(float_bits(block[16 + k])), _ordered(float_bits(block[24 + k]))
        lanes[k] = min(min(a, b), min(c, d))
    for k in range(4):
        lanes[k] = min(lanes[k], lanes[4 + k])
    smallest = min(min(lanes[0], lanes[1]), min(lanes[2], lanes[3]))
    value = np.float32(bits_float(np.uint32(_ordered(np.uint32(smallest)))))
    if value == np.float32(0.0):
        for j in range(QK):
            if block[j] == np.float32(0.0):
                return np.float32(block[j])
    return value


@helper
def _maximum(block: NDArray[np.float32], lanes: NDArray[np.int32]) -> np.float32:
    """The largest weight; the sign of a zero does not matter to its callers."""
    for k in range(LANES):
        a, b = _ordered(float_bits(block[k])), _ordered(float_bits(block[8 + k]))
        c, d = _ordered(float_bits(block[16 + k])), _ordered(float_bits(block[24 + k]))
        lanes[k] = max(max(a, b), max(c, d))
    for k in range(4):
        lanes[k] = max(lanes[k], lanes[4 + k])
    largest = max(max(lanes[0], lanes[1]), max(lanes[2], lanes[3]))
    return np.float32(bits_float(np.uint32(_ordered(np.uint32(largest)))))


@helper
def _inverse(scale: np.float32) -> np.float32:
    """1 / scale, or 0 where the quantized values are all 0: for scale 0, and where 1 / scale is infinite."""
    inverse = np.float32(1.0) / scale
    return np.float32(0.0) if (float_bits(np.float32(inverse)) & ABS) == INFINITY else np.float32(inverse)


@helper
def _put_half(out: NDArray[np.uint8], at: int, x: np.float32) -> bool:
    """Store float16(x), little endian; True if it overflowed."""
    h = half_bits(x)
    out[at] = np.uint8(h & np.uint16(0xFF))
    out[at + 1] = np.uint8(h >> np.uint16(8))
    return half_is_infinite(h)


@kernel
def encode_q8_0(rows: NDArray[np.float32], out: NDArray[np.uint8]) -> int:
    """Q8_0: float16 d, int8[32]; 34 bytes. d = amax / 127, q = roundf(x / d)."""
    first_overflow = -1
    blocks = rows.reshape(rows.shape[0], rows.shape[1] // QK, QK)
    lanes = np.empty(LANES, np.uint32)
    for i in range(blocks.shape[0]):
        to = out[i]
        overflow = False
        for b in range(blocks.shape[1]):
            block, at = blocks[i, b], b * 34
            d = np.float32(bits_float(_amax_bits(block, lanes)) / np.float32(127.0))
            inverse = _inverse(d)
            overflow |= _put_half(to, at, d)
            for j in range(QK):
                x = np.float32(block[j] * inverse)
                # roundf, half away from zero: add the float before 0.5 with the sign of x, truncate
                half = bits_float(np.uint32((float_bits(x) & SIGN) | _HALF))
                to[at + 2 + j] = np.uint8(np.int32(np.float32(x + half)))
        if overflow and first_overflow < 0:
            first_overflow = i
    return first_overflow


@kernel
def encode_q4_0(rows: NDArray[np.float32], out: NDArray[np.uint8]) -> int:
    """Q4_0: float16 d, 16 bytes of two 4-bit values; 18 bytes. d = extreme / -8, q = min(15, trunc(x / d + 8.5))."""
    first_overflow = -1
    blocks = rows.reshape(rows.shape[0], rows.shape[1] // QK, QK)
    lanes = np.empty(LANES, np.uint32)
    for i in range(blocks.shape[0]):
        to = out[i]
        overflow = False
        for b in range(blocks.shape[1]):
            block, at = blocks[i, b], b * 18
            d = np.float32(_extreme(block, lanes) / np.float32(-8.0))
            inverse = np.float32(np.float32(1.0) / d)
            offset = np.float32(8.5)
            if (float_bits(inverse) & ABS) == INFINITY:
                # d == 0: ggml uses 0 for 1 / d, all values are 8. Otherwise the products overflow, all values are 0.
                inverse, offset = np.float32(0.0), np.float32(8.5) if d == np.float32(0.0) else np.float32(0.0)
            overflow |= _put_half(to, at, d)
            for j in range(QK // 2):
                low = min(np.int32(15), np.int32(np.float32(np.float32(block[j] * inverse) + offset)))
                high = min(np.int32(15), np.int32(np.float32(np.float32(block[16 + j] * inverse) + offset)))
                to[at + 2 + j] = np.uint8(low | (high << np.int32(4)))
        if overflow and first_overflow < 0:
            first_overflow = i
    return first_overflow


@kernel
def encode_q5_0(rows: NDArray[np.float32], out: NDArray[np.uint8]) -> int:
    """Q5_0: float16 d, 32 high bits, 16 bytes of two 4-bit values; 22 bytes. q = min(31, trunc(x / d + 16.5))."""
    first_overflow = -1
    blocks = rows.reshape(rows.shape[0], rows.shape[1] // QK, QK)
    lanes = np.empty(LANES, np.uint32)
    for i in range(blocks.shape[0]):
        to = out[i]
        overflow = False
        for b in range(blocks.shape[1]):
            block, at = blocks[i, b], b * 22
            d = np.float32(_extreme(block, lanes) / np.float32(-16.0))
            inverse = np.float32(np.float32(1.0) / d)
            offset = np.float32(16.5)
            if (float_bits(inverse) & ABS) == INFINITY:
                inverse, offset = np.float32(0.0), np.float32(16.5) if d == np.float32(0.0) else np.float32(0.0)
            overflow |= _put_half(to, at, d)
            high_bits = np.uint32(0)
            for j in range(QK // 2):
                low = min(np.int32(31), np.int32(np.float32(np.float32(block[j] * inverse) + offset)))
                high = min(np.int32(31), np.int32(np.float32(np.float32(block[16 + j] * inverse) + offset)))
                to[at + 6 + j] = np.uint8((low & np.int32(15)) | ((high & np.int32(15)) << np.int32(4)))
                high_bits |= np.uint32(np.uint32(low >> np.int32(4)) & np.uint32(1)) << np.uint32(j)
                high_bits |= np.uint32(np.uint32(high >> np.int32(4)) & np.uint32(1)) << np.uint32(j + 16)
            for k in range(4):
                to[at + 2 + k] = np.uint8((high_bits >> np.uint32(8 * k)) & np.uint32(0xFF))
        if overflow and first_overflow < 0:
            first_overflow = i
    return first_overflow


@kernel
def encode_q4_1(rows: NDArray[np.float32], out: NDArray[np.uint8]) -> int:
    """Q4_1: float16 d, float16 m, 16 bytes of two 4-bit values; 20 bytes. d = (max - min) / 15, m = min."""
    first_overflow = -1
    blocks = rows.reshape(rows.shape[0], rows.shape[1] // QK, QK)
    lanes = np.empty(LANES, np.int32)
    for i in range(blocks.shape[0]):
        to = out[i]
        overflow = False
        for b in range(blocks.shape[1]):
            block, at = blocks[i, b], b * 20
            m = _minimum(block, lanes)
            d = np.float32(np.float32(_maximum(block, lanes) - m) / np.float32(15.0))
            inverse = _inverse(d)
            overflow |= _put_half(to, at, d)
            overflow |= _put_half(to, at + 2, m)
            for j in range(QK // 2):
                low = np.int32(np.float32(np.float32(np.float32(block[j] - m) * inverse) + np.float32(0.5)))
                high = np.int32(np.float32(np.float32(np.float32(block[16 + j] - m) * inverse) + np.float32(0.5)))
                low, high = min(np.int32(15), low), min(np.int32(15), high)
                to[at + 4 + j] = np.uint8(low | (high << np.int32(4)))
        if overflow and first_overflow < 0:
            first_overflow = i
    return first_overflow


@kernel
def encode_q5_1(rows: NDArray[np.float32], out: NDArray[np.uint8]) -> int:
    """Q5_1: float16 d, float16 m, 32 high bits, 16 bytes of two 4-bit values; 24 bytes. d = (max - min) / 31."""
    first_overflow = -1
    blocks = rows.reshape(rows.shape[0], rows.shape[1] // QK, QK)
    lanes = np.empty(LANES, np.int32)
    for i in range(blocks.shape[0]):
        to = out[i]
        overflow = False
        for b in range(blocks.shape[1]):
            block, at = blocks[i, b], b * 24
            m = _minimum(block, lanes)
            d = np.float32(np.float32(_maximum(block, lanes) - m) / np.float32(31.0))
            inverse = _inverse(d)
            overflow |= _put_half(to, at, d)
            overflow |= _put_half(to, at + 2, m)
            high_bits = np.uint32(0)
            for j in range(QK // 2):
                low = np.int32(np.float32(np.float32(np.float32(block[j] - m) * inverse) + np.float32(0.5)))
                high = np.int32(np.float32(np.float32(np.float32(block[16 + j] - m) * inverse) + np.float32(0.5)))
                to[at + 8 + j] = np.uint8((low & np.int32(15)) | ((high & np.int32(15)) << np.int32(4)))
                high_bits |= np.uint32(np.uint32(low >> np.int32(4)) & np.uint32(1)) << np.uint32(j)
                high_bits |= np.uint32(np.uint32(high >> np.int32(4)) & np.uint32(1)) << np.uint32(j + 16)
            for k in range(4):
                to[at + 4 + k] = np.uint8((high_bits >> np.uint32(8 * k)) & np.uint32(0xFF))
        if overflow and first_overflow < 0:
            first_overflow = i
    return first_overflow
