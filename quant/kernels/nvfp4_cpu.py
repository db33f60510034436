"""CPU kernels of compressed-tensors' NVFP4: groups of 16 with an E4M3 scale each, and one scale for the whole tensor.

    g = r(2688 * r(1 / max(amax of the tensor, tiny))), 1 where that is infinite; 2688 = 6 * 448, r() rounds to the
        dtype T of the source weight, whose smallest normal number is tiny
    s = E4M3 of min(g * r(amax of the group / 6), 448), the product in float32; 0.125 where that is 0
    code = E2M1 of w / (s / g), saturating, both quotients in float32

(generate_gparam and calculate_qparams of compressed_tensors/quantization/utils/helpers.py, quantize of
lifecycle/forward.py)
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import bits_float, float_bits, helper, kernel
from streamquant.quant.kernels.fp8_cpu import e4m3, e4m3_value
from streamquant.quant.kernels.legacy_cpu import amax
from streamquant.quant.kernels.rounding_cpu import F16, e2m1, rounded
from streamquant.quant.kernels.vectors import fill, load, store

GROUP = 16
_EIGHTH = np.uint8(0x20)
"""The code of 0.125."""
_LARGEST = np.float32(6 * 448)


@kernel
def global_scale(largest: np.float32, dtype: int) -> np.float32:
    """g of a tensor whose largest magnitude this is; infinite where it is not a number of T."""
    tiny = np.float32(2.0**-14 if dtype == F16 else 2.0**-126)
    inverse = rounded(np.float32(np.float32(1.0) / max(np.float32(largest), tiny)), dtype)
    return np.float32(rounded(np.float32(_LARGEST * inverse), dtype))


@helper
def _local(largest: np.float32, g: np.float32, dtype: int) -> np.uint8:
    """The code of s of a group."""
    code = e4m3(float_bits(np.float32(g * rounded(np.float32(largest / np.float32(6.0)), dtype))))
    return np.uint8(code if code != 0 else _EIGHTH)


@kernel
def encode(
    rows: NDArray[np.float32], codes: NDArray[np.uint8], scales: NDArray[np.uint8], g: np.float32, dtype: int
) -> int:
    """float32[r, n] -> E2M1 codes uint8[r, n], E4M3 scales uint8[r, n / 16]. Returns the first row with a weight whose
    value would be infinite, or -1."""
    r, n = rows.shape
    groups = scales.shape[1]
    overflow, quotients = -1, np.empty(n, np.float32)
    largest, divisors = np.empty(groups, np.float32), np.empty(groups, np.float32)
    for i in range(r):
        row, to, stored, most = rows[i], codes[i], scales[i], np.uint32(0)
        for k in range(groups):
            some = load(row, k * GROUP)
            largest[k] = amax(some, some)
        for k in range(groups):
            code = _local(largest[k], g, dtype)
            stored[k], divisors[k] = code, np.float32(e4m3_value(code) / g)
            most = max(most, float_bits(divisors[k]))  # positive floats order like their bits
        for k in range(groups):
            store(quotients, k * GROUP, load(row, k * GROUP) / fill(divisors[k]))
        for j in range(n):
            to[j] = e2m1(quotients[j])
        if overflow < 0 and not np.isfinite(np.float32(bits_float(most) * np.float32(6.0))):
            for j in range(n):
                # what becomes 6; 4 times the largest scale is finite
                value = np.float32(np.float32(6.0) * divisors[j // GROUP])
                if np.float32(abs(quotients[j])) > np.float32(5.0) and not np.isfinite(value):
                    overflow = i
    return overflow
