"""Rounding to the dtype of the source weights after every operation, as torch does on a CPU; E2M1 codes.

compressed-tensors computes scales and quotients in the dtype T of the weights: bfloat16, float16 or float32. float32
holds each of their values, and one operation in float32, rounded to T, is the operation in T.
"""

import numpy as np

from streamquant.quant.kernels.bits import ABS, INFINITY, ONE, SIGN, bits_float, float_bits, helper, round_bits

BF16, F16, F32 = 0, 1, 2  # the dtype T

_E2M1_MAX_BITS = np.uint32(0x40C00000)  # 6
_ONE_BITS = np.uint32(0x3F800000)


@helper
def rounded(x: np.float32, dtype: int) -> np.float32:
    """The value of T nearest to x, ties to even; infinite where T has none that large."""
    u = float_bits(np.float32(x))
    if dtype == BF16:
        return np.float32(bits_float(round_bits(u, np.uint32(16))))
    if dtype == F16:
        a = np.uint32(u & ABS)
        normal = min(round_bits(a, np.uint32(13)), INFINITY)
        normal = INFINITY if normal >= np.uint32(0x47800000) else normal  # 65536
        # Below 2**-14 values are multiples of 2**-24, the last place of 0.5 <= x < 1: adding 0.5 rounds.
        subnormal = float_bits(np.float32(np.float32(bits_float(a) + np.float32(0.5)) - np.float32(0.5)))
        magnitude = subnormal if a < np.uint32(0x38800000) else normal
        return np.float32(bits_float(np.uint32(magnitude | (u & SIGN))))
    return np.float32(x)


@helper
def or_eps(scale: np.float32, dtype: int) -> np.float32:
    """The scale, or eps(T) where it is zero."""
    eps = np.float32(2.0**-7) if dtype == BF16 else np.float32(2.0**-10) if dtype == F16 else np.float32(2.0**-23)
    return np.float32(scale if scale != np.float32(0.0) else eps)


@helper
def e2m1(q: np.float32) -> np.uint8:
    """float32 -> E2M1 code of the nearest value, ties to the even code, saturating at 6.

    A value below zero keeps its sign where it becomes 0; -0.0 is the code of 0.
    """
    a = min(np.uint32(float_bits(np.float32(q)) & ABS), _E2M1_MAX_BITS)
    normal = np.uint32(((a + np.uint32(0x1FFFFF) + ((a >> np.uint32(22)) & ONE)) >> np.uint32(22)) - np.uint32(252))
    # Below 1 values are multiples of 0.5, the last place of 2**22 <= x < 2**23: adding 2**22 rounds.
    subnormal = np.uint32(float_bits(np.float32(bits_float(a) + np.float32(4194304.0))) - np.uint32(0x4A800000))
    code = normal if a >= _ONE_BITS else subnormal
    return np.uint8(code | (np.uint32(8) if q < np.float32(0.0) else np.uint32(0)))
