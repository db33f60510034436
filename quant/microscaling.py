"""MXFP4 and MXFP8 weights as compressed-tensors stores them: groups of 32 with a power of two as scale (OCP).

| format       | codes                        | scales                       | weight               |
| ------------ | ---------------------------- | ---------------------------- | -------------------- |
| MXFP4_*      | weight_packed U8[N, K / 2]   | weight_scale U8[N, K / 32]   | E2M1 * 2^(E - 127)   |
| MXFP8_*      | weight F8_E4M3[N, K]         | weight_scale U8[N, K / 32]   | E4M3 * 2^(E - 127)   |

with the dtype of the source at the end of the name: quotients are rounded to it. The even column is in the low 4
bits of a byte. This is what llm-compressor's model_free_ptq writes, byte for byte (quant/kernels/microscaling_cpu.py
has the arithmetic). GGML's MXFP4 has other scales and another order (quant/ggml/small.py).
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.format import Encoded, Format, Importance, Part, Rows, StoredType, same_shape
from streamquant.quant.fp8 import E4M3, STORED
from streamquant.quant.kernels import microscaling_cpu
from streamquant.quant.kernels.integers_cpu import pack_pairs
from streamquant.quant.scales import DTYPES

PAIRS = StoredType("U8", None, 11, 1.0)
GROUP = microscaling_cpu.GROUP
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The value of each code."""


def unpack_pairs(packed: NDArray[np.uint8], n: int) -> NDArray[np.float32]:
    """uint8[r, n / 2] -> the E2M1 values float32[r, n]."""
    return E2M1[np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, n)]


def _times_scales(values: NDArray[np.float32], exponents: NDArray[np.uint8]) -> Rows:
    """E8M0, 255 is NaN."""
    scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(np.float32)
    scales[exponents == 255] = np.nan
    rows: Rows = values * scales.repeat(GROUP, axis=1)
    return rows


_SCALE = Part("_scale", "U8", 1, lambda n: n // GROUP, lambda shape: (shape[0], shape[1] // GROUP))


def _fp4(dtype: str) -> Format:
    def encode_into(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
        codes = np.empty(rows.shape, np.uint8)
        overflow = microscaling_cpu.encode_fp4(rows, codes, out[1], DTYPES[dtype])
        pack_pairs(codes, out[0])
        return int(overflow)

    def decode_from(encoded: Encoded, n: int) -> Rows:
        return _times_scales(unpack_pairs(encoded[0], n), encoded[1])

    codes = Part("_packed", PAIRS.name, 1, lambda n: n // 2, lambda shape: (shape[0], shape[1] // 2))
    return Format(f"MXFP4_{dtype}", PAIRS, GROUP, 1, (codes, _SCALE), encode_into, decode_from, source_dtype=dtype)


def _fp8(dtype: str) -> Format:
    def encode_into(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
        return int(microscaling_cpu.encode_fp8(rows, out[0], out[1], DTYPES[dtype]))

    def decode_from(encoded: Encoded, n: int) -> Rows:
        return _times_scales(E4M3[encoded[0].reshape(-1, n)], encoded[1])

    codes = Part("", STORED.name, 1, lambda n: n, same_shape)
    return Format(f"MXFP8_{dtype}", STORED, GROUP, 1, (codes, _SCALE), encode_into, decode_from, source_dtype=dtype)


FP4 = {dtype: _fp4(dtype) for dtype in DTYPES}
FP8 = {dtype: _fp8(dtype) for dtype in DTYPES}
"""By the dtype of the source."""
FORMATS = (*FP4.values(), *FP8.values())
