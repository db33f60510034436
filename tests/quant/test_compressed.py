"""INT4, INT8, MXFP4, MXFP8 and NVFP4 against llm-compressor's own converter, byte for byte."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from streamquant.quant.format import Rows
from streamquant.quant.formats import FORMATS
from tests.oracle import ROWS, assert_same_bytes, make_rows, round_to

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SCHEMES = {
    "INT4_GROUP_128": "W4A16",
    "INT4_GROUP_32": "W4A16-g32",
    "INT4_GROUP_128_ZERO_POINT": "W4A16_ASYM",
    "INT4_GROUP_32_ZERO_POINT": "W4A16_ASYM-g32",
    "INT8_GROUP_128": "W8A16",
    "INT8_CHANNEL": "W8A8",
    "MXFP4": "MXFP4",
    "MXFP8": "MXFP8",
    "NVFP4": "NVFP4A16",
}
"""By format, without the dtype."""
MAGNITUDES = (1.0, 1e-7, 1e-39, 1e4, 1e30)

every_dtype = pytest.mark.parametrize("dtype", TORCH)
every_kind = pytest.mark.parametrize("kind", SCHEMES)


@functools.cache
def converter(scheme: str) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter
    from llmcompressor.entrypoints.model_free.validate import validate_config

    preset, _, group = scheme.partition("-g")
    chosen = preset_name_to_scheme(preset, ["Linear"])
    if group:
        chosen.weights.group_size = int(group)
    return ModelFreePtqConverter(validate_config(None, chosen, []))


def has_lost_global_scale(rows: Rows, kind: str, dtype: str) -> bool:
    """Where the reference writes 1 because the global scale is not a number of float16."""
    return kind == "NVFP4" and dtype == "F16" and 0 < abs(rows).max() < 0.0411


def check_against_llm_compressor(rows: Rows, kind: str, dtype: str) -> bool:
    """Compare all stored tensors; False where the format refuses the rows."""
    format_ = FORMATS[f"{kind}_{dtype}"]
    out = format_.allocate(*rows.shape)
    if format_.encode_into(rows, out, None) >= 0:
        return False
    made = converter(SCHEMES[kind]).process({"layer.weight": torch.tensor(rows).to(TORCH[dtype])})
    assert set(made) == {f"layer.weight{part.suffix}" for part in format_.parts}
    for part, found in zip(format_.parts, out, strict=True):
        expected = made[f"layer.weight{part.suffix}"]
        assert tuple(expected.shape) == part.stored_shape(rows.shape)
        stored = expected.contiguous().flatten().view(torch.uint8).numpy().reshape(found.shape)
        entry = part.bytes_per_entry(rows.shape[1])
        assert_same_bytes(found, stored, np.zeros((found.shape[0], entry), np.float32))
    return True


@every_kind
@every_dtype
def test_encodes_like_llm_compressor(kind: str, dtype: str) -> None:
    """Zeros of both signs, denormals, one huge value, constants, ties ... at many magnitudes; ragged rows (37)."""
    compared = 0
    for name in ROWS:
        for magnitude in MAGNITUDES:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                rows = round_to(make_rows(name, 37, 256) * np.float32(magnitude), dtype)
            if np.isfinite(rows).all() and not has_lost_global_scale(rows, kind, dtype):
                compared += check_against_llm_compressor(rows, kind, dtype)
    assert compared > (20 if (kind, dtype) == ("NVFP4", "F16") else 40)


@every_kind
def test_a_difference_is_found(kind: str) -> None:
    """The proof that the comparison can fail."""
    rows = round_to(make_rows("normal", 9, 256), "BF16")
    assert check_against_llm_compressor(rows, kind, "BF16")
    made = converter(SCHEMES[kind]).process({"layer.weight": torch.tensor(rows).to(torch.bfloat16)})
    other = rows.copy()
    other[:, 128] *= -2
    format_ = FORMATS[f"{kind}_BF16"]
    stored = made[f"layer.weight{format_.parts[0].suffix}"].contiguous().flatten().view(torch.uint8).numpy()
    assert not np.array_equal(format_.encode(other)[0].reshape(-1), stored)


@pytest.mark.parametrize("kind", ["MXFP4", "MXFP8"])
def test_a_scale_that_the_reference_loses_is_refused(kind: str) -> None:
    """From 1.75 * 2^15 on llm-compressor takes 1 as the scale of float16: weights of 60000 would become 6."""
    rows = np.full((3, 32), 57312, np.float32)
    rows[1, 7] = 57344
    format_ = FORMATS[f"{kind}_F16"]
    assert format_.encode_into(rows, format_.allocate(*rows.shape), None) == 1
    assert check_against_llm_compressor(rows[:1], kind, "F16")


def test_a_global_scale_that_the_reference_loses_is_kept() -> None:
    """Below an amax of 0.041 llm-compressor writes 1 for float16; ours has the codes of the same weights in float32."""
    rows = round_to(make_rows("normal", 9, 256) * np.float32(1e-4), "F16")
    assert has_lost_global_scale(rows, "NVFP4", "F16")
    ours, wide = FORMATS["NVFP4_F16"].encode(rows), FORMATS["NVFP4_F32"].encode(rows)
    assert all(np.array_equal(a, b) for a, b in zip(ours, wide, strict=True))
    assert check_against_llm_compressor(rows, "NVFP4", "F32")
    theirs = converter("NVFP4A16").process({"layer.weight": torch.tensor(rows).half()})
    assert theirs["layer.weight_global_scale"].item() == 1
    error = abs(FORMATS["NVFP4_F16"].decode(ours, 256) - rows).max() / abs(rows).max()
    assert error < 0.17


def test_no_weight_is_lost_where_the_global_scale_begins_to_fit() -> None:
    """On both sides of the bound, and for zeros, whose scale is 1 as in the reference."""
    format_ = FORMATS["NVFP4_F16"]
    for value in np.arange(0.040, 0.042, 2.0**-15, dtype=np.float32):
        rows = round_to(np.full((2, 32), value, np.float32), "F16")
        assert abs(format_.decode(format_.encode(rows), 32) / rows - 1).max() < 0.07
        if not has_lost_global_scale(rows, "NVFP4", "F16"):
            assert check_against_llm_compressor(rows, "NVFP4", "F16")
    assert check_against_llm_compressor(np.zeros((3, 64), np.float32), "NVFP4", "F16")
