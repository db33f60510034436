"""GPU kernels of GGML's 32-weight blocks: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, as legacy_cpu.py and legacy_weighted_cpu.py.

A program takes some blocks, a row of a tile each. With the importance of columns a search comes first, one block a
thread, which leaves float32[4, blocks]: scale, then 1 for a block of zeros or the minimum, then the inverse scale and
the minimum that the quantized values are made with.

Every encoder takes float32[r, n], uint8[r, bytes], int32[1], and float32[n] or None on a device. It fills the bytes and
lowers the int32 to the first row in which a scale (or minimum) overflows float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamquant.quant.kernels.bits_gpu import (
    ABS,
    INFINITY,
    bits_float,
    clamped_int,
    float_bits,
    half_bits,
    half_is_infinite,
    kernel,
    lanes,
    launch,
    negative,
    report_overflow,
    rounded,
    store_byte,
    store_half,
)
from streamquant.quant.kernels.search_gpu import (
    load_lanes,
    search_scale,
    search_scale_and_min,
    sums_of_squares,
    weighed,
)

QK = 32
_BLOCKS = 64  # in a program of tiles
_SEARCHED = 128  # blocks in a program of a search: one a thread
_ROWS = 32  # in a program that sums up whole rows


@triton.jit
def _inverse(scale):
    """1 / scale, or 0 where it is infinite."""
    inverse = tl.div_rn(1.0 + tl.zeros_like(scale), scale)
    return tl.where((float_bits(inverse) & ABS) == INFINITY, 0.0, inverse)


@triton.jit
def _rounded(x):
    """C's roundf, half away from zero: add the float before 0.5 with the sign of x, truncate."""
    half = bits_float((float_bits(x) & -0x80000000) | 0x3EFFFFFF)
    return (x + half).to(tl.int32)


