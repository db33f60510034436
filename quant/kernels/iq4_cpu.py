"""CPU kernels of GGML's IQ4_NL and IQ4_XS: 4-bit indices into a fixed table of 16 levels that are not evenly spaced.

quantize_row_iq4_nl_impl of ggml/src/ggml-quants.c: 16 scales a block of 32 weights, the error weighed by x * x or, with
an importance, by importance * sqrt(sigma2 + x * x), sigma2 from the block (IQ4_NL) or super-block (IQ4_XS). IQ4_XS
quantizes the scales of 8 blocks to 6 bits. 16 blocks go together, one a SIMD lane.

The level nearest to a quotient is found by comparing with the 15 points halfway between levels; at such a point, the
upper one.

Each kernel takes float32[r, n] (and float32[n], finite and not negative) and fills uint8[r, n / 32 * 18] or uint8[r,
n / 256 * 136]; it returns the first row in which a scale overflows float16, or -1.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import half_is_infinite, helper, kernel, put_half
from streamquant.quant.kernels.search_cpu import (
    GROUP_MAX_EPS,
    extreme_lanes,
    nearest,
    sums_of_squares,
    transpose,
    transpose_importance,
    weigh,
)
from streamquant.quant.kernels.vectors import LANES, fill, fill_int, load, negative, select, store, store_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Lanes = Any

QK = 32  # weights in a block, ggml's QK4_NL
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""ggml's kvalues_iq4nl."""
_HALFWAY = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
_STEPS = LEVELS[1:] - LEVELS[:-1]
_TRIES = 7
_NO_IMPORTANCE = np.empty(0, np.float32)


@helper
def _level(x: Lanes) -> Lanes:
    """The level nearest to x; the highest for NaN."""
    nothing, level = fill(np.float32(0.0)), fill(LEVELS[0])
    for j in range(15):
        level = level + select(x < fill(_HALFWAY[j]), nothing, fill(_STEPS[j]))
    return level


@helper
def _index(x: Lanes) -> Lanes:
    """The index of the level nearest to x, int32."""
    index, one, nothing = fill_int(np.int32(0)), fill_int(np.int32(1)), fill_int(np.int32(0))
    for j in range(15):
        index = index + select(x < fill(_HALFWAY[j]), nothing, one)
    return index


@helper
def _search(xt: Floats, wt: Floats, scales: Floats, at: int) -> None:
    """The scale of every lane's block to scales[at : at + 16]: x ~ scale * level with the least weighted error."""
    nothing = fill(np.float32(0.0))
    extreme, largest = extreme_lanes(xt, QK)
    inverse = fill(np.float32(1.0)) / (negative(extreme) / fill(LEVELS[0]))
    sum_lx, sum_l2 = _products(xt, wt, inverse)
    scale = select(sum_l2 > nothing, sum_lx / sum_l2, nothing)
    best = scale * sum_lx
    for step in range(-_TRIES, _TRIES + 1):
        inverse = fill(np.float32(np.float32(step) + LEVELS[0])) / extreme
        sum_lx, sum_l2 = _products(xt, wt, inverse)
        better = (sum_l2 > nothing) & (sum_lx * sum_lx > best * sum_l2)
        scale = select(better, sum_lx / sum_l2, scale)
        best = select(better, scale * sum_lx, best)
    store(scales, at, select(largest < fill(GROUP_MAX_EPS), nothing, scale))


@helper
def _products(xt: Floats, wt: Floats, inverse: Lanes) -> tuple[Lanes, Lanes]:
    """sum w level x and sum w level level."""
    sum_lx, sum_l2 = fill(np.float32(0.0)), fill(np.float32(0.0))
    for i in range(QK):
        x, w = load(xt, i * LANES), load(wt, i * LANES)
        level = _level(inverse * x)
        wl = w * level
        sum_lx, sum_l2 = sum_lx + wl * x, sum_l2 + wl * level
    return sum_lx, sum_l2


@helper
def _square(xt: Floats, wt: Floats) -> None:
    for i in range(QK):
        x = load(xt, i * LANES)
        store(wt, i * LANES, x * x)


