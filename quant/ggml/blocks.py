"""What all GGML block formats have in common: one stored tensor, sizes and decoder from the package gguf."""

import functools
import importlib
from collections.abc import Callable

import gguf
import numpy as np
from numpy.typing import NDArray

from streamquant.quant.format import Encoded, Format, GpuEncoder, Importance, Part, Rows, StoredType, same_shape

Bytes = NDArray[np.uint8]


def block_format(
    stored: StoredType,
    encode: Callable[[Rows, Bytes], int],
    encode_weighted: Callable[[Rows, Importance, Bytes], int] | None = None,
    gpu_kernels: str | None = None,
) -> Format:
    """The format of a GGML type, from its encoders: float32[r, n], uint8[r, bytes] -> first overflowing row or -1.

    `encode_weighted` also takes the importance of the columns, float32[n]; None: it makes no difference. `gpu_kernels`
    is the module of quant/kernels with `encode_NAME` for a GPU, imported with the first use; None: there is none.
    """
    name = stored.name
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
    return Format(
        name,
        stored,
        weights,
        1,
        (part,),
        encode_into,
        decode_from,
        uses_importance=encode_weighted is not None,
        encode_on_gpu=None if gpu_kernels is None else _gpu_encoder(gpu_kernels, name),
    )


def _gpu_encoder(module: str, name: str) -> GpuEncoder:
    """`encode_NAME` of a module that imports torch and Triton."""

    @functools.cache
    def encoder() -> Callable[..., None]:
        kernels = importlib.import_module(f"streamquant.quant.kernels.{module}")
        found: Callable[..., None] = getattr(kernels, f"encode_{name.lower()}")
        return found

    return lambda rows, parts, overflow, importance: encoder()(rows, parts[0], overflow, importance)
