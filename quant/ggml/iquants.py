"""GGML's 4-bit types with a table of levels: IQ4_NL and IQ4_XS.

| format | block                                                            | bytes | weight                     |
| ------ | ---------------------------------------------------------------- | ----- | -------------------------- |
| IQ4_NL | 32: f16 d, u4 q[32]                                              | 18    | d * level[q]               |
| IQ4_XS | 256: f16 d, u16 high and u4[8] low bits of scales, u4 q[256]     | 136   | d * (sc - 32) * level[q]   |

The encoder is quantize_row_iq4_nl_impl of ggml/src/ggml-quants.c; decoding is the package gguf's. IQ1, IQ2 and IQ3,
whose values lie on grids, are only read yet: whoever adds an encoder moves their line to FORMATS.
"""

from streamquant.quant.format import StoredType
from streamquant.quant.ggml.blocks import block_format
from streamquant.quant.kernels import iq4_cpu

FORMATS = (
    block_format(
        StoredType("IQ4_NL", "Q8_0", 13, 0.9), iq4_cpu.encode_iq4_nl, iq4_cpu.encode_iq4_nl_weighted, "iq4_gpu"
    ),
    block_format(
        StoredType("IQ4_XS", "Q8_K", 13, 0.9), iq4_cpu.encode_iq4_xs, iq4_cpu.encode_iq4_xs_weighted, "iq4_gpu"
    ),
)

READ_ONLY = (
    StoredType("IQ3_S", "Q8_K", 7, 1.5),
    StoredType("IQ3_XXS", "Q8_K", 6, 1.5, needs_importance=True),
    StoredType("IQ2_S", "Q8_K", 3, 2.0, needs_importance=True),
    StoredType("IQ2_XS", "Q8_K", 3, 2.0, needs_importance=True),
    StoredType("IQ2_XXS", "Q8_K", 2, 2.0, needs_importance=True),
    StoredType("IQ1_S", "Q8_K", 1, 2.0, needs_importance=True),
    StoredType("IQ1_M", "Q8_K", 1, 2.0, needs_importance=True),
)
"""Types of other publishers' files."""
