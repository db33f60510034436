"""Widening checkpoints to float32: every value exactly, every NaN and infinity noticed."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamquant.quant.format import Rows
from streamquant.quant.widen import SOURCE_DTYPES, widen

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
WORD = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}

every_dtype = pytest.mark.parametrize("dtype", SOURCE_DTYPES)


def patterns(dtype: str) -> NDArray[np.unsignedinteger]:
    """All of a 16-bit dtype; of float32 random ones and the ends."""
    if dtype != "F32":
        return np.arange(65536, dtype=np.uint16)
    ends = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], np.uint32)
    some = np.random.default_rng(0).integers(0, 2**32, 65536, np.uint32)
    return np.concatenate([ends, ends | np.uint32(0x80000000), some])


def is_finite(bits: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = (bits & EXPONENT[dtype]) != EXPONENT[dtype]
    return finite


@every_dtype
def test_sizes(dtype: str) -> None:
    assert SOURCE_DTYPES[dtype] == TORCH[dtype].itemsize


@every_dtype
def test_every_value_is_kept(dtype: str) -> None:
    bits = patterns(dtype)
    out = np.empty(bits.size, np.float32)
    assert not widen(bits.view(np.uint8), dtype, out)
    expected = torch.frombuffer(bytearray(bits.tobytes()), dtype=TORCH[dtype]).float().numpy()
    finite = is_finite(bits, dtype)
    assert np.array_equal(out[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert np.array_equal(out[~finite], expected[~finite], equal_nan=True)


@every_dtype
def test_all_finite_values_pass(dtype: str) -> None:
    bits = patterns(dtype)
    bits = bits[is_finite(bits, dtype)]
    assert widen(bits.view(np.uint8), dtype, np.empty(bits.size, np.float32))


@every_dtype
def test_each_nan_and_infinity_is_noticed(dtype: str) -> None:
    """Alone among finite values of both signs, at places that vary, the first and the last one too."""
    bits = patterns(dtype)
    finite = bits[is_finite(bits, dtype)][-1019:]
    out = np.empty(finite.size, np.float32)
    bad = bits[~is_finite(bits, dtype)]
    assert bad.size >= 100
    for k, value in enumerate(bad):
        row = finite.copy()
        row[k * 17 % row.size if k > 1 else -k] = value
        assert not widen(row.view(np.uint8), dtype, out), hex(value)


@every_dtype
@pytest.mark.parametrize("size", [0, 1, 2, 7, 31, 65])
def test_any_length_and_shape(dtype: str, size: int) -> None:
    """Rows of a matrix, lengths below a vector register, none at all; read-only input that starts at an odd byte."""
    values = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    source = torch.from_numpy(values).to(TORCH[dtype])
    buffer = np.zeros(1 + 3 * size * SOURCE_DTYPES[dtype], np.uint8)
    buffer[1:] = source.flatten().view(torch.uint8).numpy()
    buffer.flags.writeable = False
    for raw in (buffer[1:].copy(), buffer[1:]):
        out: Rows = np.full((3, size), np.nan, np.float32)
        assert widen(raw, dtype, out)
        assert np.array_equal(out, source.float().numpy())


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "bf16", ""])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(KeyError) as error:
        widen(np.zeros(8, np.uint8), dtype, np.zeros(4, np.float32))
    assert error.value.args == (dtype,)
