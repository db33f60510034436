"""The scale searches that GGML's formats share, for 16 sub-blocks at once, one per SIMD lane.

Each lane runs the operations of ggml/src/ggml-quants.c in the same order and precision, so that the result is the same
bit for bit; where the C code branches, the lanes compute both sides and select.

Sub-blocks come transposed: weight i of sub-block k at xt[16 * i + k]. Results go to a float32[64] array:
out[0:16] scale, out[16:32] -minimum (searches with a minimum), out[32:48] and out[48:64] the inverse scale and the
minimum that the quantized values were made with, which matters where the scale itself rounds to zero.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import float_bits, helper
from streamquant.quant.kernels.vectors import (
    LANES,
    absolute,
    any_lane,
    bits,
    fill,
    fill_int,
    lane_bits,
    load,
    load_strided,
    negative,
    select,
    square_root,
    store,
    to_float,
)

Floats = NDArray[np.float32]
Lanes = Any
"""Sixteen float32, int32 or mask lanes; only Numba knows which."""
GROUP_MAX_EPS = np.float32(1e-15)  # below it a sub-block counts as zero

_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, in the low bits of the sum
_MAGIC_MASK = 0x007FFFFF
_MAGIC_ZERO = 0x00400000


@helper
def nearest(x: np.float32) -> np.int32:
    """ggml's nearest_int: ties to even; beyond 2**22 whatever the bits give, as there."""
    u = np.int32(float_bits(np.float32(np.float32(x) + _MAGIC)))
    return np.int32((u & np.int32(_MAGIC_MASK)) - np.int32(_MAGIC_ZERO))


@helper
def nearest_lanes(x: Lanes) -> Lanes:
    """`nearest` in every lane."""
    return (bits(x + fill(_MAGIC)) & fill_int(np.int32(_MAGIC_MASK))) - fill_int(np.int32(_MAGIC_ZERO))


@helper
def clamped_lanes(x: Lanes, least: Lanes, most: Lanes) -> Lanes:
    """`nearest`, limited to [least, most] (int32 lanes), as float32 lanes."""
    i = nearest_lanes(x)
    i = select(i < most, i, most)
    return to_float(select(i > least, i, least))


@helper
def rounded_lanes(x: Lanes, levels: int) -> Lanes:
    """`nearest` of x limited to [0, levels], as float32 lanes; NaN gives 0. levels is below 2**22."""
    nothing, top, magic = fill(np.float32(0.0)), fill(np.float32(levels)), fill(_MAGIC)
    x = select(x > nothing, x, nothing)
    return (select(x < top, x, top) + magic) - magic


@helper
def transpose(flat: Floats, start: int, count: int, width: int, xt: Floats) -> None:
    """`count` sub-blocks of `width` weights from flat[start:] into the lanes; the other lanes become zero."""
    for k in range(count):
        for i in range(width):
            xt[i * LANES + k] = flat[start + k * width + i]
    for k in range(count, LANES):
        for i in range(width):
            xt[i * LANES + k] = np.float32(0.0)


@helper
def sums_of_squares(flat: Floats, length: int, divisor: np.float32, out: Floats) -> None:
    """out[k] = sum of x * x over the k-th run of `length` values, added up in order, / divisor."""
    count = flat.size // length
    for first in range(0, count - count % LANES, LANES):
        total = fill(np.float32(0.0))
        for i in range(length):
            x = load_strided(flat, first * length + i, length)
            total = total + x * x
        store(out, first, total / fill(divisor))
    for k in range(count - count % LANES, count):
        rest = np.float32(0.0)
        for i in range(length):
            rest = np.float32(rest + np.float32(flat[k * length + i] * flat[k * length + i]))
        out[k] = np.float32(rest / divisor)


