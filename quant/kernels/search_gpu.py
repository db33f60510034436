"""The scale searches that GGML's K-quants share, one sub-block per GPU thread.

These are the searches of search_cpu.py, operation for operation: a lane here is a lane there. The weights of a
sub-block are a tuple of lanes (x[i] is weight i of every sub-block), so they live in registers and sums run in order.
"""

import triton
import triton.language as tl

from streamquant.quant.kernels.bits_gpu import absolute, clamped, kernel, nearest, negative, rounded

GROUP_MAX_EPS = tl.constexpr(1e-15)  # below it a sub-block counts as zero


@triton.jit
def load_lanes(flat, start, width: tl.constexpr, live):
    """A tuple of `width` lanes: the weights at flat[start + i]; zero where a lane has no sub-block.

    One load of a tile, cut in half until its columns are apart: threads that load side by side, and one operation for
    the compiler to place, whose time grows with loads times arithmetic.
    """
    column = tl.arange(0, width)[None, :]
    parts = (tl.load(flat + start[:, None] + column, mask=live[:, None], other=0.0),)
    count: tl.constexpr = start.shape[0]
    for level in tl.static_range(width.bit_length() - 1):
        halves = ()
        for k in tl.static_range(1 << level):
            pairs = tl.permute(tl.reshape(parts[k], (count, 2, width >> (level + 1))), (0, 2, 1))
            halves = halves + tl.split(pairs)
        parts = halves
    x = ()
    for i in tl.static_range(width):
        x = x + (tl.reshape(parts[i], (count,)),)
    return x


@triton.jit
def store_lanes(flat, start, x, width: tl.constexpr, live):
    """The inverse of `load_lanes`: a tuple of `width` lanes to flat[start + i], as one tile."""
    count: tl.constexpr = start.shape[0]
    parts = ()
    for i in tl.static_range(width):
        parts = parts + (tl.reshape(x[i], (count, 1)),)
    for level in tl.static_range(width.bit_length() - 1):
        joined = ()
        for k in tl.static_range(width >> (level + 1)):
            pair = tl.permute(tl.join(parts[2 * k], parts[2 * k + 1]), (0, 2, 1))
            joined = joined + (tl.reshape(pair, (count, 2 << level)),)
        parts = joined
    tl.store(flat + start[:, None] + tl.arange(0, width)[None, :], parts[0], mask=live[:, None])


@kernel
def sums_of_squares(flat, out, subs, length, divisor, LANES: tl.constexpr):
    """out[k] = sum of x * x over the k-th of `subs` runs of `length` (a multiple of 16) values, in order, / divisor."""
    run = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = run < subs
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, length, 16):
        for i in tl.static_range(16):
            x = tl.load(flat + run * length + (start + i), mask=live, other=0.0)
            total = total + x * x
    tl.store(out + run, tl.div_rn(total, divisor + tl.zeros_like(total)), mask=live)


@triton.jit
def weighed(x, importance, column, spread, width: tl.constexpr, live):
    """Weights of errors, importance[column + i] * sqrt(spread + x[i] * x[i]), and their sums."""
    total = tl.zeros_like(x[0])
    importances = load_lanes(importance, column, width, live)
    w = ()
    for i in tl.static_range(width):
        weight = importances[i] * tl.sqrt_rn(spread + x[i] * x[i])
        w = w + (weight,)
        total = total + weight
    return w, total


