"""GGML's K-quants: super-blocks of 256 weights, sub-blocks of 16 or 32 with scales that are quantized themselves.

| format | sub-blocks | scale of a sub-block     | bytes | weight                      |
| ------ | ---------- | ------------------------ | ----- | --------------------------- |
| Q2_K   | 16 of 16   | u4 scale, u4 minimum     | 84    | d * sc * q - dmin * m       |
| Q3_K   | 16 of 16   | i6 scale                 | 110   | d * sc * (q - 4)            |
| Q4_K   | 8 of 32    | u6 scale, u6 minimum     | 144   | d * sc * q - dmin * m       |
| Q5_K   | 8 of 32    | u6 scale, u6 minimum     | 176   | d * sc * q - dmin * m       |
| Q6_K   | 16 of 16   | i8 scale                 | 210   | d * sc * (q - 32)           |

d and dmin are float16. The encoders are those of ggml/src/ggml-quants.c: quantize_row_q*_K_ref, and with the importance
of columns quantize_row_q*_K_impl. Decoding is the package gguf's.
"""

from streamquant.quant.format import StoredType
from streamquant.quant.ggml.blocks import block_format
from streamquant.quant.kernels import kquants_cpu, kquants_weighted_cpu

FORMATS = (
    block_format(
        StoredType("Q2_K", "Q8_K", 4, 2.0), kquants_cpu.encode_q2_k, kquants_weighted_cpu.encode_q2_k, "kquants_gpu"
    ),
    block_format(
        StoredType("Q3_K", "Q8_K", 8, 1.5), kquants_cpu.encode_q3_k, kquants_weighted_cpu.encode_q3_k, "kquants_gpu"
    ),
    block_format(
        StoredType("Q4_K", "Q8_K", 13, 0.9), kquants_cpu.encode_q4_k, kquants_weighted_cpu.encode_q4_k, "kquants_gpu"
    ),
    block_format(
        StoredType("Q5_K", "Q8_K", 19, 0.7), kquants_cpu.encode_q5_k, kquants_weighted_cpu.encode_q5_k, "kquants_gpu"
    ),
    block_format(
        StoredType("Q6_K", "Q8_K", 24, 0.5), kquants_cpu.encode_q6_k, kquants_weighted_cpu.encode_q6_k, "kquants_gpu"
    ),
)
