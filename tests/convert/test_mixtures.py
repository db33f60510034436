"""Mixtures of experts: how their tensors are placed, what is refused, and what published ones need.

Bytes are compared where those of dense models are: test_gguf_parity.py, test_fp8_parity.py, test_llama_quantize.py.
"""

import json
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamquant.convert.architectures import describe
from streamquant.convert.architectures.config_values import ConfigValues
from streamquant.convert.architectures.layers import (
    DENSE,
    FULL,
    LINEAR,
    SPARSE,
    DenseFirst,
    LayerKinds,
    ListedTypes,
    SparseStep,
)
from streamquant.convert.conversion import convert
from streamquant.convert.manifest import MANIFEST
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.imatrix import ImportanceMatrix, read_imatrix
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant.errors import StreamquantError
from streamquant.validate.readback.verify import verify
from tests import synthetic
from tests.conftest import TINY_PRE, Shelf, write_small_tokenizer
from tests.family_checks import check_equals_llama_quantize
from tests.gguf_peer import read_gguf
from tests.goldens.models import Entry, write_imatrix
from tests.shapes import MIXTURES, write_shape
from tests.synthetic import Weight

QWEN3_MOE, _, GLM = synthetic.MIXTURES[:3]
OPTIONS = ConversionOptions(pre=TINY_PRE)


def write_model(folder: Path, architecture: str = QWEN3_MOE, **settings: Any) -> Path:
    """A checkpoint of 5 experts of which a token uses 2."""
    tokenizer = write_small_tokenizer(folder.parent / "tokenizer", special=synthetic.GLM_TOKENS)
    return synthetic.write_checkpoint(folder, architecture=architecture, tokenizer=tokenizer, **settings)


def rewrite(folder: Path, **changes: tuple[int, ...] | None) -> None:
    """Write the weights of a checkpoint again: tensors with other shapes, added, or left out (None)."""
    config = json.loads((folder / "config.json").read_text())
    weights = {weight.name: weight for weight in synthetic.weights_of(config)}
    for name, shape in changes.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = Weight(name, shape)
    synthetic.write_weights(folder, list(weights.values()), "BF16", 1, 0)


# --- places ---------------------------------------------------------------------------------------------------------


def test_every_expert_has_its_part_of_the_stack(tmp_path: Path) -> None:
    """Random order of shards and names; the values of expert e are at [e]."""
    source = open_checkpoint(write_model(tmp_path / "Model", shards=4))
    plan = make_plan(source, parse_variants(["gguf:F32"]), OPTIONS)
    convert(plan, tmp_path / "out", RunOptions(jobs=2))
    _, tensors = read_gguf(tmp_path / "out" / plan.files[0].path)
    for layer in range(2):
        for part, shape in (("down", (64, 96)), ("gate", (96, 64)), ("up", (96, 64))):
            kind, found, raw = tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert (kind.name, found) == ("F32", (5, *shape))
            stack = np.frombuffer(raw, np.float32).reshape(found)
            for expert in range(5):
                tensor = source.tensors[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]
                content = (source.folder / tensor.file).read_bytes()[tensor.start : tensor.stop]
                bits = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
                assert np.array_equal(stack[expert], bits.view(np.float32).reshape(shape))


def test_no_chunk_crosses_an_expert(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "Model"))
    plan = make_plan(source, parse_variants(["gguf:Q8_0", "fp8-dynamic"]), OPTIONS)
    experts = [matrix for matrix in plan.matrices if ".experts." in matrix.source.name]
    assert len(experts) == 2 * 3 * 5
    for matrix in experts:
        assert {len(output.tensor.sources) for output in matrix.outputs} == {1, 5}
        assert all(output.source == matrix.source.name for output in matrix.outputs)
    regions = sorted(
        (region.file, region.offset, region.nbytes)
        for matrix in plan.matrices
        for output in matrix.outputs
        for region in output.regions
    )
    assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in pairwise(regions))


