"""Qwen3-Next, Qwen 3.5 and 3.6: linear attention, fused experts, multi-token prediction, the model around them.

Checkpoints are made by transformers' own classes. Whole files are compared with llama.cpp's newest converter, logits
with transformers' and llama.cpp's.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from streamquant.calibrate.importance import InputSums
from streamquant.convert.architectures import describe
from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError
from tests.conftest import TINY_PRE, Shelf
from tests.family_checks import (
    LARGEST_DIVERGENCE,
    OPTIONS,
    OUTTYPES,
    add_tokenizer,
    check_equals_llama_quantize,
    check_importance,
    check_loads_in_transformers,
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
from tests.gguf_peer import Job, OutType, convert_many, differences, read_gguf, requires_newest_converter
from tests.gpu import HAS_TRITON, caller, convert_on_device
from tests.peers import requires_llama_cpp
from tests.quantized_sources import quantize
from tests.tokenizer_folders import edit

pytestmark = [pytest.mark.xdist_group("qwen3_5"), pytest.mark.timeout(600)]

COMMON = {
    **{"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 64},
    **{"num_key_value_heads": 1, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2},
    **{"max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 0},
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        **{"mrope_section": [6, 5, 5], "mrope_interleaved": True},
    },
}
DENSE = {"model_type": "qwen3_5_text", "intermediate_size": 128, "linear_num_value_heads": 4}
MOE = {
    **{"model_type": "qwen3_5_moe_text", "num_experts": 5, "num_experts_per_tok": 2, "linear_num_value_heads": 6},
    **{"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
}
NEXT = {
    **{**MOE, "model_type": "qwen3_next", "linear_num_value_heads": 4},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
CASES: dict[str, dict[str, Any]] = {
    "dense": {**DENSE, "tie_word_embeddings": True},
    "dense-wrapped": {**DENSE, "linear_num_value_heads": 2, "mtp": "config", "is_wrapped": True},
    "moe": {**MOE, "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    "moe-fused": {**MOE, "mtp": "tensors", "is_fused": True},
    "moe-wrapped": {**MOE, "is_fused": True, "is_wrapped": True, "mtp": "lost"},
    "next": {**NEXT, "mtp": "tensors"},
    "next-tied": {
        **{**NEXT, "linear_num_key_heads": 3, "linear_num_value_heads": 3, "tie_word_embeddings": True},
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
}
WITHOUT_MTP = [case for case in CASES if CASES[case].get("mtp") not in ("config", "tensors")]
ALONE = [case for case in CASES if "is_wrapped" not in CASES[case]]


def write_model(folder: Path, settings: dict[str, Any]) -> Path:
    """A checkpoint; mtp: its layer is in "config" and tensors, in "tensors" alone, or only in the config: "lost"."""
    given = {**COMMON, **settings}
    mtp, is_fused, is_wrapped = (given.pop(key, None) for key in ("mtp", "is_fused", "is_wrapped"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).float()
    randomize(model.parameters())
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16).save_pretrained(folder)
    if not is_fused:  # transformers writes a tensor for each expert
        weights = load_file(folder / "model.safetensors")
    elif given.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    config = json.loads((folder / "config.json").read_text())
    layer = "model.layers.3."
    if mtp in ("config", "tensors"):
        behind = {name.replace(layer, "mtp.layers.0."): t for name, t in weights.items() if name.startswith(layer)}
        weights |= {name: tensor.flip(0).contiguous() for name, tensor in behind.items()}
        hidden = given["hidden_size"]
        weights["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
        names = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        weights |= {f"mtp.{name}.weight": torch.randn(hidden).bfloat16() for name in names}
    if mtp in ("config", "lost"):
        config["mtp_num_hidden_layers"] = 1
    if is_wrapped:
        weights = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
        weights["model.visual.blocks.0.attn.qkv.weight"] = torch.randn(96, 32).bfloat16()
        outer = given["model_type"].removesuffix("_text")
        (named,) = config.pop("architectures")
        config = {
            **{"architectures": [named.replace("CausalLM", "ConditionalGeneration")], "model_type": outer},
            **{"text_config": config, "vision_config": {"model_type": f"{outer}_vision", "depth": 1}},
            **{"tie_word_embeddings": given.get("tie_word_embeddings", False), "image_token_id": 5},
        }
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> Path:
    return make_sources(shelf, "qwen3_5", CASES, write_model)


@pytest.fixture(scope="module")
def converted(sources: Path, shelf: Shelf) -> Path:
    return make_variants(shelf, "qwen3_5", [sources / case for case in CASES])


@pytest.fixture(scope="module")
def references(sources: Path, shelf: Shelf) -> Path:
    return make_references(shelf, "qwen3_5", [sources / case for case in CASES], without_mtp=WITHOUT_MTP)


@requires_newest_converter
@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_converter(converted: Path, references: Path, case: str, outtype: OutType) -> None:
    ours, reference = gguf_of(converted, case, outtype.upper()), references / f"{case}-{outtype}.gguf"
    assert differences(ours, reference) == []


LARGER = {"hidden_size": 256, "head_dim": 128, "linear_key_head_dim": 64, "linear_value_head_dim": 64}


@pytest.mark.long
@pytest.mark.parametrize(
    "settings", [{**DENSE, "intermediate_size": 512}, *({**of, "moe_intermediate_size": 256} for of in (MOE, NEXT))]
)
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of the file in BF16; the weight of the shared expert's gate has one row, and so one dimension."""
    source = write_model(tmp_path / "Model", {**settings, **LARGER, "mtp": "config"})
    check_equals_llama_quantize(source, tmp_path)


