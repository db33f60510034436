"""Bit-level building blocks of the GPU kernels (Triton): exact rounding between floating-point formats.

The GPU kernels run the single-precision operations of the CPU kernels in the same order, so the bytes are the same:

- every launch goes through `launch`, which forbids the fusing of a product and a sum into one operation;
- quotients and roots are correctly rounded: `tl.div_rn` and `tl.sqrt_rn`, never `/`, which Triton approximates;
- sums run over the weights of a sub-block one after another, in one thread; only maxima, minima and bits are reduced
  over several, because their order does not matter;
- a NaN that an operation makes has other bits on a GPU than on x86-64, so its bits are never used.

On a machine without a GPU, Triton's interpreter runs the same kernels (TRITON_INTERPRET=1, set before the import).
"""

import threading
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton import knobs

ABS = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, in the low bits of the sum
_MAGIC_EXPONENT = tl.constexpr(0x4B000000)  # its bits are this and _MAGIC_ZERO
_MAGIC_MASK = tl.constexpr(0x007FFFFF)
_MAGIC_ZERO = tl.constexpr(0x00400000)
_INTERPRETED = bool(knobs.runtime.interpret)
_INTERPRETED_LANES = 4096
_LOCK = threading.Lock()

kernel = triton.jit(do_not_specialize=("blocks", "per_row", "per_sigma", "subs", "length", "divisor", "of_minima"))
"""A kernel that is launched. It is compiled once, not again for each kind of size (1, multiples of 16, others)."""


def lanes(count: int, on_gpu: int) -> int:
    """How many of `count` items a program takes: `on_gpu`, or as many as there are, which an interpreter is quick with.

    >>> lanes(10**6, 128) in (128, 4096)
    True
    """
    if not _INTERPRETED:
        return on_gpu
    return min(_INTERPRETED_LANES, max(16, 1 << (count - 1).bit_length()))


def launch(kernel: Any, items: int, per_program: int, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Run a kernel on ceil(items / per_program) programs, in strict IEEE arithmetic, on the current stream.

    One thread at a time: compilation is not made for several, and the interpreter patches triton.language as it runs.
    The interpreter is NumPy, and lanes compute both sides of every branch: hence no warnings.
    """
    grid = (-(-items // per_program),)
    with _LOCK, np.errstate(all="ignore"):
        kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


@triton.jit
def float_bits(x):
    """float32 -> int32 with the same bits."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(u):
    """int32 -> float32 with the same bits."""
    return u.to(tl.float32, bitcast=True)


@triton.jit
def absolute(x):
    """Magnitudes of float32."""
    return bits_float(float_bits(x) & ABS)


@triton.jit
def negative(x):
    """The other sign, of zeros too."""
    return bits_float(float_bits(x) ^ -0x80000000)


@triton.jit
def round_bits(u, drop: tl.constexpr):
    """Round the bits of finite float32 to the nearest values whose low `drop` bits are zero, ties to even."""
    return (u + ((1 << (drop - 1)) - 1) + ((u >> drop) & 1)) & -(1 << drop)


@triton.jit
def half_bits(x):
    """float32 -> bits of the nearest float16 as int32, ties to even; overflow gives infinity (IEEE 754 binary16)."""
    u = float_bits(x)
    a = u & ABS
    subnormal = float_bits(bits_float(a) + 0.5) - 0x3F000000  # rounds to multiples of 2**-24
    normal = ((a + 0xFFF + ((a >> 13) & 1)) >> 13) - 0x1C000
    magnitude = tl.where(a < 0x38800000, subnormal, normal)  # 2**-14
    magnitude = tl.where(a >= 0x477FF000, 0x7C00, magnitude)  # 65520: halfway from the largest float16 to 2**16
    return ((u >> 16) & 0x8000) | magnitude


@triton.jit
def half_value(h):
    """Bits of float16 (int32) -> float32, exact; infinities stay what they are."""
    a = h & 0x7FFF
    subnormal = a.to(tl.float32) * 5.9604644775390625e-08  # 2**-24
    normal = bits_float((a << 13) + tl.where(a >= 0x7C00, 0x70000000, 0x38000000))
    magnitude = tl.where(a < 0x0400, subnormal, normal)
    return bits_float(float_bits(magnitude) | ((h & 0x8000) << 16))


@triton.jit
def half_is_infinite(h):
    """Whether float16 bits mean an infinity or a NaN."""
    return (h & 0x7C00) == 0x7C00


@triton.jit
def nearest(x):
    """ggml's nearest_int: ties to even; beyond 2**22 whatever the bits give, as there; 0 for NaN, as on x86-64."""
    i = (float_bits(x + _MAGIC) & _MAGIC_MASK) - _MAGIC_ZERO
    return tl.where(x == x, i, 0)


@triton.jit
def clamped(x, least: tl.constexpr, most: tl.constexpr):
    """`nearest`, limited to [least, most], as float32. Integers become floats by their bits, not by a conversion."""
    m = float_bits(x + _MAGIC) & _MAGIC_MASK
    m = tl.where(x == x, m, _MAGIC_ZERO)
    m = tl.where(m < _MAGIC_ZERO + most, m, _MAGIC_ZERO + most)
    m = tl.where(m > _MAGIC_ZERO + least, m, _MAGIC_ZERO + least)
    return bits_float(m | _MAGIC_EXPONENT) - _MAGIC


@triton.jit
def rounded(x, levels: tl.constexpr):
    """x limited to [0, levels], then `nearest`, as float32; NaN gives 0."""
    x = tl.where(x > 0.0, x, 0.0)
    return (tl.where(x < levels, x, levels) + _MAGIC) - _MAGIC


@triton.jit
def clamped_int(x, least: tl.constexpr, most: tl.constexpr):
    """`nearest`, limited to [least, most], as int32."""
    i = nearest(x)
    i = tl.where(i < most, i, most)
    return tl.where(i > least, i, least)


@triton.jit
def int8_value(i):
    """The low byte of int32 as a signed number."""
    return ((i & 255) ^ 128) - 128


@triton.jit
def store_byte(at, byte, live):
    """Store the low bytes of int32."""
    tl.store(at, (byte & 255).to(tl.uint8), mask=live)


@triton.jit
def store_half(at, h, live):
    """Store float16 bits, little endian; blocks lie at any address."""
    store_byte(at, h, live)
    store_byte(at + 1, h >> 8, live)


@triton.jit
def report_overflow(overflow, row, infinite, live):
    """Keep the first row in which a scale does not fit float16."""
    first = tl.min(tl.where(infinite & live, row, 0x7FFFFFFF), axis=0)
    if first < 0x7FFFFFFF:
        tl.atomic_min(overflow, first)