def test_each_expert_is_given_its_own_importance(tmp_path: Path) -> None:
    """Only the slice of expert 3 is not flat: only the bytes of expert 3 change."""
    source = open_checkpoint(write_model(tmp_path / "Model", size="small", moe_intermediate_size=256))
    name = "blk.1.ffn_up_exps.weight"

    def made(folder: str, entry: np.ndarray[Any, np.dtype[np.float32]]) -> list[bytes]:
        matrix = ImportanceMatrix("i.gguf", "0" * 64, ("text",), 1, {name: entry.reshape(-1)})
        plan = make_plan(source, parse_variants(["gguf:Q4_K_M"]), ConversionOptions(pre=TINY_PRE, imatrix=matrix))
        convert(plan, tmp_path / folder, RunOptions(jobs=1))
        raw = read_gguf(tmp_path / folder / plan.files[0].path)[1][name][2]
        return [raw[at : at + len(raw) // 5] for at in range(0, len(raw), len(raw) // 5)]

    flat = np.ones((5, 256), np.float32)
    other = flat.copy()
    other[3] = np.linspace(0.01, 10, 256, dtype=np.float32)
    before, after = made("flat", flat), made("other", other)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, True, False, True]


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "Model", size="small", moe_intermediate_size=256))
    entries = [
        Entry(f"blk.{layer}.{name}.weight", calls, np.ones((len(calls), columns), np.float32))
        for layer, calls in enumerate([(7, 0, 3, 0, 1), (5, 5, 5, 5, 5)])
        for name, columns in (("ffn_up_exps", 256), ("ffn_gate_exps", 256))
    ]
    matrix = read_imatrix(write_imatrix(tmp_path / "i.gguf", entries))
    assert matrix.entries["blk.0.ffn_up_exps.weight"].reshape(5, -1)[1].tolist() == [1.0] * 256
    plan = make_plan(source, parse_variants(["gguf:Q4_K_M"]), ConversionOptions(pre=TINY_PRE, imatrix=matrix))
    (note,) = [note for note in plan.notes if note.startswith("WARNING: no token")]
    assert "2 experts: blk.0 1, 3. All their columns" in note


def test_importance_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "Model", size="small", moe_intermediate_size=256))
    entries = {"blk.0.ffn_up_exps.weight": np.ones(4 * 256, np.float32)}
    matrix = ImportanceMatrix("i.gguf", "0" * 64, ("text",), 1, entries)
    with pytest.raises(StreamquantError, match=r"importance of another length[\s\S]*1,280"):
        make_plan(source, parse_variants(["gguf:Q4_K_M"]), ConversionOptions(pre=TINY_PRE, imatrix=matrix))


def test_what_was_made_verifies_against_the_source(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "Model", shards=2))
    specs = ["gguf:Q8_0", "gguf:BF16", "fp8-dynamic"]
    convert(make_plan(source, parse_variants(specs), OPTIONS), tmp_path / "out", RunOptions(jobs=2))
    assert [problem for result in verify(tmp_path / "out", source) for problem in result.problems] == []
    manifest = json.loads((tmp_path / "out" / "Model-GGUF" / MANIFEST).read_text())
    stacks = [t for t in manifest["variants"]["gguf:Q8_0"]["tensors"] if "sources" in t]
    assert [len(tensor["sources"]) for tensor in stacks] == [5] * 6
    (damaged,) = (tmp_path / "out" / "Model-GGUF").glob("*Q8_0.gguf")
    content = bytearray(damaged.read_bytes())
    place = stacks[0]["parts"][0]
    content[place["offset"] + place["size"] - 1] ^= 1
    damaged.write_bytes(content)
    (problem,) = (problem for result in verify(tmp_path / "out", source) for problem in result.problems)
    assert place["name"] in problem


