"""FP8 against torch's E4M3 and against llm-compressor's own converter, byte for byte."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamquant.quant.format import Encoded, Rows
from streamquant.quant.formats import FORMATS
from streamquant.quant.fp8 import E4M3
from tests.oracle import FINITE, REAL, ROWS, assert_same_bytes, float_rows, make_rows, real_matrices, round_to

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SCHEMES = {"CHANNEL": "FP8_DYNAMIC", "BLOCK": "FP8_BLOCK"}

every_dtype = pytest.mark.parametrize("dtype", TORCH)
every_kind = pytest.mark.parametrize("kind", SCHEMES)
search = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def as_bytes(tensor: Any) -> NDArray[np.uint8]:
    raw: NDArray[np.uint8] = tensor.flatten().contiguous().view(torch.uint8).numpy()
    return raw.reshape(tensor.shape[0], -1)


def check_same(found: Encoded, expected: tuple[Any, Any], rows: Rows) -> None:
    codes, scales = (as_bytes(tensor) for tensor in expected)
    size = expected[1].element_size()
    assert_same_bytes(found[1], scales, np.zeros((scales.shape[0], scales.shape[1] // size), np.float32), size)
    assert_same_bytes(found[0], codes, rows)


def rule(weights: Any, tile: tuple[int, int]) -> tuple[Any, Any]:
    """The rule in plain torch, in the dtype of the weights: one scale a tile, each tile on its own."""
    (r, n), (height, width) = weights.shape, tile
    codes = torch.empty((r, n), dtype=torch.float8_e4m3fn)
    scales = torch.empty((-(-r // height), -(-n // width)), dtype=weights.dtype)
    for i in range(0, r, height):
        for j in range(0, n, width):
            block = weights[i : i + height, j : j + width]
            scale = block.abs().max() / 448
            if scale == 0:
                scale = torch.tensor(torch.finfo(weights.dtype).eps, dtype=weights.dtype)
            scales[i // height, j // width] = scale
            codes[i : i + height, j : j + width] = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales


def rule_by_row(weights: Any) -> tuple[Any, Any]:
    """The rule for one scale a row, all rows at once."""
    scales = weights.abs().amax(dim=1, keepdim=True) / 448
    scales[scales == 0] = torch.finfo(weights.dtype).eps
    return (weights / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales


@functools.cache
def converter(scheme: str) -> Any:
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter
    from llmcompressor.entrypoints.model_free.validate import validate_config

    return ModelFreePtqConverter(validate_config(None, scheme, []))


def llm_compressor(weights: Any, kind: str) -> tuple[Any, Any]:
    made = converter(SCHEMES[kind]).process({"layer.weight": weights.clone()})
    assert sorted(made) == ["layer.weight", "layer.weight_scale"]
    assert made["layer.weight"].dtype == torch.float8_e4m3fn
    return made["layer.weight"], made["layer.weight_scale"]


def check_against_llm_compressor(rows: Rows, kind: str, dtype: str) -> None:
    rows = round_to(rows, dtype)
    expected = llm_compressor(torch.tensor(rows).to(TORCH[dtype]), kind)
    assert expected[1].dtype == TORCH[dtype]
    format_ = FORMATS[f"FP8_{kind}_{dtype}"]
    shapes = [part.stored_shape(rows.shape) for part in format_.parts]
    assert shapes == [tuple(tensor.shape) for tensor in expected]
    check_same(format_.encode(rows), expected, rows)


@every_kind
@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_encodes_like_llm_compressor(kind: str, dtype: str, rows: str) -> None:
    check_against_llm_compressor(make_rows(rows, 130, 256), kind, dtype)


@every_kind
@pytest.mark.parametrize("model", REAL)
def test_encodes_trained_weights_like_llm_compressor(kind: str, model: str) -> None:
    for rows in real_matrices(model):
        check_against_llm_compressor(rows, kind, "BF16")


@every_kind
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (3, 127), (128, 129), (129, 300), (257, 64), (256, 384)])
def test_incomplete_blocks_like_llm_compressor(kind: str, dtype: str, shape: tuple[int, int]) -> None:
    """Tiles at the right and lower edge may be smaller. The reference pads them with zeros."""
    check_against_llm_compressor(make_rows("student_t3", *shape), kind, dtype)


@every_kind
@every_dtype
def test_rows_and_blocks_of_zeros_like_llm_compressor(kind: str, dtype: str) -> None:
    """Their scale is the eps of the dtype; rows that are so small that the scale rounds to zero get it too."""
    rows = make_rows("normal", 384, 256)
    rows[100:290] = 0
    rows[:, 128:] *= np.float32(1e-7 if dtype == "F16" else 1e-42)
    check_against_llm_compressor(rows, kind, dtype)
    eps = np.float32({"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}[dtype])
    codes, scales = FORMATS[f"FP8_{kind}_{dtype}"].encode(round_to(rows, dtype))
    of_zeros = torch.from_numpy(scales[200 if kind == "CHANNEL" else 1].copy()).view(TORCH[dtype]).float()
    assert of_zeros[-1] == eps
    assert not (codes[100:290] & 0x7F).any()


@every_dtype
@pytest.mark.parametrize(("kind", "preset"), [("TENSOR", "FP8"), ("CHANNEL_CALIBRATED", "FP8_DYNAMIC")])
def test_calibrated_weights_like_compressed_tensors(kind: str, preset: str, dtype: str) -> None:
    """As oneshot quantizes them: with a zero point of 0, which takes the sign of -0.0, also of a quotient."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme(preset, ["Linear"])
    assert scheme.weights is not None
    for name in ROWS:
        for factor in (1.0, 1e-6, 1e-38, 1e3):
            rows = round_to(make_rows(name, 33, 96) * np.float32(factor), dtype)
            rows[:, 1] = -0.0
            rows[3:, 2] = round_to(np.full(30, -1e-7 if dtype == "F16" else -1e-41, np.float32), dtype)
            weights = torch.from_numpy(rows).to(TORCH[dtype])
            if not bool(torch.isfinite(weights).all()):
                continue
            each = (weights.reshape(1, -1) if kind == "TENSOR" else weights).float()
            least, most = (found.to(TORCH[dtype]) for found in (each.amin(1), each.amax(1)))
            shape = (-1,) if kind == "TENSOR" else (-1, 1)
            scale, zero = calculate_qparams(least.reshape(shape), most.reshape(shape), scheme.weights)
            state = {"weight": weights, "weight_scale": scale, "weight_zero_point": zero}
            codes = BaseCompressor.get_value_from_registry("float-quantized").compress(state, scheme)["weight"]
            check_same(FORMATS[f"FP8_{kind}_{dtype}"].encode(rows), (codes, scale), rows)