@kernel
def _q8_0(rows, out, overflow, blocks, per_row, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    i = tl.arange(0, 32)[None, :]
    x = tl.load(rows + block[:, None] * 32 + i, mask=live[:, None], other=0.0)
    amax = bits_float(tl.max(float_bits(x) & ABS, axis=1))
    d = tl.div_rn(amax, 127.0 + tl.zeros_like(amax))
    h = half_bits(d)
    store_half(out + block * 34, h, live)
    store_byte(out + block[:, None] * 34 + 2 + i, _rounded(x * _inverse(d)[:, None]), live[:, None])
    report_overflow(overflow, (block // per_row).to(tl.int32), half_is_infinite(h), live)


@triton.jit
def _first(a, b, u, i):
    """The index of the first weight of a block (a and b are its halves) with the bits u; 32 if there is none."""
    at_a = tl.min(tl.where(a == u[:, None], i, 32), axis=1)
    at_b = tl.min(tl.where(b == u[:, None], i + 16, 32), axis=1)
    return tl.where(at_a < at_b, at_a, at_b)


@triton.jit
def _limited(x, most: tl.constexpr):
    """Truncated to an integer, at most `most`."""
    i = x.to(tl.int32)
    return tl.where(i < most, i, most)


@triton.jit
def _store_values(out, block, low, high, i, size: tl.constexpr, fifth: tl.constexpr, live):
    """16 bytes of two 4-bit values at the end of the block, before them 32 fifth bits where there are any."""
    if fifth:
        bits = tl.where(low > 15, 1 << i, 0) | tl.where(high > 15, 0x10000 << i, 0)
        bits = tl.sum(bits, axis=1)  # one bit each
        for k in tl.static_range(4):
            store_byte(out + block * size + (size - 20 + k), bits >> (8 * k), live)
    store_byte(out + block[:, None] * size + (size - 16) + i, (low & 15) | ((high & 15) << 4), live[:, None])


@kernel
def _signed(rows, out, overflow, blocks, per_row, half: tl.constexpr, BLOCKS: tl.constexpr):
    """Q4_0 and Q5_0: d = extreme / -half, q = min(2 half - 1, trunc(x / d + half + 0.5))."""
    size: tl.constexpr = 18 if half == 8 else 22
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    i = tl.arange(0, 16)[None, :]
    a = tl.load(rows + block[:, None] * 32 + i, mask=live[:, None], other=0.0)
    b = tl.load(rows + block[:, None] * 32 + 16 + i, mask=live[:, None], other=0.0)
    magnitude_a, magnitude_b = float_bits(a) & ABS, float_bits(b) & ABS
    u = tl.maximum(tl.max(magnitude_a, axis=1), tl.max(magnitude_b, axis=1))
    extreme = tl.load(rows + block * 32 + _first(magnitude_a, magnitude_b, u, i), mask=live, other=0.0)
    d = tl.div_rn(tl.where(u == 0, 0.0, extreme), tl.zeros_like(extreme) - half)
    inverse = tl.div_rn(1.0 + tl.zeros_like(d), d)
    # d == 0: ggml uses 0 for 1 / d, all values are `half`. Otherwise, where 1 / d is infinite, all values are 0.
    infinite = (float_bits(inverse) & ABS) == INFINITY
    offset = tl.where(infinite & (d != 0.0), 0.0, half + 0.5)[:, None]
    inverse = tl.where(infinite, 0.0, inverse)[:, None]
    h = half_bits(d)
    store_half(out + block * size, h, live)
    low, high = _limited(a * inverse + offset, 2 * half - 1), _limited(b * inverse + offset, 2 * half - 1)
    _store_values(out, block, low, high, i, size, half == 16, live)
    report_overflow(overflow, (block // per_row).to(tl.int32), half_is_infinite(h), live)


@triton.jit
def _ordered(x):
    """Floats as integers of the same order."""
    i = float_bits(x)
    return i ^ ((i >> 31) & ABS)


@kernel
def _with_minimum(rows, out, overflow, blocks, per_row, levels: tl.constexpr, BLOCKS: tl.constexpr):
    """Q4_1 and Q5_1: m = min, d = (max - min) / levels, q = min(levels, trunc((x - m) / d + 0.5))."""
    size: tl.constexpr = 20 if levels == 15 else 24
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    i = tl.arange(0, 16)[None, :]
    a = tl.load(rows + block[:, None] * 32 + i, mask=live[:, None], other=0.0)
    b = tl.load(rows + block[:, None] * 32 + 16 + i, mask=live[:, None], other=0.0)
    least = tl.minimum(tl.min(_ordered(a), axis=1), tl.min(_ordered(b), axis=1))
    most = tl.maximum(tl.max(_ordered(a), axis=1), tl.max(_ordered(b), axis=1))
    m = bits_float(least ^ ((least >> 31) & ABS))
    # Of zeros of both signs the minimum is the first, as with C's `<`.
    first_zero = _first(float_bits(a) & ABS, float_bits(b) & ABS, tl.zeros_like(least), i)
    zero = tl.load(rows + block * 32 + first_zero, mask=live & (first_zero < 32), other=0.0)
    m = tl.where(m == 0.0, zero, m)
    d = tl.div_rn(bits_float(most ^ ((most >> 31) & ABS)) - m, levels + tl.zeros_like(m))
    inverse, low = _inverse(d)[:, None], m[:, None]
    d_bits, m_bits = half_bits(d), half_bits(m)
    store_half(out + block * size, d_bits, live)
    store_half(out + block * size + 2, m_bits, live)
    qa, qb = _limited((a - low) * inverse + 0.5, levels), _limited((b - low) * inverse + 0.5, levels)
    _store_values(out, block, qa, qb, i, size, levels == 31, live)
    infinite = half_is_infinite(d_bits) | half_is_infinite(m_bits)
    report_overflow(overflow, (block // per_row).to(tl.int32), infinite, live)


@kernel
def _search_signed(rows, importance, sigma2, found, subs, per_row, half: tl.constexpr, LANES: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = block < subs
    x = load_lanes(rows, block * 32, 32, live)
    spread = tl.load(sigma2 + block // per_row, mask=live, other=0.0)
    w, _total = weighed(x, importance, block % per_row * 32, spread, 32, live)
    scale, inverse, dead = search_scale(x, w, 32, half)
    tl.store(found + block, scale, mask=live)
    tl.store(found + subs + block, tl.where(dead, 1.0, 0.0), mask=live)
    tl.store(found + 2 * subs + block, inverse, mask=live)


@kernel
def _store_signed(rows, found, out, overflow, blocks, per_row, half: tl.constexpr, BLOCKS: tl.constexpr):
    """x ~ d * (q - half) with 0 <= q < 2 half; a block without weights has q = 0."""
    size: tl.constexpr = 18 if half == 8 else 22
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    i = tl.arange(0, 16)[None, :]
    a = tl.load(rows + block[:, None] * 32 + i, mask=live[:, None], other=0.0)
    b = tl.load(rows + block[:, None] * 32 + 16 + i, mask=live[:, None], other=0.0)
    h = half_bits(tl.load(found + block, mask=live, other=0.0))
    dead = tl.load(found + blocks + block, mask=live, other=0.0)[:, None]
    inverse = tl.load(found + 2 * blocks + block, mask=live, other=0.0)[:, None]
    store_half(out + block * size, h, live)
    offset = tl.where(dead == 0.0, half, 0)
    low, high = clamped_int(inverse * a, -half, half - 1) + offset, clamped_int(inverse * b, -half, half - 1) + offset
    _store_values(out, block, low, high, i, size, half == 16, live)
    report_overflow(overflow, (block // per_row).to(tl.int32), half_is_infinite(h), live)


@kernel
def _search_with_minimum(rows, importance, sigma2, found, subs, per_row, levels: tl.constexpr, LANES: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = block < subs
    x = load_lanes(rows, block * 32, 32, live)
    spread = tl.load(sigma2 + block // per_row, mask=live, other=0.0)
    w, _total = weighed(x, importance, block % per_row * 32, spread, 32, live)
    scale, minimum, inverse, low = search_scale_and_min(x, w, 32, levels, -0.9, 0.05, 37, False, True)
    tl.store(found + block, scale, mask=live)
    tl.store(found + subs + block, negative(minimum), mask=live)
    tl.store(found + 2 * subs + block, inverse, mask=live)
    tl.store(found + 3 * subs + block, low, mask=live)


@kernel
def _store_with_minimum(rows, found, out, overflow, blocks, per_row, levels: tl.constexpr, BLOCKS: tl.constexpr):
    """x ~ d * q + m with 0 <= q <= levels."""
    size: tl.constexpr = 20 if levels == 15 else 24
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    i = tl.arange(0, 16)[None, :]
    a = tl.load(rows + block[:, None] * 32 + i, mask=live[:, None], other=0.0)
    b = tl.load(rows + block[:, None] * 32 + 16 + i, mask=live[:, None], other=0.0)
    d_bits = half_bits(tl.load(found + block, mask=live, other=0.0))
    m_bits = half_bits(tl.load(found + blocks + block, mask=live, other=0.0))
    inverse = tl.load(found + 2 * blocks + block, mask=live, other=0.0)[:, None]
    low = tl.load(found + 3 * blocks + block, mask=live, other=0.0)[:, None]
    store_half(out + block * size, d_bits, live)
    store_half(out + block * size + 2, m_bits, live)
    qa = rounded(inverse * (a - low), levels).to(tl.int32)
    qb = rounded(inverse * (b - low), levels).to(tl.int32)
    _store_values(out, block, qa, qb, i, size, levels == 31, live)
    infinite = half_is_infinite(d_bits) | half_is_infinite(m_bits)
    report_overflow(overflow, (block // per_row).to(tl.int32), infinite, live)


def _run(kernel: object, rows: Tensor, out: Tensor, overflow: Tensor, **constants: int) -> None:
    blocks, per_row = rows.numel() // QK, rows.shape[1] // QK
    count = lanes(blocks, _BLOCKS)
    launch(kernel, blocks, count, rows, out, overflow, blocks, per_row, **constants, BLOCKS=count)


def _run_weighted(
    kernels: tuple[object, object],
    rows: Tensor,
    out: Tensor,
    overflow: Tensor,
    importance: Tensor,
    **constants: int,
) -> None:
    r, n = rows.shape
    blocks, per_row = rows.numel() // QK, n // QK
    sigma2 = torch.empty(r, dtype=torch.float32, device=rows.device)
    found = torch.empty((4, blocks), dtype=torch.float32, device=rows.device)
    width = lanes(r, _ROWS)
    launch(sums_of_squares, r, width, rows, sigma2, r, n, float(n), LANES=width)
    width, count = lanes(blocks, _SEARCHED), lanes(blocks, _BLOCKS)
    launch(kernels[0], blocks, width, rows, importance, sigma2, found, blocks, per_row, **constants, LANES=width)
    launch(kernels[1], blocks, count, rows, found, out, overflow, blocks, per_row, **constants, BLOCKS=count)


def encode_q8_0(rows: Tensor, out: Tensor, overflow: Tensor, _importance: Tensor | None) -> None:
    """Q8_0: float16 d, int8[32]; 34 bytes. Importance makes no difference."""
    _run(_q8_0, rows, out, overflow)


def _encode_signed(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None, half: int) -> None:
    if importance is None:
        _run(_signed, rows, out, overflow, half=half)
    else:
        _run_weighted((_search_signed, _store_signed), rows, out, overflow, importance, half=half)


def _encode_with_minimum(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None, levels: int) -> None:
    if importance is None:
        _run(_with_minimum, rows, out, overflow, levels=levels)
    else:
        kernels = (_search_with_minimum, _store_with_minimum)
        _run_weighted(kernels, rows, out, overflow, importance, levels=levels)


def encode_q4_0(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q4_0: float16 d, 16 bytes of two 4-bit values; 18 bytes."""
    _encode_signed(rows, out, overflow, importance, 8)


def encode_q5_0(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q5_0: float16 d, 32 fifth bits, 16 bytes of two 4-bit values; 22 bytes."""
    _encode_signed(rows, out, overflow, importance, 16)


def encode_q4_1(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q4_1: float16 d, float16 m, 16 bytes of two 4-bit values; 20 bytes."""
    _encode_with_minimum(rows, out, overflow, importance, 15)


def encode_q5_1(rows: Tensor, out: Tensor, overflow: Tensor, importance: Tensor | None) -> None:
    """Q5_1: float16 d, float16 m, 32 fifth bits, 16 bytes of two 4-bit values; 24 bytes."""
    _encode_with_minimum(rows, out, overflow, importance, 31)
