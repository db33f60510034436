"""CPU kernels of GGML's K-quants without an importance vector: super-blocks of 256 weights in sub-blocks of 16 or 32.

A group of 16 sub-blocks is transposed and searched in SIMD lanes (search_cpu.py); then each super-block gets its
scales, and its weights are quantized again with the scales as they are stored. All of it is quantize_row_q*_K_ref of
ggml/src/ggml-quants.c, operation for operation.

Each kernel takes float32[r, n] and fills uint8[r, n / 256 * block bytes]; it returns the first row in which a scale
overflows float16, or -1.
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import half_is_infinite, half_value, helper, kernel, put_half
from streamquant.quant.kernels.search_cpu import (
    GROUP_MAX_EPS,
    clamped_lanes,
    nearest,
    rounded_lanes,
    search_by_coordinates,
    search_scale,
    search_scale_and_min,
    transpose,
)
from streamquant.quant.kernels.vectors import LANES, absolute, fill, fill_int, load, square_root, store

QK_K = 256
FOUND = 4 * LANES
"""float32 values that a search returns for 16 sub-blocks."""
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def trials(first: float, step: float, count: int, levels: int) -> Floats:
    """first + step * i + levels for i < count, in the C code's float32 arithmetic."""
    f = np.float32
    return np.array([f(f(first) + f(f(step) * f(i))) + f(levels) for i in range(count)], np.float32)


_Q2_TRIALS = trials(-0.5, 0.1, 16, 3)
_Q4_TRIALS = trials(-1.0, 0.1, 21, 15)
_Q5_TRIALS = trials(-0.5, 0.1, 16, 31)


@helper
def _clamp(value: np.int32, least: int, most: int) -> np.int32:
    return np.int32(max(np.int32(least), min(np.int32(most), value)))


# Q4_K and Q5_K: 8 sub-blocks of 32 weights, 6-bit scales and minima


@helper
def _weights_of_magnitude(xt: Floats, wt: Floats) -> None:
    """w = root mean square of the sub-block + |x|."""
    total = fill(np.float32(0.0))
    for i in range(32):
        x = load(xt, i * LANES)
        total = total + x * x
    root = square_root(total / fill(np.float32(32.0)))
    for i in range(32):
        store(wt, i * LANES, root + absolute(load(xt, i * LANES)))


@helper
def put_6_bit_pair(out: Bytes, at: int, j: int, scale: np.uint8, minimum: np.uint8) -> None:
    """Scale and minimum j of Q4_K and Q5_K into their 12 bytes, for j = 0, 1, ... in turn."""
    if j < 4:
        out[at + j] = scale
        out[at + 4 + j] = minimum
    else:
        out[at + 4 + j] = (scale & np.uint8(15)) | ((minimum & np.uint8(15)) << np.uint8(4))
        out[at - 4 + j] |= (scale >> np.uint8(4)) << np.uint8(6)
        out[at + j] |= (minimum >> np.uint8(4)) << np.uint8(6)


@helper
def _store_6_bit_scales(found: Floats, lane: int, out: Bytes, at: int, scales: Floats, minima: Floats) -> bool:
    """Quantize 8 scales and minima of lanes from `lane` to 6 bits, store d, dmin and the 12 packed bytes.

    Fills scales and minima with what the stored bytes mean; True if d or dmin overflows.
    """
    max_scale, max_min = np.float32(0.0), np.float32(0.0)
    for j in range(8):
        max_scale = max(max_scale, found[lane + j])
        max_min = max(max_min, found[LANES + lane + j])
    inverse_scale = np.float32(63.0) / max_scale if max_scale > np.float32(0.0) else np.float32(0.0)
    inverse_min = np.float32(63.0) / max_min if max_min > np.float32(0.0) else np.float32(0.0)
    d = put_half(out, at, np.float32(max_scale / np.float32(63.0)))
    dmin = put_half(out, at + 2, np.float32(max_min / np.float32(63.0)))
    for j in range(8):
        ls = min(np.uint8(63), np.uint8(nearest(np.float32(inverse_scale * found[lane + j]))))
        lm = min(np.uint8(63), np.uint8(nearest(np.float32(inverse_min * found[LANES + lane + j]))))
        put_6_bit_pair(out, at + 4, j, ls, lm)
        scales[j] = np.float32(half_value(d) * np.float32(ls))
        minima[j] = np.float32(half_value(dmin) * np.float32(lm))
    return half_is_infinite(d) or half_is_infinite(dmin)