@triton.jit
def search_scale_and_min(
    x,
    w,
    width: tl.constexpr,
    levels: tl.constexpr,
    first: tl.constexpr,
    step: tl.constexpr,
    count: tl.constexpr,
    use_mad: tl.constexpr,
    limit_first: tl.constexpr,
):
    """make_qkx2_quants and, with limit_first, make_qkx3_quants: x ~ scale * q + min with 0 <= q <= levels.

    The least weighted error over `count` scales. Returns scale, -min, and the inverse scale and the minimum that the
    quantized values were made with.
    """
    low, high = x[0], x[0]
    sum_w, sum_x = w[0], w[0] * x[0]
    for i in tl.static_range(1, width):
        low, high = tl.where(x[i] < low, x[i], low), tl.where(x[i] > high, x[i], high)
        sum_w, sum_x = sum_w + w[i], sum_x + w[i] * x[i]
    low = tl.where(low > 0.0, 0.0, low)
    flat = high == low
    inverse = tl.div_rn(levels + tl.zeros_like(low), high - low)
    scale = tl.div_rn(1.0 + tl.zeros_like(low), inverse)
    q = ()
    for i in tl.static_range(width):
        q = q + (clamped(inverse * (x[i] - low), 0, levels),)
    best = _error(x, w, q, width, scale, low, use_mad)
    best = tl.where(flat, -1.0, best)  # no error is smaller: a sub-block without a range stays as it is
    all_zero = flat | (inverse == float("inf"))  # `nearest` of an infinity is below all levels
    used_inverse, used_low = tl.where(all_zero, 0.0, inverse), low
    number = tl.zeros_like(low)
    for _ in range(count):
        inverse = tl.div_rn((first + step * number) + levels, high - low)
        number += 1.0
        sum_l, sum_l2, sum_xl = tl.zeros_like(low), tl.zeros_like(low), tl.zeros_like(low)
        trial_q = ()
        for i in tl.static_range(width):
            quotient = inverse * (x[i] - low)
            value = rounded(quotient, levels) if limit_first else clamped(quotient, 0, levels)
            trial_q = trial_q + (value,)
            wq = w[i] * value
            sum_l, sum_l2, sum_xl = sum_l + wq, sum_l2 + wq * value, sum_xl + wq * x[i]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_low = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        positive = new_low > 0.0
        new_scale = tl.where(positive, tl.div_rn(sum_xl, sum_l2), new_scale)
        new_low = tl.where(positive, 0.0, new_low)
        error = _error(x, w, trial_q, width, new_scale, new_low, use_mad)
        better = (error < best) & (determinant > 0.0)
        best = tl.where(better, error, best)
        scale = tl.where(better, new_scale, scale)
        used_inverse, used_low = tl.where(better, inverse, used_inverse), tl.where(better, low, used_low)
        low = tl.where(better, new_low, low)
    return tl.where(flat, 0.0, scale), negative(low), used_inverse, used_low


@triton.jit
def _error(x, w, q, width: tl.constexpr, scale, minimum, use_mad: tl.constexpr):
    """Weighted error of scale * q + minimum."""
    error = tl.zeros_like(scale)
    for i in tl.static_range(width):
        difference = scale * q[i] + minimum - x[i]
        loss = absolute(difference) if use_mad else difference * difference
        error = error + w[i] * loss
    return error


@triton.jit
def extreme_of(x, width: tl.constexpr):
    """The weight of the largest magnitude in each lane, with its sign, the first of several; and the magnitude."""
    extreme, largest = tl.zeros_like(x[0]), tl.zeros_like(x[0])
    for i in tl.static_range(width):
        larger = absolute(x[i]) > largest
        extreme, largest = tl.where(larger, x[i], extreme), tl.where(larger, absolute(x[i]), largest)
    return extreme, largest


@triton.jit
def search_scale(x, w, width: tl.constexpr, levels: tl.constexpr):
    """make_qx_quants with rmse_type 1: x ~ scale * q with -levels <= q < levels, weights w, over 19 scales.

    Returns scale, the inverse scale that the quantized values were made with, and whether the sub-block is zero.
    """
    extreme, largest = extreme_of(x, width)
    dead = largest < GROUP_MAX_EPS
    inverse = tl.div_rn(tl.zeros_like(extreme) - levels, extreme)
    sum_lx, sum_l2 = _products(x, w, width, inverse, levels)
    scale = tl.where(sum_l2 == 0.0, 0.0, tl.div_rn(sum_lx, sum_l2))
    best = scale * sum_lx
    used = inverse
    number = tl.zeros_like(extreme) - 10.0
    for _ in range(18):
        number = tl.where(number == -1.0, 1.0, number + 1.0)  # -9 to 9 without 0
        inverse = tl.div_rn(negative(levels + 0.1 * number), extreme)
        sum_lx, sum_l2 = _products(x, w, width, inverse, levels)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        scale = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale)
        best = tl.where(better, scale * sum_lx, best)
        used = tl.where(better, inverse, used)
    return tl.where(dead, 0.0, scale), tl.where(dead, 0.0, used), dead


@triton.jit
def _products(x, w, width: tl.constexpr, inverse, levels: tl.constexpr):
    """sum w x q and sum w q q."""
    sum_lx, sum_l2 = tl.zeros_like(inverse), tl.zeros_like(inverse)
    for i in tl.static_range(width):
        q = clamped(inverse * x[i], -levels, levels - 1)
        sum_lx, sum_l2 = sum_lx + w[i] * x[i] * q, sum_l2 + w[i] * q * q
    return sum_lx, sum_l2


