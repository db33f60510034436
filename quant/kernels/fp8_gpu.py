"""GPU kernels of FP8 E4M3, as fp8_cpu.py has them: amax, scale, divide, round.

Every encoder takes float32[r, n], codes uint8[r, n] and the bytes of the scales on a device; `dtype` is BF16, F16 or
F32 of rounding_cpu.py, the dtype of weights and scales.
"""

import triton
import triton.language as tl
from torch import Tensor

from streamquant.quant.kernels.bits_gpu import (
    ABS,
    bits_float,
    float_bits,
    half_bits,
    kernel,
    lanes,
    launch,
    round_bits,
    store_byte,
)

TILE = 128
_COLUMNS = 2048  # that a program for whole rows takes at a time
_BF16, _F16 = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _e4m3(q):
    """Bits of finite float32 -> E4M3 codes, saturating at 448."""
    a = q & ABS
    a = tl.where(a < 0x43E00000, a, 0x43E00000)  # 448
    normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - 0x3C0
    # Below 2**-6 codes are multiples of 2**-9, the last place of 2**14 <= x < 2**15: adding 2**14 rounds.
    subnormal = float_bits(bits_float(a) + 16384.0) - 0x46800000
    return tl.where(a >= 0x3C800000, normal, subnormal) | ((q >> 24) & 0x80)


@triton.jit
def _scale(amax, dtype: tl.constexpr):
    """The scale of rows or tiles, as the float32 of values of `dtype`; never zero."""
    exact = tl.div_rn(amax, 448.0 + tl.zeros_like(amax))
    if dtype == _BF16:
        scale = bits_float(round_bits(float_bits(exact), 16))
        eps: tl.constexpr = 0.0078125
    elif dtype == _F16:
        subnormal = (exact + 0.5) - 0.5  # a multiple of 2**-24
        scale = tl.where(exact < 6.103515625e-05, subnormal, bits_float(round_bits(float_bits(exact), 13)))
        eps: tl.constexpr = 0.0009765625
    else:
        scale = exact
        eps: tl.constexpr = 1.1920928955078125e-07
    return tl.where(scale != 0.0, scale, eps)


@triton.jit
def _code(w, scale, dtype: tl.constexpr):
    """w / scale, rounded to `dtype`, then to E4M3."""
    quotient = float_bits(tl.div_rn(w, scale))
    if dtype == _BF16:
        quotient = round_bits(quotient, 16)
    elif dtype == _F16:
        quotient = round_bits(quotient, 13)
    return _e4m3(quotient)


@triton.jit
def _store_scale(scales, at, scale, dtype: tl.constexpr, live):
    """The bytes of a scale, which is a value of `dtype` already; `at` counts scales."""
    if dtype == _BF16:
        bits = float_bits(scale) >> 16
        size: tl.constexpr = 2
    elif dtype == _F16:
        bits = half_bits(scale)
        size: tl.constexpr = 2
    else:
        bits = float_bits(scale)
        size: tl.constexpr = 4
    for k in tl.static_range(size):
        store_byte(scales + at * size + k, bits >> (8 * k), live)


@kernel
def _channel(rows, codes, scales, r, n, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < r
    at = row[:, None] * n
    largest = tl.zeros((ROWS,), tl.int32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        w = tl.load(rows + at + column, mask=live[:, None] & (column < n), other=0.0)
        largest = tl.maximum(largest, tl.max(float_bits(w) & ABS, axis=1))
    scale = _scale(bits_float(largest), dtype)
    _store_scale(scales, row, scale, dtype, live)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        on = live[:, None] & (column < n)
        w = tl.load(rows + at + column, mask=on, other=0.0)
        store_byte(codes + at + column, _code(w, scale[:, None] + tl.zeros_like(w), dtype), on)


@kernel
def _tiles(rows, codes, scales, r, n, across, dtype: tl.constexpr):
    """One tile a program, 32 rows of it at a time."""
    tile = tl.program_id(0)
    top = (tile // across).to(tl.int64) * 128 + tl.arange(0, 32)[:, None]
    column = tile % across * 128 + tl.arange(0, 128)[None, :]
    largest = tl.zeros((32,), tl.int32)
    for start in range(0, 128, 32):
        w = tl.load(rows + (top + start) * n + column, mask=(top + start < r) & (column < n), other=0.0)
        largest = tl.maximum(largest, tl.max(float_bits(w) & ABS, axis=1))
    scale = _scale(bits_float(tl.max(largest, axis=0)), dtype)
    _store_scale(scales, tile, scale, dtype, tile >= 0)
    for start in range(0, 128, 32):
        on = (top + start < r) & (column < n)
        w = tl.load(rows + (top + start) * n + column, mask=on, other=0.0)
        store_byte(codes + (top + start) * n + column, _code(w, scale + tl.zeros_like(w), dtype), on)


def encode_channel(rows: Tensor, codes: Tensor, scales: Tensor, dtype: int) -> None:
    """One scale a row: scales uint8[r, bytes of dtype]."""
    r, n = rows.shape
    count = lanes(r, 1)
    launch(_channel, r, count, rows, codes, scales, r, n, dtype=dtype, ROWS=count, COLUMNS=_COLUMNS, num_warps=8)


def encode_tiles(rows: Tensor, codes: Tensor, scales: Tensor, dtype: int) -> None:
    """One scale a 128x128 tile: scales uint8[ceil(r / 128), ceil(n / 128) * bytes of dtype]."""
    r, n = rows.shape
    across = -(-n // TILE)
    launch(_tiles, -(-r // TILE) * across, 1, rows, codes, scales, r, n, across, dtype=dtype, num_warps=8)
