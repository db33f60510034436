"""CPU kernels of GGML's K-quants with the importance of columns: quantize_row_q*_K_impl of ggml/src/ggml-quants.c.

They search more scales than the kernels without importance (kquants_cpu.py), weigh errors by importance * sqrt(sigma2 +
x * x), and search the scale of the scales as well. That second search runs with one super-block a lane, so 16
super-blocks go together: first their sub-blocks, 16 at a time, then their scales.

Each kernel takes float32[r, n] and float32[n], finite and not negative, and fills uint8[r, n / 256 * block bytes]; it
returns the first row in which a scale overflows float16, or -1.
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import half_is_infinite, half_value, helper, kernel, put_half
from streamquant.quant.kernels.kquants_cpu import (
    FOUND,
    QK_K,
    pack_2,
    pack_3,
    pack_4,
    pack_5,
    put_6_bit_pair,
    put_6_bits,
    quantize_signed_3,
    quantize_with_min,
    store_q6_k,
    trials,
)
from streamquant.quant.kernels.search_cpu import (
    clamped_lanes,
    search_positive_scale,
    search_scale,
    search_scale_and_min,
    sums_of_squares,
    transpose,
    transpose_importance,
    weigh,
)
from streamquant.quant.kernels.vectors import LANES, fill, fill_int, load, select, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_Q2_TRIALS = trials(-0.9, 0.05, 37, 3)
_Q4_TRIALS = trials(-0.9, 0.05, 37, 15)
_Q5_TRIALS = trials(-0.9, 0.05, 37, 31)


@helper
def _by_super_block(values: Floats, stride: int, count: int, per_block: int, out: Floats) -> None:
    """Values of the sub-blocks of `count` super-blocks -> out[16 * j + b], sub-block j of super-block b in lane b.

    They lie as the searches left them: 16 sub-blocks every `stride` values. Lanes without a super-block become zero.
    """
    per_search = LANES // per_block
    for b in range(LANES):
        for j in range(per_block):
            at = b // per_search * stride + b % per_search * per_block + j
            out[LANES * j + b] = values[at] if b < count else np.float32(0.0)


# Q4_K and Q5_K: 8 sub-blocks of 32 weights, 6-bit scales and minima


@kernel
def encode_q4_k(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q4_K, 144 bytes a super-block."""
    return _encode_4_or_5(rows, importance, out, 15, _Q4_TRIALS)


