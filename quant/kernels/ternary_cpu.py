"""CPU kernels of GGML's ternary types TQ1_0 and TQ2_0: super-blocks of 256 weights of -d, 0 or d, d = amax.

quantize_row_tq*_ref of ggml/src/ggml-quants.c. Each kernel takes float32[r, n] and fills uint8[r, n / 256 * block
bytes]; it returns the first row in which d overflows float16, or -1.
"""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import half_is_infinite, helper, kernel, put_half
from streamquant.quant.kernels.legacy_cpu import inverse_or_zero, rounded
from streamquant.quant.kernels.vectors import LANES, absolute, fill, fill_int, load, select, store, store_bytes

QK_K = 256
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@helper
def _trits(flat: Floats, start: int, trits: Bytes) -> np.float32:
    """The values + 1 of a super-block; returns d."""
    largest = fill(np.float32(0.0))
    for i in range(0, QK_K, LANES):
        magnitude = absolute(load(flat, start + i))
        largest = select(magnitude > largest, magnitude, largest)
    lanes = np.empty(LANES, np.float32)
    store(lanes, 0, largest)
    d = np.float32(lanes.max())
    inverse = fill(inverse_or_zero(d))
    for i in range(0, QK_K, LANES):
        store_bytes(trits, i, rounded(load(flat, start + i) * inverse) + fill_int(np.int32(1)))
    return d


@helper
def _pack_5(trits: Bytes, first: int, step: int, count: int, values: int, to: Bytes, at: int) -> None:
    """`count` bytes of `values` trits each, `step` apart, in base 3 from the most significant of 5, scaled to 256."""
    for m in range(count):
        q = np.uint32(0)
        for k in range(5):
            q = np.uint32(3) * q + (np.uint32(trits[first + m + k * step]) if k < values else np.uint32(0))
        to[at + m] = np.uint8((q * np.uint32(256) + np.uint32(242)) // np.uint32(243))


@kernel
def encode_tq1_0(rows: Floats, out: Bytes) -> int:
    """TQ1_0: 48 bytes of 5 trits, 4 bytes of 4 trits, f16 d; 54 bytes."""
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // QK_K
    trits = np.empty(QK_K, np.uint8)
    first_overflow = -1
    for block in range(rows.size // QK_K):
        at = block * 54
        d = put_half(to, at + 52, _trits(flat, block * QK_K, trits))
        if half_is_infinite(d) and first_overflow < 0:
            first_overflow = block // per_row
        _pack_5(trits, 0, 32, 32, 5, to, at)
        _pack_5(trits, 160, 16, 16, 5, to, at + 32)
        _pack_5(trits, 240, 4, 4, 4, to, at + 48)
    return first_overflow


@kernel
def encode_tq2_0(rows: Floats, out: Bytes) -> int:
    """TQ2_0: 64 bytes of four 2-bit values, f16 d; 66 bytes."""
    flat, to, per_row = rows.reshape(rows.size), out.reshape(out.size), rows.shape[1] // QK_K
    trits = np.empty(QK_K, np.uint8)
    first_overflow = -1
    for block in range(rows.size // QK_K):
        at = block * 66
        d = put_half(to, at + 64, _trits(flat, block * QK_K, trits))
        if half_is_infinite(d) and first_overflow < 0:
            first_overflow = block // per_row
        for half in range(2):
            for m in range(32):
                byte = np.uint8(0)
                for k in range(4):
                    byte |= trits[128 * half + 32 * k + m] << np.uint8(2 * k)
                to[at + 32 * half + m] = byte
    return first_overflow
