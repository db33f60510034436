"""NVFP4 weights as compressed-tensors stores them: groups of 16 with an E4M3 scale, and a scale for the tensor.

| format  | codes                      | scales of groups              | scale of the tensor        | weight         |
| ------- | -------------------------- | ----------------------------- | -------------------------- | -------------- |
| NVFP4_* | weight_packed U8[N, K / 2] | weight_scale F8_E4M3[N, K/16] | weight_global_scale F32[1] | E2M1 * (s / g) |

with the dtype of the source at the end of the name. The even column is in the low 4 bits of a byte. The global scale g
is a divisor, 448 * 6 / amax, of the largest magnitude of the tensor, or of those that runtimes merge with it: so it has
to be known before the first row is encoded. This is what llm-compressor's model_free_ptq writes, byte for byte
(quant/kernels/nvfp4_cpu.py has the arithmetic), but for float16: below an amax of 0.041 g does not fit there, and the
library writes 1 without a word, which leaves a few codes or none. Such a tensor is encoded as one of float32 would be.
"""

import numpy as np

from streamquant.quant.format import WHOLE, Encoded, Format, Importance, Part, Rows
from streamquant.quant.fp8 import E4M3
from streamquant.quant.kernels import floats_cpu, nvfp4_cpu
from streamquant.quant.kernels.integers_cpu import pack_pairs
from streamquant.quant.microscaling import PAIRS, unpack_pairs
from streamquant.quant.scales import DTYPES

GROUP = nvfp4_cpu.GROUP


def global_scale(amax: float, dtype: str) -> tuple[np.float32, str]:
    """The global scale of what has this largest magnitude, and the dtype whose rounding it and the others have.

    Also that of activations (input_global_scale).

    >>> [float(value) for value, _ in (global_scale(1.0, "BF16"), global_scale(0.0, "F16"), global_scale(0.01, "F16"))]
    [2688.0, 1.0, 268800.0]
    """
    for name in (dtype, "F32"):
        found = np.float32(nvfp4_cpu.global_scale(np.float32(amax), DTYPES[name]))
        if np.isfinite(found):
            return found, name
    return np.float32(1), dtype


def _format(dtype: str) -> Format:
    def encode_from_amax(rows: Rows, out: Encoded, amax: float) -> int:
        g, rounding = global_scale(amax, dtype)
        codes = np.empty(rows.shape, np.uint8)
        overflow = nvfp4_cpu.encode(rows, codes, out[1], g, DTYPES[rounding])
        pack_pairs(codes, out[0])
        out[2][:] = np.frombuffer(g.tobytes(), np.uint8)
        return int(overflow)

    def encode_into(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
        return encode_from_amax(rows, out, float(floats_cpu.largest_magnitude(rows.reshape(-1))))

    def decode_from(encoded: Encoded, n: int) -> Rows:
        scales = E4M3[encoded[1]] / np.ascontiguousarray(encoded[2]).view("<f4").reshape(1, 1)
        rows: Rows = unpack_pairs(encoded[0], n) * scales.repeat(GROUP, axis=1)
        return rows

    codes = Part("_packed", PAIRS.name, 1, lambda n: n // 2, lambda shape: (shape[0], shape[1] // 2))
    scale = Part("_scale", "F8_E4M3", 1, lambda n: n // GROUP, lambda shape: (shape[0], shape[1] // GROUP))
    whole = Part("_global_scale", "F32", WHOLE, lambda _n: 4, lambda _shape: (1,))
    return Format(
        f"NVFP4_{dtype}",
        PAIRS,
        GROUP,
        1,
        (codes, scale, whole),
        encode_into,
        decode_from,
        source_dtype=dtype,
        encode_from_amax=encode_from_amax,
        shares_amax=True,
    )


BY_DTYPE = {dtype: _format(dtype) for dtype in DTYPES}
"""By the dtype of the source."""
FORMATS = tuple(BY_DTYPE.values())
