"""GGML's 4-bit types with a table of levels: IQ4_NL and IQ4_XS.

| format | block                                                            | bytes | weight                     |
| ------ | ---------------------------------------------------------------- | ----- | -------------------------- |
| IQ4_NL | 32: f16 d, u4 q[32]                                              | 18    | d * level[q]               |
| IQ4_XS | 256: f16 d, u16 high and u4[8] low bits of scales, u4 q[256]     | 136   | d * (sc - 32) * level[q]   |

The encoder is quantize_row_iq4_nl_impl of ggml/src/ggml-quants.c; decoding is the package gguf's. IQ1, IQ2 and IQ3,
whose values lie on grids, are not here yet: each would be a line in FORMATS.
"""

from streamquant.quant.ggml.blocks import block_format
from streamquant.quant.kernels import iq4_cpu

FORMATS = (
    block_format("IQ4_NL", iq4_cpu.encode_iq4_nl, iq4_cpu.encode_iq4_nl_weighted),
    block_format("IQ4_XS", iq4_cpu.encode_iq4_xs, iq4_cpu.encode_iq4_xs_weighted),
)
