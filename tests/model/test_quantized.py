"""Checkpoints that other tools quantized as variants: weights, and inputs as vLLM's formulas quantize them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.variants.open import open_variant
from streamquant.model.variants.quantized import QuantizedVariant
from streamquant.quant.errors import StreamquantError
from tests import quantized_sources as sources
from tests.attacks.harness import edit_json

MODULE = "model.layers.1.self_attn.q_proj"
DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
TENSOR = sources.Scheme(block=(None, None))
ONE = sources.Scheme(block=(None, None), suffix="_scale")
ROWS = sources.Scheme(block=(1, None), suffix="_scale")


def write(folder: Path, scheme: sources.Scheme, config: Mapping[str, object], **inputs: torch.Tensor) -> Path:
    """A quantized checkpoint, with a tensor beside each matrix of codes for each of `inputs`."""
    model = sources.quantize(sources.write_source(folder), scheme, config)
    tensors = sources.read(model)
    modules = [name.removesuffix(".weight") for name, value in tensors.items() if value.dtype == torch.float8_e4m3fn]
    sources.write(model, tensors | {f"{module}.{name}": value for module in modules for name, value in inputs.items()})
    return model


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Through FP8: scaled_fp8_quant of vLLM, and back."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def inputs() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 256) * torch.logspace(-2, 2, 256)


def by_group(x: torch.Tensor, size: int) -> torch.Tensor:
    """per_token_group_quant_fp8."""
    groups = x.unflatten(-1, (-1, size))
    return rounded(groups, groups.abs().amax(-1, keepdim=True) / 448).flatten(-2)


SCALE = torch.tensor([0.25])
CASES: dict[str, tuple[sources.Scheme, dict[str, Any], dict[str, torch.Tensor], str | None]] = {
    "blocks": (sources.BLOCK, dict(sources.BLOCK_CONFIG), {}, "float8 per group of 128, dynamic"),
    "dynamic": (TENSOR, DYNAMIC, {}, "float8 per token, dynamic"),
    "static": (TENSOR, STATIC, {"input_scale": SCALE}, "float8 per tensor, static"),
    "static-as-mistral": (TENSOR, STATIC, {"activation_scale": SCALE[0]}, "float8 per tensor, static"),
    "modelopt": (ONE, MODELOPT, {"input_scale": SCALE}, "float8 per tensor, static"),
    "modelopt-rows": (ROWS, MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, {}, "float8 per token, dynamic"),
    "modelopt-weights": (ROWS, MODELOPT | {"quant_algo": "FP8_PB_WO"}, {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_and_inputs(case: str, tmp_path: Path) -> None:
    scheme, config, beside, activations = CASES[case]
    model = write(tmp_path / "Model", scheme, config, **beside)
    variant = open_variant(model)
    assert isinstance(variant, QuantizedVariant)
    assert variant.activations() == activations
    if "group" in (activations or ""):
        (problem,) = variant.problems  # of down_proj alone
        assert (problem.check, problem.found) == ("activation-groups", "rows of 320")
        assert variant.input_quantizer(MODULE.replace("self_attn.q_proj", "mlp.down_proj")) is None
    else:
        assert not variant.problems
    for name, value in sources.values(model, scheme).items():
        if name in variant.tensors:
            assert torch.equal(variant.read(name, torch.float32), value), name
    assert variant.tensors[f"{MODULE}.weight"].stored_as == "F8_E4M3"
    quantizer = variant.input_quantizer(MODULE)
    assert variant.input_quantizer("lm_head") is None
    if activations is None:
        assert quantizer is None
        return
    assert quantizer is not None
    x = inputs()
    columns = 128 if "group" in activations else 256
    expected = rounded(x, SCALE) if "static" in activations else by_group(x, columns)
    torch.testing.assert_close(quantizer(x), expected, rtol=1e-6, atol=0)
    shared = variant.input_quantizer(MODULE.replace("q_proj", "k_proj")) is quantizer
    assert shared is ("dynamic" in activations)


def test_modelopt_s_own_file_says_it_too(tmp_path: Path) -> None:
    """As Nvidia published it in 2024; convert takes it as well."""
    model = write(tmp_path / "Model", ONE, MODELOPT, input_scale=SCALE)
    record = {"producer": {"name": "modelopt", "version": "0.19.0"}, "quantization": {"quant_algo": "FP8"}}
    edit_json(model / "config.json", quantization_config=None)
    (model / "hf_quant_config.json").write_text(json.dumps(record))
    variant, source = open_variant(model), open_checkpoint(model)
    assert variant.activations() == "float8 per tensor, static"
    assert source.quantized is not None
    assert source.quantized.method == "modelopt"
    for broken in ({}, {**record, "producer": {"name": "another"}}, {**record, "producer": 1, "quantization": []}):
        (model / "hf_quant_config.json").write_text(json.dumps(broken))
        with pytest.raises(StreamquantError, match="a quantized tensor in a checkpoint without quantization_config"):
            open_variant(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_scheme": "static", "weight_block_size": None}, "static activations without their scale"),
        ({"activation_scheme": "static"}, "a quantization of the activations that is not known"),
        ({"activation_scheme": 1}, "a quantization of the activations that is not known"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized weights without their scales"),
        ({"quant_method": "fbgemm_fp8"}, "unknown quantization"),
    ],
)
def test_what_is_not_known(tmp_path: Path, change: dict[str, object], message: str) -> None:
    scheme = TENSOR if change.get("weight_block_size", 0) is None else sources.BLOCK
    model = write(tmp_path / "Model", scheme, {**sources.BLOCK_CONFIG, **change})
    with pytest.raises(StreamquantError, match=message):
        open_variant(model)
