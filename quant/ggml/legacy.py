"""GGML's blocks of 32 weights with one or two float16 scales: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

| format | block                                        | bytes | weight            |
| ------ | -------------------------------------------- | ----- | ----------------- |
| Q8_0   | f16 d, i8 q[32]                              | 34    | d * q             |
| Q4_0   | f16 d, u4 q[32]                              | 18    | d * (q - 8)       |
| Q4_1   | f16 d, f16 m, u4 q[32]                       | 20    | d * q + m         |
| Q5_0   | f16 d, u32 fifth bits, u4 q[32]              | 22    | d * (q - 16)      |
| Q5_1   | f16 d, f16 m, u32 fifth bits, u4 q[32]       | 24    | d * q + m         |

Byte j of the 4-bit values holds weight j in its low half and weight j + 16 in its high half. The encoders are those of
ggml/src/ggml-quants.c: quantize_row_*_ref, and with the importance of columns quantize_row_*_impl, which Q8_0 lacks.
Decoding is the package gguf's.
"""

from streamquant.quant.format import StoredType
from streamquant.quant.ggml.blocks import block_format
from streamquant.quant.kernels import legacy_cpu, legacy_weighted_cpu

FORMATS = (
    block_format(StoredType("Q8_0", "Q8_0", 35, 0.06), legacy_cpu.encode_q8_0, gpu_kernels="legacy_gpu"),
    block_format(
        StoredType("Q4_0", "Q8_0", 13, 0.9), legacy_cpu.encode_q4_0, legacy_weighted_cpu.encode_q4_0, "legacy_gpu"
    ),
    block_format(
        StoredType("Q4_1", "Q8_0", 13, 0.9), legacy_cpu.encode_q4_1, legacy_weighted_cpu.encode_q4_1, "legacy_gpu"
    ),
    block_format(
        StoredType("Q5_0", "Q8_0", 19, 0.6), legacy_cpu.encode_q5_0, legacy_weighted_cpu.encode_q5_0, "legacy_gpu"
    ),
    block_format(
        StoredType("Q5_1", "Q8_0", 19, 0.6), legacy_cpu.encode_q5_1, legacy_weighted_cpu.encode_q5_1, "legacy_gpu"
    ),
)
