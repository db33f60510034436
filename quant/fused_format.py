"""How GPT-OSS stores the experts of a layer: floats by columns, gate and up by turns, or MXFP4.

Each function here is the source format of one projection of one expert, as source_format.py has them: rows that lie in
the same bytes as those of other projections, every `step`-th from `offset`. (GptOssExperts of transformers;
GptOssModel of llama.cpp's converter)
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.format import Encoded, Rows
from streamquant.quant.kernels import floats_cpu, mxfp4_cpu
from streamquant.quant.source_format import SourceFormat, SourcePart
from streamquant.quant.widen import SOURCE_DTYPES, widen

MXFP4_BLOCK = 32
"""Weights that share a scale."""


@cache
def by_turns(dtype: str, step: int, offset: int) -> SourceFormat:
    """Vectors of floats: n weights are every `step`-th of n * step values.

    >>> by_turns("BF16", 2, 1).parts[0].span(0, 1, 96)
    (0, 384)
    """
    size = SOURCE_DTYPES[dtype]

    def widen_into(parts: Encoded, _first: int, out: Rows) -> bool:
        r, n = out.shape
        wide: NDArray[np.float32] = np.empty((r, n * step), np.float32)
        widen(parts[0], dtype, wide)
        out[:] = wide[:, offset::step]
        return bool(floats_cpu.all_finite(out.reshape(-1)))

    part = SourcePart(dtype, 1, lambda n: n * step * size)
    about = f"{dtype}, every {step}. value"
    name = f"{dtype}_TURNS_{step}_{offset}"
    return SourceFormat(name, about, dtype, (part,), widen_into, is_coded=False, shared_by=step)


@cache
def by_columns(dtype: str, rows: int, step: int, offset: int) -> SourceFormat:
    """A matrix of floats [rows, n] that lies as [n, rows * step]: row i is column i * step + offset.

    Any rows need the whole of it.

    >>> by_columns("BF16", 96, 2, 0).parts[0].span(10, 20, 64)
    (0, 24576)
    """
    size = SOURCE_DTYPES[dtype]
    raw_dtype = {2: np.uint16, 4: np.uint32}[size]

    def widen_into(parts: Encoded, first: int, out: Rows) -> bool:
        r, n = out.shape
        stored = parts[0].view(raw_dtype).reshape(n, rows * step)
        start = first * step + offset
        picked = np.ascontiguousarray(stored[:, start : start + r * step : step].T)
        return widen(picked.reshape(-1).view(np.uint8), dtype, out)

    part = SourcePart(dtype, rows, lambda n: n * rows * step * size)
    name = f"{dtype}_COLUMNS_{rows}_{step}_{offset}"
    return SourceFormat(name, f"{dtype} by columns", dtype, (part,), widen_into, is_coded=False, shared_by=step)


@cache
def mxfp4_by_columns(rows: int, n: int) -> SourceFormat:
    """Matrices [rows, n], one after another, whose transposes [n, rows] lie as blocks and scales: floats of GPT-OSS.

    >>> mxfp4_by_columns(64, 192).parts[0].span(70, 80, 192)
    (6144, 12288)
    """

    def widen_into(parts: Encoded, first: int, out: Rows) -> bool:
        codes, scales = (part.reshape(-1, n, rows // size) for part, size in zip(parts, (2, MXFP4_BLOCK), strict=True))
        at, of_first = 0, first // rows
        while at < len(out):
            matrix, start = divmod(first + at, rows)
            stop = min(start + len(out) - at, rows)
            low, high = start // MXFP4_BLOCK, -(-stop // MXFP4_BLOCK)
            block = np.ascontiguousarray(codes[matrix - of_first, :, low * MXFP4_BLOCK // 2 : high * MXFP4_BLOCK // 2])
            wide: NDArray[np.float32] = np.empty((n, (high - low) * MXFP4_BLOCK), np.float32)
            mxfp4_cpu.decode_mxfp4(block, np.ascontiguousarray(scales[matrix - of_first, :, low:high]), wide)
            out[at : at + stop - start] = wide[:, start - low * MXFP4_BLOCK : stop - low * MXFP4_BLOCK].T
            at += stop - start
        return bool(floats_cpu.all_finite(out.reshape(-1)))

    parts = (
        SourcePart("U8", rows, lambda columns: columns * rows // 2),
        SourcePart("U8", rows, lambda columns: columns * rows // MXFP4_BLOCK),
    )
    about = f"MXFP4 by columns, a scale for each {MXFP4_BLOCK} rows"
    return SourceFormat(f"MXFP4_COLUMNS_{rows}_{n}", about, "BF16", parts, widen_into)


@cache
def mxfp4(step: int, offset: int) -> SourceFormat:
    """E2M1 codes, two in a byte, the low 4 bits first, and an E8M0 scale for each 32: blocks and scales of GPT-OSS.

    A block of GGML's MXFP4 has the scale, and then in byte j the values j and j + 16: only bits move. (repack_mxfp4)

    >>> mxfp4(2, 0).parts[0].span(1, 3, 64), mxfp4(1, 0).encoded_as
    ((64, 192), 'MXFP4')
    """

    def picked(parts: Encoded, r: int, n: int) -> Encoded:
        shapes = (n // 2, n // MXFP4_BLOCK)
        rows = (part.reshape(r, step, size)[:, offset] for part, size in zip(parts, shapes, strict=True))
        return tuple(np.ascontiguousarray(part) for part in rows)

    def widen_into(parts: Encoded, _first: int, out: Rows) -> bool:
        codes, scales = picked(parts, *out.shape)
        mxfp4_cpu.decode_mxfp4(codes, scales, out)
        return bool(floats_cpu.all_finite(out.reshape(-1)))

    def repack(parts: Encoded, rows: int, n: int) -> Encoded:
        codes, scales = picked(parts, rows, n)
        out = np.empty((rows, n // MXFP4_BLOCK * 17), np.uint8)
        mxfp4_cpu.repack_mxfp4(codes, scales, out)
        return (out,)

    parts = (SourcePart("U8", 1, lambda n: step * n // 2), SourcePart("U8", 1, lambda n: step * n // MXFP4_BLOCK))
    about = f"MXFP4, a scale for each {MXFP4_BLOCK} columns of a row"
    name = f"MXFP4_TURNS_{step}_{offset}"
    return SourceFormat(name, about, "BF16", parts, widen_into, "MXFP4", repack, shared_by=step)