@helper
def _block_scales(flat: Floats, importance: Floats, per_sigma: int) -> Floats:
    """The scales of all blocks; runs of `per_sigma` blocks share the mean of squares that weighs errors."""
    total = flat.size // QK
    scales = np.empty(total + LANES, np.float32)
    xt, wt = np.empty(QK * LANES, np.float32), np.empty(QK * LANES, np.float32)
    spread, sums = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sigma2 = np.empty(total // per_sigma, np.float32)
    if importance.size:
        sums_of_squares(flat, QK * per_sigma, np.float32(16 * per_sigma), sigma2)
    for first in range(0, total, LANES):
        count = min(LANES, total - first)
        transpose(flat, first * QK, count, QK, xt)
        if importance.size:
            transpose_importance(importance, first, count, QK, sigma2, per_sigma, wt, spread)
            weigh(xt, QK, wt, spread, sums, 0)
        else:
            _square(xt, wt)
        _search(xt, wt, scales, first)
    return scales


@helper
def _store_indices(flat: Floats, start: int, inverse: np.float32, to: Bytes, at: int) -> None:
    """16 bytes: the indices of weights 0 to 15 in the low halves, of 16 to 31 in the high halves."""
    low, high = _index(fill(inverse) * load(flat, start)), _index(fill(inverse) * load(flat, start + LANES))
    store_bytes(to, at, low | (high << fill_int(np.int32(4))))


@kernel
def encode_iq4_nl(rows: Floats, out: Bytes) -> int:
    """IQ4_NL without importance: f16 d, 16 bytes of two 4-bit indices; 18 bytes."""
    return _encode_nl(rows, _NO_IMPORTANCE, out)


@kernel
def encode_iq4_nl_weighted(rows: Floats, importance: Floats, out: Bytes) -> int:
    """IQ4_NL with the importance of columns."""
    return _encode_nl(rows, importance, out)


@helper
def _encode_nl(rows: Floats, importance: Floats, out: Bytes) -> int:
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // QK
    scales = _block_scales(flat, importance, 1)
    first_overflow = -1
    for block in range(rows.size // QK):
        d = scales[block]
        if half_is_infinite(put_half(to, block * 18, d)) and first_overflow < 0:
            first_overflow = block // per_row
        _store_indices(flat, block * QK, _inverse(d), to, block * 18 + 2)
    return first_overflow


@helper
def _inverse(x: np.float32) -> np.float32:
    return np.float32(np.float32(1.0) / x) if x != np.float32(0.0) else np.float32(0.0)


@kernel
def encode_iq4_xs(rows: Floats, out: Bytes) -> int:
    """IQ4_XS without importance: f16 d, 2 + 4 bytes of 6-bit scales, 128 bytes of two 4-bit indices; 136 bytes."""
    return _encode_xs(rows, _NO_IMPORTANCE, out)


@kernel
def encode_iq4_xs_weighted(rows: Floats, importance: Floats, out: Bytes) -> int:
    """IQ4_XS with the importance of columns."""
    return _encode_xs(rows, importance, out)


@helper
def _encode_xs(rows: Floats, importance: Floats, out: Bytes) -> int:
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // (8 * QK)
    scales = _block_scales(flat, importance, 8)
    first_overflow = -1
    for super_block in range(rows.size // (8 * QK)):
        if _store_xs(flat, super_block, scales, to, super_block * 136) and first_overflow < 0:
            first_overflow = super_block // per_row
    return first_overflow


@helper
def _store_xs(flat: Floats, super_block: int, scales: Floats, to: Bytes, at: int) -> bool:
    """One super-block; True if d overflows. The indices are made with d as it was before it became float16."""
    extreme, largest = np.float32(0.0), np.float32(0.0)
    for j in range(8):
        scale = scales[8 * super_block + j]
        if abs(scale) > largest:
            largest, extreme = np.float32(abs(scale)), scale
    d = np.float32(np.float32(-extreme) / np.float32(32.0))
    stored_d, inverse = put_half(to, at, d), _inverse(d)
    high_bits = np.int32(0)
    for j in range(8):
        signed = nearest(np.float32(inverse * scales[8 * super_block + j]))
        signed = max(np.int32(-32), min(np.int32(31), signed))
        _store_indices(
            flat,
            (8 * super_block + j) * QK,
            _inverse(np.float32(d * np.float32(signed))),
            to,
            at + 8 + 16 * j,
        )
        stored = np.int32(signed + np.int32(32))
        low = np.uint8(stored & np.int32(15))
        to[at + 4 + j // 2] = low if j % 2 == 0 else to[at + 4 + j // 2] | (low << np.uint8(4))
        high_bits |= (stored >> np.int32(4)) << np.int32(2 * j)
    to[at + 2], to[at + 3] = np.uint8(high_bits & np.int32(255)), np.uint8(high_bits >> np.int32(8))
    return half_is_infinite(stored_d)