@helper
def transpose_importance(
    importance: Floats, first: int, count: int, width: int, sigma2: Floats, per_sigma: int, wt: Floats, spread: Floats
) -> None:
    """The importance of the columns of sub-blocks first, first + 1, ... into the lanes of wt, their sigma2 into spread.

    Sub-blocks are numbered through all rows; each run of `per_sigma` of them shares an entry of sigma2.
    """
    per_row = importance.size // width
    for k in range(count):
        column = (first + k) % per_row * width
        for i in range(width):
            wt[i * LANES + k] = importance[column + i]
        spread[k] = sigma2[(first + k) // per_sigma]
    for k in range(count, LANES):
        for i in range(width):
            wt[i * LANES + k] = np.float32(0.0)
        spread[k] = np.float32(0.0)


@helper
def weigh(xt: Floats, width: int, wt: Floats, spread: Floats, sums: Floats, at: int) -> None:
    """wt: importance -> importance * sqrt(sigma2 + x * x); the sums of the new weights to sums[at : at + 16]."""
    sigma2, total = load(spread, 0), fill(np.float32(0.0))
    for i in range(width):
        x = load(xt, i * LANES)
        w = load(wt, i * LANES) * square_root(sigma2 + x * x)
        store(wt, i * LANES, w)
        total = total + w
    store(sums, at, total)


@helper
def search_scale_and_min(
    xt: Floats,
    wt: Floats,
    qt: Floats,
    width: int,
    levels: int,
    trials: Floats,
    use_mad: bool,
    limit_first: bool,
    out: Floats,
) -> None:
    """make_qkx2_quants and make_qkx3_quants: x ~ scale * q + min with 0 <= q <= levels, least weighted error of trials.

    Every trial waits for the result of the one before, so two groups of 16 sub-blocks go side by side: xt, wt, qt
    (scratch) and out hold both, one after the other. trials holds rmin + rdelta * i + levels in the C code's float32
    arithmetic. use_mad measures |error| and not its square. limit_first (make_qkx3_quants) limits to the range before
    it rounds: that matters where the best minimum so far is close to the largest weight, and quotients are huge.
    """
    size = width * LANES
    range_a, fit_a = _first_fit(xt, wt, 0, width, levels, use_mad)
    range_b, fit_b = _first_fit(xt, wt, size, width, levels, use_mad)
    for trial in range(trials.size):
        inverse_a = fill(trials[trial]) / (range_a[1] - fit_a[2])
        inverse_b = fill(trials[trial]) / (range_b[1] - fit_b[2])
        low_a, low_b = fit_a[2], fit_b[2]
        if limit_first or (_rounds_exactly(inverse_a, low_a, range_a) and _rounds_exactly(inverse_b, low_b, range_b)):
            sums_a, sums_b = _trial_sums(xt, wt, qt, width, levels, inverse_a, low_a, inverse_b, low_b, True)
        else:
            sums_a, sums_b = _trial_sums(xt, wt, qt, width, levels, inverse_a, low_a, inverse_b, low_b, False)
        line_a, line_b = _line(sums_a, range_a), _line(sums_b, range_b)
        error_a, error_b = _errors(xt, wt, qt, width, line_a, line_b, use_mad)
        fit_a = _better_fit(fit_a, line_a, inverse_a, error_a)
        fit_b = _better_fit(fit_b, line_b, inverse_b, error_b)
    _store_fit(out, 0, range_a, fit_a)
    _store_fit(out, 4 * LANES, range_b, fit_b)


@helper
def _first_fit(
    xt: Floats, wt: Floats, at: int, width: int, levels: int, use_mad: bool
) -> tuple[tuple[Lanes, ...], tuple[Lanes, ...]]:
    """What does not change, (lowest, highest weight, sum w, sum w x, lanes without a range); and the fit to the range.

    A fit is (error, scale, minimum, the inverse scale and the minimum that made its quantized values).
    """
    zero, top = fill_int(np.int32(0)), fill_int(np.int32(levels))
    nothing = fill(np.float32(0.0))
    x, w = load(xt, at), load(wt, at)
    lowest, high = x, x
    sum_w, sum_x = w, w * x
    for i in range(1, width):
        x, w = load(xt, at + i * LANES), load(wt, at + i * LANES)
        lowest, high = select(x < lowest, x, lowest), select(x > high, x, high)
        sum_w, sum_x = sum_w + w, sum_x + w * x
    low = select(lowest > nothing, nothing, lowest)
    flat = high == low
    inverse = fill(np.float32(levels)) / (high - low)
    scale = fill(np.float32(1.0)) / inverse
    error = nothing
    for i in range(width):
        x = load(xt, at + i * LANES)
        q = clamped_lanes(inverse * (x - low), zero, top)
        error = error + load(wt, at + i * LANES) * _loss(scale * q + low - x, use_mad)
    error = select(flat, fill(np.float32(-1.0)), error)  # none is smaller: without a range it stays as it is
    all_zero = flat | (inverse == fill(np.float32(np.inf)))  # `nearest` of an infinity is below all levels
    return (lowest, high, sum_w, sum_x, flat), (error, scale, low, select(all_zero, nothing, inverse), low)


@helper
def _loss(difference: Lanes, use_mad: bool) -> Lanes:
    return absolute(difference) if use_mad else difference * difference


@helper
def _rounds_exactly(inverse: Lanes, low: Lanes, fixed: tuple[Lanes, ...]) -> bool:
    """Whether `nearest` of all quotients inverse * (x - low) is the nearest integer."""
    lowest, high, _, _, flat = fixed
    limit = fill(np.float32(1 << 21))
    fine = (absolute(inverse * (lowest - low)) < limit) & (absolute(inverse * (high - low)) < limit)
    return bool(lane_bits(fine | flat) == np.uint16(0xFFFF))


@helper
def _trial_sums(
    xt: Floats,
    wt: Floats,
    qt: Floats,
    width: int,
    levels: int,
    inverse_a: Lanes,
    low_a: Lanes,
    inverse_b: Lanes,
    low_b: Lanes,
    limit_first: bool,
) -> tuple[tuple[Lanes, ...], tuple[Lanes, ...]]:
    """Quantize to qt; (sum w q, sum w q q, sum w q x) of both groups."""
    zero, top, size = fill_int(np.int32(0)), fill_int(np.int32(levels)), width * LANES
    nothing = fill(np.float32(0.0))
    l_a, l2_a, xl_a = nothing, nothing, nothing
    l_b, l2_b, xl_b = nothing, nothing, nothing
    for i in range(width):
        x_a, x_b = load(xt, i * LANES), load(xt, size + i * LANES)
        quotient_a, quotient_b = inverse_a * (x_a - low_a), inverse_b * (x_b - low_b)
        q_a = rounded_lanes(quotient_a, levels) if limit_first else clamped_lanes(quotient_a, zero, top)
        q_b = rounded_lanes(quotient_b, levels) if limit_first else clamped_lanes(quotient_b, zero, top)
        store(qt, i * LANES, q_a)
        store(qt, size + i * LANES, q_b)
        wq_a, wq_b = load(wt, i * LANES) * q_a, load(wt, size + i * LANES) * q_b
        l_a, l2_a, xl_a = l_a + wq_a, l2_a + wq_a * q_a, xl_a + wq_a * x_a
        l_b, l2_b, xl_b = l_b + wq_b, l2_b + wq_b * q_b, xl_b + wq_b * x_b
    return (l_a, l2_a, xl_a), (l_b, l2_b, xl_b)


@helper
def _line(sums: tuple[Lanes, ...], fixed: tuple[Lanes, ...]) -> tuple[Lanes, Lanes, Lanes]:
    """The least-squares (scale, minimum) for quantized values, the minimum not above zero; and the lanes with one."""
    sum_l, sum_l2, sum_xl = sums
    _, _, sum_w, sum_x, _ = fixed
    nothing = fill(np.float32(0.0))
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = low > nothing
    return select(positive, sum_xl / sum_l2, scale), select(positive, nothing, low), determinant > nothing


@helper
def _errors(
    xt: Floats,
    wt: Floats,
    qt: Floats,
    width: int,
    line_a: tuple[Lanes, Lanes, Lanes],
    line_b: tuple[Lanes, Lanes, Lanes],
    use_mad: bool,
) -> tuple[Lanes, Lanes]:
    """Weighted errors of both groups."""
    size = width * LANES
    error_a, error_b = fill(np.float32(0.0)), fill(np.float32(0.0))
    for i in range(width):
        difference_a = line_a[0] * load(qt, i * LANES) + line_a[1] - load(xt, i * LANES)
        difference_b = line_b[0] * load(qt, size + i * LANES) + line_b[1] - load(xt, size + i * LANES)
        error_a = error_a + load(wt, i * LANES) * _loss(difference_a, use_mad)
        error_b = error_b + load(wt, size + i * LANES) * _loss(difference_b, use_mad)
    return error_a, error_b


@helper
def _better_fit(
    fit: tuple[Lanes, ...], line: tuple[Lanes, Lanes, Lanes], inverse: Lanes, error: Lanes
) -> tuple[Lanes, ...]:
    """The fit, or in the lanes where its error is smaller the line."""
    best, scale, low, used_inverse, used_low = fit
    better = (error < best) & line[2]
    return (
        select(better, error, best),
        select(better, line[0], scale),
        select(better, line[1], low),
        select(better, inverse, used_inverse),
        select(better, low, used_low),
    )


@helper
def _store_fit(out: Floats, at: int, fixed: tuple[Lanes, ...], fit: tuple[Lanes, ...]) -> None:
    store(out, at, select(fixed[4], fill(np.float32(0.0)), fit[1]))
    store(out, at + LANES, negative(fit[2]))
    store(out, at + 2 * LANES, fit[3])
    store(out, at + 3 * LANES, fit[4])


@helper
def extreme_lanes(xt: Floats, width: int) -> tuple[Lanes, Lanes]:
    """The weight of the largest magnitude in each lane, with its sign, the first of several; and the magnitude."""
    extreme, largest = fill(np.float32(0.0)), fill(np.float32(0.0))
    for i in range(width):
        x = load(xt, i * LANES)
        larger = absolute(x) > largest
        extreme, largest = select(larger, x, extreme), select(larger, absolute(x), largest)
    return extreme, largest


@helper
def search_scale(xt: Floats, wt: Floats, width: int, levels: int, finite: bool, out: Floats) -> None:
    """make_qx_quants with rmse_type 1: x ~ scale * q with -levels <= q < levels, weights wt, over 19 scales.

    finite: x is finite, as weights are; scales of sub-blocks may be infinite or NaN.
    """
    nothing = fill(np.float32(0.0))
    extreme, largest = extreme_lanes(xt, width)
    dead = largest < fill(GROUP_MAX_EPS)
    inverse = fill(np.float32(-levels)) / extreme
    sum_lx, sum_l2 = _products(xt, wt, width, inverse, levels, finite)
    scale = select(sum_l2 == nothing, nothing, sum_lx / sum_l2)
    best = scale * sum_lx
    used = inverse
    for step in range(-9, 10):
        if step != 0:
            factor = np.float32(np.float32(levels) + np.float32(np.float32(0.1) * np.float32(step)))
            inverse = fill(np.float32(-factor)) / extreme
            sum_lx, sum_l2 = _products(xt, wt, width, inverse, levels, finite)
            better = (sum_l2 > nothing) & (sum_lx * sum_lx > best * sum_l2)
            scale = select(better, sum_lx / sum_l2, scale)
            best = select(better, scale * sum_lx, best)
            used = select(better, inverse, used)
    store(out, 0, select(dead, nothing, scale))
    store(out, 2 * LANES, select(dead, nothing, used))
    store(out, 3 * LANES, select(dead, fill(np.float32(1.0)), nothing))


@helper
def _products(xt: Floats, wt: Floats, width: int, inverse: Lanes, levels: int, finite: bool) -> tuple[Lanes, Lanes]:
    """sum w x q and sum w q q. Finite quotients are at most levels + 1: they may be limited before they are rounded."""
    least, most, magic = fill(np.float32(-levels)), fill(np.float32(levels - 1)), fill(_MAGIC)
    lowest, top = fill_int(np.int32(-levels)), fill_int(np.int32(levels - 1))
    sum_lx, sum_l2 = fill(np.float32(0.0)), fill(np.float32(0.0))
    for i in range(width):
        x, w = load(xt, i * LANES), load(wt, i * LANES)
        q = inverse * x
        if finite:
            q = select(q > least, q, least)
            q = (select(q < most, q, most) + magic) - magic
        else:
            q = clamped_lanes(q, lowest, top)
        sum_lx, sum_l2 = sum_lx + w * x * q, sum_l2 + w * q * q
    return sum_lx, sum_l2


@helper
def search_positive_scale(xt: Floats, wt: Floats, lt: Floats, width: int, levels: int, out: Floats) -> None:
    """make_qp_quants: x ~ scale * q with 0 <= q <= levels, weights wt; 9 scales, then one value after another.

    It quantizes the scales of sub-blocks. The quantized values, in lt, are bytes: negative ones wrap, as in C.
    """
    top, byte = fill_int(np.int32(levels)), fill_int(np.int32(255))
    nothing = fill(np.float32(0.0))
    high = nothing
    for i in range(width):
        x = load(xt, i * LANES)
        high = select(x > high, x, high)
    dead = high < fill(GROUP_MAX_EPS)
    inverse = fill(np.float32(levels)) / high
    scale = fill(np.float32(1.0)) / inverse
    best = nothing
    for i in range(width):
        x = load(xt, i * LANES)
        difference = x - scale * to_float(nearest_lanes(inverse * x) & byte)
        best = best + load(wt, i * LANES) * difference * difference
    for step in range(-4, 5):
        if step != 0:
            factor = np.float32(np.float32(np.float32(0.1) * np.float32(step)) + np.float32(levels))
            trial = fill(factor) / high
            scale = fill(np.float32(1.0)) / trial
            error = nothing
            for i in range(width):
                x = load(xt, i * LANES)
                q = nearest_lanes(trial * x)
                difference = x - scale * to_float(select(q < top, q, top))
                error = error + load(wt, i * LANES) * difference * difference
            better = error < best
            best, inverse = select(better, error, best), select(better, trial, inverse)
    sum_lx, sum_l2 = nothing, nothing
    for i in range(width):
        x, w = load(xt, i * LANES), load(wt, i * LANES)
        q = nearest_lanes(inverse * x)
        q = select(q < top, q, top)
        store(lt, i * LANES, to_float(q & byte))
        sum_lx, sum_l2 = sum_lx + w * x * to_float(q), sum_l2 + w * to_float(q) * to_float(q)
    for _ in range(5):
        changed = high < nothing
        for i in range(width):
            x, w, q = load(xt, i * LANES), load(wt, i * LANES), load(lt, i * LANES)
            lx = sum_lx - w * x * q
            l2 = sum_l2 - w * q * q
            moved = (lx > nothing) & (l2 > nothing)
            n = nearest_lanes(x * l2 / lx)
            n = select(n < top, n, top)
            new = to_float(n)
            moved = moved & ((new < q) | (new > q))
            lx, l2 = lx + w * x * new, l2 + w * new * new
            accepted = moved & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            store(lt, i * LANES, select(accepted, to_float(n & byte), q))
            sum_lx, sum_l2 = select(accepted, lx, sum_lx), select(accepted, l2, sum_l2)
            changed = changed | accepted
        if not any_lane(changed):
            break
    for i in range(width):
        store(lt, i * LANES, select(dead, nothing, load(lt, i * LANES)))
    scale = select(sum_l2 > nothing, sum_lx / sum_l2, nothing)
    store(out, 0, select(dead, nothing, scale))


@helper
def search_by_coordinates(xt: Floats, lt: Floats, width: int, levels: int, out: Floats) -> None:
    """make_q3_quants with do_rmse: the quantized values one after another, in up to five sweeps; values in lt.

    Every step waits for the division of the one before, so two groups of 16 sub-blocks go side by side: xt, lt and out
    hold both, one after the other. A sweep without a change changes nothing when repeated, so the lanes go on until
    none of them changes.
    """
    size = width * LANES
    inverse, dead = _first_inverse(xt, width, levels)
    other_inverse, other_dead = _first_inverse(xt[size:], width, levels)
    sum_lx, sum_l2 = _cubed_products(xt, lt, width, levels, inverse)
    other_lx, other_l2 = _cubed_products(xt[size:], lt[size:], width, levels, other_inverse)
    for _ in range(5):
        changed = sum_l2 < sum_l2  # no lane
        for i in range(width):
            sum_lx, sum_l2, accepted = _step(xt, lt, i * LANES, levels, sum_lx, sum_l2)
            other_lx, other_l2, other = _step(xt, lt, size + i * LANES, levels, other_lx, other_l2)
            changed = changed | accepted | other
        if not any_lane(changed):
            break
    _store_scale(out, 0, sum_lx, sum_l2, dead)
    _store_scale(out, 4 * LANES, other_lx, other_l2, other_dead)


@helper
def _first_inverse(xt: Floats, width: int, levels: int) -> tuple[Lanes, Lanes]:
    """-levels / the weight of the largest magnitude; and the lanes that are zero."""
    extreme, largest = extreme_lanes(xt, width)
    return fill(np.float32(-levels)) / extreme, largest < fill(GROUP_MAX_EPS)


@helper
def _cubed_products(xt: Floats, lt: Floats, width: int, levels: int, inverse: Lanes) -> tuple[Lanes, Lanes]:
    """The quantized values into lt, and their sums of x**3 q and x**2 q**2."""
    least, most = fill_int(np.int32(-levels)), fill_int(np.int32(levels - 1))
    sum_lx, sum_l2 = fill(np.float32(0.0)), fill(np.float32(0.0))
    for i in range(width):
        x = load(xt, i * LANES)
        q = clamped_lanes(inverse * x, least, most)
        store(lt, i * LANES, q)
        sum_lx, sum_l2 = sum_lx + x * x * x * q, sum_l2 + x * x * q * q
    return sum_lx, sum_l2


@helper
def _step(xt: Floats, lt: Floats, at: int, levels: int, sum_lx: Lanes, sum_l2: Lanes) -> tuple[Lanes, Lanes, Lanes]:
    """Move one quantized value of each lane where that helps; the new sums, and the lanes where it did."""
    least, most = fill_int(np.int32(-levels)), fill_int(np.int32(levels - 1))
    nothing = fill(np.float32(0.0))
    x, q = load(xt, at), load(lt, at)
    w = x * x
    lx = sum_lx - w * x * q
    l2 = sum_l2 - w * q * q
    new = clamped_lanes(x * l2 / lx, least, most)
    moved = (lx > nothing) & ((new < q) | (new > q))
    lx, l2 = lx + w * x * new, l2 + w * new * new
    accepted = moved & (l2 > nothing) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
    store(lt, at, select(accepted, new, q))
    return select(accepted, lx, sum_lx), select(accepted, l2, sum_l2), accepted


@helper
def _store_scale(out: Floats, at: int, sum_lx: Lanes, sum_l2: Lanes, dead: Lanes) -> None:
    nothing = fill(np.float32(0.0))
    scale = select(sum_l2 > nothing, sum_lx / sum_l2, nothing)
    store(out, at, select(dead, nothing, scale))
    store(out, at + 3 * LANES, select(dead, fill(np.float32(1.0)), nothing))