@pytest.mark.parametrize("case", ALONE)
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
    if case.startswith("dense"):  # where weights are random, a little noise chooses other experts
        noise = all_logits(folder, some_tokens(), Setting()) - original
        assert noise.square().mean() < 0.1 * original.square().mean()


@requires_llama_cpp
@pytest.mark.parametrize("case", ["dense", "moe-fused", "next", "next-tied"])
def test_llama_cpp_computes_the_same(sources: Path, converted: Path, case: str) -> None:
    assert divergence(sources / case, gguf_of(converted, case, "F32")) < LARGEST_DIVERGENCE


@pytest.mark.parametrize("case", ["dense", "moe-wrapped", "next"])
def test_what_was_made_verifies_against_the_source(sources: Path, converted: Path, case: str) -> None:
    for folder in (f"{case}-GGUF", f"{case}-FP8-dynamic"):
        check_verifies(converted / folder, sources / case)


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def test_fp8_has_an_expert_in_each_tensor_and_leaves_small_matrices_alone(sources: Path, converted: Path) -> None:
    fused = load_file(sources / "moe-wrapped" / "model.safetensors")
    made = dict(tensors_of(converted / "moe-wrapped-FP8-dynamic"))
    name = "model.visual.blocks.0.attn.qkv.weight"
    assert torch.equal(made[name], fused[name])
    path = "model.language_model.layers.1"
    for expert in range(5):
        both = fused[f"{path}.mlp.experts.gate_up_proj"][expert]
        whole = {"gate": both[:64], "up": both[64:], "down": fused[f"{path}.mlp.experts.down_proj"][expert]}
        for part, weight in whole.items():
            codes = made[f"{path}.mlp.experts.{expert}.{part}_proj.weight"]
            scale = made[f"{path}.mlp.experts.{expert}.{part}_proj.weight_scale"]
            assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, weight.shape)
            assert torch.allclose(codes.float() * scale.float(), weight.float(), atol=0.04)
    plain = {name for name, tensor in made.items() if tensor.dtype == torch.bfloat16 and name.startswith(f"{path}.")}
    kept = ("mlp.gate", "mlp.shared_expert_gate", *(f"linear_attn.{name}" for name in ("conv1d", "norm")))
    kept += ("linear_attn.in_proj_a", "linear_attn.in_proj_b", "input_layernorm", "post_attention_layernorm")
    named = {f"{path}.{name}.weight" for name in kept} | {f"{path}.linear_attn.{n}" for n in ("A_log", "dt_bias")}
    assert {name for name in plain if not name.endswith("_scale")} == named
    mtp = [name for name, _ in tensors_of(converted / "moe-fused-FP8-dynamic") if name.startswith("mtp.")]
    assert "mtp.layers.0.mlp.experts.4.down_proj.weight" in mtp
    assert not any(name.endswith("_scale") for name in mtp)


def is_published_in_fp8(name: str) -> bool:
    """Of Qwen's own FP8 checkpoints: what makes decay and step stays, and layers for multi-token prediction."""
    is_matrix = name.endswith(("_proj.weight", "in_proj_qkvz.weight", "in_proj_qkv.weight", "in_proj_z.weight"))
    return is_matrix and not name.startswith("mtp.")