def test_routers_are_left_alone(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "Model"))
    plan = make_plan(source, parse_variants(["fp8-dynamic"]), OPTIONS)
    convert(plan, tmp_path / "out", RunOptions(jobs=1))
    config = json.loads((tmp_path / "out" / "Model-FP8-dynamic" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens", "re:.*mlp.gate$"]
    formats = {tensor.name: tensor.format for tensor in plan.variants[0].tensors}
    assert formats["model.layers.0.mlp.gate.weight"] == "BF16"
    assert formats["model.layers.1.mlp.experts.4.down_proj.weight"].startswith("FP8")


# --- refused --------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({EXPERT.format(2): None}, r"lacks tensors[\s\S]*experts\.2\.up_proj"),
        ({EXPERT.format(4): None}, r"lacks tensors[\s\S]*experts\.4\.up_proj"),
        ({EXPERT.format(5): (96, 64)}, r"does not explain[\s\S]*experts\.5\.up_proj"),
        ({EXPERT.format(2): (64, 96)}, r"shape does not fit[\s\S]*experts\.2\.up_proj"),
        ({EXPERT.format(2): (95, 64)}, r"shape does not fit[\s\S]*\[95, 64\]"),
        ({"model.layers.0.mlp.gate.weight": (6, 64)}, r"shape does not fit[\s\S]*mlp\.gate"),
        ({"model.layers.0.mlp.gate.weight": None}, r"lacks tensors[\s\S]*mlp\.gate"),
        ({"model.layers.0.mlp.experts.gate_up_proj": (5, 192, 64)}, r"does not explain[\s\S]*gate_up_proj"),
        ({"model.layers.0.mlp.up_proj.weight": (160, 64)}, r"does not explain[\s\S]*mlp\.up_proj"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, changes: Mapping[str, tuple[int, ...] | None], message: str) -> None:
    folder = write_model(tmp_path / "Model")
    rewrite(folder, **changes)
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:Q8_0"]), OPTIONS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_experts", 0, "out of range"),
        ("num_experts", 1, "out of range"),
        ("num_experts", 513, "out of range"),
        ("num_experts", "5", "a string where an integer"),
        ("num_experts_per_tok", 6, "out of range"),
        ("moe_intermediate_size", None, "null where"),
        ("decoder_sparse_step", 2, "layers of another kind"),
        ("mlp_only_layers", [0], "layers of another kind"),
        ("n_routed_experts", 5, "a mixture of experts, which Qwen3MoeForCausalLM is not"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    folder = write_model(tmp_path / "Model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(StreamquantError, match=message) as error:
        make_plan(open_checkpoint(folder), parse_variants(["gguf:Q8_0"]), OPTIONS)
    assert key in str(error.value)


@pytest.mark.parametrize("architecture", synthetic.MIXTURES[3:])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({EXPERT.format(2): None}, r"lacks tensors[\s\S]*experts\.2\.up_proj"),
        ({EXPERT.format(5): (96, 64)}, r"does not explain[\s\S]*experts\.5\.up_proj"),
        ({EXPERT.format(2): (64, 97)}, r"shape does not fit[\s\S]*experts\.2\.up_proj"),
        ({"model.layers.1.mlp.gate.weight": (6, 64)}, r"shape does not fit[\s\S]*mlp\.gate"),
        ({"model.layers.1.mlp.gate.weight": None}, r"lacks tensors[\s\S]*mlp\.gate"),
    ],
)
def test_tensors_of_other_mixtures_that_do_not_fit(
    tmp_path: Path, architecture: str, changes: Mapping[str, tuple[int, ...] | None], message: str
) -> None:
    """Qwen 2 MoE, dots.llm1, OLMoE."""
    folder = write_model(tmp_path / "Model", architecture)
    rewrite(folder, **changes)
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:Q8_0"]), OPTIONS)


@pytest.mark.parametrize("architecture", synthetic.MIXTURES[2:])
def test_an_index_with_a_hole(tmp_path: Path, architecture: str) -> None:
    """An expert that lies in a shard and is not in the index, and one that is in the index alone."""
    folder = write_model(tmp_path / "Model", architecture, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    hole = {name: file for name, file in content["weight_map"].items() if name != EXPERT.format(2)}
    for weight_map, message in (
        (hole, "tensor of a shard is not in the index"),
        (content["weight_map"] | {EXPERT.format(7): next(iter(hole.values()))}, "tensor of the index is in no shard"),
    ):
        index.write_text(json.dumps(content | {"weight_map": weight_map}))
        with pytest.raises(StreamquantError, match=message):
            open_checkpoint(folder)


@pytest.mark.long
@pytest.mark.parametrize("architecture", synthetic.MIXTURES[2:])
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path, architecture: str) -> None:
    """GLM-4.5 to 4.7, Qwen 2 MoE, dots.llm1 and OLMoE, of the file in BF16, with columns that K-quants take."""
    wide = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "intermediate_size": 512}
    known = synthetic.FAMILY_KEYS[architecture]
    sizes = {key: value for key, value in wide.items() if key in known or key == "intermediate_size"}
    if architecture == "OlmoeForCausalLM":
        sizes["intermediate_size"] = 256
    source = write_model(tmp_path / "Model", architecture, size="small", **sizes)
    check_equals_llama_quantize(source, tmp_path)


