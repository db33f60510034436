"""How a checkpoint stores its weights: as plain floats, or as codes with scales in tensors of their own.

A source format turns any run of rows into float32: it says which bytes of which stored tensors the rows need, and
widens them. For codes the value is one product in float32, code * scale, as llama.cpp's converter computes it
(dequant_model of conversion/base.py); every code and scale is exact in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.format import Encoded, Rows
from streamquant.quant.fp8 import TILE
from streamquant.quant.kernels import floats_cpu, fp8_cpu, int4_cpu
from streamquant.quant.widen import SOURCE_DTYPES, widen

ALL = 1 << 62
"""As a height or width of blocks: all rows, all columns."""
_WORD = 8
"""Codes in a word of INT4."""


@dataclass(frozen=True, slots=True)
class SourcePart:
    """One stored tensor: entries of equal size, each for some rows of weights."""

    dtype: str
    """As safetensors spells it."""
    rows_per_entry: int
    bytes_per_entry: Callable[[int], int]
    """Row length n in weights -> bytes of one entry."""

    def span(self, first: int, last: int, n: int) -> tuple[int, int]:
        """Bytes [start, stop) of the stored tensor that rows [first, last) need."""
        size = self.bytes_per_entry(n)
        return first // self.rows_per_entry * size, -(-last // self.rows_per_entry) * size


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """Rows of weights as a checkpoint stores them."""

    name: str
    about: str
    """In words, for people."""
    floats: str
    """The dtype of its weights where they are stored as plain floats."""
    parts: tuple[SourcePart, ...]
    """The first has an entry for every row."""
    widen_into: Callable[[Encoded, int, Rows], bool]
    """(uint8[k] of each part, their first row, float32[r, n] to fill) -> whether all values are finite."""
    encoded_as: str | None = None
    """The format of `quant.formats.FORMATS` whose parts have these bytes, so that they can be copied."""
    repack: Callable[[Encoded, int, int], Encoded] | None = None
    """(uint8[k] of each part, rows, n) -> encoded rows of `encoded_as`, where its bits stand in other places."""
    is_coded: bool = True
    """Whether weights had lost something before: not of floats."""
    shared_by: int = 1
    """Tensors whose rows lie in the same bytes, by turns."""


@cache
def plain(dtype: str) -> SourceFormat:
    """Plain floats: "BF16", "F16" or "F32".

    >>> plain("BF16").parts[0].span(2, 5, 64)
    (256, 640)
    """
    size = SOURCE_DTYPES[dtype]

    def widen_into(parts: Encoded, _first: int, out: Rows) -> bool:
        return widen(parts[0], dtype, out)

    part = SourcePart(dtype, 1, lambda n: n * size)
    return SourceFormat(dtype, dtype, dtype, (part,), widen_into, dtype, is_coded=False)


@cache
def fp8(height: int, width: int, scale_dtype: str) -> SourceFormat:
    """E4M3 codes [N, K], and a scale of `scale_dtype` for each block of `height` rows and `width` columns.

    Scales lie as [ceil(N / height), ceil(K / width)]; blocks at the edges are smaller. (ALL, ALL) is one scale for a
    tensor, (1, ALL) one for each row.

    >>> fp8(128, 128, "F32").name, fp8(1, ALL, "BF16").name, fp8(ALL, ALL, "F32").name
    ('FP8_BLOCK_128x128_F32', 'FP8_CHANNEL_BF16', 'FP8_TENSOR_F32')
    """
    encoded_as = None
    if width == ALL:
        kind = "TENSOR" if height == ALL else "CHANNEL"
        about = "a scale for each tensor" if height == ALL else "a scale for each output channel"
        encoded_as = f"FP8_CHANNEL_{scale_dtype}" if height == 1 else None
    else:
        kind, about = f"BLOCK_{height}x{width}", f"a scale for each block of {height} x {width}"
        encoded_as = f"FP8_BLOCK_{scale_dtype}" if (height, width) == (TILE, TILE) else None
    size = SOURCE_DTYPES[scale_dtype]

    def widen_into(parts: Encoded, first: int, out: Rows) -> bool:
        codes, n = parts[0].reshape(out.shape), out.shape[1]
        columns = -(-n // width)
        scales: NDArray[np.float32] = np.empty((parts[1].size // size // columns, columns), np.float32)
        is_finite = widen(parts[1], scale_dtype, scales)
        return fp8_cpu.decode(codes, scales, (first % height, height, width), out) and is_finite

    parts = (
        SourcePart("F8_E4M3", 1, lambda n: n),
        SourcePart(scale_dtype, height, lambda n: -(-n // width) * size),
    )
    return SourceFormat(f"FP8_{kind}_{scale_dtype}", f"FP8 E4M3, {about}", "BF16", parts, widen_into, encoded_as)


@cache
def int4(group: int, scale_dtype: str, *, has_zero_point: bool) -> SourceFormat:
    """Words of 8 codes, the lowest 4 bits first, [N, K / 8], and a scale for each `group` columns [N, ceil(K / group)].

    The value is (code - 8) * scale, or (code - zero point) * scale; zero points are packed like codes, along the rows
    [ceil(N / 8), ceil(K / group)]. (dequant_packed in dequant_model; pack_to_int32 of compressed-tensors)

    >>> int4(32, "BF16", has_zero_point=False).name
    'INT4_GROUP_32_BF16'
    """
    kind, about = ("CHANNEL", "output channel") if group == ALL else (f"GROUP_{group}", f"{group} columns of a row")
    size = SOURCE_DTYPES[scale_dtype]

    def widen_into(parts: Encoded, first: int, out: Rows) -> bool:
        rows, n = out.shape
        columns = -(-n // group)
        scales: NDArray[np.float32] = np.empty((rows, columns), np.float32)
        is_finite = widen(parts[1], scale_dtype, scales)
        zeros = np.full((rows, columns), 8, np.float32)
        if has_zero_point:
            packed = parts[2].view(np.uint32).reshape(-1, columns)
            row = first % _WORD + np.arange(rows)
            shift = (4 * (row % _WORD)).astype(np.uint32)[:, None]
            zeros[:] = (packed[row // _WORD] >> shift) & np.uint32(15)
        int4_cpu.decode(parts[0].reshape(rows, n // 2), scales, zeros, min(group, n), out)
        return is_finite and bool(floats_cpu.all_finite(out.reshape(-1)))

    parts = [SourcePart("I32", 1, lambda n: n // 2), SourcePart(scale_dtype, 1, lambda n: -(-n // group) * size)]
    if has_zero_point:
        parts.append(SourcePart("I32", _WORD, lambda n: -(-n // group) * 4))
    name = f"INT4_{kind}_{scale_dtype}{'_ZERO_POINT' if has_zero_point else ''}"
    about = f"INT4, a scale{' and a zero point' if has_zero_point else ''} for each {about}"
    return SourceFormat(name, about, "BF16", tuple(parts), widen_into)
