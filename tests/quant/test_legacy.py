"""GGML's unquantized and 32-weight formats against ggml's own quantizer and against gguf-py, byte for byte."""

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamquant.quant.format import Rows
from streamquant.quant.formats import FORMATS
from tests.oracle import (
    FINITE,
    REAL,
    ROWS,
    assert_same_bytes,
    check_against_ggml,
    float_rows,
    ggml_decode,
    ggml_encode,
    make_rows,
    real_matrices,
    same_values,
)

BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
FLOATS = ("F32", "F16", "BF16")
SCALES = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31}  # largest magnitude or range / d

every_format = pytest.mark.parametrize("name", BLOCKS + FLOATS)
every_block = pytest.mark.parametrize("name", BLOCKS)
search = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@every_format
@pytest.mark.parametrize("rows", ROWS)
def test_encodes_like_ggml(name: str, rows: str) -> None:
    check_against_ggml(make_rows(rows, 200, 512), name)


@every_format
@pytest.mark.parametrize("model", REAL)
def test_encodes_trained_weights_like_ggml(name: str, model: str) -> None:
    fitting = [rows for rows in real_matrices(model) if FORMATS[name].fits(rows.shape[1])]
    assert fitting
    for rows in fitting:
        check_against_ggml(rows, name)


@every_format
@search
@given(float_rows(3, 64))
def test_encodes_any_finite_bits_like_ggml(name: str, rows: Rows) -> None:
    check_against_ggml(rows, name)


@every_block
@search
@given(
    float_rows(
        2, 64, st.sampled_from([0.0, -0.0, 2.0**-149, 2.0**-126, 2.0**-24, 65504.0, 65520.0, 3.4028234663852886e38])
    )
)
def test_encodes_the_ends_of_the_ranges_like_ggml(name: str, rows: Rows) -> None:
    check_against_ggml(rows, name)


@every_block
@search
@given(st.integers(1, 31), FINITE, st.lists(st.integers(-256, 256), min_size=32, max_size=32))
def test_rounds_ties_like_ggml(name: str, exponent: int, offset: float, quarters: list[int]) -> None:
    """Multiples of a quarter of a step: every rounding is a tie or next to one."""
    levels = SCALES[name]
    step = 2.0 ** (exponent - 20)
    block = np.clip(np.array(quarters) / 4, -levels, levels) * step
    block[0], block[1] = levels * step * (1 if name.endswith("_1") or exponent % 2 else -1), 0
    shift = np.float32(offset) if name.endswith("_1") and abs(offset) < 1e4 else np.float32(0)
    check_against_ggml((block + shift).astype(np.float32)[None], name)


