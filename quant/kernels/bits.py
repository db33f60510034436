"""Bit-level building blocks of the CPU kernels: reinterpretation and exact rounding between floating-point formats.

LLVM inlines all of them into the kernels that call them and vectorizes the loops around them: selects, no branches.
Numba keys its cache on the file of the kernel alone: after a change here, run `make clean`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])

ABS = np.uint32(0x7FFFFFFF)
SIGN = np.uint32(0x80000000)
INFINITY = np.uint32(0x7F800000)
ONE = np.uint32(1)


def _bitcast(argument: types.Type, result: types.Type, llvm_result: ir.Type) -> Any:
    def typed(_typing_context: Any, _value: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], llvm_result)

        return result(argument), codegen

    return intrinsic(typed)


float_bits: Callable[[np.float32], np.uint32] = _bitcast(types.float32, types.uint32, ir.IntType(32))
"""float32 -> uint32 with the same bits."""
bits_float: Callable[[np.uint32], np.float32] = _bitcast(types.uint32, types.float32, ir.FloatType())
"""uint32 -> float32 with the same bits."""


def helper(function: F) -> F:
    """A function that LLVM inlines into the kernels that call it."""
    compiled: F = njit(function, nogil=True, error_model="numpy")
    return compiled


def kernel(function: F) -> F:
    """A kernel: compiled once for this machine (cached on disk), runs without the GIL, strict IEEE arithmetic."""
    compiled: F = njit(function, nogil=True, cache=True, error_model="numpy")
    return compiled


@helper
def round_bits(u: np.uint32, drop: np.uint32) -> np.uint32:
    """Round the bits of a finite float32 to the nearest value whose low `drop` bits are zero, ties to even."""
    half = (ONE << (drop - ONE)) - ONE
    return np.uint32((u + half + ((u >> drop) & ONE)) & ~((ONE << drop) - ONE))


@helper
def half_bits(x: np.float32) -> np.uint16:
    """float32 -> bits of the nearest float16, ties to even (IEEE 754 binary16); overflow gives infinity, NaN a NaN.

    Subnormals are rounded by adding a power of two whose last place is 2**-24.
    """
    u = float_bits(np.float32(x))
    a = np.uint32(u & ABS)
    sign = np.uint32((u & SIGN) >> np.uint32(16))
    if a > INFINITY:
        return np.uint16(sign | np.uint32(0x7E00))
    if a >= np.uint32(0x477FF000):  # 65520: halfway from the largest float16 to 2**16
        return np.uint16(sign | np.uint32(0x7C00))
    if a < np.uint32(0x38800000):  # 2**-14
        shifted = float_bits(np.float32(bits_float(a) + np.float32(0.5)))
        return np.uint16(sign | np.uint32(shifted - np.uint32(0x3F000000)))
    rounded = np.uint32(a + np.uint32(0xFFF) + ((a >> np.uint32(13)) & ONE))
    return np.uint16(sign | np.uint32((rounded >> np.uint32(13)) - np.uint32(112 << 10)))


@helper
def half_is_infinite(bits: np.uint16) -> bool:
    """Whether float16 bits mean an infinity or a NaN."""
    return bool((bits & np.uint16(0x7C00)) == np.uint16(0x7C00))


@helper
def half_value(bits: np.uint16) -> np.float32:
    """float16 bits -> float32, exact; infinities and NaN stay what they are."""
    sign = np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16))
    a = np.uint32(bits & np.uint16(0x7FFF))
    if a < np.uint32(0x0400):  # subnormal: a multiple of 2**-24
        return np.float32(bits_float(np.uint32(float_bits(np.float32(np.float32(a) * np.float32(2.0**-24))) | sign)))
    rebias = np.uint32(224 << 23) if a >= np.uint32(0x7C00) else np.uint32(112 << 23)
    return np.float32(bits_float(np.uint32((a << np.uint32(13)) + rebias | sign)))


@helper
def put_half(out: NDArray[np.uint8], at: int, x: np.float32) -> np.uint16:
    """Store float16(x) at out[at:at + 2], little endian; returns its bits."""
    h = half_bits(x)
    out[at] = np.uint8(h & np.uint16(0xFF))
    out[at + 1] = np.uint8(h >> np.uint16(8))
    return h
