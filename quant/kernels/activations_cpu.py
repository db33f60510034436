"""CPU kernels that quantize the inputs of a matrix and decode them again, by explicit SIMD."""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import bits_float, helper, kernel
from streamquant.quant.kernels.legacy_cpu import amax, magnitudes
from streamquant.quant.kernels.vectors import LANES, absolute, any_lane, fill, fill_int, largest, load, select, store

MAGIC = 12582912
"""Adding and subtracting 1.5 * 2^23 rounds a float32 to the nearest even integer."""
Floats = NDArray[np.float32]


@helper
def _largest(x: Floats, at: int, count: int) -> np.float32:
    """The largest magnitude of x[at : at + count], a multiple of 16; NaN is above all."""
    most = fill_int(np.int32(0))
    for i in range(at, at + count, LANES):
        found = magnitudes(load(x, i))
        most = select(found > most, found, most)
    return np.float32(bits_float(np.uint32(largest(most))))


@helper
def _first_of(x: Floats, at: int, count: int, magnitude: np.float32) -> np.float32:
    """The first value of a magnitude, with its sign."""
    for i in range(at, at + count, LANES):
        if any_lane(absolute(load(x, i)) == fill(magnitude)):
            for lane in range(LANES):
                if abs(x[i + lane]) == magnitude:
                    return np.float32(x[i + lane])
    return np.float32(0)


@helper
def _through_half(x: np.float32) -> np.float32:
    """A number of at least 0, rounded to FP16's 11 bits; below 2^-14 to multiples of 2^-24."""
    if x < np.float32(6.103515625e-05):
        step = np.float32(16777216)
        return np.float32(np.rint(x * step)) / step
    split = np.float32(8193) * x  # Dekker's splitting keeps the upper 24 - 13 bits
    return split - (split - x)


@kernel
def q8_0(x: Floats, out: Floats) -> None:
    """float32[n] -> float32[n], n a multiple of 32: Q8_0 and back (quantize_row_q8_0 of ggml)."""
    magic = fill(np.float32(MAGIC))
    for at in range(0, x.shape[0], 32):
        a, b = load(x, at), load(x, at + LANES)
        scale = np.float32(amax(a, b) / np.float32(127))
        inverse = fill(np.float32(1) / scale if scale > 0 else np.float32(0))
        half = fill(_through_half(scale))
        store(out, at, ((a * inverse + magic) - magic) * half)
        store(out, at + LANES, ((b * inverse + magic) - magic) * half)


@kernel
def q8_k(x: Floats, out: Floats) -> None:
    """float32[n] -> float32[n], n a multiple of 256: Q8_K and back (quantize_row_q8_K of ggml)."""
    magic, top = fill(np.float32(MAGIC)), fill(np.float32(127))
    for at in range(0, x.shape[0], 256):
        most = _largest(x, at, 256)
        signed = _first_of(x, at, 256, most)
        inverse = np.float32(-127) / signed if most > 0 else np.float32(0)
        scale = fill(np.float32(1) / inverse if most > 0 else np.float32(0))
        for i in range(at, at + 256, LANES):
            code = (load(x, i) * fill(inverse) + magic) - magic
            store(out, i, select(code > top, top, code) * scale)


@kernel
def e4m3(x: Floats, out: Floats, group: int) -> None:
    """float32[n] -> float32[n]: E4M3 and back, a scale for each `group` values, a multiple of 16 that divides n.

    calculate_qparams and _quantize_dequantize of compressed-tensors, dynamic and symmetric, in float32, in their order.
    """
    most, least, smallest = np.float32(448), np.float32(-448), fill(np.float32(2.0**-6))
    # adding and subtracting 1.5 * 2^23 units of the last place of a subnormal, 2^-9, rounds to multiples of it
    magic = fill(np.float32(1.5 * 2.0**14))
    for at in range(0, x.shape[0], group):
        quotient = np.float32(_largest(x, at, group) / most)
        scale = fill(quotient if quotient > 0 else np.float32(2.0**-23))
        for i in range(at, at + group, LANES):
            value = load(x, i) / scale
            value = select(value < fill(least), fill(least), value)
            value = select(value > fill(most), fill(most), value)
            # Dekker's splitting keeps the upper 24 - 20 bits, ties to even
            split = fill(np.float32(1048577)) * value
            normal, subnormal = split - (split - value), (value + magic) - magic
            store(out, i, select(absolute(value) < smallest, subnormal, normal) * scale)