@every_block
def test_rounds_next_to_every_tie_like_ggml(name: str) -> None:
    """Each half step, and the float32 before and after it, at a scale of 1 and at others that are powers of two."""
    levels = SCALES[name]
    halves = np.arange(-levels if not name.endswith("_1") else 0, levels, dtype=np.float32) + np.float32(0.5)
    around = np.concatenate([halves, *(np.nextafter(halves, np.float32(end)) for end in (-np.inf, np.inf))])
    blocks = np.zeros((-(-around.size // 30), 32), np.float32)
    blocks[:, 2:].flat[: around.size] = around
    for extreme in (levels, -levels) if not name.endswith("_1") else (levels,):
        blocks[:, 0] = extreme
        for scale in (1.0, 2.0**-10, 2.0**9):
            check_against_ggml(blocks * np.float32(scale), name)


@every_block
def test_encodes_every_scale_like_ggml(name: str) -> None:
    """d just below, at and above each float16, and each midpoint of two of them, subnormal and overflowing ones too."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (halves[1:] + halves[:-1]) / 2
    points = (np.concatenate([halves, middles, [65520.0, 65536.0, 1e6]]) * SCALES[name]).astype(np.float32)
    around = np.concatenate([points, *(np.nextafter(points, np.float32(end)) for end in (0, np.inf))])
    rows = np.random.default_rng(0).random((around.size, 32), np.float32) * around[:, None]
    rows[:, 5] = around
    rows[:, 9] = 0
    rows[1::2, :5] *= -1 if not name.endswith("_1") else 1
    check_against_ggml(rows, name)


@every_block
def test_the_first_of_equal_extremes_gives_the_sign(name: str) -> None:
    """Both signs of the largest magnitude, at every pair of places."""
    rows = np.zeros((32 * 31, 32), np.float32)
    pairs = [(i, j) for i in range(32) for j in range(32) if i != j]
    for row, (plus, minus) in zip(rows, pairs, strict=True):
        row[plus], row[minus] = 3, -3
    found = check_against_ggml(rows, name)
    if name in ("Q4_0", "Q5_0"):
        d = found[:, :2].copy().view(np.float16)[:, 0]
        assert [bool(x < 0) for x in d] == [plus < minus for plus, minus in pairs]


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_the_first_of_equal_zeros_gives_the_sign_of_the_minimum(name: str) -> None:
    rows = np.abs(make_rows("normal", 64, 32))
    rows[:, 3], rows[:, 7] = 0.0, -0.0
    rows[::2, [3, 7]] = rows[::2, [7, 3]]
    found = check_against_ggml(rows, name)
    assert found[:, 2:4].copy().view(np.uint16)[:, 0].tolist() == [0x8000, 0] * 32


@pytest.mark.parametrize("name", ["Q8_0", *FLOATS])
@pytest.mark.parametrize("rows", sorted(set(ROWS) - {"denormal"}))  # gguf-py divides by zero there
def test_encodes_like_gguf_py(name: str, rows: str) -> None:
    weights = make_rows(rows, 20, 256)
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
    assert_same_bytes(FORMATS[name].encode(weights)[0], np.ascontiguousarray(expected).view(np.uint8), weights)


@every_block
def test_decodes_like_ggml(name: str) -> None:
    """Every float16 as d, and as m where there is one, infinities and NaN too, with random values of the weights."""
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (65536, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    raw[:, :2] = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    if name.endswith("_1"):
        raw[:, 2:4] = raw[rng.permutation(65536), :2]
    raw = raw.reshape(4096, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        found, expected = FORMATS[name].decode((raw,), 512), ggml_decode(raw, name)
    assert found.shape == (4096, 512)
    assert same_values(found, expected)


@pytest.mark.parametrize(("name", "word"), [("F32", np.uint32), ("F16", np.uint16), ("BF16", np.uint16)])
def test_floats_decode_like_gguf_py(name: str, word: type[np.uint16] | type[np.uint32]) -> None:
    patterns = np.arange(65536) * (65537 if word is np.uint32 else 1)
    raw = patterns.astype(word).reshape(64, 1024).view(np.uint8)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert same_values(FORMATS[name].decode((raw,), 1024), expected)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_value_survives(name: str) -> None:
    raw = np.arange(65536, dtype=np.uint16)
    exponent = {"F16": 0x7C00, "BF16": 0x7F80}[name]
    finite = raw[(raw & exponent) != exponent].reshape(64, -1)
    encoded = FORMATS[name].encode(FORMATS[name].decode((finite.view(np.uint8),), finite.shape[1]))
    assert np.array_equal(encoded[0].view(np.uint16), finite)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_16_bit_floats_round_to_even_like_ggml_and_gguf_py(name: str) -> None:
    """Each midpoint of two neighbours, and the float32 before and after it."""
    finite = np.arange({"F16": 0x7C00, "BF16": 0x7F80}[name], dtype=np.uint16).reshape(32, -1)
    values = FORMATS[name].decode((finite.view(np.uint8),), finite.shape[1]).astype(np.float64).reshape(-1)
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    around = np.stack([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    for rows in (around, -around):
        found = check_against_ggml(rows, name)
        expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name])
        assert_same_bytes(found, np.ascontiguousarray(expected).view(np.uint8), rows, 2)


@pytest.mark.parametrize(
    ("name", "fits", "overflows", "infinity"),
    [
        ("F16", float.fromhex("0x1.ffdffep15"), 65520.0, 0x7C00),
        ("BF16", float.fromhex("0x1.fefffep127"), float.fromhex("0x1.ffp127"), 0x7F80),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_is_infinite_and_reported(name: str, fits: float, overflows: float, infinity: int, sign: int) -> None:
    """The last float32 that rounds down, and the first that rounds to infinity, in two rows."""
    format_ = FORMATS[name]
    rows = np.full((40, 70), sign * fits, np.float32)
    out = format_.allocate(40, 70)
    assert format_.encode_into(rows, out, None) == -1
    assert (out[0].view(np.uint16) & 0x7FFF == infinity - 1).all()
    rows[[17, 30], [69, 0]] = sign * overflows
    assert format_.encode_into(rows, out, None) == 17
    assert (out[0].view(np.uint16) & 0x7FFF == infinity).nonzero()[0].tolist() == [17, 30]
    assert np.array_equal(out[0], ggml_encode(rows, name))


@every_block
def test_overflow_of_a_scale_is_infinite_and_reported(name: str) -> None:
    """d = 65520 is the first to become infinite, in a block in the middle of a row; the bytes stay those of ggml."""
    format_ = FORMATS[name]
    rows = np.zeros((9, 96), np.float32)
    out = format_.allocate(9, 96)
    # for the formats with a minimum it is 0; otherwise the sign of the extreme does not matter
    rows[[4, 7], 40] = np.nextafter(np.float32(65520 * SCALES[name]), np.float32(0))
    assert format_.encode_into(rows, out, None) == -1
    rows[[4, 7], 40] = 65520 * SCALES[name]
    assert format_.encode_into(rows, out, None) == 4
    assert np.array_equal(out[0], ggml_encode(rows, name))


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_overflow_of_a_minimum_is_reported(name: str) -> None:
    """A block of equal weights has d = 0 and m = -65520, which is infinite in float16."""
    format_ = FORMATS[name]
    rows = np.zeros((3, 64), np.float32)
    rows[2, 32:] = -65520
    out = format_.allocate(3, 64)
    assert format_.encode_into(rows, out, None) == 2
    assert np.array_equal(out[0], ggml_encode(rows, name))
