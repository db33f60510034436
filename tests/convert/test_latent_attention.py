"""Multi-head latent attention (MLA): DeepSeek V3 and R1, Kimi K2, GLM-4.7-Flash.

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
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.readback.verify import verify
from tests import llama_cpp
from tests.conftest import TINY_PRE, Shelf, write_small_tokenizer
from tests.convert.test_gguf_parity import differences
from tests.gguf_peer import Job, OutType, convert_many, read_gguf, requires_newest_converter
from tests.imatrix_files import write_imatrix
from tests.synthetic import GLM_TOKENS
from tests.tokenizer_folders import edit

pytestmark = [pytest.mark.xdist_group("latent_attention"), pytest.mark.timeout(600)]

OPTIONS = ConversionOptions(pre=TINY_PRE)
OUTTYPES: tuple[OutType, ...] = ("f32", "bf16", "q8_0")
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
LITE = {"model_type": "glm4_moe_lite", "n_routed_experts": 5, "mlp_layer_types": ["dense", "sparse", "sparse"]}
CASES: dict[str, dict[str, Any]] = {
    "deepseek": {**V3, "q_lora_rank": 32, "num_nextn_predict_layers": 1, "is_mtp_there": True},
    "deepseek-yarn": {**V3, "q_lora_rank": 32, "norm_topk_prob": False, "rope_scaling": YARN},
    "deepseek-plain": {**V3, "q_lora_rank": None, "first_k_dense_replace": 0},
    "glm-flash": {**LITE, "q_lora_rank": 32, "num_nextn_predict_layers": 1, "is_mtp_there": True},
    "glm-flash-lost": {**LITE, "norm_topk_prob": False, "q_lora_rank": 96, "num_nextn_predict_layers": 1},
}


def write_model(folder: Path, settings: dict[str, Any]) -> Path:
    """A checkpoint in BF16 as it is published, with a layer for multi-token prediction if it is there."""
    given = {**COMMON, **settings}
    is_mtp_there = given.pop("is_mtp_there", False)
    said = given.pop("num_nextn_predict_layers")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).float()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" not in name:
            spread = 0.1 if tensor.ndim > 1 else 0.3
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * spread + ("norm" in name))
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
    special = GLM_TOKENS if given["model_type"] == "glm4_moe_lite" else ()
    tokenizer = write_small_tokenizer(folder.parent / f"{folder.name}-tokenizer", special=special, add_bos_token=True)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> Path:
    def make(folder: Path) -> None:
        for case, settings in CASES.items():
            write_model(folder / case, settings)

    return shelf.get("latent-sources", make)


@pytest.fixture(scope="module")
def converted(sources: Path, shelf: Shelf) -> Path:
    variants = parse_variants(["gguf:F32,BF16,Q8_0", "fp8-dynamic"])

    def make(folder: Path) -> None:
        for case in CASES:
            plan = make_plan(open_checkpoint(sources / case), variants, OPTIONS)
            convert(plan, folder, RunOptions(jobs=2))

    return shelf.get("latent-converted", make)


@pytest.fixture(scope="module")
def references(sources: Path, shelf: Shelf) -> Path:
    """The converter's files. It counts by config.json, and would miss the tensors of a layer that was lost."""

    def make(folder: Path) -> None:
        jobs = [
            Job(str(sources / case), outtype, str(folder / f"{case}-{outtype}.gguf"), TINY_PRE, newest=True, more=more)
            for case in CASES
            for more in [("--no-mtp",) if case.endswith("-lost") else ()]
            for outtype in OUTTYPES
        ]
        convert_many(sorted(jobs, key=lambda job: job.more))  # the option stays for the rest of a process

    return shelf.get("latent-references", make)


def gguf_of(converted: Path, case: str, kind: str) -> Path:
    return converted / f"{case}-GGUF" / f"{case}-{kind}.gguf"


def tokens() -> Any:
    return (torch.arange(96).reshape(2, 48) * 7 % 320).numpy()


@requires_newest_converter
@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_converter(converted: Path, references: Path, case: str, outtype: OutType) -> None:
    ours, reference = gguf_of(converted, case, outtype.upper()), references / f"{case}-{outtype}.gguf"
    assert differences(ours, reference) == []


