"""GGML's types for models that were trained for them: MXFP4 (gpt-oss) and the ternary TQ1_0 and TQ2_0 (BitNet, TriLMs).

| format | block                                         | bytes | weight              |
| ------ | --------------------------------------------- | ----- | ------------------- |
| MXFP4  | 32: E8M0 e, E2M1 q[32]                        | 17    | 2**(e - 127) * q    |
| TQ1_0  | 256: 52 bytes of 5 (or 4) base-3 digits, f16 d | 54    | d * (q - 1)         |
| TQ2_0  | 256: u2 q[256], f16 d                         | 66    | d * (q - 1)         |

The encoders are quantize_row_*_ref of ggml/src/ggml-quants.c, which know no importance; decoding is the package gguf's.
"""

from streamquant.quant.format import StoredType
from streamquant.quant.ggml.blocks import block_format
from streamquant.quant.kernels import mxfp4_cpu, ternary_cpu

FORMATS = (
    block_format(StoredType("MXFP4", "Q8_0", 11, 1.0), mxfp4_cpu.encode_mxfp4),
    block_format(StoredType("TQ1_0", "Q8_K"), ternary_cpu.encode_tq1_0),
    block_format(StoredType("TQ2_0", "Q8_K"), ternary_cpu.encode_tq2_0),
)
