"""The plan's file sizes, made from the shapes of the published models, against the sizes that others have published.

Nothing of a model is at hand but what its config.json says, so that a wrong shape, mix, format or count of tensors
shows as a difference of megabytes; a published number allows half of its last digit. Exact to the byte are the sums
within the plan.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.recipes.imatrix import ImportanceMatrix
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import Checkpoint, open_checkpoint
from tests.conftest import Shelf
from tests.shapes import SHAPES, write_shape

PUBLISHED = {
    # NousResearch/Hermes-4.3-36B-GGUF
    ("Hermes-4.3-36B", False): {
        **{"gguf:Q3_K_M": "17.62", "gguf:Q4_K_M": "21.76", "gguf:Q5_K_M": "25.59"},
        **{"gguf:Q6_K": "29.67", "gguf:Q8_0": "38.42", "gguf:F16": "72.31"},
    },
    # lmstudio-community/Hermes-4-70B-GGUF
    ("Hermes-4-70B", False): {"gguf:Q8_0": "75.0"},
    # bartowski's table of another model of the same shape, Llama-3.1-Nemotron-70B, made with an importance matrix,
    # which changes the mixes of Q4_0 (first layers at Q4_1) and IQ4_XS (no first layers at Q5_K)
    ("Hermes-4-70B", True): {
        **{"gguf:Q8_0": "74.98", "gguf:Q6_K": "57.89", "gguf:Q5_K_L": "50.60", "gguf:Q5_K_M": "49.95"},
        **{"gguf:Q5_K_S": "48.66", "gguf:Q4_K_L": "43.30", "gguf:Q4_K_M": "42.52", "gguf:Q4_K_S": "40.35"},
        **{"gguf:Q4_0": "40.12", "gguf:Q3_K_XL": "38.06", "gguf:IQ4_XS": "37.90", "gguf:Q3_K_L": "37.14"},
        **{"gguf:Q3_K_M": "34.27", "gguf:Q3_K_S": "30.91"},
    },
    # an estimate, of NousResearch/Hermes-4-405B-FP8: "about 410 GB"
    ("Hermes-4-405B", False): {"fp8-dynamic": "410"},
}
"""(model, with an importance matrix) -> variant -> size in GB of 10^9 bytes, with the digits that were published."""
WITHOUT_MATRIX = ("gguf:Q4_0", "gguf:IQ4_XS")
"""Of these, the variants whose mix depends on the matrix."""
VOCABULARY_UNKNOWN = {"Hermes-4.3-36B": 2_000_000}
"""Bytes that the metadata may differ by where the real tokenizer is not at hand; they are about 6 MB in all."""

SPLIT_MAX_SIZE = {"Hermes-4-405B": 45 * 10**9}
"""The largest model also shows how files are split; the others are published whole."""


@pytest.fixture(scope="module")
def checkpoint(shelf: Shelf, data: Path) -> Callable[[str], Checkpoint]:
    """Opens the shape of a model, by name."""

    @cache
    def get(name: str) -> Checkpoint:
        folder = shelf.get(f"shape-{name}", lambda place: write_shape(SHAPES[name], place / name, data))
        return open_checkpoint(folder / name)

    return get


@pytest.fixture(scope="module")
def plan(checkpoint: Callable[[str], Checkpoint]) -> Callable[[str, bool], Plan]:
    """The plan of a model, by name and whether there is an importance matrix: FP8 and all that was published of it."""

    @cache
    def get(name: str, with_imatrix: bool) -> Plan:
        source = checkpoint(name)
        more = WITHOUT_MATRIX if (name, with_imatrix) == ("Hermes-4-70B", False) else ()
        specs = dict.fromkeys(
            ("fp8-dynamic", "fp8-block", "gguf:Q4_K_M", *PUBLISHED.get((name, with_imatrix), ()), *more)
        )
        matrix = importance(source) if with_imatrix else None
        return make_plan(
            source,
            parse_variants(list(specs)),
            ConversionOptions(split_max_size=SPLIT_MAX_SIZE.get(name), imatrix=matrix),
        )

    return get


def importance(checkpoint: Checkpoint) -> ImportanceMatrix:
    """As llama-imatrix makes it: an entry for each matrix in a layer."""
    names = {
        **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
        **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
        "mlp.down_proj": "ffn_down",
    }
    entries = {}
    for layer in range(checkpoint.config["num_hidden_layers"]):
        for hf, gguf in names.items():
            tensor = checkpoint.tensors[f"model.layers.{layer}.{hf}.weight"]
            entries[f"blk.{layer}.{gguf}.weight"] = np.ones(tensor.row_length, np.float32)
    return ImportanceMatrix("imatrix.gguf", "0" * 64, ("calibration.txt",), 100, entries)


@pytest.mark.parametrize("name", SHAPES)
def test_shards(name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    found = checkpoint(name)
    assert len(found.files) == SHAPES[name].shards
    assert all(file.size < 5.1e9 for file in found.files)
    index = json.loads((found.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found.nbytes == 2 * found.parameter_count


# Parameters as the cards give them; hermes4.md, section 2.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("Hermes-4-405B", 405.85), ("Hermes-4-70B", 70.55), ("Hermes-4-14B", 14.77), ("Hermes-4.3-36B", 36.15)],
)
def test_parameters(name: str, billions: float, checkpoint: Callable[[str], Checkpoint]) -> None:
    assert checkpoint(name).parameter_count / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(("name", "with_imatrix"), PUBLISHED)
def test_published_sizes(name: str, with_imatrix: bool, plan: Callable[[str, bool], Plan]) -> None:
    made = plan(name, with_imatrix)
    found = {variant.recipe.spec: made.variant_bytes(variant) for variant in made.variants}
    wrong = {
        spec: f"{found[spec]:,} bytes, published {text} GB"
        for spec, text in PUBLISHED[name, with_imatrix].items()
        if abs(found[spec] - float(text) * 1e9) > half_a_digit(text) * 1e9 + VOCABULARY_UNKNOWN.get(name, 0)
    }
    assert not wrong


def half_a_digit(text: str) -> float:
    """What a rounded number may be off by: 0.005 of "42.52"."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def test_a_wrong_mix_is_far_outside_the_bound(plan: Callable[[str, bool], Plan]) -> None:
    """The same variants, planned without the importance matrix that they were made with."""
    made = plan("Hermes-4-70B", False)
    found = {variant.recipe.spec: made.variant_bytes(variant) / 1e9 for variant in made.variants}
    for spec in WITHOUT_MATRIX:
        assert abs(found[spec] - float(PUBLISHED["Hermes-4-70B", True][spec])) > 0.1


