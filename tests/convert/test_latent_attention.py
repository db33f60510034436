"""Multi-head latent attention (MLA): DeepSeek V2, V3 and R1, GLM-4.7-Flash; Kimi K2 is in test_kimi.py.

Checkpoints are made by transformers' own classes. Whole files are compared with llama.cpp's newest converter, logits
with transformers' and llama.cpp's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from streamquant.convert.architectures import describe
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError
from streamquant.validate.readback.verify import verify
from tests import llama_cpp
from tests.conftest import TINY_PRE, Shelf
from tests.family_checks import (
    LARGEST_DIVERGENCE,
    OPTIONS,
    OUTTYPES,
    add_tokenizer,
    check_equals_llama_quantize,
    check_importance,
    check_verifies,
    convert_case,
    divergence,
    gguf_logits,
    gguf_of,
    is_close,
    make_references,
    make_sources,
    make_variants,
    randomize,
    resident_logits,
    some_tokens,
)
from tests.gguf_peer import OutType, differences, read_gguf, requires_newest_converter
from tests.imatrix_files import write_imatrix
from tests.peers import requires_llama_cpp
from tests.synthetic import GLM_TOKENS
from tests.tokenizer_folders import edit

pytestmark = [pytest.mark.xdist_group("latent_attention"), pytest.mark.timeout(600)]

COMMON = {
    **{"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3},
    **{"num_key_value_heads": 3, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 64},
    **{"intermediate_size": 96, "moe_intermediate_size": 32, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **{"max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 0, "rope_theta": 10000.0},
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0},
}
V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 6,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
YARN = {
    **{"type": "yarn", "factor": 8, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1},
    **{"mscale": 1.0, "mscale_all_dim": 1.0},
}
V2 = {
    **{"model_type": "deepseek_v2", "n_routed_experts": 6, "n_shared_experts": 2, "norm_topk_prob": False},
    **{"scoring_func": "softmax", "topk_method": "greedy", "first_k_dense_replace": 1, "routed_scaling_factor": 1.0},
    **{"num_attention_heads": 4, "num_key_value_heads": 4},
}
LITE = {"model_type": "glm4_moe_lite", "n_routed_experts": 5, "mlp_layer_types": ["dense", "sparse", "sparse"]}
CASES: dict[str, dict[str, Any]] = {
    "deepseek": {**V3, "q_lora_rank": 32, "num_nextn_predict_layers": 1, "is_mtp_there": True},
    "deepseek-yarn": {**V3, "q_lora_rank": 32, "norm_topk_prob": False, "rope_scaling": YARN},
    "deepseek-plain": {**V3, "q_lora_rank": None, "first_k_dense_replace": 0},
    # V2-Lite, whose queries llama.cpp takes for whole in models of so many layers; V2 has experts in groups.
    "v2-lite": {**V2, "q_lora_rank": None, "num_hidden_layers": 26, "n_group": 1, "topk_group": 1},
    "v2-yarn": {**V2, "q_lora_rank": 32, "routed_scaling_factor": 16.0, "n_routed_experts": 5}
    | {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "scoring_func": None},
    "v2-groups": {**V2, "q_lora_rank": 32, "first_k_dense_replace": 0, "num_hidden_layers": 2}
    | {"n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "glm-flash": {**LITE, "q_lora_rank": 32, "num_nextn_predict_layers": 1, "is_mtp_there": True},
    "glm-flash-lost": {**LITE, "norm_topk_prob": False, "q_lora_rank": 96, "num_nextn_predict_layers": 1},
}


def write_model(folder: Path, settings: dict[str, Any]) -> Path:
    """A checkpoint in BF16 as it is published, with a layer for multi-token prediction if it is there."""
    given = {**COMMON, **settings}
    is_mtp_there = given.pop("is_mtp_there", False)
    said = given.pop("num_nextn_predict_layers")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).float()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    randomize(tensor for name, tensor in named.items() if "rotary" not in name)
    for name in (name for name in named if "norm" in name):
        named[name].data.add_(1)
    model.to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    last = given["num_hidden_layers"] - 1
    if is_mtp_there:
        behind = {name.replace(f"layers.{last}.", f"layers.{last + 1}."): tensor for name, tensor in weights.items()}
        weights |= {name: tensor.flip(0) for name, tensor in behind.items() if f"layers.{last + 1}." in name}
        hidden, path = given["hidden_size"], f"model.layers.{last + 1}"
        weights[f"{path}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
        for name in ("enorm", "hnorm", "shared_head.norm"):
            weights[f"{path}.{name}.weight"] = torch.randn(hidden).bfloat16()
        for name, like in {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}.items():
            weights[f"{path}.{name}.weight"] = weights[f"{like}.weight"].clone()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    counted = {"num_nextn_predict_layers": said, "first_k_dense_replace": given.get("first_k_dense_replace", 1)}
    edit(folder / "config.json", lambda config: config.update(counted))
    if given["scoring_func"] is None:
        edit(folder / "config.json", lambda config: config.pop("scoring_func"))
    special = GLM_TOKENS if given["model_type"] == "glm4_moe_lite" else ()
    add_tokenizer(folder, special)
    return folder


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> Path:
    return make_sources(shelf, "latent", CASES, write_model)


@pytest.fixture(scope="module")
def converted(sources: Path, shelf: Shelf) -> Path:
    return make_variants(shelf, "latent", [sources / case for case in CASES])


@pytest.fixture(scope="module")
def references(sources: Path, shelf: Shelf) -> Path:
    return make_references(
        shelf,
        "latent",
        [sources / case for case in CASES],
        without_mtp=[case for case in CASES if case.endswith("-lost")],
    )


@requires_newest_converter
@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_converter(converted: Path, references: Path, case: str, outtype: OutType) -> None:
    ours, reference = gguf_of(converted, case, outtype.upper()), references / f"{case}-{outtype}.gguf"
    assert differences(ours, reference) == []


@pytest.mark.parametrize("case", CASES)
def test_streamed_logits_are_transformers(sources: Path, case: str) -> None:
    ours = all_logits(open_variant(sources / case), some_tokens(), Setting())
    assert is_close(ours, resident_logits(sources / case, some_tokens()))


@pytest.mark.parametrize("case", CASES)
def test_what_was_made_computes_what_the_original_does(sources: Path, converted: Path, case: str) -> None:
    original = all_logits(open_variant(sources / case), some_tokens(), Setting())
    for kind in ("F32", "BF16"):
        assert is_close(gguf_logits(gguf_of(converted, case, kind)), original), kind
    folder = open_variant(converted / f"{case}-FP8-dynamic")
    assert folder.problems == []


@requires_llama_cpp
@pytest.mark.parametrize("case", ["deepseek", "deepseek-yarn", "v2-lite", "v2-yarn", "glm-flash"])
def test_llama_cpp_computes_the_same(sources: Path, converted: Path, case: str) -> None:
    assert divergence(sources / case, gguf_of(converted, case, "F32")) < LARGEST_DIVERGENCE


@requires_llama_cpp
@pytest.mark.long
def test_llama_cpp_computes_the_same_without_a_rank_of_queries(tmp_path: Path) -> None:
    """It takes such a model only with so many layers."""
    source = write_model(tmp_path / "Model", {**CASES["deepseek-plain"], "num_hidden_layers": 27})
    convert_case(source, tmp_path, ["gguf:F32"])
    assert divergence(source, gguf_of(tmp_path, "Model", "F32")) < LARGEST_DIVERGENCE


@pytest.mark.parametrize("case", ["deepseek", "v2-groups", "glm-flash"])
def test_what_was_made_verifies_against_the_source(sources: Path, converted: Path, case: str) -> None:
    for folder in (f"{case}-GGUF", f"{case}-FP8-dynamic"):
        check_verifies(converted / folder, sources / case)


@pytest.mark.parametrize("case", ["deepseek", "v2-yarn", "glm-flash-lost"])
def test_importance_has_an_entry_for_every_matrix_of_the_layers(sources: Path, converted: Path, case: str) -> None:
    """But of the parts of kv_b_proj, by head: no linear layer here has their inputs."""
    without = (".attn_k_b.weight", ".attn_v_b.weight")
    check_importance(sources / case, gguf_of(converted, case, "F32"), without)


def test_fp8_folders_of_v2_load_in_transformers(converted: Path) -> None:
    pytest.importorskip("compressed_tensors")
    for case in ("v2-lite", "v2-yarn", "v2-groups"):
        folder = converted / f"{case}-FP8-dynamic"
        _, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
        assert {kind: keys for kind, keys in info.items() if keys} == {}


def test_what_llama_cpp_does_not_load_is_said(sources: Path) -> None:
    config = open_checkpoint(sources / "deepseek-plain").config
    assert not any("q_lora_rank" in note for note in describe({**config, "num_hidden_layers": 27}).notes)
    notes = describe(config).notes
    assert any("q_lora_rank = null: llama.cpp will refuse" in note for note in notes)
    config = open_checkpoint(sources / "deepseek").config
    assert not any("q_lora_rank" in note for note in describe(config).notes)
    notes = describe({**config, "num_hidden_layers": 26}).notes
    assert any("q_lora_rank = 32: llama.cpp will refuse" in note for note in notes)


@requires_llama_cpp
def test_groups_of_experts_that_llama_cpp_chooses_otherwise_are_a_warning(sources: Path, converted: Path) -> None:
    """It takes the groups with the two best experts together, DeepSeek V2 those with the best one."""
    notes = {case: describe(open_checkpoint(sources / case).config).notes for case in ("v2-groups", "v2-yarn")}
    assert any("n_group = 3: llama.cpp takes the groups" in note for note in notes["v2-groups"])
    assert not any("n_group" in note for note in notes["v2-yarn"])
    assert divergence(sources / "v2-groups", gguf_of(converted, "v2-groups", "F32")) > LARGEST_DIVERGENCE


def test_layers_are_counted_by_either_key(sources: Path) -> None:
    """transformers writes a list alone; the converter would call all layers sparse then."""
    config = dict(open_checkpoint(sources / "glm-flash").config)
    key = "deepseek2.leading_dense_block_count"
    listed = ("first_k_dense_replace", "mlp_layer_types")
    for given in ({}, {"first_k_dense_replace": 1}, {"mlp_layer_types": ["dense", "sparse", "sparse"]}):
        without = {key: value for key, value in config.items() if key not in listed}
        assert describe({**without, **given}).added_metadata[key].value == 1


def test_layers_for_multi_token_prediction(sources: Path, converted: Path) -> None:
    """llama.cpp reads those of GLM; those of DeepSeek stay out of a GGUF, and in FP8 folders as in the source."""
    _, of_glm = read_gguf(gguf_of(converted, "glm-flash", "BF16"))
    assert "blk.3.nextn.eh_proj.weight" in of_glm
    keys, of_deepseek = read_gguf(gguf_of(converted, "deepseek", "BF16"))
    assert keys["deepseek2.block_count"][1] == 3
    assert not any(name.startswith("blk.3.") for name in of_deepseek)
    notes = make_plan(open_checkpoint(sources / "deepseek"), parse_variants(["gguf:BF16"]), OPTIONS).notes
    assert any("stay out of GGUF files" in note for note in notes)
    folder = load_file(converted / "deepseek-FP8-dynamic" / "model.safetensors")
    assert folder["model.layers.3.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert folder["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16


def test_fp8_leaves_alone_what_runtimes_want_whole(converted: Path) -> None:
    made = load_file(converted / "deepseek-FP8-dynamic" / "model.safetensors")
    plain = {name for name, tensor in made.items() if "layers.1." in name and tensor.dtype != torch.float8_e4m3fn}
    kept = {"mlp.gate.weight", "mlp.gate.e_score_correction_bias", "self_attn.q_a_proj.weight"}
    kept |= {"self_attn.kv_a_proj_with_mqa.weight", *(f"self_attn.{name}_a_layernorm.weight" for name in ("q", "kv"))}
    kept |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert {name for name in plain if not name.endswith("_scale")} == {f"model.layers.1.{name}" for name in kept}
    ignored = json.loads((converted / "deepseek-FP8-dynamic" / "config.json").read_text())["quantization_config"][
        "ignore"
    ]
    assert {"re:.*mlp.gate$", "re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$", "lm_head"} <= set(ignored)


ATTENTION, EXPERTS = "model.layers.1.self_attn", "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("case", "weights", "config", "message"),
    [
        ("deepseek", {}, {"num_key_value_heads": 1}, "heads that share keys"),
        ("deepseek", {}, {"qk_rope_head_dim": 15}, "rotated by halves"),
        ("deepseek", {}, {"rope_interleave": False}, "layers of another kind"),
        ("deepseek", {}, {"scoring_func": "softmax"}, "layers of another kind"),
        ("deepseek", {}, {"attention_bias": True}, "layers of another kind"),
        (
            "deepseek-yarn",
            {},
            {"rope_parameters": None, "rope_scaling": {**YARN, "mscale": 0.7}},
            "whose numbers differ",
        ),
        ("deepseek-yarn", {}, {"rope_parameters": None, "rope_scaling": {**YARN, "mscale": None}}, "null where"),
        ("deepseek", {}, {"v_head_dim": 48}, "shape does not fit config.json"),
        ("deepseek", {}, {"q_lora_rank": None}, "does not explain"),
        ("deepseek-plain", {}, {"q_lora_rank": 32}, "does not explain"),
        ("deepseek", {f"{ATTENTION}.kv_b_proj.weight": (287, 64)}, {}, "shape does not fit config.json"),
        ("deepseek", {f"{ATTENTION}.kv_a_layernorm.weight": None}, {}, "lacks tensors"),
        ("deepseek", {f"{EXPERTS}.3.up_proj.weight": None}, {}, "lacks tensors"),
        ("deepseek", {f"{EXPERTS}.9.up_proj.weight": (32, 64)}, {}, "does not explain"),
        ("deepseek", {"model.layers.1.mlp.gate.weight": (7, 64)}, {}, "shape does not fit config.json"),
        ("v2-yarn", {}, {"norm_topk_prob": True}, "layers of another kind"),
        ("v2-yarn", {}, {"topk_method": "noaux_tc"}, "layers of another kind"),
        ("v2-yarn", {}, {"scoring_func": "sigmoid"}, "layers of another kind"),
        ("v2-yarn", {}, {"mlp_bias": True}, "layers of another kind"),
        ("v2-yarn", {f"{EXPERTS}.4.up_proj.weight": None}, {}, "lacks tensors"),
        ("v2-yarn", {f"{EXPERTS}.2.down_proj.weight": (64, 31)}, {}, "shape does not fit config.json"),
        ("v2-yarn", {"model.layers.1.mlp.gate.weight": (6, 64)}, {}, "shape does not fit config.json"),
        ("v2-yarn", {"model.layers.1.mlp.gate.e_score_correction_bias": (5,)}, {}, "does not explain"),
        ("glm-flash", {}, {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "cannot tell by the number"),
        ("glm-flash", {}, {"mlp_layer_types": ["dense", "dense", "sparse"]}, "cannot tell by the number"),
        ("glm-flash", {}, {"mlp_layer_types": ["dense"] * 4}, "a list of 4 layers in a model of 3"),
    ],
)
def test_what_does_not_fit_is_refused(
    sources: Path, tmp_path: Path, case: str, weights: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(sources / case, tmp_path / "Model")
    tensors = load_file(folder / "model.safetensors")
    for name, shape in weights.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    edit(folder / "config.json", lambda values: values.update(config))
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), OPTIONS)


LARGER = {"hidden_size": 256, "kv_lora_rank": 256, "moe_intermediate_size": 256, "intermediate_size": 512}


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {**V3, "q_lora_rank": 256},
        {**V2, "q_lora_rank": 256},
        {**LITE, "q_lora_rank": 96, "num_nextn_predict_layers": 1, "is_mtp_there": True},
    ],
)
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of the file in BF16."""
    source = write_model(tmp_path / "Model", {**settings, **LARGER})
    check_equals_llama_quantize(source, tmp_path)


