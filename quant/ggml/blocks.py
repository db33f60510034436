"""What all GGML block formats have in common: one stored tensor, sizes and decoder from the package gguf."""

from collections.abc import Callable

import gguf
import numpy as np
from numpy.typing import NDArray

from quant.format import Encoded, Format, Part, Rows, same_shape


def block_format(name: str, encode: Callable[[Rows, NDArray[np.uint8]], int]) -> Format:
    """The format of a GGML type, from its encoder: float32[r, n], uint8[r, bytes] -> first overflowing row or -1."""
    kind = gguf.GGMLQuantizationType[name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]

    def encode_into(rows: Rows, out: Encoded) -> int:
        return int(encode(rows, out[0]))

    def decode_from(encoded: Encoded, n: int) -> Rows:
        rows: Rows = gguf.quants.dequantize(encoded[0], kind)
        return rows.reshape(-1, n)

    part = Part("", name, 1, lambda n: n // weights * size, same_shape)
    return Format(name, weights, 1, (part,), encode_into, decode_from)
