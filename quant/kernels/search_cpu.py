"""The scale searches that GGML's K-quants share, for 16 sub-blocks at once, one per SIMD lane.

Each lane runs the operations of ggml/src/ggml-quants.c in the same order and precision, so that the result is the same
bit for bit; where the C code branches, the lanes compute both sides and select.

Sub-blocks come transposed: weight i of sub-block k at xt[16 * i + k]. Results go to a float32[64] array:
out[0:16] scale, out[16:32] -minimum (searches with a minimum), out[32:48] and out[48:64] the inverse scale and the
minimum that the quantized values were made with, which matters where the scale itself rounds to zero.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.kernels.bits import float_bits, helper
from quant.kernels.vectors import LANES, absolute, any_lane, bits, fill, fill_int, load, select, store, to_float

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
def transpose(flat: Floats, start: int, count: int, width: int, xt: Floats) -> None:
    """`count` sub-blocks of `width` weights from flat[start:] into the lanes; the other lanes become zero."""
    for k in range(count):
        for i in range(width):
            xt[i * LANES + k] = flat[start + k * width + i]
    for k in range(count, LANES):
        for i in range(width):
            xt[i * LANES + k] = np.float32(0.0)


@helper
def search_scale_and_min(
    xt: Floats, wt: Floats, qt: Floats, width: int, levels: int, trials: Floats, use_mad: bool, out: Floats
) -> None:
    """make_qkx2_quants: x ~ scale * q + min with 0 <= q <= levels, least weighted error over len(trials) scales.

    trials holds rmin + rdelta * i + levels in the C code's float32 arithmetic. use_mad measures |error| and not its
    square. qt is scratch of the size of xt.
    """
    zero, top = fill_int(np.int32(0)), fill_int(np.int32(levels))
    nothing = fill(np.float32(0.0))
    x, w = load(xt, 0), load(wt, 0)
    low, high = x, x
    sum_w, sum_x = w, w * x
    for i in range(1, width):
        x, w = load(xt, i * LANES), load(wt, i * LANES)
        low, high = select(x < low, x, low), select(x > high, x, high)
        sum_w, sum_x = sum_w + w, sum_x + w * x
    low = select(low > nothing, nothing, low)
    flat = high == low
    inverse = fill(np.float32(levels)) / (high - low)
    scale = fill(np.float32(1.0)) / inverse
    for i in range(width):
        store(qt, i * LANES, clamped_lanes(inverse * (load(xt, i * LANES) - low), zero, top))
    best = _error(xt, wt, qt, width, scale, low, use_mad)
    best = select(flat, fill(np.float32(-1.0)), best)  # no error is smaller: a sub-block without a range stays as it is
    used_inverse, used_low = select(flat, nothing, inverse), low
    for trial in range(trials.size):
        inverse = fill(trials[trial]) / (high - low)
        sum_l, sum_l2, sum_xl = nothing, nothing, nothing
        for i in range(width):
            x = load(xt, i * LANES)
            q = clamped_lanes(inverse * (x - low), zero, top)
            store(qt, i * LANES, q)
            wq = load(wt, i * LANES) * q
            sum_l, sum_l2, sum_xl = sum_l + wq, sum_l2 + wq * q, sum_xl + wq * x
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = new_low > nothing
        new_scale = select(positive, sum_xl / sum_l2, new_scale)
        new_low = select(positive, nothing, new_low)
        error = _error(xt, wt, qt, width, new_scale, new_low, use_mad)
        better = (error < best) & (determinant > nothing)
        best = select(better, error, best)
        scale = select(better, new_scale, scale)
        used_inverse, used_low = select(better, inverse, used_inverse), select(better, low, used_low)
        low = select(better, new_low, low)
    store(out, 0, select(flat, nothing, scale))
    store(out, LANES, nothing - low)
    store(out, 2 * LANES, used_inverse)
    store(out, 3 * LANES, used_low)


@helper
def _error(xt: Floats, wt: Floats, qt: Floats, width: int, scale: Lanes, minimum: Lanes, use_mad: bool) -> Lanes:
    """Weighted error of scale * q + minimum."""
    error = fill(np.float32(0.0))
    for i in range(width):
        difference = scale * load(qt, i * LANES) + minimum - load(xt, i * LANES)
        loss = absolute(difference) if use_mad else difference * difference
        error = error + load(wt, i * LANES) * loss
    return error


@helper
def _extreme(xt: Floats, width: int) -> tuple[Lanes, Lanes]:
    """The weight of the largest magnitude in each lane, with its sign, the first of several; and the magnitude."""
    extreme, largest = fill(np.float32(0.0)), fill(np.float32(0.0))
    for i in range(width):
        x = load(xt, i * LANES)
        larger = absolute(x) > largest
        extreme, largest = select(larger, x, extreme), select(larger, absolute(x), largest)
    return extreme, largest


@helper
def search_scale(xt: Floats, wt: Floats, width: int, levels: int, out: Floats) -> None:
    """make_qx_quants with rmse_type 1: x ~ scale * q with -levels <= q < levels, weights wt, over 19 scales."""
    least, most = fill_int(np.int32(-levels)), fill_int(np.int32(levels - 1))
    nothing = fill(np.float32(0.0))
    extreme, largest = _extreme(xt, width)
    dead = largest < fill(GROUP_MAX_EPS)
    inverse = fill(np.float32(-levels)) / extreme
    sum_lx, sum_l2 = _products(xt, wt, width, inverse, least, most)
    scale = select(sum_l2 == nothing, nothing, sum_lx / sum_l2)
    best = scale * sum_lx
    used = inverse
    for step in range(-9, 10):
        if step != 0:
            factor = np.float32(np.float32(levels) + np.float32(np.float32(0.1) * np.float32(step)))
            inverse = fill(np.float32(-factor)) / extreme
            sum_lx, sum_l2 = _products(xt, wt, width, inverse, least, most)
            better = (sum_l2 > nothing) & (sum_lx * sum_lx > best * sum_l2)
            scale = select(better, sum_lx / sum_l2, scale)
            best = select(better, scale * sum_lx, best)
            used = select(better, inverse, used)
    store(out, 0, select(dead, nothing, scale))
    store(out, 2 * LANES, select(dead, nothing, used))
    store(out, 3 * LANES, select(dead, fill(np.float32(1.0)), nothing))


@helper
def _products(xt: Floats, wt: Floats, width: int, inverse: Lanes, least: Lanes, most: Lanes) -> tuple[Lanes, Lanes]:
    """sum w x q and sum w q q."""
    sum_lx, sum_l2 = fill(np.float32(0.0)), fill(np.float32(0.0))
    for i in range(width):
        x, w = load(xt, i * LANES), load(wt, i * LANES)
        q = clamped_lanes(inverse * x, least, most)
        sum_lx, sum_l2 = sum_lx + w * x * q, sum_l2 + w * q * q
    return sum_lx, sum_l2


@helper
def search_by_coordinates(xt: Floats, lt: Floats, width: int, levels: int, out: Floats) -> None:
    """make_q3_quants with do_rmse: the quantized values one after another, in up to five sweeps; values in lt.

    A sweep without a change changes nothing when repeated, so the lanes go on until none of them changes.
    """
    least, most = fill_int(np.int32(-levels)), fill_int(np.int32(levels - 1))
    nothing = fill(np.float32(0.0))
    extreme, largest = _extreme(xt, width)
    dead = largest < fill(GROUP_MAX_EPS)
    inverse = fill(np.float32(-levels)) / extreme
    sum_lx, sum_l2 = nothing, nothing
    for i in range(width):
        x = load(xt, i * LANES)
        q = clamped_lanes(inverse * x, least, most)
        store(lt, i * LANES, q)
        sum_lx, sum_l2 = sum_lx + x * x * x * q, sum_l2 + x * x * q * q
    for _ in range(5):
        changed = largest < nothing
        for i in range(width):
            x, q = load(xt, i * LANES), load(lt, i * LANES)
            w = x * x
            lx = sum_lx - w * x * q
            l2 = sum_l2 - w * q * q
            new = clamped_lanes(x * l2 / lx, least, most)
            moved = (lx > nothing) & ((new < q) | (new > q))
            lx, l2 = lx + w * x * new, l2 + w * new * new
            accepted = moved & (l2 > nothing) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            store(lt, i * LANES, select(accepted, new, q))
            sum_lx, sum_l2 = select(accepted, lx, sum_lx), select(accepted, l2, sum_l2)
            changed = changed | accepted
        if not any_lane(changed):
            break
    scale = select(sum_l2 > nothing, sum_lx / sum_l2, nothing)
    store(out, 0, select(dead, nothing, scale))
    store(out, 3 * LANES, select(dead, fill(np.float32(1.0)), nothing))
