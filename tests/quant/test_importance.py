"""GGML's types with the importance of columns against ggml's own quantizer, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamquant.quant.format import Importance, Rows
from streamquant.quant.formats import FORMATS
from tests.oracle import REAL, ROWS, check_against_ggml, float_rows, make_rows, real_matrices

WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
UNWEIGHTED = ("F32", "F16", "BF16", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0")
every_format = pytest.mark.parametrize("name", WEIGHTED)
search = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

IMPORTANCE: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "positive": lambda rng, n: rng.random(n) + 1e-3,
    "with_zeros": lambda rng, n: rng.random(n) * (rng.random(n) < 0.5),
    "zero": lambda _rng, n: np.zeros(n),
    "ones": lambda _rng, n: np.ones(n),
    "wide": lambda rng, n: np.exp(10 * rng.standard_normal(n)),
    "extreme": lambda rng, n: rng.choice(np.array([0.0, 1e-45, 1e-30, 1.0, 1e30]), n),
}


def make_importance(name: str, n: int) -> Importance:
    return IMPORTANCE[name](np.random.default_rng(n), n).astype(np.float32)


@every_format
@pytest.mark.parametrize("importance", IMPORTANCE)
def test_encodes_like_ggml(name: str, importance: str) -> None:
    """Rows of three super-blocks, and rows that do not fill the lanes; columns differ, so a shift would show."""
    for rows in ROWS:
        for r, n in ((11, 768), (1, 256)):
            check_against_ggml(make_rows(rows, r, n), name, make_importance(importance, n))


@pytest.mark.parametrize("name", [name for name in WEIGHTED if FORMATS[name].weights_per_block == 32])
def test_encodes_rows_of_any_number_of_blocks_like_ggml(name: str) -> None:
    """The lanes hold blocks of two rows, with a mean square each."""
    for blocks in (1, 2, 3, 17, 18):
        rows = make_rows("student_t3", 21, 32 * blocks) * np.exp2(np.arange(21, dtype=np.float32))[:, None]
        check_against_ggml(rows, name, make_importance("positive", 32 * blocks))


@every_format
@pytest.mark.parametrize("model", REAL)
def test_encodes_trained_weights_like_ggml(name: str, model: str) -> None:
    weights = np.concatenate([rows.reshape(-1) for rows in real_matrices(model)])
    rows = weights[: min(weights.size, 1 << 18) // 512 * 512].reshape(-1, 512)
    check_against_ggml(rows, name, make_importance("with_zeros", 512))


@every_format
@search
@given(float_rows(2, 256), float_rows(1, 256))
def test_encodes_any_weights_and_importance_like_ggml(name: str, rows: Rows, importance: Rows) -> None:
    check_against_ggml(rows, name, abs(importance[0]))


@every_format
@search
@given(st.integers(0, 2**32 - 1), st.floats(-40, 10), st.floats(0, 1), st.booleans())
def test_encodes_sub_blocks_of_mixed_scale_like_ggml(
    name: str, seed: int, scale: float, zeros: float, one_sided: bool
) -> None:
    """Sub-blocks whose own scale rounds to zero, zeros, weights of one sign, few columns that count."""
    rng = np.random.default_rng(seed)
    sub_scale = np.exp2(rng.uniform(-30, 0, (2, 32, 1)) + scale)
    weights = rng.standard_normal((2, 32, 16)) * sub_scale * (rng.random((2, 32, 16)) >= zeros)
    rows: Rows = (abs(weights) if one_sided else weights).reshape(2, 512).astype(np.float32)
    importance = rng.random(512) ** 8 * (rng.random(512) >= zeros)
    check_against_ggml(rows, name, importance.astype(np.float32))


@every_format
def test_reports_the_first_row_whose_scale_overflows(name: str) -> None:
    rows, importance = make_rows("normal", 5, 256), make_importance("ones", 256)
    out = FORMATS[name].allocate(*rows.shape)
    assert FORMATS[name].encode_into(rows, out, importance) == -1
    rows[3] *= np.float32(1e12)
    assert FORMATS[name].encode_into(rows, out, importance) == 3


def test_formats_say_whether_importance_matters() -> None:
    assert {name for name, format_ in FORMATS.items() if format_.uses_importance} == set(WEIGHTED)


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_other_formats_ignore_importance(name: str) -> None:
    rows = make_rows("normal", 3, 256)
    assert (
        FORMATS[name].encode(rows, make_importance("wide", 256))[0].tobytes() == FORMATS[name].encode(rows)[0].tobytes()
    )


def test_refuses_importance_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"the importance of 256 columns is float32\[256\], not float64\[32\]"):
        FORMATS["Q4_K"].encode(make_rows("normal", 3, 256), np.ones(32))  # type: ignore[arg-type]
