"""FP8 E4M3 weights with scales of their own, as compressed-tensors stores them and vLLM and SGLang load them.

| format           | codes         | scales                                          |
| ---------------- | ------------- | ----------------------------------------------- |
| FP8_CHANNEL_BF16 | F8_E4M3[N, K] | weight_scale BF16[N, 1]                         |
| FP8_BLOCK_BF16   | F8_E4M3[N, K] | weight_scale BF16[ceil(N / 128), ceil(K / 128)] |
| FP8_TENSOR_BF16  | F8_E4M3[N, K] | weight_scale BF16[1]                            |

and the same with F16 and F32: scales have the dtype of the source weight, and the quotient is rounded to it before it
is rounded to E4M3. This is what llm-compressor's model_free_ptq writes, byte for byte (quant/kernels/fp8_cpu.py has
the arithmetic). E4M3 here is the "fn" form: no infinities, largest value 448 (arXiv 2209.05433). Values that would
round beyond it saturate.

FP8_TENSOR, and FP8_CHANNEL_CALIBRATED, which is FP8_CHANNEL otherwise, are what its oneshot writes, which calibrates:
there -0.0 has the code of 0, in model_free_ptq that of -0.0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.format import WHOLE, Encoded, Format, Importance, Part, Rows, StoredType, same_shape
from streamquant.quant.kernels import floats_cpu, fp8_cpu
from streamquant.quant.scales import DTYPES, load_scales, store_scales
from streamquant.quant.widen import SOURCE_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

TILE = fp8_cpu.TILE
STORED = StoredType("F8_E4M3", None, 24, 0.25)


def _e4m3_values() -> NDArray[np.float32]:
    """The value of each of the 256 codes: sign, 4 exponent bits (bias 7), 3 mantissa bits; S.1111.111 is NaN.

    >>> float(_e4m3_values()[0x7E]), float(_e4m3_values()[0x01]) == 2**-9
    (448.0, True)
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3_values()


def _channel(dtype: str) -> Format:
    def encode_into(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
        scales = np.empty(rows.shape[0], np.float32)
        fp8_cpu.encode_channel(rows, out[0], scales, DTYPES[dtype])
        store_scales(scales, dtype, out[1])
        return -1

    def decode_from(encoded: Encoded, n: int) -> Rows:
        return E4M3[encoded[0].reshape(-1, n)] * load_scales(encoded[1], dtype)

    def encode_on_gpu(rows: Tensor, parts: tuple[Tensor, ...], _overflow: Tensor, _importance: Tensor | None) -> None:
        from streamquant.quant.kernels import fp8_gpu

        fp8_gpu.encode_channel(rows, parts[0], parts[1], DTYPES[dtype])

    size = SOURCE_DTYPES[dtype]
    codes = Part("", STORED.name, 1, lambda n: n, same_shape)
    scale = Part("_scale", dtype, 1, lambda _n: size, lambda shape: (shape[0], 1))
    return Format(
        f"FP8_CHANNEL_{dtype}",
        STORED,
        1,
        1,
        (codes, scale),
        encode_into,
        decode_from,
        source_dtype=dtype,
        encode_on_gpu=encode_on_gpu,
    )


def _block(dtype: str) -> Format:
    def encode_into(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
        r, n = rows.shape
        scales = np.empty((-(-r // TILE), -(-n // TILE)), np.float32)
        fp8_cpu.encode_tiles(rows, out[0], scales, DTYPES[dtype])
        store_scales(scales, dtype, out[1])
        return -1

    def decode_from(encoded: Encoded, n: int) -> Rows:
        codes = encoded[0].reshape(-1, n)
        scales = load_scales(encoded[1], dtype).repeat(TILE, axis=0).repeat(TILE, axis=1)
        return E4M3[codes] * scales[: codes.shape[0], :n]

    def encode_on_gpu(rows: Tensor, parts: tuple[Tensor, ...], _overflow: Tensor, _importance: Tensor | None) -> None:
        from streamquant.quant.kernels import fp8_gpu

        fp8_gpu.encode_tiles(rows, parts[0], parts[1], DTYPES[dtype])

    size = SOURCE_DTYPES[dtype]
    codes = Part("", STORED.name, 1, lambda n: n, same_shape)
    scale = Part(
        "_scale",
        dtype,
        TILE,
        lambda n: -(-n // TILE) * size,
        lambda shape: (-(-shape[0] // TILE), -(-shape[1] // TILE)),
    )
    return Format(
        f"FP8_BLOCK_{dtype}",
        STORED,
        TILE,
        TILE,
        (codes, scale),
        encode_into,
        decode_from,
        pads_rows=True,
        source_dtype=dtype,
        encode_on_gpu=encode_on_gpu,
    )


def static_scale(amax: float, dtype: str) -> bytes:
    """The bytes of a scale, of `dtype`, for activations whose largest magnitude is `amax`.

    >>> np.frombuffer(static_scale(896.0, "F32"), np.float32)
    array([2.], dtype=float32)
    """
    out = np.empty(SOURCE_DTYPES[dtype], np.uint8)
    store_scales(np.array([fp8_cpu.tensor_scale(np.float32(amax), DTYPES[dtype])], np.float32), dtype, out)
    return out.tobytes()


def _tensor(dtype: str) -> Format:
    def encode_from_amax(rows: Rows, out: Encoded, amax: float) -> int:
        scale = np.float32(fp8_cpu.tensor_scale(np.float32(amax), DTYPES[dtype]))
        fp8_cpu.encode_by_scales(rows, out[0], np.full(rows.shape[0], scale, np.float32), DTYPES[dtype])
        store_scales(np.array([scale], np.float32), dtype, out[1])
        return -1

    def encode_into(rows: Rows, out: Encoded, _importance: Importance | None) -> int:
        return encode_from_amax(rows, out, float(floats_cpu.largest_magnitude(rows.reshape(-1))))

    def decode_from(encoded: Encoded, n: int) -> Rows:
        return E4M3[encoded[0].reshape(-1, n)] * load_scales(encoded[1], dtype)

    size = SOURCE_DTYPES[dtype]
    codes = Part("", STORED.name, 1, lambda n: n, same_shape)
    scale = Part("_scale", dtype, WHOLE, lambda _n: size, lambda _shape: (1,))
    return Format(
        f"FP8_TENSOR_{dtype}",
        STORED,
        1,
        1,
        (codes, scale),
        encode_into,
        decode_from,
        source_dtype=dtype,
        encode_from_amax=encode_from_amax,
    )


def _calibrated_channel(channel: Format, dtype: str) -> Format:
    def encode_into(rows: Rows, out: Encoded, importance: Importance | None) -> int:
        channel.encode_into(rows, out, importance)
        scales = load_scales(out[1], dtype).reshape(-1)
        fp8_cpu.encode_by_scales(rows, out[0], scales, DTYPES[dtype])
        return -1

    name = f"FP8_CHANNEL_CALIBRATED_{dtype}"
    return replace(channel, name=name, encode_into=encode_into, encode_on_gpu=None)


CHANNEL = {dtype: _channel(dtype) for dtype in DTYPES}
BLOCK = {dtype: _block(dtype) for dtype in DTYPES}
TENSOR = {dtype: _tensor(dtype) for dtype in DTYPES}
CALIBRATED_CHANNEL = {dtype: _calibrated_channel(channel, dtype) for dtype, channel in CHANNEL.items()}
"""By the dtype of the source."""
FORMATS = (*CHANNEL.values(), *BLOCK.values(), *TENSOR.values(), *CALIBRATED_CHANNEL.values())
