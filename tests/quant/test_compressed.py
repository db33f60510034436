"""INT4, INT8, MXFP4 and MXFP8 against llm-compressor's own converter, byte for byte."""

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
            if np.isfinite(rows).all():
                compared += check_against_llm_compressor(rows, kind, dtype)
    assert compared > 40


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
