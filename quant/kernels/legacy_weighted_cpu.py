"""CPU kernels of GGML's 32-weight blocks with the importance of columns: Q4_0, Q4_1, Q5_0, Q5_1.

quantize_row_q*_impl of ggml/src/ggml-quants.c: the scale (and minimum) of a block comes from a search that weighs
errors by importance * sqrt(mean square of the row + x * x). 16 blocks go together, one a SIMD lane (search_cpu.py).

Each kernel takes float32[r, n] and float32[n], finite and not negative, and fills uint8[r, n / 32 * block bytes]; it
returns the first row in which a scale (or minimum) overflows float16, or -1.
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import half_is_infinite, helper, kernel, put_half
from streamquant.quant.kernels.kquants_cpu import trials
from streamquant.quant.kernels.legacy_cpu import QK, nibbles, store_fifth_bits
from streamquant.quant.kernels.search_cpu import (
    clamped_lanes,
    rounded_lanes,
    search_scale,
    search_scale_and_min,
    sums_of_squares,
    transpose,
    transpose_importance,
    weigh,
)
from streamquant.quant.kernels.vectors import LANES, fill, fill_int, load, store_bytes, to_int

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_Q4_TRIALS = trials(-0.9, 0.05, 37, 15)
_Q5_TRIALS = trials(-0.9, 0.05, 37, 31)


@kernel
def encode_q4_0(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q4_0, 18 bytes a block."""
    return _encode_signed(rows, importance, out, 8, 18)


@kernel
def encode_q5_0(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q5_0, 22 bytes a block."""
    return _encode_signed(rows, importance, out, 16, 22)


@kernel
def encode_q4_1(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q4_1, 20 bytes a block."""
    return _encode_with_minimum(rows, importance, out, 15, 20, _Q4_TRIALS)


@kernel
def encode_q5_1(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q5_1, 24 bytes a block."""
    return _encode_with_minimum(rows, importance, out, 31, 24, _Q5_TRIALS)


@helper
def _encode_signed(rows: Floats, importance: Floats, out: Bytes, half: int, size: int) -> int:
    """x ~ d * (q - half) with 0 <= q < 2 half; a block without weights has q = 0."""
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // QK
    xt, wt = np.empty(QK * LANES, np.float32), np.empty(QK * LANES, np.float32)
    found, sums, spread = np.empty(4 * LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sigma2 = np.empty(rows.shape[0], np.float32)
    sums_of_squares(flat, rows.shape[1], np.float32(rows.shape[1]), sigma2)
    least, most, total = fill_int(np.int32(-half)), fill_int(np.int32(half - 1)), rows.size // QK
    first_overflow = -1
    for first in range(0, total, LANES):
        count = min(LANES, total - first)
        transpose(flat, first * QK, count, QK, xt)
        transpose_importance(importance, first, count, QK, sigma2, per_row, wt, spread)
        weigh(xt, QK, wt, spread, sums, 0)
        search_scale(xt, wt, QK, half, True, found)
        for k in range(count):
            block, at = first + k, (first + k) * size
            if half_is_infinite(put_half(to, at, found[k])) and first_overflow < 0:
                first_overflow = block // per_row
            inverse = fill(found[2 * LANES + k])
            offset = fill(np.float32(half) if found[3 * LANES + k] == np.float32(0.0) else np.float32(0.0))
            low = to_int(clamped_lanes(inverse * load(flat, block * QK), least, most) + offset)
            high = to_int(clamped_lanes(inverse * load(flat, block * QK + LANES), least, most) + offset)
            if half == 16:
                store_fifth_bits(to, at + 2, low, high)
            store_bytes(to, at + size - 16, nibbles(low, high))
    return first_overflow


@helper
def _encode_with_minimum(rows: Floats, importance: Floats, out: Bytes, levels: int, size: int, factors: Floats) -> int:
    """x ~ d * q + m with 0 <= q <= levels. Two groups of 16 blocks go together."""
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // QK
    size_t = 2 * QK * LANES
    xt, wt, qt = np.empty(size_t, np.float32), np.empty(size_t, np.float32), np.empty(size_t, np.float32)
    found, sums, spread = np.empty(8 * LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sigma2, total = np.empty(rows.shape[0], np.float32), rows.size // QK
    sums_of_squares(flat, rows.shape[1], np.float32(rows.shape[1]), sigma2)
    first_overflow = -1
    for first in range(0, total, 2 * LANES):
        count = min(2 * LANES, total - first)
        for group in range(2):
            block, part = first + group * LANES, group * QK * LANES
            lanes = max(0, min(LANES, count - group * LANES))
            transpose(flat, block * QK, lanes, QK, xt[part:])
            transpose_importance(importance, block, lanes, QK, sigma2, per_row, wt[part:], spread)
            weigh(xt[part:], QK, wt[part:], spread, sums, 0)
        search_scale_and_min(xt, wt, qt, QK, levels, factors, False, True, found)
        for k in range(count):
            block, at, lane = first + k, (first + k) * size, k // LANES * 4 * LANES + k % LANES
            d, m = put_half(to, at, found[lane]), put_half(to, at + 2, np.float32(-found[LANES + lane]))
            if (half_is_infinite(d) or half_is_infinite(m)) and first_overflow < 0:
                first_overflow = block // per_row
            inverse, minimum = fill(found[2 * LANES + lane]), fill(found[3 * LANES + lane])
            low = to_int(rounded_lanes(inverse * (load(flat, block * QK) - minimum), levels))
            high = to_int(rounded_lanes(inverse * (load(flat, block * QK + LANES) - minimum), levels))
            if levels == 31:
                store_fifth_bits(to, at + 4, low, high)
            store_bytes(to, at + size - 16, nibbles(low, high))
    return first_overflow
