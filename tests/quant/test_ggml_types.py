"""GGML's types beyond the legacy ones against ggml's own quantizer and dequantizer, without importance, bit for bit."""

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamquant.quant.format import Rows
from streamquant.quant.formats import FORMATS
from streamquant.quant.kernels.kquants_cpu import trials
from tests.oracle import (
    REAL,
    ROWS,
    check_against_ggml,
    float_rows,
    ggml_decode,
    make_rows,
    real_matrices,
    same_values,
)

KQUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TYPES = (*KQUANTS, "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0")
every_format = pytest.mark.parametrize("name", TYPES)
search = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@every_format
@pytest.mark.parametrize("rows", ROWS)
def test_encodes_like_ggml(name: str, rows: str) -> None:
    """Three super-blocks in a row: an odd number leaves half of the lanes empty at the end."""
    check_against_ggml(make_rows(rows, 33, 768), name)


@every_format
@pytest.mark.parametrize("model", REAL)
def test_encodes_trained_weights_like_ggml(name: str, model: str) -> None:
    weights = np.concatenate([rows.reshape(-1) for rows in real_matrices(model)])
    check_against_ggml(weights[: min(weights.size, 1 << 20) // 512 * 512].reshape(-1, 512), name)


@every_format
@search
@given(float_rows(2, 256))
def test_encodes_any_weights_like_ggml(name: str, rows: Rows) -> None:
    check_against_ggml(rows, name)


@every_format
@search
@given(st.integers(0, 2**32 - 1), st.floats(-40, 10), st.floats(0, 1), st.booleans())
def test_encodes_sub_blocks_of_mixed_scale_like_ggml(
    name: str, seed: int, scale: float, zeros: float, one_sided: bool
) -> None:
    """Sub-blocks whose own scale rounds to zero beside large ones, zeros, and weights of one sign."""
    rng = np.random.default_rng(seed)
    sub_scale = np.exp2(rng.uniform(-30, 0, (2, 32, 1)) + scale)
    weights = rng.standard_normal((2, 32, 16)) * sub_scale * (rng.random((2, 32, 16)) >= zeros)
    rows: Rows = (abs(weights) if one_sided else weights).reshape(2, 512).astype(np.float32)
    check_against_ggml(rows, name)


@every_format
def test_constant_sub_blocks_like_ggml(name: str) -> None:
    """No range to search: positive, negative and zero constants, in every mixture of sub-blocks."""
    rng = np.random.default_rng(0)
    levels = rng.choice(np.array([0, 1, -1, 0.37, -3e-5, 1e-20], np.float32), (64, 32, 1))
    check_against_ggml(np.broadcast_to(levels, (64, 32, 16)).reshape(64, 512).astype(np.float32), name)


@every_format
def test_weights_that_fit_one_trial_like_ggml(name: str) -> None:
    """Near the largest weight, and exact for one of the 19 scales that the search of Q6_K tries."""
    rng = np.random.default_rng(3)
    factors = 32 + np.repeat(np.arange(-9, 10), 64)[:, None] / 10
    rows = rng.choice([-1.0, 1.0], (factors.size, 256)) * rng.integers(24, 32, (factors.size, 256)) / factors
    rows[:, ::16] = 1.0
    check_against_ggml(rows.astype(np.float32), name)


@pytest.mark.parametrize("name", [name for name in TYPES if name != "MXFP4"])
def test_reports_the_first_row_whose_scale_overflows(name: str) -> None:
    rows = make_rows("normal", 5, 256)
    out = FORMATS[name].allocate(*rows.shape)
    assert FORMATS[name].encode_into(rows, out, None) == -1
    rows[3] *= np.float32(1e15)
    assert FORMATS[name].encode_into(rows, out, None) == 3


def test_mxfp4_scales_around_powers_of_two_like_ggml() -> None:
    """log2f rounds up to the exponent of a power of two that is just above, more often for large exponents."""
    powers = np.exp2(np.arange(-149, 128)).astype(np.float32).view(np.int32)
    nearby = np.unique(powers[:, None] + np.arange(-60, 3))
    largest = nearby[(nearby > 0) & (nearby < 0x7F800000)].astype(np.int32).view(np.float32)
    rows = np.zeros((largest.size, 32), np.float32)
    rows[:, 5], rows[:, 6], rows[:, 30] = largest, -largest / 2, largest / 3
    check_against_ggml(rows, "MXFP4")


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4"])
def test_weights_halfway_between_levels_like_ggml(name: str) -> None:
    """Of two levels equally near, IQ4 takes the upper one, MXFP4 the first in its table."""
    halves = np.arange(-254, 255, dtype=np.float32) / 2
    rows = np.zeros((halves.size, 32), np.float32)
    rows[:, 0], rows[:, 1:9], rows[:, 9:17] = -127, halves[:, None], halves[::-1, None]
    check_against_ggml(rows, name)
    check_against_ggml(rows / np.float32(16), name)


def test_trials_are_the_c_codes() -> None:
    """rmin + rdelta * is + nmax in single precision; 0.1 is not exact, so the order matters."""
    f = np.float32
    assert trials(-1.0, 0.1, 21, 15)[7] == f(f(-1) + f(f(0.1) * f(7))) + f(15)
    assert trials(-0.5, 0.1, 16, 31).tolist()[0] == 30.5


@every_format
def test_decodes_like_ggml(name: str) -> None:
    """Any bytes at all: every value of scales, minima and weights, infinities and NaN too."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = np.random.default_rng(2).integers(0, 256, (2000, 2 * size), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        assert same_values(FORMATS[name].decode((raw,), 2 * weights), ggml_decode(raw, name))
