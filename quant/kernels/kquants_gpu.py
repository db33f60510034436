"""GPU kernels of GGML's K-quants, as kquants_cpu.py and kquants_weighted_cpu.py have them.

Three kernels a format:

1. `_search_*`: one sub-block per thread finds its scale (and minimum);
2. `_scales_*`: the scales of a super-block are quantized and stored;
3. `_values_*`: the weights are quantized again with the scales as they are stored.

In the second and third a row of a tile is a super-block, a column a sub-block or a byte of it. With the importance of
columns two more come first and second: `sums_of_squares`, and `_search_scales`, in which one super-block per thread
finds how its scales (or minima) are quantized.

They hand over float32[planes, sub-blocks], `found`; the constants SCALE, MINIMUM, ... number its planes.

Every encoder takes float32[r, n], uint8[r, bytes], int32[1], and float32[n] or None on a device. It fills the bytes and
lowers the int32 to the first row in which a scale overflows float16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamquant.quant.kernels.bits_gpu import (
    absolute,
    clamped,
    clamped_int,
    half_bits,
    half_is_infinite,
    half_value,
    int8_value,
    kernel,
    lanes,
    launch,
    nearest,
    report_overflow,
    rounded,
    store_byte,
    store_half,
)
from streamquant.quant.kernels.search_gpu import (
    GROUP_MAX_EPS,
    load_lanes,
    search_by_coordinates,
    search_positive_scale,
    search_scale,
    search_scale_and_min,
    store_lanes,
    sums_of_squares,
    weighed,
)

QK_K = 256
_SUB_BLOCKS = 128  # in a program of a search: one a thread
_SUPER_BLOCKS = 8  # in a program of tiles

# The planes of `found`. What the search found:
SCALE, MINIMUM = tl.constexpr(0), tl.constexpr(1)  # scale, -minimum
INVERSE, LOW = (
    tl.constexpr(2),
    tl.constexpr(3),
)  # what the quantized values were made with; LOW 1 for a sub-block of zeros
WEIGHT = tl.constexpr(4)  # sum of the weights of errors
# What the stored scale and minimum mean:
STORED_SCALE, STORED_MINIMUM = tl.constexpr(5), tl.constexpr(6)
# With importance, how they are quantized:
SCALE_CODE, MINIMUM_CODE = tl.constexpr(7), tl.constexpr(8)
_PLANES, _WEIGHTED_PLANES = 7, 9


@triton.jit
def _plane(found, subs, plane: tl.constexpr):
    return found + plane * subs


@triton.jit
def _blocks(blocks, BLOCKS: tl.constexpr):
    """The super-blocks of this program, and which of them exist."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    return block, block < blocks


@triton.jit
def _quotient_of_positive(a: tl.constexpr, b):
    """a / b where b is positive, else 0."""
    return tl.where(b > 0.0, tl.div_rn(a + tl.zeros_like(b), b), 0.0)


@triton.jit
def _largest_positive(found, at, live):
    """The largest of a row, at least +0."""
    values = tl.load(found + at, mask=live, other=0.0)
    return tl.max(tl.where(values > 0.0, values, 0.0), axis=1)


@triton.jit
def _d_and_dmin(
    found, coarse, subs, blocks, block, width: tl.constexpr, levels: tl.constexpr, weighted: tl.constexpr, live
):
    """d and dmin as float32, and what scales and minima are multiplied with to be quantized, a column."""
    j = block[:, None] * width + tl.arange(0, width)[None, :]
    max_scale = _largest_positive(_plane(found, subs, SCALE), j, live[:, None])
    max_min = _largest_positive(_plane(found, subs, MINIMUM), j, live[:, None])
    if weighted:
        d = tl.load(coarse + block, mask=live, other=0.0)
        dmin = tl.load(coarse + blocks + block, mask=live, other=0.0)
    else:
        d = tl.div_rn(max_scale, levels + tl.zeros_like(max_scale))
        dmin = tl.div_rn(max_min, levels + tl.zeros_like(max_min))
    return d, dmin, _quotient_of_positive(levels, max_scale)[:, None], _quotient_of_positive(levels, max_min)[:, None]