SHARED = "model.layers.1.mlp.shared_experts.{}_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({BIAS: (6,)}, r"shape does not fit[\s\S]*e_score_correction_bias"),
        ({BIAS: None}, r"lacks tensors[\s\S]*e_score_correction_bias"),
        ({SHARED.format("up"): None}, r"lacks tensors[\s\S]*shared_experts\.up_proj"),
        ({SHARED.format("down"): (64, 192)}, r"shape does not fit[\s\S]*shared_experts\.down_proj"),
        ({"model.layers.0.mlp.up_proj.weight": None}, r"lacks tensors[\s\S]*layers\.0\.mlp\.up_proj"),
        ({"model.layers.0.mlp.gate.weight": (5, 64)}, r"does not explain[\s\S]*layers\.0\.mlp\.gate"),
        ({"model.layers.2.eh_proj.weight": None}, r"lacks tensors[\s\S]*layers\.2\.eh_proj"),
        ({"model.layers.2.eh_proj.weight": (64, 64)}, r"shape does not fit[\s\S]*\[64, 128\]"),
        ({"model.layers.2.self_attn.q_proj.weight": None}, r"lacks tensors[\s\S]*layers\.2\.self_attn"),
        ({"model.layers.3.enorm.weight": (64,)}, r"lacks tensors[\s\S]*layers\.3\."),
        ({"model.layers.1.enorm.weight": (64,)}, r"does not explain[\s\S]*layers\.1\.enorm"),
    ],
)
def test_shared_experts_biases_and_layers_behind_that_do_not_fit(
    tmp_path: Path, changes: Mapping[str, tuple[int, ...] | None], message: str
) -> None:
    folder = write_model(tmp_path / "Model", GLM)
    rewrite(folder, **changes)
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:Q8_0"]), OPTIONS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("first_k_dense_replace", 3, "out of range"),
        ("first_k_dense_replace", -1, "out of range"),
        ("first_k_dense_replace", [1], "a list where an integer"),
        ("n_shared_experts", 2**30, "sizes out of range"),
        ("n_shared_experts", None, "null where"),
        ("num_nextn_predict_layers", 600, "out of range"),
        ("routed_scaling_factor", "2", "a string where a number"),
        ("norm_topk_prob", 1, "an integer where true or false"),
        ("partial_rotary_factor", 1.5, "more than the whole of a head"),
        ("partial_rotary_factor", 0.1, "cannot be rotated by halves"),
        ("text_config", {}, "a multimodal model"),
    ],
)
def test_configs_of_glm_that_are_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    folder = write_model(tmp_path / "Model", GLM)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(StreamquantError, match=message) as error:
        describe({**config, "rope_parameters": {"rope_theta": 1e6}, key: value})
    assert key in str(error.value)


