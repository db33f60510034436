"""GGML's blocks of 32 weights with one or two float16 scales: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

| format | block                                        | bytes | weight            |
| ------ | -------------------------------------------- | ----- | ----------------- |
| Q8_0   | f16 d, i8 q[32]                              | 34    | d * q             |
| Q4_0   | f16 d, u4 q[32]                              | 18    | d * (q - 8)       |
| Q4_1   | f16 d, f16 m, u4 q[32]                       | 20    | d * q + m         |
| Q5_0   | f16 d, u32 fifth bits, u4 q[32]              | 22    | d * (q - 16)      |
| Q5_1   | f16 d, f16 m, u32 fifth bits, u4 q[32]       | 24    | d * q + m         |

Byte j of the 4-bit values holds weight j in its low half and weight j + 16 in its high half. The encoders are those of
ggml/src/ggml-quants.c (quantize_row_*_ref), the decoders those of dequantize_row_*, in float32.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quant.format import Encoded, Format, Part, Rows, same_shape
from quant.kernels import legacy_cpu

QK = legacy_cpu.QK
Blocks = NDArray[np.uint8]  # uint8[r, blocks, bytes per block]


def _half(blocks: Blocks, at: int) -> NDArray[np.float32]:
    """The float16 at byte `at` of each block -> float32[r, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Blocks) -> NDArray[np.uint8]:
    """uint8[r, blocks, 16] -> the 4-bit values uint8[r, blocks, 32]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: Blocks) -> NDArray[np.uint8]:
    """uint8[r, blocks, 4] -> 16 or 0 for each weight, uint8[r, blocks, 32]."""
    return np.unpackbits(packed, axis=-1, bitorder="little") * np.uint8(16)


def _q8_0(blocks: Blocks) -> NDArray[np.float32]:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[..., 2:]).view(np.int8)


def _q4_0(blocks: Blocks) -> NDArray[np.float32]:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Blocks) -> NDArray[np.float32]:
    return _half(blocks, 0) * _nibbles(blocks[..., 4:]) + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> NDArray[np.float32]:
    quants = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return _half(blocks, 0) * (quants.astype(np.float32) - 16)


def _q5_1(blocks: Blocks) -> NDArray[np.float32]:
    quants = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return _half(blocks, 0) * quants + _half(blocks, 2)


def _format(
    name: str,
    bytes_per_block: int,
    encode: Callable[[Rows, NDArray[np.uint8]], int],
    decode: Callable[[Blocks], NDArray[np.float32]],
) -> Format:
    def encode_into(rows: Rows, out: Encoded) -> int:
        return int(encode(rows, out[0]))

    def decode_from(encoded: Encoded, n: int) -> Rows:
        rows = encoded[0].shape[0]
        return decode(encoded[0].reshape(rows, n // QK, bytes_per_block)).reshape(rows, n)

    part = Part("", name, 1, lambda n: n // QK * bytes_per_block, same_shape)
    return Format(name, QK, 1, (part,), encode_into, decode_from)


FORMATS = (
    _format("Q8_0", 34, legacy_cpu.encode_q8_0, _q8_0),
    _format("Q4_0", 18, legacy_cpu.encode_q4_0, _q4_0),
    _format("Q4_1", 20, legacy_cpu.encode_q4_1, _q4_1),
    _format("Q5_0", 22, legacy_cpu.encode_q5_0, _q5_0),
    _format("Q5_1", 24, legacy_cpu.encode_q5_1, _q5_1),
)
