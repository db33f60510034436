"""The unquantized formats F32, F16 and BF16: GGUF tensor types and safetensors dtypes of the same names.

Rounding is to nearest, ties to even, as ggml_fp32_to_bf16_row and numpy's float16 do; a value that overflows becomes
infinite in the bytes and is reported to the caller, who refuses it.
"""

import numpy as np

from streamquant.quant.format import Encoded, Format, Importance, Part, Rows, same_shape
from streamquant.quant.kernels import floats_cpu


def _encode_f32(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
    out[0].view(np.float32)[:] = rows
    return -1


def _encode_f16(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
    return int(floats_cpu.encode_f16(rows, out[0].view(np.uint16)))


def _encode_bf16(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
    return int(floats_cpu.encode_bf16(rows, out[0].view(np.uint16)))


def _decode_f32(encoded: Encoded, n: int) -> Rows:
    return encoded[0].view(np.float32).reshape(-1, n)


def _decode_f16(encoded: Encoded, n: int) -> Rows:
    return encoded[0].view(np.float16).reshape(-1, n).astype(np.float32)


def _decode_bf16(encoded: Encoded, n: int) -> Rows:
    return (encoded[0].view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, n)


def _part(name: str, size: int) -> Part:
    return Part("", name, 1, lambda n: n * size, same_shape)


F32 = Format("F32", 1, 1, (_part("F32", 4),), _encode_f32, _decode_f32)
F16 = Format("F16", 1, 1, (_part("F16", 2),), _encode_f16, _decode_f16)
BF16 = Format("BF16", 1, 1, (_part("BF16", 2),), _encode_bf16, _decode_bf16)
FORMATS = (F32, F16, BF16)
