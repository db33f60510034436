"""The statistics of rows of logits on the CPU, in float64: one Numba kernel for a model, one for a pair of models.

Kernels release Python's lock. exp is a polynomial that LLVM vectorizes (the C library's is called value by value):
range reduction by Cody and Waite, Taylor series to degree 12 on |r| <= ln(2) / 2, relative error below 1e-15.

They stand here and not in quant/kernels: those encode and decode weights, exactly and for every room above, with
settings of their own (no fast-math). These are statistics of logits that only a comparison needs.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 6.93145751953125e-1, 1.42860682030941723212e-6
POWERS = np.ldexp(1.0, -np.arange(1076)).astype(np.float64)
"""2**-k; the last ones are subnormal and zero."""
LEAST = -744.0
COEFFICIENTS = tuple(1 / math.factorial(k) for k in range(13))
TOP = 5

_FAST = {"reassoc", "contract", "nsz"}


def _kernel(function: F) -> F:
    compiled: F = numba.njit(function, nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
    return compiled


@numba.njit(inline="always", fastmath=_FAST, error_model="numpy")
def _exp(x: float) -> float:
    """exp of a number that is not above 0."""
    x = max(x, LEAST)
    k = math.floor(x * LOG2_E + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    p = COEFFICIENTS[12]
    p = p * r + COEFFICIENTS[11]
    p = p * r + COEFFICIENTS[10]
    p = p * r + COEFFICIENTS[9]
    p = p * r + COEFFICIENTS[8]
    p = p * r + COEFFICIENTS[7]
    p = p * r + COEFFICIENTS[6]
    p = p * r + COEFFICIENTS[5]
    p = p * r + COEFFICIENTS[4]
    p = p * r + COEFFICIENTS[3]
    p = p * r + COEFFICIENTS[2]
    p = p * r + COEFFICIENTS[1]
    p = p * r + COEFFICIENTS[0]
    return p * POWERS[int(-k)]  # type: ignore[no-any-return]


@_kernel
def log_normalizers(logits: NDArray[np.float32], out: NDArray[np.float64], top: NDArray[np.int64]) -> None:
    """float32[r, v] -> float64[r] log(sum(exp(logits))), and int64[r, 5] ids of the largest logits, largest first.

    Of equal logits the first comes first.
    """
    for row in range(logits.shape[0]):
        x = logits[row]
        best = np.full(TOP, -np.inf, np.float32)
        for at in range(TOP):
            top[row, at] = -1
        for i in range(x.shape[0]):
            if x[i] > best[TOP - 1]:
                at = TOP - 1
                while at > 0 and x[i] > best[at - 1]:
                    best[at] = best[at - 1]
                    top[row, at] = top[row, at - 1]
                    at -= 1
                best[at] = x[i]
                top[row, at] = i
        most = np.float64(best[0])
        total = 0.0
        for i in range(x.shape[0]):
            total += _exp(np.float64(x[i]) - most)
        out[row] = most + math.log(total)


@_kernel
def divergences(
    base: NDArray[np.float32],
    other: NDArray[np.float32],
    base_normalizer: NDArray[np.float64],
    other_normalizer: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """float32[r, v] twice and their log normalizers -> float64[r]: sum of p (log p - log q), in nats."""
    for row in range(base.shape[0]):
        a, b = base[row], other[row]
        shift = base_normalizer[row]
        total = 0.0
        for i in range(a.shape[0]):
            total += _exp(min(np.float64(a[i]) - shift, 0.0)) * (np.float64(a[i]) - np.float64(b[i]))
        out[row] = total - shift + other_normalizer[row]
