"""GGML's K-quants: super-blocks of 256 weights, sub-blocks of 16 or 32 with scales that are quantized themselves.

| format | sub-blocks | scale of a sub-block     | bytes | weight                      |
| ------ | ---------- | ------------------------ | ----- | --------------------------- |
| Q2_K   | 16 of 16   | u4 scale, u4 minimum     | 84    | d * sc * q - dmin * m       |
| Q3_K   | 16 of 16   | i6 scale                 | 110   | d * sc * (q - 4)            |
| Q4_K   | 8 of 32    | u6 scale, u6 minimum     | 144   | d * sc * q - dmin * m       |
| Q5_K   | 8 of 32    | u6 scale, u6 minimum     | 176   | d * sc * q - dmin * m       |
| Q6_K   | 16 of 16   | i8 scale                 | 210   | d * sc * (q - 32)           |

d and dmin are float16. The encoders are those of ggml/src/ggml-quants.c (quantize_row_q*_K_ref: without an importance
vector); decoding is the package gguf's.
"""

from collections.abc import Callable

import gguf
import numpy as np
from numpy.typing import NDArray

from quant.format import Encoded, Format, Part, Rows, same_shape
from quant.kernels import kquants_cpu

QK_K = kquants_cpu.QK_K


def _format(name: str, bytes_per_block: int, encode: Callable[[Rows, NDArray[np.uint8]], int]) -> Format:
    kind = gguf.GGMLQuantizationType[name]

    def encode_into(rows: Rows, out: Encoded) -> int:
        return int(encode(rows, out[0]))

    def decode_from(encoded: Encoded, n: int) -> Rows:
        rows: Rows = gguf.quants.dequantize(encoded[0], kind)
        return rows.reshape(-1, n)

    part = Part("", name, 1, lambda n: n // QK_K * bytes_per_block, same_shape)
    return Format(name, QK_K, 1, (part,), encode_into, decode_from)


FORMATS = (
    _format("Q2_K", 84, kquants_cpu.encode_q2_k),
    _format("Q3_K", 110, kquants_cpu.encode_q3_k),
    _format("Q4_K", 144, kquants_cpu.encode_q4_k),
    _format("Q5_K", 176, kquants_cpu.encode_q5_k),
    _format("Q6_K", 210, kquants_cpu.encode_q6_k),
)