@triton.jit
def _store_d_and_dmin(to, d, dmin, overflow, row, live):
    """Store d and dmin as float16; what they mean."""
    h, hmin = half_bits(d), half_bits(dmin)
    store_half(to, h, live)
    store_half(to + 2, hmin, live)
    report_overflow(overflow, row.to(tl.int32), half_is_infinite(h) | half_is_infinite(hmin), live)
    return half_value(h), half_value(hmin)


@triton.jit
def _quantized_with_min(
    rows, found, subs, b, p, width: tl.constexpr, levels: tl.constexpr, limit_first: tl.constexpr, on
):
    """q = (x + minimum) / scale of weight p of each super-block, in [0, levels]; for scale 0, what the search had."""
    x = tl.load(rows + b * 256 + p, mask=on, other=0.0)
    sub = b * (256 // width) + p // width
    scale = tl.load(_plane(found, subs, STORED_SCALE) + sub, mask=on, other=0.0)
    minimum = tl.load(_plane(found, subs, STORED_MINIMUM) + sub, mask=on, other=0.0)
    inverse = tl.load(_plane(found, subs, INVERSE) + sub, mask=on, other=0.0)
    low = tl.load(_plane(found, subs, LOW) + sub, mask=on, other=0.0)
    searched = inverse * (x - low)
    if limit_first:
        searched = rounded(searched, levels)
    return clamped_int(tl.where(scale != 0.0, tl.div_rn(x + minimum, scale), searched), 0, levels)


@triton.jit
def _store_found_with_min(found, subs, sub, scale, minimum, inverse, low, live):
    tl.store(_plane(found, subs, SCALE) + sub, scale, mask=live)
    tl.store(_plane(found, subs, MINIMUM) + sub, minimum, mask=live)
    tl.store(_plane(found, subs, INVERSE) + sub, inverse, mask=live)
    tl.store(_plane(found, subs, LOW) + sub, low, mask=live)


@triton.jit
def _importance_of(importance, sigma2, sub, x, width: tl.constexpr, n, live):
    """The weights of errors of sub-blocks with importance, and their sums."""
    column = sub % (n // width) * width
    spread = tl.load(sigma2 + sub // (256 // width), mask=live, other=0.0)
    return weighed(x, importance, column, spread, width, live)


@kernel
def _search_scales(
    found, coarse, blocks, subs, of_minima, width: tl.constexpr, levels: tl.constexpr, LANES: tl.constexpr
):
    """The `width` scales of each super-block, or its minima, as numbers from 0 to `levels` (Q3_K, 64: signed, + 32).

    The numbers go to SCALE_CODE or MINIMUM_CODE, d or dmin to coarse, float32[2, blocks].
    """
    block, live = _blocks(blocks, LANES)
    x = load_lanes(found + of_minima * subs, block * width, width, live)
    w = load_lanes(_plane(found, subs, WEIGHT), block * width, width, live)
    codes = ()
    if levels == 64:
        d, inverse, dead = search_scale(x, w, width, 32)
        for j in tl.static_range(width):
            codes = codes + (tl.where(dead, 0.0, clamped(inverse * x[j], -32, 31) + 32.0),)
    else:
        d, codes = search_positive_scale(x, w, width, levels)
    tl.store(coarse + of_minima * blocks + block, d, mask=live)
    store_lanes(_plane(found, subs, SCALE_CODE) + of_minima * subs, block * width, codes, width, live)


@triton.jit
def _code(found, subs, plane: tl.constexpr, at, live):
    """A scale or minimum as `_search_scales` quantized it, int32."""
    return tl.load(_plane(found, subs, plane) + at, mask=live, other=0.0).to(tl.int32)


# Q4_K and Q5_K: 8 sub-blocks of 32 weights, 6-bit scales and minima


@kernel
def _search_4_or_5(
    rows, found, importance, sigma2, subs, n, levels: tl.constexpr, weighted: tl.constexpr, LANES: tl.constexpr
):
    sub, live = _blocks(subs, LANES)
    x = load_lanes(rows, sub * 32, 32, live)
    if weighted:
        w, total = _importance_of(importance, sigma2, sub, x, 32, n, live)
        tl.store(_plane(found, subs, WEIGHT) + sub, total, mask=live)
        scale, minimum, inverse, low = search_scale_and_min(x, w, 32, levels, -0.9, 0.05, 37, False, True)
    else:
        total = tl.zeros_like(x[0])
        for i in tl.static_range(32):
            total = total + x[i] * x[i]
        root = tl.sqrt_rn(tl.div_rn(total, 32.0 + tl.zeros_like(total)))
        w = ()
        for i in tl.static_range(32):
            w = w + (root + absolute(x[i]),)
        first: tl.constexpr = -1.0 if levels == 15 else -0.5
        count: tl.constexpr = 21 if levels == 15 else 16
        scale, minimum, inverse, low = search_scale_and_min(x, w, 32, levels, first, 0.1, count, False, False)
    _store_found_with_min(found, subs, sub, scale, minimum, inverse, low, live)


@triton.jit
def _scale_6(found, subs, inverse, at, weighted: tl.constexpr, limited: tl.constexpr, live):
    """The 6 bits of a scale. With importance those of Q4_K are not limited: they run over into others, as in C."""
    if weighted:
        bits = _code(found, subs, SCALE_CODE, at, live)
    else:
        bits = nearest(inverse * tl.load(_plane(found, subs, SCALE) + at, mask=live, other=0.0)) & 255
    return tl.where(bits < 63, bits, 63) if limited else bits


@triton.jit
def _minimum_6(found, subs, inverse, at, weighted: tl.constexpr, limited: tl.constexpr, live):
    """The same of a minimum."""
    if weighted:
        bits = _code(found, subs, MINIMUM_CODE, at, live)
    else:
        bits = nearest(inverse * tl.load(_plane(found, subs, MINIMUM) + at, mask=live, other=0.0)) & 255
    return tl.where(bits < 63, bits, 63) if limited else bits


@kernel
def _scales_4_or_5(
    found,
    coarse,
    out,
    overflow,
    blocks,
    per_row,
    subs,
    size: tl.constexpr,
    weighted: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    limited: tl.constexpr = size == 176 or not weighted
    block, live = _blocks(blocks, BLOCKS)
    b, on = block[:, None], live[:, None]
    d, dmin, by_scale, by_min = _d_and_dmin(found, coarse, subs, blocks, block, 8, 63.0, weighted, live)
    d, dmin = _store_d_and_dmin(out + block * size, d, dmin, overflow, block // per_row, live)
    k = b * 8 + tl.arange(0, 4)[None, :]
    scale, high_scale = (
        _scale_6(found, subs, by_scale, k, weighted, limited, on),
        _scale_6(found, subs, by_scale, k + 4, weighted, limited, on),
    )
    minimum, high_min = (
        _minimum_6(found, subs, by_min, k, weighted, limited, on),
        _minimum_6(found, subs, by_min, k + 4, weighted, limited, on),
    )
    first, second = (scale | ((high_scale >> 4) << 6)) & 255, (minimum | ((high_min >> 4) << 6)) & 255
    to = out + b * size + tl.arange(0, 4)[None, :]
    store_byte(to + 4, first, on)
    store_byte(to + 8, second, on)
    store_byte(to + 12, (high_scale & 15) | ((high_min & 15) << 4), on)
    high_scale, high_min = (high_scale & 15) | ((first >> 6) << 4), (high_min & 15) | ((second >> 6) << 4)
    scales, minima = _plane(found, subs, STORED_SCALE), _plane(found, subs, STORED_MINIMUM)
    tl.store(scales + k, d[:, None] * (first & 63).to(tl.float32), mask=on)
    tl.store(scales + k + 4, d[:, None] * high_scale.to(tl.float32), mask=on)
    tl.store(minima + k, dmin[:, None] * (second & 63).to(tl.float32), mask=on)
    tl.store(minima + k + 4, dmin[:, None] * high_min.to(tl.float32), mask=on)


@kernel
def _values_4_or_5(
    rows, found, out, blocks, subs, levels: tl.constexpr, limit_first: tl.constexpr, BLOCKS: tl.constexpr
):
    size: tl.constexpr = 144 if levels == 15 else 176
    block, live = _blocks(blocks, BLOCKS)
    b, on = block[:, None], live[:, None]
    to = out + b * size
    if levels == 31:
        i = tl.arange(0, 32)[None, :]
        high = tl.zeros((BLOCKS, 32), tl.int32)
        for bit in tl.static_range(8):
            q = _quantized_with_min(rows, found, subs, b, 32 * bit + i, 32, levels, limit_first, on)
            high = high | ((q >> 4) << bit)
        store_byte(to + 16 + i, high, on)
    byte = tl.arange(0, 128)[None, :]
    p = byte // 32 * 64 + byte % 32
    low = _quantized_with_min(rows, found, subs, b, p, 32, levels, limit_first, on)
    upper = _quantized_with_min(rows, found, subs, b, p + 32, 32, levels, limit_first, on)
    store_byte(to + (size - 128) + byte, (low & 15) | ((upper & 15) << 4), on)


def _encode_4_or_5(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None, levels: int) -> None:
    size = {15: 144, 31: 176}[levels]
    work = _Work(rows, 32, importance, 128.0)
    work.search(_search_4_or_5, levels=levels)
    work.search_scales(8, 63)
    work.scales(_scales_4_or_5, out, overflow, size=size)
    work.values(_values_4_or_5, out, levels=levels, limit_first=work.weighted)


class _Work:
    """Rows on their way: what the kernels hand over, and how each of them is launched."""

    def __init__(self, rows: Tensor, width: int, importance: Tensor | None, divisor: float | None = None) -> None:
        """`width` of sub-blocks. `divisor`: of the sums of squares that weigh errors; None: importance alone does."""
        self.rows, self.n, self.weighted = rows, rows.shape[1], importance is not None
        self.blocks, self.per_row, self.subs = rows.numel() // QK_K, self.n // QK_K, rows.numel() // width
        self.found = self._floats(_WEIGHTED_PLANES if self.weighted else _PLANES, self.subs)
        self.coarse = self._floats(2, self.blocks)
        self.sigma2 = self._floats(self.blocks)
        self.importance = rows if importance is None else importance  # some pointer, which is not read then
        if self.weighted and divisor is not None:
            count = lanes(self.blocks, _SUB_BLOCKS)
            launch(sums_of_squares, self.blocks, count, rows, self.sigma2, self.blocks, QK_K, divisor, LANES=count)

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.rows.device)

    def search(self, kernel: object, *more: Tensor, **constants: Any) -> None:
        """One sub-block a thread."""
        count = lanes(self.subs, _SUB_BLOCKS)
        arguments = (self.rows, self.found, self.importance, self.sigma2, *more, self.subs, self.n)
        launch(kernel, self.subs, count, *arguments, **constants, weighted=self.weighted, LANES=count)

    def search_scales(self, width: int, levels: int, *, minima: bool = True) -> None:
        """With importance, one super-block a thread."""
        count = lanes(self.blocks, _SUB_BLOCKS)
        for of_minima in range((1 + minima) * self.weighted):
            arguments = (self.found, self.coarse, self.blocks, self.subs, of_minima)
            launch(_search_scales, self.blocks, count, *arguments, width=width, levels=levels, LANES=count)

    def scales(self, kernel: object, out: Tensor, overflow: Tensor, **constants: Any) -> None:
        """One super-block a row of a tile."""
        count = lanes(self.blocks, _SUPER_BLOCKS)
        arguments = (self.found, self.coarse, out, overflow, self.blocks, self.per_row, self.subs)
        launch(kernel, self.blocks, count, *arguments, **constants, weighted=self.weighted, BLOCKS=count)

    def values(self, kernel: object, out: Tensor, *more: Tensor, **constants: Any) -> None:
        """One super-block a row of a tile."""
        count = lanes(self.blocks, _SUPER_BLOCKS)
        arguments = (self.rows, self.found, out, *more, self.blocks, self.subs)
        launch(kernel, self.blocks, count, *arguments, **constants, BLOCKS=count)


def encode_q4_k(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q4_K: f16 d, f16 dmin, 12 bytes of 6-bit scales and minima, 128 bytes of two 4-bit values; 144 bytes."""
    _encode_4_or_5(rows, out, overflow, importance, 15)


def encode_q5_k(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q5_K: as Q4_K with 32 bytes of fifth bits before the 4-bit values; 176 bytes."""
    _encode_4_or_5(rows, out, overflow, importance, 31)


# Q2_K: 16 sub-blocks of 16 weights, 4-bit scales and minima


@kernel
def _search_q2_k(rows, found, importance, sigma2, subs, n, weighted: tl.constexpr, LANES: tl.constexpr):
    sub, live = _blocks(subs, LANES)
    x = load_lanes(rows, sub * 16, 16, live)
    if weighted:
        w, total = _importance_of(importance, sigma2, sub, x, 16, n, live)
        tl.store(_plane(found, subs, WEIGHT) + sub, total, mask=live)
        scale, minimum, inverse, low = search_scale_and_min(x, w, 16, 3, -0.9, 0.05, 37, False, True)
    else:
        w = ()
        for i in tl.static_range(16):
            w = w + (absolute(x[i]),)
        scale, minimum, inverse, low = search_scale_and_min(x, w, 16, 3, -0.5, 0.1, 16, True, False)
    _store_found_with_min(found, subs, sub, scale, minimum, inverse, low, live)


@kernel
def _scales_q2_k(found, coarse, out, overflow, blocks, per_row, subs, weighted: tl.constexpr, BLOCKS: tl.constexpr):
    block, live = _blocks(blocks, BLOCKS)
    b, on = block[:, None], live[:, None]
    d, dmin, by_scale, by_min = _d_and_dmin(found, coarse, subs, blocks, block, 16, 15.0, weighted, live)
    d, dmin = _store_d_and_dmin(out + block * 84 + 80, d, dmin, overflow, block // per_row, live)
    j = tl.arange(0, 16)[None, :]
    at = b * 16 + j
    if weighted:
        scale, minimum = _code(found, subs, SCALE_CODE, at, on), _code(found, subs, MINIMUM_CODE, at, on)
    else:
        scale = nearest(by_scale * tl.load(_plane(found, subs, SCALE) + at, mask=on, other=0.0))
        minimum = nearest(by_min * tl.load(_plane(found, subs, MINIMUM) + at, mask=on, other=0.0))
    byte = (scale | (minimum << 4)) & 255
    store_byte(out + b * 84 + j, byte, on)
    tl.store(_plane(found, subs, STORED_SCALE) + at, d[:, None] * (byte & 15).to(tl.float32), mask=on)
    tl.store(_plane(found, subs, STORED_MINIMUM) + at, dmin[:, None] * (byte >> 4).to(tl.float32), mask=on)


@kernel
def _values_q2_k(rows, found, out, blocks, subs, limit_first: tl.constexpr, BLOCKS: tl.constexpr):
    block, live = _blocks(blocks, BLOCKS)
    b, on = block[:, None], live[:, None]
    byte = tl.arange(0, 64)[None, :]
    values = tl.zeros((BLOCKS, 64), tl.int32)
    for k in tl.static_range(4):
        p = byte // 32 * 128 + 32 * k + byte % 32
        values = values | (_quantized_with_min(rows, found, subs, b, p, 16, 3, limit_first, on) << (2 * k))
    store_byte(out + b * 84 + 16 + byte, values, on)


def encode_q2_k(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q2_K: 16 bytes of 4-bit scales and minima, 64 bytes of four 2-bit values, f16 d, f16 dmin; 84 bytes."""
    work = _Work(rows, 16, importance, 256.0)
    work.search(_search_q2_k)
    work.search_scales(16, 15)
    work.scales(_scales_q2_k, out, overflow)
    work.values(_values_q2_k, out, limit_first=work.weighted)


# Q3_K: 16 sub-blocks of 16 weights, signed 6-bit scales


@triton.jit
def _extreme_scale(scales, block, live):
    """Of the 16 scales of each super-block the first of the largest magnitude, and the magnitude."""
    j = tl.arange(0, 16)[None, :]
    magnitude = absolute(tl.load(scales + block[:, None] * 16 + j, mask=live[:, None], other=0.0))
    magnitude = tl.where(magnitude > 0.0, magnitude, 0.0)
    largest = tl.max(magnitude, axis=1)
    at = tl.min(tl.where(magnitude == largest[:, None], j, 15), axis=1)
    extreme = tl.load(scales + block * 16 + at, mask=live, other=0.0)
    return tl.where(largest > 0.0, extreme, 0.0), largest


@kernel
def _search_q3_k(rows, found, importance, sigma2, values, subs, n, weighted: tl.constexpr, LANES: tl.constexpr):
    """values: int8, what the search quantized to."""
    sub, live = _blocks(subs, LANES)
    x = load_lanes(rows, sub * 16, 16, live)
    if weighted:
        w, total = _importance_of(importance, sigma2, sub, x, 16, n, live)
        tl.store(_plane(found, subs, WEIGHT) + sub, total, mask=live)
        scale, inverse, dead = search_scale(x, w, 16, 4)
        q = ()
        for i in tl.static_range(16):
            q = q + (clamped(inverse * x[i], -4, 3),)
    else:
        scale, dead, q = search_by_coordinates(x, 16, 4)
    stored = ()
    for i in tl.static_range(16):
        stored = stored + (tl.where(dead, 0.0, q[i] + 4.0).to(tl.int8),)
    store_lanes(values, sub * 16, stored, 16, live)
    tl.store(_plane(found, subs, SCALE) + sub, scale, mask=live)


@triton.jit
def _scale_q3_k(found, subs, inverse, at, empty, weighted: tl.constexpr, live):
    """A scale as it is stored, 0 to 63, and as its number, -32 to 31; both 0 where all scales are (`empty`)."""
    if weighted:
        code = _code(found, subs, SCALE_CODE, at, live)
        signed = code - 32
    else:
        signed = int8_value(nearest(inverse * tl.load(_plane(found, subs, SCALE) + at, mask=live, other=0.0)))
        signed = tl.where(signed < 31, signed, 31)
        signed = tl.where(signed > -32, signed, -32)
        code = tl.where(empty, 0, signed + 32)
        signed = tl.where(empty, 0, signed)
    return code, signed


@kernel
def _scales_q3_k(found, coarse, out, overflow, blocks, per_row, subs, weighted: tl.constexpr, BLOCKS: tl.constexpr):
    block, live = _blocks(blocks, BLOCKS)
    b, on = block[:, None], live[:, None]
    extreme, _largest = _extreme_scale(_plane(found, subs, SCALE), block, live)
    nothing = extreme == 0.0
    inverse = tl.div_rn(tl.zeros_like(extreme) - 32.0, extreme)
    if weighted:
        d = tl.load(coarse + block, mask=live, other=0.0)
    else:
        d = tl.where(nothing, 0.0, tl.div_rn(1.0 + tl.zeros_like(inverse), inverse))
    h = half_bits(d)
    store_half(out + block * 110 + 108, h, live)
    report_overflow(overflow, (block // per_row).to(tl.int32), half_is_infinite(h), live)
    inverse, empty = inverse[:, None], nothing[:, None]
    j = b * 16 + tl.arange(0, 16)[None, :]
    _, signed = _scale_q3_k(found, subs, inverse, j, empty, weighted, on)
    tl.store(_plane(found, subs, STORED_SCALE) + j, half_value(h)[:, None] * signed.to(tl.float32), mask=on)
    low = tl.arange(0, 8)[None, :]
    first, _ = _scale_q3_k(found, subs, inverse, b * 16 + low, empty, weighted, on)
    second, _ = _scale_q3_k(found, subs, inverse, b * 16 + 8 + low, empty, weighted, on)
    store_byte(out + b * 110 + 96 + low, (first & 15) | ((second & 15) << 4), on)
    high = tl.arange(0, 4)[None, :]
    upper = tl.zeros((BLOCKS, 4), tl.int32)
    for k in tl.static_range(4):
        code, _ = _scale_q3_k(found, subs, inverse, b * 16 + 4 * k + high, empty, weighted, on)
        upper = upper | ((code >> 4) << (2 * k))
    store_byte(out + b * 110 + 104 + high, upper, on)


@triton.jit
def _quantized_q3_k(rows, found, values, subs, b, p, on):
    """q = x / scale + 4 of weight p of each super-block; where the scale is zero, what the search had."""
    scale = tl.load(_plane(found, subs, STORED_SCALE) + b * 16 + p // 16, mask=on, other=0.0)
    x = tl.load(rows + b * 256 + p, mask=on, other=0.0)
    searched = tl.load(values + b * 256 + p, mask=on, other=0).to(tl.int32)
    return tl.where(scale != 0.0, clamped_int(tl.div_rn(x, scale), -4, 3) + 4, searched)


@kernel
def _values_q3_k(rows, found, out, values, blocks, subs, BLOCKS: tl.constexpr):
    block, live = _blocks(blocks, BLOCKS)
    b, on = block[:, None], live[:, None]
    to = out + b * 110
    i = tl.arange(0, 32)[None, :]
    third_bits = tl.zeros((BLOCKS, 32), tl.int32)
    for bit in tl.static_range(8):
        third_bits = third_bits | ((_quantized_q3_k(rows, found, values, subs, b, 32 * bit + i, on) >> 2) << bit)
    store_byte(to + i, third_bits, on)
    byte = tl.arange(0, 64)[None, :]
    packed = tl.zeros((BLOCKS, 64), tl.int32)
    for k in tl.static_range(4):
        q = _quantized_q3_k(rows, found, values, subs, b, byte // 32 * 128 + 32 * k + byte % 32, on)
        packed = packed | ((q & 3) << (2 * k))
    store_byte(to + 32 + byte, packed, on)


def encode_q3_k(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q3_K: 32 bytes of high bits, 64 bytes of four 2-bit values, 12 bytes of 6-bit scales, f16 d; 110 bytes."""
    work = _Work(rows, 16, importance, 128.0)
    values = torch.empty(rows.numel(), dtype=torch.int8, device=rows.device)
    work.search(_search_q3_k, values)
    work.search_scales(16, 64, minima=False)
    work.scales(_scales_q3_k, out, overflow)
    work.values(_values_q3_k, out, values)


# Q6_K: 16 sub-blocks of 16 weights, 8-bit scales


@kernel
def _search_q6_k(rows, found, importance, sigma2, subs, n, weighted: tl.constexpr, LANES: tl.constexpr):
    """Errors are weighed by x * x, or by the importance alone."""
    sub, live = _blocks(subs, LANES)
    x = load_lanes(rows, sub * 16, 16, live)
    if weighted:
        w = load_lanes(importance, sub % (n // 16) * 16, 16, live)
    else:
        w = ()
        for i in tl.static_range(16):
            w = w + (x[i] * x[i],)
    scale, used, dead = search_scale(x, w, 16, 32)
    tl.store(_plane(found, subs, SCALE) + sub, scale, mask=live)
    tl.store(_plane(found, subs, INVERSE) + sub, used, mask=live)
    tl.store(_plane(found, subs, LOW) + sub, tl.where(dead, 1.0, 0.0), mask=live)


@kernel
def _scales_q6_k(found, coarse, out, overflow, blocks, per_row, subs, weighted: tl.constexpr, BLOCKS: tl.constexpr):
    """A super-block of zeros is all zero bytes: STORED_MINIMUM, which Q6_K has no minimum for, is 0 there, else 1."""
    block, live = _blocks(blocks, BLOCKS)
    b, on = block[:, None], live[:, None]
    scales = _plane(found, subs, SCALE)
    extreme, largest = _extreme_scale(scales, block, live)
    nothing = largest < GROUP_MAX_EPS
    inverse = tl.div_rn(tl.zeros_like(extreme) - 128.0, extreme)
    h = half_bits(tl.where(nothing, 0.0, tl.div_rn(1.0 + tl.zeros_like(inverse), inverse)))
    store_half(out + block * 210 + 208, h, live)
    report_overflow(overflow, (block // per_row).to(tl.int32), half_is_infinite(h), live)
    j = tl.arange(0, 16)[None, :]
    stored = nearest(inverse[:, None] * tl.load(scales + b * 16 + j, mask=on, other=0.0))
    stored = int8_value(tl.where(stored < 127, stored, 127))
    store_byte(out + b * 210 + 192 + j, tl.where(nothing[:, None], 0, stored), on)
    meaning = half_value(h)[:, None] * stored.to(tl.float32)
    tl.store(_plane(found, subs, STORED_SCALE) + b * 16 + j, meaning, mask=on)
    tl.store(_plane(found, subs, STORED_MINIMUM) + b * 16 + j, tl.where(nothing[:, None], 0.0, 1.0), mask=on)


@triton.jit
def _quantized_q6_k(rows, found, subs, b, p, on):
    """q = x / scale + 32 of weight p of each super-block; where the scale is zero, what the search had."""
    sub = b * 16 + p // 16
    scale = tl.load(_plane(found, subs, STORED_SCALE) + sub, mask=on, other=0.0)
    used = tl.load(_plane(found, subs, INVERSE) + sub, mask=on, other=0.0)
    dead = tl.load(_plane(found, subs, LOW) + sub, mask=on, other=0.0)
    alive = tl.load(_plane(found, subs, STORED_MINIMUM) + sub, mask=on, other=0.0)
    x = tl.load(rows + b * 256 + p, mask=on, other=0.0)
    value = tl.where(scale != 0.0, tl.div_rn(x, scale), used * x)
    offset = tl.where((scale == 0.0) & (dead != 0.0), 0, 32)  # a sub-block without weights: its values are 0, not 32
    return tl.where(alive != 0.0, clamped_int(value, -32, 31) + offset, 0)


@kernel
def _values_q6_k(rows, found, out, blocks, subs, BLOCKS: tl.constexpr):
    block, live = _blocks(blocks, BLOCKS)
    b, on = block[:, None], live[:, None]
    to = out + b * 210
    byte = tl.arange(0, 128)[None, :]
    p = byte // 64 * 128 + byte % 64
    low, upper = _quantized_q6_k(rows, found, subs, b, p, on), _quantized_q6_k(rows, found, subs, b, p + 64, on)
    store_byte(to + byte, (low & 15) | ((upper & 15) << 4), on)
    byte = tl.arange(0, 64)[None, :]
    high = tl.zeros((BLOCKS, 64), tl.int32)
    for k in tl.static_range(4):
        q = _quantized_q6_k(rows, found, subs, b, byte // 32 * 128 + 32 * k + byte % 32, on)
        high = high | ((q >> 4) << (2 * k))
    store_byte(to + 128 + byte, high, on)


def encode_q6_k(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q6_K: 128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 int8 scales, f16 d; 210 bytes."""
    work = _Work(rows, 16, importance)
    work.search(_search_q6_k)
    work.scales(_scales_q6_k, out, overflow)
    work.values(_values_q6_k, out)
