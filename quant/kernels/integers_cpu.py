"""CPU kernels of compressed-tensors' INT4 and INT8: a scale, and a zero point where asked, for each group of a row.

    low = min(w, 0), high = max(w, 0) of the group; r() rounds to the dtype T of the source weight
    symmetric   scale = r(max(-low, high) / ((2^b - 1) / 2)); 0 -> eps(T)
                q = rint(clip(r(w / scale), -2^(b-1), 2^(b-1) - 1))
    asymmetric  scale = r(r(high - low) / (2^b - 1)); zero = rint(clip(r(-2^(b-1) - r(low / scale)), ...)), 0 for 0 / 0
                q = rint(clip(r(r(w / scale) + zero), ...)), with scale 0 -> eps(T)

(calculate_qparams of compressed_tensors/quantization/utils/helpers.py, quantize of lifecycle/forward.py)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import SIGN, bits_float, float_bits, helper, kernel
from streamquant.quant.kernels.rounding_cpu import or_eps, rounded
from streamquant.quant.kernels.vectors import LANES, bits, fill_int, largest, load, select

Lanes = Any


@helper
def _above_zero(row: NDArray[np.float32], start: int, stop: int, flip: np.uint32) -> np.float32:
    """The largest of row[start:stop] above zero, or 0; with the sign bit as `flip` the magnitude of the smallest below.

    The bits of floats above zero order like the floats, and as integers those of all others are below zero.
    """
    most, at = np.int32(0), start
    if stop - start >= LANES:
        found, sign = fill_int(np.int32(0)), fill_int(np.int32(flip))
        while at + LANES <= stop:
            some = bits(load(row, at)) ^ sign
            found = select(some > found, some, found)
            at += LANES
        most = largest(found)
    while at < stop:
        most = max(most, np.int32(float_bits(row[at]) ^ flip))
        at += 1
    return np.float32(bits_float(np.uint32(most)))


@helper
def _zero_point(low: np.float32, scale: np.float32, half: np.float32, dtype: int) -> np.float32:
    if low == np.float32(0.0):  # 0 / 0 is no number, for which the reference takes 0
        return np.float32(-half) if scale != np.float32(0.0) else np.float32(0.0)
    zero = rounded(np.float32(-half - rounded(np.float32(low / scale), dtype)), dtype)
    return np.float32(np.rint(min(max(zero, -half), np.float32(half - np.float32(1.0)))))


@kernel
def encode(
    rows: NDArray[np.float32],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8],
    width: int,
    dtype: int,
) -> int:
    """float32[r, n] -> codes uint8[r, n] and scales float32[r, g] of g groups, with 2^(width - 1) added to the codes.

    `zeros` is uint8[r, g], with the same added, or uint8[r, 0] for symmetric codes; `dtype` is rounding_cpu's. Returns
    the first row in which a code times its scale is infinite, or -1.
    """
    r, n = rows.shape
    groups = scales.shape[1]
    group = n // groups
    half, levels = np.float32(1 << (width - 1)), np.float32((1 << width) - 1)
    top = np.float32(half - np.float32(1.0))
    is_symmetric = zeros.shape[1] == 0
    column_scale = np.empty(n, np.float32)
    column_zero = np.zeros(n, np.float32)
    overflow = -1
    for i in range(r):
        row, largest_scale = rows[i], np.float32(0.0)
        for g in range(groups):
            start, stop = g * group, (g + 1) * group
            high = _above_zero(row, start, stop, np.uint32(0))
            low = _above_zero(row, start, stop, SIGN)
            if is_symmetric:
                scale = rounded(np.float32(max(high, low) / np.float32(levels / np.float32(2.0))), dtype)
            else:
                span = rounded(np.float32(high + low), dtype)
                scale = rounded(np.float32(span / levels), dtype)
                zero = _zero_point(np.float32(-low), scale, half, dtype)
                column_zero[start:stop] = zero
                zeros[i, g] = np.uint8(np.int32(zero) + np.int32(half))
            largest_scale = max(largest_scale, scale)
            scale = or_eps(scale, dtype)
            scales[i, g] = scale
            column_scale[start:stop] = scale
        to = codes[i]
        if is_symmetric:
            for j in range(n):
                q = rounded(np.float32(row[j] / column_scale[j]), dtype)
                q = np.rint(min(max(q, -half), top))
                to[j] = np.uint8(np.int32(q) + np.int32(half))
        else:
            for j in range(n):
                q = rounded(np.float32(rounded(np.float32(row[j] / column_scale[j]), dtype) + column_zero[j]), dtype)
                q = np.rint(min(max(q, -half), top))
                to[j] = np.uint8(np.int32(q) + np.int32(half))
        if overflow < 0 and not np.isfinite(np.float32(largest_scale * levels)):
            for j in range(n):
                q = np.float32(np.float32(to[j]) - half) - column_zero[j]
                if not np.isfinite(np.float32(q * column_scale[j])):
                    overflow = i
    return overflow


@kernel
def pack_pairs(codes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """4-bit codes uint8[r, n] -> uint8[r, n / 2]: the even column in the low 4 bits."""
    for i in range(codes.shape[0]):
        pairs, to = codes[i].view(np.uint16), out[i]
        for j in range(pairs.size):
            to[j] = np.uint8(pairs[j] | (pairs[j] >> np.uint16(4)))