@pytest.mark.parametrize("case", CASES)
def test_streamed_logits_are_transformers(sources: Path, case: str) -> None:
    ours = all_logits(open_variant(sources / case), tokens(), Setting())
    model = AutoModelForCausalLM.from_pretrained(sources / case, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens())).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_what_was_made_computes_what_the_original_does(sources: Path, converted: Path, case: str) -> None:
    original = all_logits(open_variant(sources / case), tokens(), Setting())
    for kind in ("F32", "BF16"):
        variant = open_variant(gguf_of(converted, case, kind))
        assert variant.problems == []
        found = all_logits(variant, tokens(), Setting(weights_only=True))
        assert (found - original).abs().max() < 1e-4 * original.abs().max(), kind
    folder = open_variant(converted / f"{case}-FP8-dynamic")
    assert folder.problems == []


@pytest.mark.parametrize("case", ["deepseek", "deepseek-yarn", "glm-flash"])
def test_llama_cpp_computes_the_same(sources: Path, converted: Path, case: str) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp (package xllamacpp) is not installed")
    compare_with_llama_cpp(gguf_of(converted, case, "F32"), sources / case)


@pytest.mark.long
def test_llama_cpp_computes_the_same_without_a_rank_of_queries(tmp_path: Path) -> None:
    """It takes such a model only with so many layers."""
    pytest.importorskip("xllamacpp", reason="llama.cpp (package xllamacpp) is not installed")
    source = write_model(tmp_path / "Model", {**CASES["deepseek-plain"], "num_hidden_layers": 27})
    convert(make_plan(open_checkpoint(source), parse_variants(["gguf:F32"]), OPTIONS), tmp_path, RunOptions(jobs=2))
    compare_with_llama_cpp(tmp_path / "Model-GGUF" / "Model-F32.gguf", source)


def compare_with_llama_cpp(made: Path, source: Path) -> None:
    prompts = [[5, 17, 33], [5, 17, 33, 60, 99, 120, 7, 42, 250, 199, 3, 77]]
    engine = EngineProcess(made)
    try:
        answers = engine.next_token_logprobs(prompts, 20)
    finally:
        engine.close()
    original = open_variant(source)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = torch.log_softmax(all_logits(original, np.array([prompt]), Setting())[0, -1].double(), -1)
        assert np.allclose(answer.logprobs, expected[list(answer.ids)], atol=3e-3)


@pytest.mark.parametrize("case", ["deepseek", "glm-flash"])
def test_what_was_made_verifies_against_the_source(sources: Path, converted: Path, case: str) -> None:
    for folder in (f"{case}-GGUF", f"{case}-FP8-dynamic"):
        for result in verify(converted / folder, open_checkpoint(sources / case)):
            assert result.problems == []
            assert result.total.sqnr_db > 25


def test_what_llama_cpp_does_not_load_is_said(sources: Path) -> None:
    config = open_checkpoint(sources / "deepseek-plain").config
    assert not any("q_lora_rank" in note for note in describe({**config, "num_hidden_layers": 27}).notes)
    notes = describe(config).notes
    assert any("q_lora_rank = null: llama.cpp will refuse" in note for note in notes)


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
    [{**V3, "q_lora_rank": 256}, {**LITE, "q_lora_rank": 96, "num_nextn_predict_layers": 1, "is_mtp_there": True}],
)
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of the file in BF16."""
    source = write_model(tmp_path / "Model", {**settings, **LARGER})
    types = ("Q4_K_M", "Q2_K", "IQ4_XS", "MXFP4_MOE")
    convert(
        make_plan(open_checkpoint(source), parse_variants([f"gguf:BF16,{','.join(types)}"]), OPTIONS),
        tmp_path,
        RunOptions(jobs=2),
    )
    made = tmp_path / "Model-GGUF"
    for kind in types:
        theirs = llama_cpp.quantize(made / "Model-BF16.gguf", tmp_path / f"{kind}.gguf", kind)
        assert read_gguf(made / f"Model-{kind}.gguf")[1] == read_gguf(theirs)[1]
        assert open_variant(theirs).problems == []


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
