"""CPU kernel of GGML's MXFP4: blocks of 32 E2M1 values with a power of two as scale (OCP Microscaling Formats, MXFP4).

quantize_row_mxfp4_ref of ggml/src/ggml-quants.c. The scale is 2**(floor(log2f(amax)) - 2), and log2f rounds: the float
before a large power of two has the logarithm of the power. The logarithm in double precision, rounded to single, is the
same. Of values equally near, the first of ggml's table is taken, so zero is +0.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import bits_float, helper, kernel
from streamquant.quant.kernels.legacy_cpu import QK, amax, nibbles
from streamquant.quant.kernels.vectors import LANES, absolute, fill, fill_int, load, select, store_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Lanes = Any

DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the values of E2M1 by their code, ggml's kvalues_mxfp4."""


@helper
def _exponent(largest: np.float32) -> np.uint8:
    """E8M0 of the scale; of the smallest numbers it wraps, as C's conversion does on x86-64."""
    if largest == np.float32(0.0):
        return np.uint8(0)
    logarithm = np.float32(math.log2(np.float64(largest)))
    return np.uint8((np.int32(math.floor(logarithm)) - np.int32(2) + np.int32(127)) & np.int32(255))


@helper
def _half_scale(e: np.uint8) -> np.float32:
    """2**(e - 128): half of what E8M0 means, for the doubled values."""
    if e < np.uint8(2):
        return np.float32(bits_float(np.uint32(np.uint32(0x00200000) << np.uint32(e))))
    return np.float32(bits_float(np.uint32((np.uint32(e) - np.uint32(1)) << np.uint32(23))))


@helper
def _codes(x: Lanes, scale: np.float32) -> Lanes:
    """The code of the value nearest to x."""
    code, best = fill_int(np.int32(0)), absolute(fill(np.float32(0.0)) - x)
    for k in range(1, 16):
        error = absolute(fill(np.float32(DOUBLED[k] * scale)) - x)
        better = error < best
        code, best = select(better, fill_int(np.int32(k)), code), select(better, error, best)
    return code


@kernel
def encode_mxfp4(rows: Floats, out: Bytes) -> int:
    """float32[r, n] -> uint8[r, n / 32 * 17]: E8M0 scale, 16 bytes of two codes. Returns -1: every scale fits."""
    flat, to = rows.reshape(rows.size), out.reshape(out.size)
    for block in range(rows.size // QK):
        at = block * 17
        a, b = load(flat, block * QK), load(flat, block * QK + LANES)
        e = _exponent(amax(a, b))
        to[at] = e
        scale = _half_scale(e)
        store_bytes(to, at + 1, nibbles(_codes(a, scale), _codes(b, scale)))
    return -1


@kernel
def decode_mxfp4(codes: Bytes, scales: Bytes, out: Floats) -> None:
    """uint8[r, n / 2], the low 4 bits first, and E8M0 uint8[r, n / 32] -> float32[r, n]; every value is exact.

    Of the largest scales values overflow to infinity.
    """
    r, n = out.shape
    for i in range(r):
        for block in range(n // QK):
            scale = _half_scale(scales[i, block])
            for j in range(QK // 2):
                byte = codes[i, block * (QK // 2) + j]
                out[i, block * QK + 2 * j] = DOUBLED[byte & np.uint8(15)] * scale
                out[i, block * QK + 2 * j + 1] = DOUBLED[byte >> np.uint8(4)] * scale


@kernel
def repack_mxfp4(codes: Bytes, scales: Bytes, out: Bytes) -> None:
    """The same codes and scales -> uint8[r, n / 32 * 17] of GGML: a scale, then bytes of the values j and j + 16.

    (GptOssModel.repack_mxfp4 of llama.cpp's converter)
    """
    for i in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            at = block * 17
            out[i, at] = scales[i, block]
            for j in range(QK // 2):
                shift = np.uint8(4 * (j & 1))
                low = (codes[i, block * (QK // 2) + (j >> 1)] >> shift) & np.uint8(15)
                high = (codes[i, block * (QK // 2) + 8 + (j >> 1)] >> shift) & np.uint8(15)
                out[i, at + 1 + j] = np.uint8(low | (high << np.uint8(4)))
