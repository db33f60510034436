"""Source formats: any run of rows, from any row, is what torch makes of the whole tensor."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamquant.quant.fp8 import BLOCK
from streamquant.quant.fused_format import by_columns, by_turns, mxfp4, mxfp4_by_columns
from streamquant.quant.source_format import ALL, SourceFormat, fp8, int4, plain
from tests.oracle import ggml_decode
from tests.quantized_sources import Packed

RUNS = ((0, 300), (0, 1), (127, 129), (77, 233), (299, 300))
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read(format_: SourceFormat, stored: list[torch.Tensor], run: tuple[int, int], n: int) -> NDArray[np.float32]:
    """Rows [first, last) through the spans that a reader would read."""
    parts = []
    for part, tensor in zip(format_.parts, stored, strict=True):
        start, stop = part.span(*run, n)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert stop <= raw.size
        parts.append(raw[start:stop].copy())
    out = np.empty((run[1] - run[0], n), np.float32)
    assert format_.widen_into(tuple(parts), run[0], out)
    return out


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 32), (1, ALL), (ALL, ALL)])
@pytest.mark.parametrize("n", [8, 200, 384])
def test_fp8(height: int, width: int, scale_dtype: str, n: int) -> None:
    raw = torch.randint(0, 256, (300, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    raw[(raw & 0x7F) == 0x7F] = 0
    codes = raw.view(torch.float8_e4m3fn)
    size = (-(-300 // height), -(-n // width))
    scales = (torch.rand(size, generator=torch.Generator().manual_seed(1)) / 100).to(DTYPES[scale_dtype])
    spread = scales.float().repeat_interleave(min(height, 300), 0).repeat_interleave(min(width, n), 1)[:300, :n]
    expected = (codes.float() * spread).numpy()
    for run in RUNS:
        assert np.array_equal(read(fp8(height, width, scale_dtype), [codes, scales], run, n), expected[slice(*run)])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96])
def test_int4(group: int, symmetric: bool) -> None:
    how = Packed(group, symmetric)
    stored = how.stored("w", torch.randn((300, 192), generator=torch.Generator().manual_seed(2)))
    parts = [stored[f"w_{part}"] for part in ("packed", "scale", *(() if symmetric else ("zero_point",)))]
    expected = how.decode("w", stored).numpy()
    format_ = int4(group, "BF16", has_zero_point=not symmetric)
    for run in RUNS:
        assert np.array_equal(read(format_, parts, run, 192), expected[slice(*run)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain(dtype: str) -> None:
    values = torch.randn((300, 24), generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])
    for run in RUNS:
        assert np.array_equal(read(plain(dtype), [values], run, 24), values.float().numpy()[slice(*run)])


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_nan_codes_are_found(code: int, scale: float) -> None:
    codes, out = np.zeros((3, 200), np.uint8), np.empty((3, 200), np.float32)
    codes[1, 150] = code
    scales = np.full((1, 2), scale, np.float32)
    assert not fp8(128, 128, "F32").widen_into((codes.reshape(-1), scales.view(np.uint8).reshape(-1)), 0, out)
    assert np.argwhere(np.isnan(out)).tolist() == [[1, 150]]


def test_our_own_blocks_are_read_back() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    encoded = BLOCK["F32"].encode(rows)
    out = np.empty_like(rows)
    assert fp8(128, 128, "F32").encoded_as == BLOCK["F32"].name
    assert fp8(128, 128, "F32").widen_into(tuple(part.reshape(-1) for part in encoded), 0, out)
    assert np.array_equal(out, BLOCK["F32"].decode(encoded, 200))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("step", "offset"), [(1, 0), (2, 0), (2, 1)])
def test_by_columns_and_by_turns(dtype: str, step: int, offset: int) -> None:
    values = torch.randn((24, 300 * step), generator=torch.Generator().manual_seed(4)).to(DTYPES[dtype])
    expected = values.float().numpy()[:, offset::step].T
    for run in RUNS:
        assert np.array_equal(read(by_columns(dtype, 300, step, offset), [values], run, 24), expected[slice(*run)])
    one = read(by_turns(dtype, step, offset), [values[0]], (0, 1), 300)
    assert np.array_equal(one[0], values[0].float().numpy()[offset::step])


@pytest.mark.parametrize(("step", "offset"), [(1, 0), (2, 0), (2, 1)])
def test_mxfp4(step: int, offset: int) -> None:
    """Every scale but the largest, whose values overflow; ggml reads the same of what was repacked."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (300 * step, 48), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 252, (300 * step, 3), dtype=torch.uint8, generator=generator)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    whole = table[torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()].reshape(-1, 3, 32)
    expected = (whole * 2.0 ** (scales.double()[..., None] - 127)).reshape(-1, 96)[offset::step].float().numpy()
    format_ = mxfp4(step, offset)
    for run in RUNS:
        assert np.array_equal(read(format_, [codes, scales], run, 96), expected[slice(*run)])
    assert format_.repack is not None
    (repacked,) = format_.repack((codes.numpy().reshape(-1), scales.numpy().reshape(-1)), 300, 96)
    assert np.array_equal(ggml_decode(repacked, "MXFP4"), expected)


def test_mxfp4_by_columns() -> None:
    """Matrices of 96 rows, one after another: runs that begin and end in any of them, and within a block."""
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (4, 40, 48), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (4, 40, 3), dtype=torch.uint8, generator=generator)
    stacked = [part.reshape(160, -1) for part in (codes, scales)]
    expected = read(mxfp4(1, 0), stacked, (0, 160), 96).reshape(4, 40, 96).swapaxes(1, 2).reshape(384, 40)
    for run in (*RUNS, (0, 384), (95, 97), (31, 33), (383, 384)):
        assert np.array_equal(read(mxfp4_by_columns(96, 40), [codes, scales], run, 40), expected[slice(*run)])


def test_scales_that_overflow_are_found() -> None:
    codes, scales, out = np.full(16, 7, np.uint8), np.array([254], np.uint8), np.empty((1, 32), np.float32)
    assert not mxfp4(1, 0).widen_into((codes, scales), 0, out)
