"""quantization_config with a wrong value at every place: one typed error, or a variant that computes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import Checkpoint, as_source, check_dtypes, open_checkpoint, read_checkpoint
from streamquant.model.variants.compressed import CompressedVariant
from streamquant.quant.errors import StreamquantError
from tests.attacks.harness import write_model
from tests.attacks.wrong_json import put, wrong_records

MODULE = "model.layers.0.self_attn.q_proj"
KEY = "quantization_config"
KINDS = ("fp8-dynamic", "fp8-block")
OTHERS: tuple[dict[str, Any], ...] = (
    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
)
"""Of sources alone."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("quantization")
    source = write_model(root / "Tiny")
    convert(make_plan(open_checkpoint(source), parse_variants(KINDS)), root / "out", RunOptions(jobs=1))
    names = {"fp8-dynamic": "Tiny-FP8-dynamic", "fp8-block": "Tiny-FP8-block"}
    return {kind: read_checkpoint(root / "out" / names[kind]) for kind in KINDS}


def answers(checkpoint: Checkpoint, quantization: object) -> Iterator[StreamquantError | None]:
    """What a variant and a source say of a config. Any other error is a fault."""
    changed = replace(checkpoint, config={**checkpoint.config, KEY: quantization})
    for use in (_compute, _convert):
        try:
            use(changed)
        except StreamquantError as error:
            yield error
        else:
            yield None


def _compute(checkpoint: Checkpoint) -> None:
    variant = CompressedVariant(checkpoint)
    name = f"{MODULE}.weight"
    variant.read(name, torch.float32)
    if (quantizer := variant.input_quantizer(MODULE)) is not None:
        quantizer(torch.ones(1, 2, variant.tensors[name].shape[1]))


def _convert(checkpoint: Checkpoint) -> None:
    check_dtypes(as_source(checkpoint))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_wrong_value(folders: dict[str, Checkpoint], kind: str) -> None:
    refused = 0
    for _, wrong in wrong_records(folders[kind].config[KEY]):
        said = [answer for answer in answers(folders[kind], wrong) if answer is not None]
        assert all(len(str(answer)) < 3000 for answer in said)
        refused += len(said)
    assert refused > 500


@pytest.mark.parametrize("right", OTHERS, ids=lambda right: str(right["quant_method"]))
def test_every_wrong_value_of_a_source(folders: dict[str, Checkpoint], right: dict[str, Any]) -> None:
    for _, wrong in wrong_records(right):
        for _ in answers(folders["fp8-dynamic"], wrong):
            pass


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_activations", {}),  # static, without a scale
        (("input_activations", "group_size"), "x"),
        (("input_activations", "group_size"), []),
        (("input_activations", "num_bits"), True),
        ("targets", ["re:("]),
        ("format", "x"),
    ],
)
def test_what_was_a_traceback(folders: dict[str, Checkpoint], key: str | tuple[str, ...], value: object) -> None:
    right = folders["fp8-dynamic"].config[KEY]
    (group,) = right["config_groups"]
    keys = (key,) if isinstance(key, str) else key
    variant, _ = answers(folders["fp8-dynamic"], put(right, ("config_groups", group, *keys), value))
    assert variant is not None
    assert variant.what in ("compressed-tensors refuses the config", "static activations without their scale")
    assert "config.json" in str(variant.where)