@every_kind
@every_dtype
@search
@given(data=st.data())
def test_any_finite_bits_follow_the_rule(kind: str, dtype: str, data: st.DataObject) -> None:
    r, n = data.draw(st.sampled_from([(1, 1), (5, 33), (130, 3), (2, 260)]), "shape")
    rows = round_to(data.draw(float_rows(r, n, FINITE), "rows"), dtype)
    weights = torch.from_numpy(rows).to(TORCH[dtype])
    expected = rule_by_row(weights) if kind == "CHANNEL" else rule(weights, (128, 128))
    check_same(FORMATS[f"FP8_{kind}_{dtype}"].encode(rows), expected, rows)


def finite_values(dtype: str) -> Rows:
    """All finite values of a 16-bit dtype."""
    values: Rows = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(TORCH[dtype]).float().numpy()
    return values[np.isfinite(values)]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_at_many_scales(dtype: str) -> None:
    """Every finite value divided by scales of every exponent, and of every mantissa at the ends and in the middle.

    A row holds all values up to its amax, which gives the scale, and zeros for the others.
    """
    values = finite_values(dtype)
    positive = np.unique(abs(values))
    mantissas = {"BF16": 128, "F16": 1024}[dtype]
    rng = np.random.default_rng(0)
    exponents = positive.size // mantissas
    one_each = np.arange(exponents) * mantissas + rng.integers(0, mantissas, exponents)
    middle = exponents // 2 * mantissas + rng.choice(mantissas, 100, replace=False)
    top = positive.size - 1 - rng.choice(mantissas, 20, replace=False)
    picks = np.concatenate([one_each[-(len(one_each) * 3 // 4) :], middle, top, [positive.size - 1]])
    format_ = FORMATS[f"FP8_CHANNEL_{dtype}"]
    for amax in np.array_split(positive[picks], 8):
        rows = np.where(abs(values) <= amax[:, None], values, np.float32(0))
        check_same(format_.encode(rows), rule_by_row(torch.from_numpy(rows).to(TORCH[dtype])), rows)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_amax_of_a_16_bit_dtype(dtype: str) -> None:
    """Every positive value as the amax of a row, with some smaller ones beside it."""
    positive = np.unique(abs(finite_values(dtype)))
    smaller = np.random.default_rng(0).uniform(-1, 1, (positive.size, 40)).astype(np.float32)
    rows = round_to(np.concatenate([-positive[:, None], smaller * positive[:, None]], axis=1), dtype)
    found = FORMATS[f"FP8_CHANNEL_{dtype}"].encode(rows)
    check_same(found, rule_by_row(torch.from_numpy(rows).to(TORCH[dtype])), rows)


def test_every_e4m3_value_and_tie() -> None:
    """With a scale of 1: each code, each midpoint and the float32 around them, of both signs, like torch."""
    codes = np.sort(E4M3[:0x7F].astype(np.float64))
    points = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2]).astype(np.float32)
    around = np.concatenate([points, *(np.nextafter(points, np.float32(end)) for end in (0, 448))])
    row = np.concatenate([around, -around, [np.float32(448)]]).astype(np.float32)[None]
    (found, scales) = FORMATS["FP8_CHANNEL_F32"].encode(row)
    assert scales.view(np.float32).item() == 1
    assert_same_bytes(found, as_bytes(torch.from_numpy(row).to(torch.float8_e4m3fn)), row)


def test_quotients_beyond_448_saturate() -> None:
    """A scale that was rounded down leaves quotients above 448; E4M3 "fn" would make NaN of those above 464."""
    amax = np.float32(448 * 1.5 * 2.0**-24)  # amax / 448 is 1.5 steps of float16, exactly a tie; and just below it
    rows = np.array([[amax, -amax], [amax * np.float32(1 - 2.0**-10), 0]], np.float32)
    rows = round_to(rows, "F16")
    codes, scales = FORMATS["FP8_CHANNEL_F16"].encode(rows)
    assert scales.view(np.uint16)[:, 0].tolist() == [2, 1]
    assert codes[1].tolist() == [0x7E, 0]
    check_same((codes, scales), rule_by_row(torch.from_numpy(rows).half()), rows)


def test_every_code_decodes_like_torch() -> None:
    """NaN too, and with each dtype of scales, in a channel and in a block."""
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    expected = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3.reshape(2, 128), expected, equal_nan=True)
    assert np.array_equal(np.signbit(E4M3[:255]), np.arange(255) >= 128)
    for kind, entries in (("CHANNEL", 2), ("BLOCK", 1)):
        for dtype, kind_of_scale in TORCH.items():
            scale = torch.tensor([[1.0], [0.375]][:entries], dtype=kind_of_scale)
            found = FORMATS[f"FP8_{kind}_{dtype}"].decode((codes, as_bytes(scale)), 128)
            assert np.array_equal(found, expected * scale.float().numpy(), equal_nan=True)


@every_dtype
def test_block_scales_decode_where_they_belong(dtype: str) -> None:
    """Each tile has a scale of its own; the tiles at the edges are incomplete."""
    scale = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=TORCH[dtype])
    codes = np.full((130, 259), 0x38, np.uint8)  # 1.0
    found = FORMATS[f"FP8_BLOCK_{dtype}"].decode((codes, as_bytes(scale)), 259)
    expected = np.kron(scale.float().numpy(), np.ones((128, 128), np.float32))[:130, :259]
    assert np.array_equal(found, expected)