@helper
def quantize_with_min(
    flat: Floats,
    start: int,
    width: int,
    levels: int,
    limit_first: bool,
    scale: np.float32,
    minimum: np.float32,
    found: Floats,
    lane: int,
    q: Floats,
    at: int,
) -> None:
    """q = (x + minimum) / scale, limited to [0, levels]; where the scale is zero, what the search had."""
    zero, top = fill_int(np.int32(0)), fill_int(np.int32(levels))
    for i in range(0, width, LANES):
        x = load(flat, start + i)
        if scale != np.float32(0.0):
            value = clamped_lanes((x + fill(minimum)) / fill(scale), zero, top)
        else:
            quotient = fill(found[2 * LANES + lane]) * (x - fill(found[3 * LANES + lane]))
            value = rounded_lanes(quotient, levels) if limit_first else clamped_lanes(quotient, zero, top)
        store(q, at + i, value)


@kernel
def encode_q4_k(rows: Floats, out: Bytes) -> int:
    """Q4_K: f16 d, f16 dmin, 12 bytes of 6-bit scales and minima, 128 bytes of two 4-bit values; 144 bytes."""
    return _encode_4_or_5(rows, out, 15, _Q4_TRIALS)


@kernel
def encode_q5_k(rows: Floats, out: Bytes) -> int:
    """Q5_K: as Q4_K with 32 bytes of fifth bits before the 4-bit values; 176 bytes."""
    return _encode_4_or_5(rows, out, 31, _Q5_TRIALS)


