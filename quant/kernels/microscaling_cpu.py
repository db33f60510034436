"""CPU kernels of compressed-tensors' MXFP4 and MXFP8: groups of 32 with a power of two as scale, stored as E8M0.

    E = 127 + e - offset, offset 2 (MXFP4) or 8 (MXFP8); 2^e is the largest magnitude of the group rounded to a power of
        two: up from a mantissa of 1.75 on; E = 0 where it is 0 or denormal in the dtype T of the source weight
    code = E2M1 or E4M3 of r(w / 2^(E - 127)), saturating; r() rounds to T

In float16 the smallest scale would be 0: it is 1 then, E = 127. The quotient is a product here: with powers of two
they are the same. (compressed_tensors/quantization/utils/mxfp_utils.py, lifecycle/forward.py)
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import bits_float, float_bits, half_bits, helper, kernel
from streamquant.quant.kernels.fp8_cpu import e4m3
from streamquant.quant.kernels.legacy_cpu import amax
from streamquant.quant.kernels.rounding_cpu import BF16, F16, e2m1, rounded
from streamquant.quant.kernels.vectors import LANES, load

GROUP = 32
_NAN = 255
"""E8M0 has no infinity."""


@helper
def _exponent(largest: np.float32, dtype: int, offset: int) -> np.int64:
    """E of a group; 255 where the power of two is not a number of T."""
    if dtype == F16:
        field = np.int64((np.int64(half_bits(largest)) + (1 << 8)) >> 10)
        if field == 0:
            return np.int64(127)
        return np.int64(_NAN if field == 31 else 112 + field - offset)
    if dtype == BF16:
        field = np.int64((np.int64(float_bits(largest) >> np.uint32(16)) + (1 << 5)) >> 7)
    else:
        field = np.int64((np.int64(float_bits(largest)) + (1 << 21)) >> 23)
    if field == 255:
        return np.int64(_NAN)
    return np.int64(field - offset) if field > offset else np.int64(0)


@helper
def _inverse(e: np.int64) -> np.float32:
    """2^(127 - E)."""
    return np.float32(bits_float(np.uint32((254 - e) << 23) if e < 254 else np.uint32(0x00400000)))


@helper
def _scales(
    row: NDArray[np.float32], exponents: NDArray[np.uint8], inverse: NDArray[np.float32], dtype: int, offset: int
) -> bool:
    """Fill the exponents of a row and the inverse scale of each column; whether all are numbers."""
    fits = True
    for g in range(exponents.size):
        at = g * GROUP
        e = _exponent(amax(load(row, at), load(row, at + LANES)), dtype, offset)
        fits &= e != _NAN
        exponents[g] = np.uint8(e)
        inverse[at : at + GROUP] = _inverse(e)
    return fits


@kernel
def encode_fp4(rows: NDArray[np.float32], codes: NDArray[np.uint8], exponents: NDArray[np.uint8], dtype: int) -> int:
    """float32[r, n] -> codes uint8[r, n], exponents uint8[r, n / 32]. Returns the first row without one, or -1."""
    overflow, inverse = -1, np.empty(rows.shape[1], np.float32)
    for i in range(rows.shape[0]):
        row, to = rows[i], codes[i]
        if not _scales(row, exponents[i], inverse, dtype, 2) and overflow < 0:
            overflow = i
        for j in range(row.size):
            to[j] = e2m1(rounded(np.float32(row[j] * inverse[j]), dtype))
    return overflow


@kernel
def encode_fp8(rows: NDArray[np.float32], codes: NDArray[np.uint8], exponents: NDArray[np.uint8], dtype: int) -> int:
    """float32[r, n] -> codes uint8[r, n], exponents uint8[r, n / 32]. Returns the first row without one, or -1."""
    overflow, inverse = -1, np.empty(rows.shape[1], np.float32)
    for i in range(rows.shape[0]):
        row, to = rows[i], codes[i]
        if not _scales(row, exponents[i], inverse, dtype, 8) and overflow < 0:
            overflow = i
        for j in range(row.size):
            to[j] = e4m3(float_bits(rounded(np.float32(row[j] * inverse[j]), dtype)))
    return overflow
