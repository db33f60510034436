"""What all GGML block formats have in common: one stored tensor, sizes and decoder from the package gguf."""

from collections.abc import Callable

import gguf
import numpy as np
from numpy.typing import NDArray

from streamquant.quant.format import Encoded, Format, Importance, Part, Rows, same_shape

Bytes = NDArray[np.uint8]


def block_format(
    name: str,
    encode: Callable[[Rows, Bytes], int],
    encode_weighted: Callable[[Rows, Importance, Bytes], int] | None = None,
) -> Format:
    """The format of a GGML type, from its encoders: float32[r, n], uint8[r, bytes] -> first overflowing row or -1.

    `encode_weighted` also takes the importance of the columns, float32[n]; None: it makes no difference.
    """
    kind = gguf.GGMLQuantizationType[name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]

    def encode_into(rows: Rows, out: Encoded, importance: Importance | None) -> int:
        if importance is None or encode_weighted is None:
            return int(encode(rows, out[0]))
        return int(encode_weighted(rows, importance, out[0]))

    def decode_from(encoded: Encoded, n: int) -> Rows:
        rows: Rows = gguf.quants.dequantize(encoded[0], kind)
        return rows.reshape(-1, n)

    part = Part("", name, 1, lambda n: n // weights * size, same_shape)
    uses_importance = encode_weighted is not None
    return Format(name, weights, 1, (part,), encode_into, decode_from, uses_importance=uses_importance)
