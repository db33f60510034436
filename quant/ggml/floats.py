"""The unquantized formats F32, F16 and BF16: GGUF tensor types and safetensors dtypes of the same names.

Rounding is to nearest, ties to even, as ggml_fp32_to_bf16_row and numpy's float16 do; a value that overflows becomes
infinite in the bytes and is reported to the caller, who refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from streamquant.quant.format import (
    NO_OVERFLOW,
    Encoded,
    Format,
    GpuEncoder,
    Importance,
    Part,
    Rows,
    StoredType,
    same_shape,
)
from streamquant.quant.kernels import floats_cpu

if TYPE_CHECKING:
    from torch import Tensor

Encoder = Callable[[Rows, Encoded, Importance | None], int]


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


def _gpu_encoder(dtype: str) -> GpuEncoder:
    """torch rounds to nearest, ties to even, and overflows to infinity. `dtype` is its name in torch."""

    def encode(rows: Tensor, parts: tuple[Tensor, ...], overflow: Tensor, _importance: Tensor | None) -> None:
        import torch

        narrow = rows.to(getattr(torch, dtype))
        parts[0].copy_(narrow.view(torch.uint8))
        if narrow.dtype != rows.dtype:
            lost = torch.isinf(narrow).any(dim=1)
            row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
            torch.minimum(overflow, torch.where(lost, row, NO_OVERFLOW).min(), out=overflow)

    return encode


def _float_format(
    stored: StoredType, size: int, encode: Encoder, decode: Callable[[Encoded, int], Rows], gpu_dtype: str
) -> Format:
    part = Part("", stored.name, 1, lambda n: n * size, same_shape)
    gpu = _gpu_encoder(gpu_dtype)
    return Format(stored.name, stored, 1, 1, (part,), encode, decode, copies=stored.name, encode_on_gpu=gpu)


FORMATS = (
    _float_format(StoredType("F32", None, 60, 0.001), 4, _encode_f32, _decode_f32, "float32"),
    _float_format(StoredType("F16", "F16", 40, 0.05), 2, _encode_f16, _decode_f16, "float16"),
    _float_format(StoredType("BF16", "BF16", 40, 0.02), 2, _encode_bf16, _decode_bf16, "bfloat16"),
)