@kernel
def encode_q5_k(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q5_K, 176 bytes a super-block."""
    return _encode_4_or_5(rows, importance, out, 31, _Q5_TRIALS)


@helper
def _encode_4_or_5(rows: Floats, importance: Floats, out: Bytes, levels: int, factors: Floats) -> int:
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    per_row, total = rows.shape[1] // QK_K, rows.size // QK_K
    size = to.size // max(total, 1)
    sigma2, spread = np.empty(total, np.float32), np.empty(LANES, np.float32)
    sums_of_squares(flat, QK_K, np.float32(128.0), sigma2)
    xt, wt, qt = np.empty(64 * LANES, np.float32), np.empty(64 * LANES, np.float32), np.empty(64 * LANES, np.float32)
    found, sums = np.empty(8 * FOUND, np.float32), np.empty(8 * LANES, np.float32)
    scales, minima, q = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(QK_K, np.float32)
    coarse = _coarse(8)
    first_overflow = -1
    for first in range(0, total, LANES):
        count = min(LANES, total - first)
        for pair in range(0, (count + 1) // 2, 2):  # two super-blocks fill the lanes, and two groups go together
            for group in range(2):
                block, part = first + 2 * (pair + group), group * 32 * LANES
                lanes = 8 * max(0, min(2, first + count - block))
                transpose(flat, block * QK_K, lanes, 32, xt[part:])
                transpose_importance(importance, 8 * block, lanes, 32, sigma2, 8, wt[part:], spread)
                weigh(xt[part:], 32, wt[part:], spread, sums, (pair + group) * LANES)
            search_scale_and_min(xt, wt, qt, 32, levels, factors, False, True, found[pair * FOUND :])
        _search_scales_and_minima(found, sums, count, 8, 63, coarse)
        for b in range(count):
            start, at = (first + b) * QK_K, (first + b) * size
            if _store_6_bit_scales(coarse, b, levels, to, at, scales, minima) and first_overflow < 0:
                first_overflow = (first + b) // per_row
            for j in range(8):
                lane, pair_found = 8 * (b % 2) + j, found[b // 2 * FOUND :]
                quantize_with_min(
                    flat, start + 32 * j, 32, levels, True, scales[j], minima[j], pair_found, lane, q, 32 * j
                )
            if levels == 15:
                pack_4(q, to, at + 16)
            else:
                pack_5(q, to, at + 16)
    return first_overflow


@helper
def _coarse(per_block: int) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
    """Scratch of the second search: scales (or minima), weights, quantized scales, quantized minima, d, dmin."""
    n = per_block * LANES
    return (
        np.empty(n, np.float32),
        np.empty(n, np.float32),
        np.empty(n, np.float32),
        np.empty(n, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )


@helper
def _search_scales_and_minima(
    found: Floats,
    sums: Floats,
    count: int,
    per_block: int,
    levels: int,
    coarse: tuple[Floats, Floats, Floats, Floats, Floats, Floats],
) -> None:
    """Quantize scales and minima of up to 16 super-blocks."""
    values, weights, scales, minima, d, dmin = coarse
    _by_super_block(sums, LANES, count, per_block, weights)
    _by_super_block(found, FOUND, count, per_block, values)
    search_positive_scale(values, weights, scales, per_block, levels, d)
    _by_super_block(found[LANES:], FOUND, count, per_block, values)
    search_positive_scale(values, weights, minima, per_block, levels, dmin)


@helper
def _store_6_bit_scales(
    coarse: tuple[Floats, Floats, Floats, Floats, Floats, Floats],
    b: int,
    levels: int,
    out: Bytes,
    at: int,
    scales: Floats,
    minima: Floats,
) -> bool:
    """d, dmin and the 12 packed bytes of super-block b; fills scales and minima with what the bytes mean."""
    _, _, scale_q, minimum_q, d_found, dmin_found = coarse
    d, dmin = put_half(out, at, d_found[b]), put_half(out, at + 2, dmin_found[b])
    for j in range(8):
        ls, lm = np.uint8(scale_q[LANES * j + b]), np.uint8(minimum_q[LANES * j + b])
        if levels == 31:
            ls, lm = min(np.uint8(63), ls), min(np.uint8(63), lm)
        put_6_bit_pair(out, at + 4, j, ls, lm)
    low, high, six = np.uint8(15), np.uint8(4), np.uint8(63)
    for j in range(8):
        if j < 4:
            ls, lm = out[at + 4 + j] & six, out[at + 8 + j] & six
        else:
            ls = (out[at + 8 + j] & low) | ((out[at + j] >> np.uint8(6)) << high)
            lm = (out[at + 8 + j] >> high) | ((out[at + 4 + j] >> np.uint8(6)) << high)
        scales[j] = np.float32(half_value(d) * np.float32(ls))
        minima[j] = np.float32(half_value(dmin) * np.float32(lm))
    return half_is_infinite(d) or half_is_infinite(dmin)


# Q2_K: 16 sub-blocks of 16 weights, 4-bit scales and minima


@kernel
def encode_q2_k(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q2_K, 84 bytes a super-block."""
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    per_row, total = rows.shape[1] // QK_K, rows.size // QK_K
    sigma2, spread = np.empty(total, np.float32), np.empty(LANES, np.float32)
    sums_of_squares(flat, QK_K, np.float32(256.0), sigma2)
    xt, wt, qt = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
    found, sums = np.empty(LANES * FOUND, np.float32), np.empty(LANES * LANES, np.float32)
    q, coarse = np.empty(QK_K, np.float32), _coarse(16)
    first_overflow = -1
    for first in range(0, total, LANES):
        count = min(LANES, total - first)
        for b in range(0, count, 2):
            for group in range(2):
                block, part = first + b + group, group * 16 * LANES
                lanes = 16 if b + group < count else 0
                transpose(flat, block * QK_K, lanes, 16, xt[part:])
                transpose_importance(importance, 16 * block, lanes, 16, sigma2, 16, wt[part:], spread)
                weigh(xt[part:], 16, wt[part:], spread, sums, (b + group) * LANES)
            search_scale_and_min(xt, wt, qt, 16, 3, _Q2_TRIALS, False, True, found[b * FOUND :])
        _search_scales_and_minima(found, sums, count, 16, 15, coarse)
        for b in range(count):
            if _store_q2_k(flat, (first + b) * QK_K, found[b * FOUND :], coarse, b, q, to, (first + b) * 84):
                first_overflow = (first + b) // per_row if first_overflow < 0 else first_overflow
    return first_overflow


@helper
def _store_q2_k(
    flat: Floats,
    start: int,
    found: Floats,
    coarse: tuple[Floats, Floats, Floats, Floats, Floats, Floats],
    b: int,
    q: Floats,
    to: Bytes,
    at: int,
) -> bool:
    """Super-block b; True if d or dmin overflows."""
    _, _, scales, minima, d_found, dmin_found = coarse
    d, dmin = put_half(to, at + 80, d_found[b]), put_half(to, at + 82, dmin_found[b])
    for j in range(16):
        byte = np.uint8(scales[LANES * j + b]) | (np.uint8(minima[LANES * j + b]) << np.uint8(4))
        to[at + j] = byte
        scale = np.float32(half_value(d) * np.float32(byte & np.uint8(15)))
        minimum = np.float32(half_value(dmin) * np.float32(byte >> np.uint8(4)))
        quantize_with_min(flat, start + 16 * j, 16, 3, True, scale, minimum, found, j, q, 16 * j)
    pack_2(q, to, at + 16)
    return half_is_infinite(d) or half_is_infinite(dmin)


# Q3_K: 16 sub-blocks of 16 weights, signed 6-bit scales


@kernel
def encode_q3_k(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q3_K, 110 bytes a super-block."""
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    per_row, total = rows.shape[1] // QK_K, rows.size // QK_K
    sigma2, spread = np.empty(total, np.float32), np.empty(LANES, np.float32)
    sums_of_squares(flat, QK_K, np.float32(128.0), sigma2)
    xt, wt = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    found, sums = np.empty(LANES * FOUND, np.float32), np.empty(LANES * LANES, np.float32)
    scales, weights, coarse = (
        np.empty(16 * LANES, np.float32),
        np.empty(16 * LANES, np.float32),
        np.empty(FOUND, np.float32),
    )
    q = np.empty(QK_K, np.float32)
    first_overflow = -1
    for first in range(0, total, LANES):
        count = min(LANES, total - first)
        for b in range(count):
            block = first + b
            transpose(flat, block * QK_K, 16, 16, xt)
            transpose_importance(importance, 16 * block, 16, 16, sigma2, 16, wt, spread)
            weigh(xt, 16, wt, spread, sums, b * LANES)
            search_scale(xt, wt, 16, 4, True, found[b * FOUND :])
        _by_super_block(sums, LANES, count, 16, weights)
        _by_super_block(found, FOUND, count, 16, scales)
        search_scale(scales, weights, 16, 32, False, coarse)
        _quantize_signed_scales(scales, coarse)
        for b in range(count):
            start, at = (first + b) * QK_K, (first + b) * 110
            if _store_q3_k(flat, start, found[b * FOUND :], scales, coarse, b, q, to, at) and first_overflow < 0:
                first_overflow = (first + b) // per_row
    return first_overflow


@helper
def _quantize_signed_scales(scales: Floats, coarse: Floats) -> None:
    """The scales become what is stored of them, 0 to 63; 0 in a super-block whose scales are all zero."""
    least, most = fill_int(np.int32(-32)), fill_int(np.int32(31))
    inverse, nothing = load(coarse, 2 * LANES), fill(np.float32(0.0))
    dead = load(coarse, 3 * LANES) > nothing
    for j in range(16):
        stored = clamped_lanes(inverse * load(scales, j * LANES), least, most) + fill(np.float32(32.0))
        store(scales, j * LANES, select(dead, nothing, stored))


@helper
def _store_q3_k(
    flat: Floats, start: int, found: Floats, scales: Floats, coarse: Floats, b: int, q: Floats, to: Bytes, at: int
) -> bool:
    """Super-block b; True if d overflows."""
    for i in range(12):
        to[at + 96 + i] = np.uint8(0)
    d = put_half(to, at + 108, coarse[b])
    for j in range(16):
        stored = scales[LANES * j + b]
        put_6_bits(to, at + 96, j, np.uint8(stored))
        scale = np.float32(half_value(d) * np.float32(stored - np.float32(32.0)))
        if scale != np.float32(0.0):
            quantize_signed_3(flat, start + 16 * j, scale, q, 16 * j)
        else:
            _as_found(flat, start + 16 * j, found, j, q, 16 * j)
    pack_3(q, to, at)
    return half_is_infinite(d)


@helper
def _as_found(flat: Floats, start: int, found: Floats, lane: int, q: Floats, at: int) -> None:
    """The values of the search, + 4; a sub-block without weights is all 0."""
    least, most = fill_int(np.int32(-4)), fill_int(np.int32(3))
    value = clamped_lanes(fill(found[2 * LANES + lane]) * load(flat, start), least, most) + fill(np.float32(4.0))
    if found[3 * LANES + lane] != np.float32(0.0):
        value = fill(np.float32(0.0))
    store(q, at, value)


# Q6_K: 16 sub-blocks of 16 weights, 8-bit scales


@kernel
def encode_q6_k(rows: Floats, importance: Floats, out: Bytes) -> int:
    """Q6_K, 210 bytes a super-block; errors are weighed by the importance alone."""
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    per_row = rows.shape[1] // QK_K
    xt, wt, found = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(FOUND, np.float32)
    q = np.empty(QK_K, np.float32)
    first_overflow = -1
    for b in range(rows.size // QK_K):
        transpose(flat, b * QK_K, 16, 16, xt)
        transpose(importance, b % per_row * QK_K, 16, 16, wt)
        search_scale(xt, wt, 16, 32, True, found)
        if store_q6_k(flat, b * QK_K, found, q, to, b * 210) and first_overflow < 0:
            first_overflow = b // per_row
    return first_overflow
