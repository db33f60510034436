"""Rounding by bits (quant/kernels/bits.py) against numpy's float16, and against exact integer arithmetic."""

from typing import Any

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import bits_float, float_bits, half_bits, half_is_infinite, round_bits


@njit
def _half_bits(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = half_bits(x[i])


@njit
def _round_bits(u: Any, drop: Any, out: Any) -> None:
    for i in range(u.size):
        out[i] = round_bits(u[i], drop)


@njit
def _half_is_infinite(bits: Any, out: Any) -> None:
    for i in range(bits.size):
        out[i] = half_is_infinite(bits[i])


@njit
def _there_and_back(u: Any, values: Any, out: Any) -> None:
    for i in range(u.size):
        values[i] = bits_float(u[i])
        out[i] = float_bits(values[i])


def check_half_bits(x: NDArray[np.float32]) -> None:
    found = np.empty(x.size, np.uint16)
    _half_bits(x, found)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    wrong = np.flatnonzero(found != expected)
    assert not wrong.size, f"{float(x[wrong[0]]).hex()}: {found[wrong[0]]:#06x}, not {expected[wrong[0]]:#06x}"


def both_signs_and_neighbours(points: NDArray[np.float64]) -> NDArray[np.float32]:
    exact = points.astype(np.float32)
    assert np.array_equal(exact, points)
    around = [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))]
    return np.concatenate([sign * np.concatenate(around) for sign in (np.float32(1), np.float32(-1))])


HALVES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)


def test_half_bits_at_every_float16() -> None:
    check_half_bits(both_signs_and_neighbours(HALVES))


def test_half_bits_at_every_tie() -> None:
    """Midpoints of neighbours, subnormal ones too, and 65520, from which on everything is infinite."""
    check_half_bits(both_signs_and_neighbours(np.append((HALVES[1:] + HALVES[:-1]) / 2, 65520.0)))


def test_half_bits_of_random_bits() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 2_000_000, np.uint32)
    check_half_bits(bits.view(np.float32)[(bits & 0x7F800000) != 0x7F800000])


def test_half_bits_of_random_values_in_the_range_of_float16() -> None:
    """Every exponent from below the smallest subnormal to beyond infinity; float32's own subnormals and ends too."""
    rng = np.random.default_rng(1)
    values = np.ldexp(1 + rng.random(2_000_000), rng.integers(-30, 18, 2_000_000))
    check_half_bits((values * rng.choice([-1, 1], values.size)).astype(np.float32))
    ends = np.array([0, 1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000], np.uint32)
    check_half_bits(np.concatenate([ends, ends | 0x80000000]).astype(np.uint32).view(np.float32))


def test_half_is_infinite() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    found = np.empty(bits.size, np.bool_)
    _half_is_infinite(bits, found)
    assert np.array_equal(found, ~np.isfinite(bits.view(np.float16)))


@pytest.mark.parametrize("drop", [1, 2, 11, 13, 16, 20, 23])
def test_round_bits_to_even(drop: int) -> None:
    """All patterns around ties, and random ones, against rounding of integers; the sign bit is not touched."""
    rng = np.random.default_rng(drop)
    steps = rng.integers(0, 0x7F800000 >> drop, 20_000).astype(np.uint64) << np.uint64(drop)
    near = [steps + np.uint64(low) for low in (0, 1, 2 ** (drop - 1) - 1, 2 ** (drop - 1), 2 ** (drop - 1) + 1)]
    bits = np.concatenate([*near, rng.integers(0, 0x7F800000, 100_000, np.uint64), [np.uint64(0x7F7FFFFF)]])
    bits = bits[bits < 0x7F800000]
    signed = np.concatenate([bits, bits | np.uint64(0x80000000)]).astype(np.uint32)
    found = np.empty(signed.size, np.uint32)
    _round_bits(signed, np.uint32(drop), found)
    magnitude = (signed & np.uint32(0x7FFFFFFF)).astype(np.float64)
    expected = (np.rint(magnitude / 2.0**drop) * 2.0**drop).astype(np.uint32) | (signed & np.uint32(0x80000000))
    assert np.array_equal(found, expected)


def test_bits_of_floats_are_kept() -> None:
    """NaN included, with its payload."""
    bits = np.random.default_rng(3).integers(0, 2**32, 100_000, np.uint32)
    bits[:4] = [0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x80000000]
    values, back = np.empty(bits.size, np.float32), np.empty(bits.size, np.uint32)
    _there_and_back(bits, values, back)
    assert np.array_equal(values.view(np.uint32), bits)
    assert np.array_equal(back, bits)