def test_layers_behind_the_last_are_counted_by_their_tensors(tmp_path: Path) -> None:
    """config.json says one, and none is there: the plan says so, no file and no FP8 folder has any."""
    folder = write_model(tmp_path / "Model", GLM, num_nextn_predict_layers=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    plan = make_plan(open_checkpoint(folder), parse_variants(["gguf:Q8_0", "fp8-dynamic"]), OPTIONS)
    assert any("says 1 of layers for multi-token prediction" in note for note in plan.notes)
    assert plan.model.block_count == plan.model.layer_count == 2
    assert "glm4moe.nextn_predict_layers" not in plan.model.added_metadata
    convert(plan, tmp_path / "out", RunOptions(jobs=1))
    made = json.loads((tmp_path / "out" / "Model-FP8-dynamic" / "config.json").read_text())
    assert made["num_nextn_predict_layers"] == 0
    assert "re:.*eh_proj$" not in made["quantization_config"]["ignore"]


class Values(ConfigValues):
    """config.json of a model whose layers are listed."""

    def __init__(self, **values: object) -> None:
        super().__init__(values, defaults={"every": 3, "step": 2, "dense": None}, nullable=frozenset({"dense"}))


LISTED = ListedTypes({"full_attention": FULL, "linear_attention": LINEAR}, interval="every")


def test_kinds_of_layers() -> None:
    assert DenseFirst("first").tags(Values(first=1), 3) == [DENSE, SPARSE, SPARSE]
    assert SparseStep("step", "dense").tags(Values(), 4) == [DENSE, SPARSE, DENSE, SPARSE]
    assert SparseStep("step", "dense").tags(Values(step=1, dense=[2]), 3) == [SPARSE, SPARSE, DENSE]
    assert LISTED.tags(Values(), 4) == [LINEAR, LINEAR, FULL, LINEAR]
    assert LISTED.tags(Values(layer_types=["full_attention", "linear_attention"]), 2) == [FULL, LINEAR]


@pytest.mark.parametrize(
    ("kinds", "values", "message"),
    [
        (LISTED, {"layer_types": ["full_attention"] * 5}, "a list of 5 layers in a model of 4"),
        (LISTED, {"layer_types": ["full_attention"] * 3}, "a list of 3 layers in a model of 4"),
        (LISTED, {"layer_types": "full_attention"}, "a string where a list of layers"),
        (LISTED, {"layer_types": ["full_attention"] * 3 + ["mamba"]}, "layer 3 is of an unknown type: 'mamba'"),
        (LISTED, {"layer_types": [[]] * 4}, "layer 0 is of an unknown type"),
        (SparseStep("step", "dense"), {"dense": [4]}, "not a list of layers"),
        (SparseStep("step", "dense"), {"dense": [True]}, "not a list of layers"),
        (DenseFirst("first"), {"first": 5}, "out of range"),
    ],
)
def test_kinds_of_layers_that_do_not_fit(kinds: LayerKinds, values: dict[str, object], message: str) -> None:
    with pytest.raises(StreamquantError, match=message):
        kinds.tags(Values(**values), 4)


def test_weights_that_llama_cpp_would_normalise_are_a_warning(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Model", norm_topk_prob=False)
    plan = make_plan(open_checkpoint(folder), parse_variants(["gguf:Q8_0"]), OPTIONS)
    assert any(note.startswith("WARNING: norm_topk_prob = False") for note in plan.notes)
    plan = make_plan(open_checkpoint(write_model(tmp_path / "Other")), parse_variants(["gguf:Q8_0"]), OPTIONS)
    assert not any("norm_topk_prob" in note for note in plan.notes)


# --- published models -----------------------------------------------------------------------------------------------

# bartowski's table of Qwen_Qwen3-30B-A3B-GGUF, GB of 10^9 bytes. (His K-quants of it are 10 to 20 MB larger than
# llama-quantize's: about what attn_k at Q8_0 would take.)
PUBLISHED = {"gguf:BF16": 61.10, "gguf:Q8_0": 32.48}


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen3-30B-A3B", 30.53), ("GLM-4.7", 358.34), pytest.param("Qwen3-235B-A22B", 235.09, marks=pytest.mark.long)],
)
def test_published_mixtures(shelf: Shelf, data: Path, name: str, billions: float) -> None:
    folder = shelf.get(f"shape-{name}", lambda place: write_shape(MIXTURES[name], place / name, data)) / name
    started = time.process_time()
    source = open_checkpoint(folder)
    plan = make_plan(source, parse_variants([*PUBLISHED, "fp8-dynamic"]), ConversionOptions())
    chunks = len(plan.chunks)
    seconds = time.process_time() - started
    assert source.parameter_count / 1e9 == pytest.approx(billions, abs=0.005)
    assert chunks >= sum(".experts." in tensor for tensor in source.tensors)
    assert plan.memory_bytes(16) < 1.2 * 2**30
    if name == "Qwen3-30B-A3B":
        sizes = {variant.recipe.spec: plan.variant_bytes(variant) / 1e9 for variant in plan.variants}
        assert {spec: round(sizes[spec], 2) for spec in PUBLISHED} == PUBLISHED
    assert seconds < 15  # of CPU


def test_fp8_block_of_experts_that_servers_refuse(tmp_path: Path) -> None:
    """vLLM demands whole blocks of each expert's gate and up, on every GPU."""
    sizes: dict[str, Any] = {"size": "small", "num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 128}
    plans = [
        make_plan(
            open_checkpoint(write_model(tmp_path / str(narrow), **sizes, moe_intermediate_size=narrow)),
            parse_variants(["fp8-block"]),
            OPTIONS,
        )
        for narrow in (96, 256)
    ]
    refused, runs = (plan.variants[0].blocks for plan in plans)
    assert refused is not None
    assert runs is not None
    assert refused.is_refused
    assert "96 rows each" in str(refused.refusal)
    assert runs.tensor_parallel == (1, 2)
    assert "64 rows each on each of 4 GPUs" in str(runs.refusal)