@helper
def _encode_4_or_5(rows: Floats, out: Bytes, levels: int, factors: Floats) -> int:
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    per_row, total = rows.shape[1] // QK_K, rows.size // QK_K
    size = to.size // max(total, 1)
    xt, wt, qt = np.empty(64 * LANES, np.float32), np.empty(64 * LANES, np.float32), np.empty(64 * LANES, np.float32)
    found, q = np.empty(2 * FOUND, np.float32), np.empty(QK_K, np.float32)
    scales, minima = np.empty(8, np.float32), np.empty(8, np.float32)
    first_overflow = -1
    for first in range(0, total, 4):  # two super-blocks fill the lanes, and two groups of lanes go together
        count = min(4, total - first)
        for group in range(2):
            at = group * 32 * LANES
            lanes = 8 * max(0, min(2, count - 2 * group))
            transpose(flat, (first + 2 * group) * QK_K, lanes, 32, xt[at:])
            _weights_of_magnitude(xt[at:], wt[at:])
        search_scale_and_min(xt, wt, qt, 32, levels, factors, False, False, found)
        for b in range(count):
            start, at, part, lane = (first + b) * QK_K, (first + b) * size, found[b // 2 * FOUND :], b % 2 * 8
            if _store_6_bit_scales(part, lane, to, at, scales, minima) and first_overflow < 0:
                first_overflow = (first + b) // per_row
            for j in range(8):
                at_x = start + 32 * j
                quantize_with_min(flat, at_x, 32, levels, False, scales[j], minima[j], part, lane + j, q, 32 * j)
            if levels == 15:
                pack_4(q, to, at + 16)
            else:
                pack_5(q, to, at + 16)
    return first_overflow


@helper
def pack_4(q: Floats, to: Bytes, at: int) -> None:
    """Two values in a byte: those of one sub-block of 32 low, of the next high."""
    for j in range(4):
        for i in range(32):
            to[at + 32 * j + i] = np.uint8(np.int32(q[64 * j + i]) | (np.int32(q[64 * j + 32 + i]) << np.int32(4)))


@helper
def pack_5(q: Floats, to: Bytes, at: int) -> None:
    """32 bytes of fifth bits, then as pack_4."""
    for i in range(32):
        high = np.int32(0)
        for j in range(8):
            high |= (np.int32(q[32 * j + i]) >> np.int32(4)) << np.int32(j)
        to[at + i] = np.uint8(high)
    for j in range(4):
        for i in range(32):
            low, upper = np.int32(q[64 * j + i]) & np.int32(15), np.int32(q[64 * j + 32 + i]) & np.int32(15)
            to[at + 32 + 32 * j + i] = np.uint8(low | (upper << np.int32(4)))


# Q2_K: 16 sub-blocks of 16 weights, 4-bit scales and minima


@kernel
def encode_q2_k(rows: Floats, out: Bytes) -> int:
    """Q2_K: 16 bytes of 4-bit scales and minima, 64 bytes of four 2-bit values, f16 d, f16 dmin; 84 bytes."""
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    per_row, total = rows.shape[1] // QK_K, rows.size // QK_K
    xt, wt, qt = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
    found, q = np.empty(2 * FOUND, np.float32), np.empty(QK_K, np.float32)
    first_overflow = -1
    for first in range(0, total, 2):
        count = min(2, total - first)
        for group in range(2):
            transpose(flat, (first + group) * QK_K, 16 if group < count else 0, 16, xt[group * 16 * LANES :])
        for i in range(32):
            store(wt, i * LANES, absolute(load(xt, i * LANES)))
        search_scale_and_min(xt, wt, qt, 16, 3, _Q2_TRIALS, True, False, found)
        for b in range(count):
            if _store_q2_k(flat, (first + b) * QK_K, found[b * FOUND :], q, to, (first + b) * 84):
                first_overflow = (first + b) // per_row if first_overflow < 0 else first_overflow
    return first_overflow


@helper
def _store_q2_k(flat: Floats, start: int, found: Floats, q: Floats, to: Bytes, at: int) -> bool:
    """A super-block from the scales and minima that were found; True if d or dmin overflows."""
    d, dmin = _store_4_bit_scales(found, to, at)
    for j in range(16):
        scale = np.float32(half_value(d) * np.float32(to[at + j] & np.uint8(15)))
        minimum = np.float32(half_value(dmin) * np.float32(to[at + j] >> np.uint8(4)))
        quantize_with_min(flat, start + 16 * j, 16, 3, False, scale, minimum, found, j, q, 16 * j)
    pack_2(q, to, at + 16)
    return half_is_infinite(d) or half_is_infinite(dmin)


@helper
def _store_4_bit_scales(found: Floats, to: Bytes, at: int) -> tuple[np.uint16, np.uint16]:
    max_scale, max_min = np.float32(0.0), np.float32(0.0)
    for j in range(16):
        max_scale = max(max_scale, found[j])
        max_min = max(max_min, found[LANES + j])
        to[at + j] = np.uint8(0)
    if max_scale > np.float32(0.0):
        inverse = np.float32(np.float32(15.0) / max_scale)
        for j in range(16):
            to[at + j] = np.uint8(nearest(np.float32(inverse * found[j])))
    if max_min > np.float32(0.0):
        inverse = np.float32(np.float32(15.0) / max_min)
        for j in range(16):
            to[at + j] |= np.uint8(nearest(np.float32(inverse * found[LANES + j])) << np.int32(4))
    d = put_half(to, at + 80, np.float32(max_scale / np.float32(15.0)))
    dmin = put_half(to, at + 82, np.float32(max_min / np.float32(15.0)))
    return d, dmin


@helper
def pack_2(q: Floats, to: Bytes, at: int) -> None:
    """The low two bits of four values in a byte."""
    for half in range(2):
        for i in range(32):
            byte = np.int32(0)
            for k in range(4):
                byte |= (np.int32(q[128 * half + 32 * k + i]) & np.int32(3)) << np.int32(2 * k)
            to[at + 32 * half + i] = np.uint8(byte)


# Q3_K: 16 sub-blocks of 16 weights, signed 6-bit scales


@kernel
def encode_q3_k(rows: Floats, out: Bytes) -> int:
    """Q3_K: 32 bytes of high bits, 64 bytes of four 2-bit values, 12 bytes of 6-bit scales, f16 d; 110 bytes."""
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    per_row, total = rows.shape[1] // QK_K, rows.size // QK_K
    xt, lt, found = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(2 * FOUND, np.float32)
    scales, q = np.empty(16, np.float32), np.empty(QK_K, np.float32)
    first_overflow = -1
    for first in range(0, total, 2):
        count = min(2, total - first)
        transpose(flat, first * QK_K, 16, 16, xt)
        transpose(flat, (first + 1) * QK_K, 16 * (count - 1), 16, xt[16 * LANES :])
        search_by_coordinates(xt, lt, 16, 4, found)
        for b in range(count):
            start, at = (first + b) * QK_K, (first + b) * 110
            if _store_signed_6_bit_scales(found[b * FOUND :], to, at + 96, scales) and first_overflow < 0:
                first_overflow = (first + b) // per_row
            for j in range(16):
                if scales[j] != np.float32(0.0):
                    quantize_signed_3(flat, start + 16 * j, scales[j], q, 16 * j)
                else:
                    dead = found[b * FOUND + 3 * LANES + j] != np.float32(0.0)
                    for i in range(16):
                        searched = np.float32(lt[(16 * b + i) * LANES + j] + np.float32(4.0))
                        q[16 * j + i] = np.float32(0.0) if dead else searched
            pack_3(q, to, at)
    return first_overflow


@helper
def quantize_signed_3(flat: Floats, start: int, scale: np.float32, q: Floats, at: int) -> None:
    """q = x / scale in [-4, 3], stored + 4, of 16 weights."""
    value = clamped_lanes(load(flat, start) / fill(scale), fill_int(np.int32(-4)), fill_int(np.int32(3)))
    store(q, at, value + fill(np.float32(4.0)))


@helper
def pack_3(q: Floats, to: Bytes, at: int) -> None:
    """32 bytes of high bits, then the low two bits as pack_2."""
    for i in range(32):
        high = np.int32(0)
        for j in range(8):
            high |= (np.int32(q[32 * j + i]) >> np.int32(2)) << np.int32(j)
        to[at + i] = np.uint8(high)
    pack_2(q, to, at + 32)


@helper
def put_6_bits(to: Bytes, at: int, j: int, value: np.uint8) -> None:
    """Scale j of Q3_K, 6 bits, into its 12 bytes, which were zero."""
    to[at + j % 8] |= (value & np.uint8(15)) << np.uint8(4 * (j // 8))
    to[at + 8 + j % 4] |= (value >> np.uint8(4)) << np.uint8(2 * (j // 4))


@helper
def _store_signed_6_bit_scales(found: Floats, to: Bytes, at: int, scales: Floats) -> bool:
    """12 bytes of scales and d; fills `scales` with what they mean; True if d overflows."""
    extreme, largest = np.float32(0.0), np.float32(0.0)
    for j in range(16):
        if abs(found[j]) > largest:
            largest, extreme = np.float32(abs(found[j])), found[j]
    for i in range(12):
        to[at + i] = np.uint8(0)
    if extreme == np.float32(0.0):
        put_half(to, at + 12, np.float32(0.0))
        scales[:] = np.float32(0.0)
        return False
    inverse = np.float32(np.float32(-32.0) / extreme)
    d = put_half(to, at + 12, np.float32(np.float32(1.0) / inverse))
    for j in range(16):
        signed = _clamp(np.int32(np.int8(nearest(np.float32(inverse * found[j])))), -32, 31)
        put_6_bits(to, at, j, np.uint8(signed + 32))
        scales[j] = np.float32(half_value(d) * np.float32(signed))
    return half_is_infinite(d)


# Q6_K: 16 sub-blocks of 16 weights, 8-bit scales


@kernel
def encode_q6_k(rows: Floats, out: Bytes) -> int:
    """Q6_K: 128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 int8 scales, f16 d; 210 bytes."""
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    per_row = rows.shape[1] // QK_K
    xt, wt, found = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(64, np.float32)
    q = np.empty(QK_K, np.float32)
    first_overflow = -1
    for b in range(rows.size // QK_K):
        start, at = b * QK_K, b * 210
        transpose(flat, start, 16, 16, xt)
        for i in range(16):
            x = load(xt, i * LANES)
            store(wt, i * LANES, x * x)
        search_scale(xt, wt, 16, 32, True, found)
        if store_q6_k(flat, start, found, q, to, at) and first_overflow < 0:
            first_overflow = b // per_row
    return first_overflow


@helper
def store_q6_k(flat: Floats, start: int, found: Floats, q: Floats, to: Bytes, at: int) -> bool:
    """A super-block from the scales that were found; True if d overflows. q is scratch for 256 values."""
    extreme, largest = np.float32(0.0), np.float32(0.0)
    for j in range(16):
        if abs(found[j]) > largest:
            largest, extreme = np.float32(abs(found[j])), found[j]
    if largest < GROUP_MAX_EPS:
        to[at : at + 210] = np.uint8(0)
        return False
    inverse = np.float32(np.float32(-128.0) / extreme)
    d = put_half(to, at + 208, np.float32(np.float32(1.0) / inverse))
    for j in range(16):
        stored = np.int8(min(np.int32(127), nearest(np.float32(inverse * found[j]))))
        to[at + 192 + j] = np.uint8(stored)
        scale = np.float32(half_value(d) * np.float32(stored))
        quantize_signed_6(flat, start + 16 * j, scale, found, j, q, 16 * j)
    pack_6(q, to, at)
    return half_is_infinite(d)


@helper
def quantize_signed_6(
    flat: Floats, start: int, scale: np.float32, found: Floats, lane: int, q: Floats, at: int
) -> None:
    """q = x / scale in [-32, 31], stored + 32; where the scale is zero, what the search had."""
    x = load(flat, start)
    value = x / fill(scale) if scale != np.float32(0.0) else fill(found[2 * LANES + lane]) * x
    offset = np.float32(32.0)
    if scale == np.float32(0.0) and found[3 * LANES + lane] != np.float32(0.0):
        offset = np.float32(0.0)  # a sub-block without weights: its values are 0, not 32
    store(q, at, clamped_lanes(value, fill_int(np.int32(-32)), fill_int(np.int32(31))) + fill(offset))


@helper
def pack_6(q: Floats, to: Bytes, at: int) -> None:
    """128 bytes of low 4 bits, then 64 bytes of high 2 bits."""
    for half in range(2):
        base = 128 * half
        for i in range(32):
            a, b = np.int32(q[base + i]), np.int32(q[base + 32 + i])
            c, d = np.int32(q[base + 64 + i]), np.int32(q[base + 96 + i])
            low, high = np.int32(15), np.int32(4)
            to[at + 64 * half + i] = np.uint8((a & low) | ((c & low) << high))
            to[at + 64 * half + 32 + i] = np.uint8((b & low) | ((d & low) << high))
            upper = (a >> high) | ((b >> high) << np.int32(2)) | ((c >> high) << high) | ((d >> high) << np.int32(6))
            to[at + 128 + 32 * half + i] = np.uint8(upper)