@triton.jit
def search_positive_scale(x, w, width: tl.constexpr, levels: tl.constexpr):
    """make_qp_quants: x ~ scale * q with 0 <= q <= levels, weights w; 9 scales, then one value after another.

    It quantizes the scales of sub-blocks. Returns the scale and a tuple of the quantized values, 0 to 255: negative
    ones wrap, as bytes do in C.
    """
    high = tl.zeros_like(x[0])
    for i in tl.static_range(width):
        high = tl.where(x[i] > high, x[i], high)
    dead = high < GROUP_MAX_EPS
    inverse = tl.div_rn(levels + tl.zeros_like(high), high)
    scale = tl.div_rn(1.0 + tl.zeros_like(high), inverse)
    best = tl.zeros_like(high)
    for i in tl.static_range(width):
        difference = x[i] - scale * (nearest(inverse * x[i]) & 255).to(tl.float32)
        best = best + w[i] * difference * difference
    number = tl.zeros_like(high) - 5.0
    for _ in range(8):
        number = tl.where(number == -1.0, 1.0, number + 1.0)  # -4 to 4 without 0
        trial = tl.div_rn(0.1 * number + levels, high)
        scale = tl.div_rn(1.0 + tl.zeros_like(high), trial)
        error = tl.zeros_like(high)
        for i in tl.static_range(width):
            difference = x[i] - scale * _at_most(nearest(trial * x[i]), levels).to(tl.float32)
            error = error + w[i] * difference * difference
        better = error < best
        best, inverse = tl.where(better, error, best), tl.where(better, trial, inverse)
    sum_lx, sum_l2 = tl.zeros_like(high), tl.zeros_like(high)
    q = ()
    for i in tl.static_range(width):
        n = _at_most(nearest(inverse * x[i]), levels)
        q = q + ((n & 255).to(tl.float32),)
        value = n.to(tl.float32)
        sum_lx, sum_l2 = sum_lx + w[i] * x[i] * value, sum_l2 + w[i] * value * value
    for _ in range(5):
        swept = ()
        for i in tl.static_range(width):
            lx = sum_lx - w[i] * x[i] * q[i]
            l2 = sum_l2 - w[i] * q[i] * q[i]
            n = _at_most(nearest(tl.div_rn(x[i] * l2, lx)), levels)
            new = n.to(tl.float32)
            moved = (lx > 0.0) & (l2 > 0.0) & ((new < q[i]) | (new > q[i]))
            lx, l2 = lx + w[i] * x[i] * new, l2 + w[i] * new * new
            accepted = moved & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            swept = swept + (tl.where(accepted, (n & 255).to(tl.float32), q[i]),)
            sum_lx, sum_l2 = tl.where(accepted, lx, sum_lx), tl.where(accepted, l2, sum_l2)
        q = swept
    stored = ()
    for i in tl.static_range(width):
        stored = stored + (tl.where(dead, 0.0, q[i]),)
    scale = tl.where(sum_l2 > 0.0, tl.div_rn(sum_lx, sum_l2), 0.0)
    return tl.where(dead, 0.0, scale), stored


@triton.jit
def _at_most(i, most: tl.constexpr):
    return tl.where(i < most, i, most)


@triton.jit
def search_by_coordinates(x, width: tl.constexpr, levels: tl.constexpr):
    """make_q3_quants with do_rmse: the quantized values one after another, in five sweeps.

    Returns scale, whether the sub-block is zero, and the tuple of the quantized values.
    """
    extreme, largest = extreme_of(x, width)
    dead = largest < GROUP_MAX_EPS
    inverse = tl.div_rn(tl.zeros_like(extreme) - levels, extreme)
    sum_lx, sum_l2 = tl.zeros_like(extreme), tl.zeros_like(extreme)
    q = ()
    for i in tl.static_range(width):
        value = clamped(inverse * x[i], -levels, levels - 1)
        q = q + (value,)
        sum_lx, sum_l2 = sum_lx + x[i] * x[i] * x[i] * value, sum_l2 + x[i] * x[i] * value * value
    for _ in range(5):
        swept = ()
        for i in tl.static_range(width):
            w = x[i] * x[i]
            lx = sum_lx - w * x[i] * q[i]
            l2 = sum_l2 - w * q[i] * q[i]
            new = clamped(tl.div_rn(x[i] * l2, lx), -levels, levels - 1)
            moved = (lx > 0.0) & ((new < q[i]) | (new > q[i]))
            lx, l2 = lx + w * x[i] * new, l2 + w * new * new
            accepted = moved & (l2 > 0.0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            swept = swept + (tl.where(accepted, new, q[i]),)
            sum_lx, sum_l2 = tl.where(accepted, lx, sum_lx), tl.where(accepted, l2, sum_l2)
        q = swept
    scale = tl.where(sum_l2 > 0.0, tl.div_rn(sum_lx, sum_l2), 0.0)
    return tl.where(dead, 0.0, scale), dead, q