@pytest.mark.parametrize("name", SHAPES)
def test_addresses_fill_the_files(name: str, plan: Callable[[str, bool], Plan]) -> None:
    """Literals and regions follow one another without overlap; what is between them is a GGUF's padding."""
    made = plan(name, False)
    for variant in made.variants:
        padding = 1 if variant.recipe.container.is_checkpoint else 32
        spans = {index: [(at, at + len(data)) for at, data in made.files[index].literals] for index in variant.files}
        for tensor in variant.tensors:
            for region in tensor.regions:
                spans[region.file].append((region.offset, region.offset + region.nbytes))
        for index, found in spans.items():
            found.sort()
            ends = pairwise([*found, (made.files[index].size, made.files[index].size)])
            assert found[0][0] == 0
            assert all(start == math.ceil(stop / padding) * padding for (_, stop), (start, _) in ends)


@pytest.mark.parametrize("name", SHAPES)
def test_fp8_size_to_the_byte(name: str, plan: Callable[[str, bool], Plan]) -> None:
    """By hand: a byte for each weight of a linear layer, two for its row's scale, two for every other weight."""
    made = plan(name, False)
    source = made.checkpoint
    linear = [tensor for tensor in source.tensors.values() if tensor.name.endswith("_proj.weight")]
    data = 2 * source.parameter_count - sum(tensor.count for tensor in linear) + 2 * sum(t.rows for t in linear)
    dynamic = next(variant for variant in made.variants if variant.recipe.spec == "fp8-dynamic")
    headers = sum(len(made.files[index].literals[0][1]) for index in dynamic.files)
    assert made.variant_bytes(dynamic) == data + headers
