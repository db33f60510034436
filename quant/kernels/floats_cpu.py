"""CPU kernels that move between float32 and the 16-bit floats of checkpoints."""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import ABS, ONE, SIGN, bits_float, float_bits, kernel


@kernel
def widen_bf16(raw: NDArray[np.uint16], out: NDArray[np.float32]) -> bool:
    """uint16[k] (bfloat16 bits) -> float32[k]; False if a value is NaN or infinite."""
    largest = np.uint16(0)
    for j in range(raw.size):
        largest = max(largest, np.uint16(raw[j] & np.uint16(0x7FFF)))
        out[j] = bits_float(np.uint32(np.uint32(raw[j]) << np.uint32(16)))
    return bool(largest < np.uint16(0x7F80))


@kernel
def all_finite(x: NDArray[np.float32]) -> bool:
    """Whether no value of float32[k] is NaN or infinite."""
    largest = np.uint32(0)
    for j in range(x.size):
        largest = max(largest, np.uint32(float_bits(x[j]) & ABS))
    return bool(largest < np.uint32(0x7F800000))


@kernel
def encode_bf16(rows: NDArray[np.float32], out: NDArray[np.uint16]) -> int:
    """float32[r, n] -> bfloat16 bits uint16[r, n], to nearest, ties to even; first row that overflows, or -1."""
    first_overflow = -1
    for i in range(rows.shape[0]):
        largest = np.uint32(0)
        for j in range(rows.shape[1]):
            u = float_bits(rows[i, j])
            rounded = np.uint32((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & ONE)) >> np.uint32(16))
            largest = max(largest, np.uint32(rounded & np.uint32(0x7FFF)))
            out[i, j] = np.uint16(rounded)
        if largest >= np.uint32(0x7F80) and first_overflow < 0:
            first_overflow = i
    return first_overflow


@kernel
def encode_f16(rows: NDArray[np.float32], out: NDArray[np.uint16]) -> int:
    """float32[r, n] -> float16 bits uint16[r, n], to nearest, ties to even; first row that overflows, or -1.

    Both the normal and the subnormal result are computed (`half_bits` of bits.py), so that the loop has no branch.
    """
    first_overflow = -1
    for i in range(rows.shape[0]):
        largest = np.uint32(0)
        for j in range(rows.shape[1]):
            u = float_bits(rows[i, j])
            a = np.uint32(u & ABS)
            largest = max(largest, a)
            normal = np.uint32(
                ((a + np.uint32(0xFFF) + ((a >> np.uint32(13)) & ONE)) >> np.uint32(13)) - np.uint32(112 << 10)
            )
            small = np.uint32(float_bits(np.float32(bits_float(a) + np.float32(0.5))) - np.uint32(0x3F000000))
            half = small if a < np.uint32(0x38800000) else min(normal, np.uint32(0x7C00))
            out[i, j] = np.uint16(half | ((u & SIGN) >> np.uint32(16)))
        if largest >= np.uint32(0x477FF000) and first_overflow < 0:
            first_overflow = i
    return first_overflow


@kernel
def largest_magnitude(x: NDArray[np.float32]) -> np.float32:
    """The largest magnitude in float32[k], finite; 0 where k is 0."""
    largest = np.uint32(0)
    for j in range(x.size):  # magnitudes order like the integers that store them
        largest = max(largest, np.uint32(float_bits(x[j]) & ABS))
    return np.float32(bits_float(largest))