@pytest.mark.long
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_each_head_has_an_importance_of_its_own(tmp_path: Path) -> None:
    """llama-imatrix counts the inputs of the two parts of kv_b_proj by head, and llama-quantize weighs by them."""
    source = write_model(tmp_path / "Model", {**V3, **LARGER, "q_lora_rank": 256, "qk_nope_head_dim": 256})
    rules = [rule for rule in describe(open_checkpoint(source).config).stored_rules() if rule.is_by_head]
    rng = np.random.default_rng(1)
    entries = {
        rule.gguf_name: (
            (rng.standard_t(3, (rule.gguf_shape[0], rule.gguf_shape[-1])) ** 2 * 1000).astype(np.float32),
            np.full((rule.gguf_shape[0], 1), 4096, np.float32),
        )
        for rule in rules
    }
    assert len(entries) == 6
    matrix = write_imatrix(tmp_path / "imatrix.gguf", entries)
    options = ConversionOptions(pre=TINY_PRE, imatrix=read_imatrix(matrix))
    kinds = ("Q4_K_M", "IQ4_XS")
    plan = make_plan(open_checkpoint(source), parse_variants([f"gguf:BF16,{','.join(kinds)}"]), options)
    convert(plan, tmp_path, RunOptions(jobs=2))
    made = tmp_path / "Model-GGUF"
    for kind in kinds:
        flags = ("--imatrix", str(matrix))
        theirs = llama_cpp.quantize(made / "Model-BF16.gguf", tmp_path / f"{kind}.gguf", kind, flags)
        assert read_gguf(made / f"Model-{kind}.gguf")[1] == read_gguf(theirs)[1]
    results = verify(made, open_checkpoint(source), read_imatrix(matrix))
    assert [result.problems for result in results] == [[], [], []]
