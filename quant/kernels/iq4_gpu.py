"""GPU kernels of GGML's IQ4_NL and IQ4_XS, as iq4_cpu.py has them: a search with one block of 32 weights a thread, then
tiles that store scales and indices.

Every encoder takes float32[r, n], uint8[r, bytes], int32[1], and float32[n] or None on a device. It fills the bytes and
lowers the int32 to the first row in which a scale overflows float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamquant.quant.kernels.bits_gpu import (
    absolute,
    clamped_int,
    half_bits,
    half_is_infinite,
    kernel,
    lanes,
    launch,
    negative,
    report_overflow,
    store_byte,
    store_half,
)
from streamquant.quant.kernels.iq4_cpu import LEVELS
from streamquant.quant.kernels.search_gpu import GROUP_MAX_EPS, extreme_of, load_lanes, sums_of_squares, weighed

QK = 32
_SEARCHED = 128  # blocks in a program of a search: one a thread
_BLOCKS = 64  # in a program of tiles
_SUPER_BLOCKS = 8  # in a program of tiles
_LEVELS = tl.constexpr(tuple(float(level) for level in LEVELS))


@triton.jit
def _level(x):
    """The level nearest to x; at a point halfway, the upper one; the lowest for NaN."""
    level = tl.zeros_like(x) + _LEVELS[0]
    for j in tl.static_range(15):
        level = tl.where(x >= (_LEVELS[j] + _LEVELS[j + 1]) / 2, _LEVELS[j + 1], level)
    return level


@triton.jit
def _index(x):
    """The index of the level nearest to x, int32."""
    index = tl.zeros_like(x).to(tl.int32)
    for j in tl.static_range(15):
        index = tl.where(x >= (_LEVELS[j] + _LEVELS[j + 1]) / 2, j + 1, index)
    return index


@triton.jit
def _products(x, w, inverse):
    """sum w level x and sum w level level."""
    sum_lx, sum_l2 = tl.zeros_like(inverse), tl.zeros_like(inverse)
    for i in tl.static_range(32):
        level = _level(inverse * x[i])
        wl = w[i] * level
        sum_lx, sum_l2 = sum_lx + wl * x[i], sum_l2 + wl * level
    return sum_lx, sum_l2


@kernel
def _search(rows, importance, sigma2, scales, subs, per_row, per_sigma, weighted: tl.constexpr, LANES: tl.constexpr):
    """The scale of every block: x ~ scale * level with the least weighted error of 16 trials."""
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = block < subs
    x = load_lanes(rows, block * 32, 32, live)
    if weighted:
        spread = tl.load(sigma2 + block // per_sigma, mask=live, other=0.0)
        w, _total = weighed(x, importance, block % per_row * 32, spread, 32, live)
    else:
        w = ()
        for i in tl.static_range(32):
            w = w + (x[i] * x[i],)
    extreme, largest = extreme_of(x, 32)
    lowest = tl.zeros_like(extreme) + _LEVELS[0]
    inverse = tl.div_rn(1.0 + tl.zeros_like(extreme), tl.div_rn(negative(extreme), lowest))
    sum_lx, sum_l2 = _products(x, w, inverse)
    scale = tl.where(sum_l2 > 0.0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    number = tl.zeros_like(extreme) - 7.0
    for _ in range(15):
        sum_lx, sum_l2 = _products(x, w, tl.div_rn(number + lowest, extreme))
        number += 1.0
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        scale = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale)
        best = tl.where(better, scale * sum_lx, best)
    tl.store(scales + block, tl.where(largest < GROUP_MAX_EPS, 0.0, scale), mask=live)


@triton.jit
def _inverse(x):
    """1 / x; 0 for 0."""
    return tl.where(x != 0.0, tl.div_rn(1.0 + tl.zeros_like(x), x), 0.0)


@kernel
def _store_nl(rows, scales, out, overflow, blocks, per_row, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    b, on = block[:, None], live[:, None]
    d = tl.load(scales + block, mask=live, other=0.0)
    h = half_bits(d)
    store_half(out + block * 18, h, live)
    report_overflow(overflow, (block // per_row).to(tl.int32), half_is_infinite(h), live)
    inverse = _inverse(d)[:, None]
    i = tl.arange(0, 16)[None, :]
    low = _index(inverse * tl.load(rows + b * 32 + i, mask=on, other=0.0))
    high = _index(inverse * tl.load(rows + b * 32 + 16 + i, mask=on, other=0.0))
    store_byte(out + b * 18 + 2 + i, low | (high << 4), on)


@triton.jit
def _6_bits(scales, inverse, at, live):
    """A scale of a block as its stored number, -32 to 31."""
    return clamped_int(inverse * tl.load(scales + at, mask=live, other=0.0), -32, 31)


@kernel
def _store_xs(rows, scales, out, overflow, blocks, per_row, BLOCKS: tl.constexpr):
    """The indices are made with d as it was before it became float16."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    b, on = block[:, None], live[:, None]
    j = tl.arange(0, 8)[None, :]
    magnitude = absolute(tl.load(scales + b * 8 + j, mask=on, other=0.0))
    magnitude = tl.where(magnitude > 0.0, magnitude, 0.0)
    largest = tl.max(magnitude, axis=1)
    at = tl.min(tl.where(magnitude == largest[:, None], j, 7), axis=1)
    extreme = tl.where(largest > 0.0, tl.load(scales + block * 8 + at, mask=live, other=0.0), 0.0)
    d = tl.div_rn(negative(extreme), 32.0 + tl.zeros_like(extreme))
    h = half_bits(d)
    store_half(out + block * 136, h, live)
    report_overflow(overflow, (block // per_row).to(tl.int32), half_is_infinite(h), live)
    inverse, d = _inverse(d)[:, None], d[:, None]
    for k in tl.static_range(2):
        bit = tl.arange(0, 1)[None, :]
        high = tl.zeros((BLOCKS, 1), tl.int32)
        for part in tl.static_range(4):
            high = high | (((_6_bits(scales, inverse, b * 8 + 4 * k + part + bit, on) + 32) >> 4) << (2 * part))
        store_byte(out + b * 136 + 2 + k + bit, high, on)
    i = tl.arange(0, 4)[None, :]
    low = (_6_bits(scales, inverse, b * 8 + 2 * i, on) + 32) & 15
    upper = (_6_bits(scales, inverse, b * 8 + 2 * i + 1, on) + 32) & 15
    store_byte(out + b * 136 + 4 + i, low | (upper << 4), on)
    byte = tl.arange(0, 128)[None, :]
    by_block = _inverse(d * _6_bits(scales, inverse, b * 8 + byte // 16, on).to(tl.float32))
    p = b * 256 + byte // 16 * 32 + byte % 16
    low = _index(by_block * tl.load(rows + p, mask=on, other=0.0))
    high = _index(by_block * tl.load(rows + p + 16, mask=on, other=0.0))
    store_byte(out + b * 136 + 8 + byte, low | (high << 4), on)


def _block_scales(rows: Tensor, importance: Tensor | None, per_sigma: int) -> Tensor:
    """The scales of all blocks; runs of `per_sigma` blocks share the mean of squares that weighs errors."""
    blocks, per_row = rows.numel() // QK, rows.shape[1] // QK
    scales = torch.empty(blocks, dtype=torch.float32, device=rows.device)
    sigma2 = scales
    if importance is not None:
        runs = blocks // per_sigma
        sigma2 = torch.empty(runs, dtype=torch.float32, device=rows.device)
        width = lanes(runs, _SEARCHED)
        launch(sums_of_squares, runs, width, rows, sigma2, runs, QK * per_sigma, 16.0 * per_sigma, LANES=width)
    width = lanes(blocks, _SEARCHED)
    arguments = (rows, rows if importance is None else importance, sigma2, scales, blocks, per_row, per_sigma)
    launch(_search, blocks, width, *arguments, weighted=importance is not None, LANES=width)
    return scales


def encode_iq4_nl(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """IQ4_NL: f16 d, 16 bytes of two 4-bit indices; 18 bytes."""
    scales = _block_scales(rows, importance, 1)
    blocks = rows.numel() // QK
    count = lanes(blocks, _BLOCKS)
    launch(_store_nl, blocks, count, rows, scales, out, overflow, blocks, rows.shape[1] // QK, BLOCKS=count)


def encode_iq4_xs(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """IQ4_XS: f16 d, 2 + 4 bytes of 6-bit scales, 128 bytes of two 4-bit indices; 136 bytes."""
    scales = _block_scales(rows, importance, 8)
    blocks = rows.numel() // (8 * QK)
    count = lanes(blocks, _SUPER_BLOCKS)
    launch(_store_xs, blocks, count, rows, scales, out, overflow, blocks, rows.shape[1] // (8 * QK), BLOCKS=count)