@requires_newest_converter
@pytest.mark.parametrize("settings", [{**MOE, "is_fused": False}, NEXT], ids=["moe", "next"])
def test_published_fp8_of_linear_attention(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Blocks of 128 rows and columns, over heads that change places or go into two tensors."""
    more = {"hidden_size": 256, "linear_key_head_dim": 48, "linear_value_head_dim": 48, "mtp": "config"}
    source = quantize(write_model(tmp_path / "Model", {**settings, **more}), chosen=is_published_in_fp8)
    convert_case(source, tmp_path, ["gguf:BF16,Q8_0"])
    jobs = [Job(str(source), kind, str(tmp_path / f"{kind}.gguf"), TINY_PRE, newest=True) for kind in OUTTYPES[1:]]
    convert_many(jobs)
    for kind in OUTTYPES[1:]:
        assert differences(gguf_of(tmp_path, "Model", kind.upper()), tmp_path / f"{kind}.gguf") == []
    check_verifies(tmp_path / "Model-GGUF", source)


def test_a_layer_that_was_lost_is_said(sources: Path) -> None:
    checkpoint = open_checkpoint(sources / "moe-wrapped")
    assert any("mtp_num_hidden_layers" in note and "the checkpoint has none" in note for note in checkpoint.notes)


def test_importance_has_the_columns_of_the_gguf(sources: Path, converted: Path) -> None:
    """llama.cpp sees the inputs of ssm_out in its own order of heads."""
    rules = describe(open_checkpoint(sources / "dense").config).rules
    name = "model.layers.0.linear_attn.out_proj"
    sums = InputSums({name: rules[f"{name}.weight"]})
    sums.observe(name, torch.arange(128.0)[None])
    squares = np.arange(128.0).reshape(2, 2, 32).swapaxes(0, 1).reshape(128) ** 2
    assert np.array_equal(sums.sums["blk.0.ssm_out.weight"][0], squares)
    _, stored = read_gguf(gguf_of(converted, "dense", "F32"))
    source = load_file(sources / "dense" / "model.safetensors")[f"{name}.weight"].float().numpy()
    found = np.frombuffer(stored["blk.0.ssm_out.weight"][2], np.float32).reshape(source.shape)
    assert np.array_equal(found, source.reshape(64, 2, 2, 32).swapaxes(1, 2).reshape(64, 128))


@pytest.mark.long
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it has wheels for Linux alone)")
@pytest.mark.parametrize("block", [1 << 30, 3000])
def test_a_gpu_gives_the_same_files(sources: Path, converted: Path, tmp_path: Path, block: int) -> None:
    """Rows and columns change places there too; what has other values is encoded by the CPU."""
    variants = ["gguf:F32,BF16,Q8_0"]
    with caller() as call:
        options = OPTIONS
        assert call(convert_on_device, sources / "dense", tmp_path, variants, options, block, frozenset()) is None
    for kind in ("F32", "BF16", "Q8_0"):
        ours, on_cpu = gguf_of(tmp_path, "dense", kind), gguf_of(converted, "dense", kind)
        assert ours.read_bytes() == on_cpu.read_bytes()


def test_values_of_an_f16_source_are_made_in_float32(sources: Path, tmp_path: Path) -> None:
    """The converter makes them in F16 and widens what was rounded."""
    folder = shutil.copytree(sources / "dense", tmp_path / "Model")
    half = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    plan = make_plan(open_checkpoint(folder), parse_variants(["gguf:F16"]), OPTIONS)
    convert(plan, tmp_path / "out", RunOptions(jobs=1))
    _, tensors = read_gguf(gguf_of(tmp_path / "out", "Model", "F16"))
    source = {name: tensor.float().numpy() for name, tensor in half.items()}
    decay = source["model.layers.0.linear_attn.A_log"].reshape(2, 2).T.reshape(4)
    expected = {
        "output_norm.weight": source["model.norm.weight"] + np.float32(1),
        "blk.0.ssm_norm.weight": source["model.layers.0.linear_attn.norm.weight"],
        "blk.0.ssm_a": (-np.exp(decay.astype(np.float64))).astype(np.float32),
    }
    assert {name: tensors[name][2] for name in expected} == {name: v.tobytes() for name, v in expected.items()}
    assert tensors["output_norm.weight"][0].name == "F32"


@pytest.mark.parametrize(
    ("case", "values", "message"),
    [
        ("next", {"norm_topk_prob": False}, "computes as if it were True"),
        ("next", {"linear_key_head_dim": 16}, "linear_value_head_dim = 32: llama.cpp will refuse to load"),
        ("dense", {"linear_key_head_dim": 16}, "linear_value_head_dim = 32: llama.cpp will refuse to load"),
        ("next", {"layer_types": ["linear_attention"] * 4}, "without full_attention: llama.cpp will refuse to load"),
        ("dense", {"layer_types": ["full_attention"] * 4}, "without linear_attention: llama.cpp will refuse to load"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_a_warning(
    sources: Path, case: str, values: dict[str, Any], message: str
) -> None:
    config = open_checkpoint(sources / case).config
    notes = [describe({**config, **more}).notes for more in (values, {})]
    assert [any(n.startswith("WARNING") and message in n for n in own) for own in notes] == [True, False]


def test_one_projection_of_qwen3_next_becomes_two(sources: Path, converted: Path) -> None:
    """llama.cpp has queries, keys and values of all heads in one tensor and their gates in another; FP8 one."""
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    stored = load_file(sources / "next" / "model.safetensors")[name].float().numpy()
    by_head = stored.reshape(2, 32 + 32 + 64 + 64, 64)
    parts = np.split(by_head, [32, 64, 128], axis=1)
    expected = {
        "blk.0.attn_qkv.weight": np.concatenate([part.reshape(-1, 64) for part in parts[:3]]),
        "blk.0.attn_gate.weight": parts[3].reshape(-1, 64),
    }
    _, found = read_gguf(gguf_of(converted, "next", "F32"))
    assert {key: found[key][2] for key in expected} == {key: value.tobytes() for key, value in expected.items()}
    made = dict(tensors_of(converted / "next-FP8-dynamic"))
    assert made[name].dtype == torch.float8_e4m3fn
    assert made[name.replace("qkvz", "ba")].dtype == torch.bfloat16


def test_importance_of_every_matrix(sources: Path, converted: Path) -> None:
    check_importance(sources / "next-tied", gguf_of(converted, "next-tied", "F32"), without=["ssm_conv1d.weight"])


@pytest.mark.parametrize("case", ["dense", "moe", "next", "next-tied"])
def test_fp8_folders_load_in_transformers(sources: Path, converted: Path, case: str) -> None:
    pytest.importorskip("compressed_tensors")
    check_loads_in_transformers(converted / f"{case}-FP8-dynamic", sources / case)


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("case", "weights", "config", "message"),
    [
        ("moe-fused", {f"{EXPERTS}.2.up_proj.weight": (64, 64)}, {}, "two tensors are the same tensor"),
        ("moe-fused", {f"{EXPERTS}.gate_up_proj": (5, 127, 64)}, {}, "a shape that does not divide"),
        ("moe-fused", {f"{EXPERTS}.gate_up_proj": (128, 64)}, {}, "a shape that does not divide"),
        ("moe-fused", {f"{EXPERTS}.gate_up_proj": (4, 128, 64)}, {}, "lacks tensors"),
        ("moe-fused", {f"{EXPERTS}.down_proj": (6, 64, 64)}, {}, "does not explain"),
        ("moe-fused", {f"{EXPERTS}.down_proj": (5, 64, 32)}, {}, "shape does not fit config.json"),
        ("moe-fused", {"mtp.norm.weight": None}, {}, "lacks tensors"),
        ("dense", {}, {"layer_types": ["full_attention"] * 5}, "a list of 5 layers in a model of 4"),
        ("dense", {}, {"layer_types": ["mamba"] * 4}, "unknown type"),
        ("dense", {}, {"linear_num_value_heads": 3}, "does not divide into heads"),
        ("next", {}, {"linear_num_value_heads": 3}, "does not divide into heads"),
        ("next", {"model.layers.0.linear_attn.in_proj_qkvz.weight": (256, 64)}, {}, "shape does not fit config.json"),
        ("next", {"model.layers.0.linear_attn.in_proj_ba.weight": None}, {}, "lacks tensors"),
        ("next", {"model.layers.0.mlp.gate.weight": (4, 64)}, {}, "shape does not fit config.json"),
        ("next", {f"{EXPERTS}.4.up_proj.weight": None}, {}, "lacks tensors"),
        ("next", {}, {"decoder_sparse_step": 2}, "layers of another kind"),
        ("next", {}, {"mlp_only_layers": [1]}, "layers of another kind"),
        ("dense", {}, {"attn_output_gate": False}, "layers of another kind"),
        ("dense", {"model.layers.0.linear_attn.conv1d.weight": (256, 4)}, {}, "shape does not fit config.json"),
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
