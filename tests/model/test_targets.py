"""Targets of a quantization_config against compressed-tensors' own matching, and patterns that take for ever."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.utils.match import match_targets
from hypothesis import given
from hypothesis import strategies as st

from streamquant.convert.architectures import TensorKind
from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.overrides import Overrides
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.recipes.targets import Targets
from streamquant.convert.source.checkpoint import open_checkpoint, read_checkpoint
from streamquant.model.variants.compressed import CompressedVariant
from streamquant.quant.errors import UsageError
from tests.attacks.harness import write_model

MODULES = (
    "lm_head",
    "model.layers.0.mlp.gate",
    "model.layers.11.mlp.experts.3.gate_proj",
    "model.embed_tokens",
    "visual",
)
TARGETS = (
    *MODULES, "Linear", "Embedding", "Module", "Conv1d", "LinearBase", "re:.*", "re:visual.*", "re:.*mlp.gate$",
    "re:model.layers.1", "re:(?:.*gate|lm_head)", r"re:.*\.experts\.\d+\..*", "re:", "re:Linear", "mlp.gate",
)  # fmt: skip
ENDLESS = "(.|.)*[XY]"


@given(st.lists(st.sampled_from(TARGETS)), st.sampled_from(MODULES))
def test_the_library_finds_the_same_target(targets: list[str], name: str) -> None:
    kind, module = TensorKind.HEAD, torch.nn.Linear(1, 1, device="meta")
    if name == "model.embed_tokens":
        kind, module = TensorKind.EMBEDDING, torch.nn.Embedding(1, 1, device="meta")
    assert Targets(targets, "").first(name, kind) == next(iter(match_targets(name, module, targets)), None)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamquant.convert.recipes.patterns.MAX_SECONDS", 0.2)


@pytest.mark.usefixtures("short")
def test_endless_patterns_of_a_config_are_an_error(tmp_path: Path) -> None:
    convert(
        make_plan(open_checkpoint(write_model(tmp_path / "Tiny")), parse_variants(["fp8-dynamic"])),
        tmp_path / "out",
        RunOptions(jobs=1),
    )
    checkpoint = read_checkpoint(tmp_path / "out/Tiny-FP8-dynamic")
    settings = dict(checkpoint.config["quantization_config"])
    (group,) = settings["config_groups"].values()
    for changed in (
        settings | {"ignore": [f"re:{ENDLESS}"]},
        settings | {"config_groups": {"group_0": group | {"targets": [f"re:{ENDLESS}"]}}},
    ):
        with pytest.raises(UsageError, match="pattern takes too long"):
            CompressedVariant(replace(checkpoint, config={**checkpoint.config, "quantization_config": changed}))


@pytest.mark.usefixtures("short")
def test_endless_patterns_of_a_recipe_are_an_error() -> None:
    with pytest.raises(UsageError, match="pattern takes too long"):
        Overrides(tensor_types=((ENDLESS, "Q8_0"),)).match("blk.100.ffn_gate_up_exps.weight.and_what_strangers_add")
