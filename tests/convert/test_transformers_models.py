"""Families of which transformers makes tiny checkpoints: whole files, logits, llama.cpp, what was made read back.

Whole files are compared with llama.cpp's newest converter, logits with transformers' resident ones, the next token's
probabilities with llama.cpp's.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from safetensors.torch import load_file, save_file

from streamquant.convert.architectures import describe
from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError
from streamquant.validate.readback.verify import verify
from tests.conftest import TINY_PRE, Shelf
from tests.family_checks import (
    LARGEST_DIVERGENCE,
    OUTTYPES,
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
    resident_logits,
    some_tokens,
)
from tests.gguf_peer import OutType, differences, requires_newest_converter
from tests.peers import requires_llama_cpp
from tests.small_models import edit_gguf
from tests.transformers_models import (
    Case,
    quantize_to_static_fp8,
    write_model,
)

pytestmark = [pytest.mark.xdist_group("transformers-models"), pytest.mark.timeout(600)]

VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16},
    **{"image_size": 28, "patch_size": 14, "model_type": "pixtral"},
}
YARN = {
    **{"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32},
}
MINISTRAL = {"model_type": "ministral3", "head_dim": 32, "rope_parameters": YARN}
THETA = {"rope_type": "default", "rope_theta": 5e5}
SMOLLM3 = {"model_type": "smollm3", "num_hidden_layers": 5, "rope_parameters": THETA}
FULL, SLIDING = "full_attention", "sliding_attention"
OLMO3 = {"model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 24}
YARN_OF_OLMO3 = {
    **{"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32},
    **{"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0},
}
BYTES = 256
"""Tokens that every vocabulary here has."""
GEMMA3 = {
    **{"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32},
    **{"sliding_window": 24, "tie_word_embeddings": True},
}
SIGLIP = {
    **{key: value for key, value in VISION.items() if key != "head_dim"},
    "model_type": "siglip_vision_model",
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FACTORS = {
    **{"embedding_multiplier": 12.0, "attention_multiplier": 0.05, "residual_multiplier": 0.22},
    **{"logits_scaling": 6.0, "rope_parameters": THETA},
}
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 96}
HYBRID = {
    **{**FACTORS, "model_type": "granitemoehybrid", "num_hidden_layers": 4, "shared_intermediate_size": 160},
    **{"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 16},
}
PUBLISHED_LAYERS = ["mamba", "mamba", "attention", "mamba"]
"""As Granite 4 is published; the converter does not know transformers' spelling."""
GRANITE: Mapping[str, Case] = {
    "granite": Case({**FACTORS, "model_type": "granite", "tie_word_embeddings": True}),
    "granite-biased": Case(
        {
            **{**FACTORS, "model_type": "granite", "attention_bias": True, "mlp_bias": True, "hidden_size": 96},
            **{"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32},
        }
    ),
    "granite-moe": Case(
        {**FACTORS, **MOE, "model_type": "granitemoe", "tie_word_embeddings": True}, loads_in_fp8=False
    ),
    "granite-moe-shared": Case(
        {**FACTORS, **MOE, "model_type": "granitemoeshared", "shared_intermediate_size": 80}, loads_in_fp8=False
    ),
    "granite-hybrid": Case(
        {**HYBRID, **MOE, "shared_intermediate_size": 80, "layer_types": PUBLISHED_LAYERS},
        stored={"layer_types": PUBLISHED_LAYERS, "position_embedding_type": "nope"},
        loads_in_fp8=False,
    ),
    "granite-hybrid-dense": Case(
        {
            **{**HYBRID, "num_local_experts": 0, "num_experts_per_tok": 0, "tie_word_embeddings": True},
            **{"intermediate_size": 160, "hidden_size": 96, "num_attention_heads": 6, "mamba_n_heads": 6},
            "layer_types": PUBLISHED_LAYERS,
        },
        stored={"layer_types": PUBLISHED_LAYERS, "time_step_limit": ...},
    ),
    "granite-attention": Case(
        {
            **{**HYBRID, "num_local_experts": 0, "num_experts_per_tok": 0, "position_embedding_type": "rope"},
            **{"intermediate_size": 160, "layer_types": ["attention"] * 4, "tie_word_embeddings": True},
        },
        stored={"layer_types": ["attention"] * 4},
    ),
    "granite-attention-moe": Case(
        {**HYBRID, **MOE, "position_embedding_type": "rope", "layer_types": ["attention"] * 4},
        stored={"layer_types": ["attention"] * 4},
        loads_in_fp8=False,
    ),
}
CONVOLUTIONS = ["conv", "full_attention", "conv"]
LFM2: Mapping[str, Case] = {
    "lfm2": Case(
        {
            **{"model_type": "lfm2", "layer_types": CONVOLUTIONS, "block_auto_adjust_ff_dim": False},
            "rope_parameters": THETA,
        }
    ),
    "lfm2-adjusted": Case(
        {
            **{"model_type": "lfm2", "layer_types": ["full_attention", "conv", "conv"], "hidden_size": 96},
            **{"num_attention_heads": 3, "num_key_value_heads": 1, "block_multiple_of": 32, "conv_L_cache": 4},
            **{"block_ffn_dim_multiplier": 1.5, "rope_parameters": THETA},
        }
    ),
    "lfm2-moe": Case(
        {
            **{"model_type": "lfm2_moe", "layer_types": CONVOLUTIONS, "num_dense_layers": 1, "num_experts": 5},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 96, "rope_parameters": THETA},
        }
    ),
    "lfm2-moe-sparse": Case(
        {
            **{"model_type": "lfm2_moe", "layer_types": ["conv", *CONVOLUTIONS], "num_hidden_layers": 4},
            **{"num_dense_layers": 0, "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 64},
            **{"rope_parameters": THETA},
        }
    ),
}
EXAONE4: Mapping[str, Case] = {
    "exaone4": Case(
        {
            **{"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 3},
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
            },
            "tie_word_embeddings": True,
        }
    ),
    # llama.cpp knows windows in models of 64 layers.
    "exaone4-window": Case(
        {
            **{"model_type": "exaone4", "sliding_window": 24, "num_hidden_layers": 64, "intermediate_size": 64},
            **{"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32},
            "rope_parameters": THETA,
        }
    ),
}
CASES: Mapping[str, Case] = {
    **GRANITE,
    **LFM2,
    **EXAONE4,
    "ministral3": Case({**MINISTRAL, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "ministral3-wrapped": Case(
        {
            **{"model_type": "mistral3", "vision_config": VISION, "tie_word_embeddings": True},
            "text_config": {**MINISTRAL, "tie_word_embeddings": True, "hidden_size": 96},
        }
    ),
    "smollm3": Case({**SMOLLM3, "tie_word_embeddings": True}),
    "smollm3-untied": Case(
        {
            **{**SMOLLM3, "tie_word_embeddings": False, "num_attention_heads": 3, "num_key_value_heads": 3},
            **{"hidden_size": 96, "no_rope_layers": [1, 1, 1, 0, 1]},
        }
    ),
    "olmo2": Case({"model_type": "olmo2", "rope_parameters": THETA}),
    "olmo2-tied": Case(
        {
            **{"model_type": "olmo2", "rope_parameters": THETA, "tie_word_embeddings": True, "hidden_size": 96},
            **{"num_attention_heads": 6, "num_key_value_heads": 6},
        },
        is_refused=True,
    ),
    "olmo3": Case(OLMO3),
    "olmo3-yarn": Case(
        {
            **{**OLMO3, "num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96},
            "rope_parameters": {FULL: YARN_OF_OLMO3, SLIDING: {"rope_type": "default", "rope_theta": 5e5}},
        },
    ),
    # Without tokenizer.model the converter drops the rows of the embeddings behind the tokens: here there are none.
    "gemma3": Case({**GEMMA3, "vocab_size": 261}),
    "gemma3-wrapped": Case(
        {
            **{"model_type": "gemma3", "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 5},
            **{"boi_token_index": 6, "eoi_token_index": 7},
            "text_config": {
                **{**GEMMA3, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96},
                **{"rope_parameters": TWO_ROPES, "bos_token_id": 2, "eos_token_id": 1},
            },
        },
        stored={"bos_token_id": 2, "eos_token_id": 1, "unk_token_id": 3},  # the converter does not ask tokenizer.model
        has_sentencepiece=True,
    ),
    "mistral3": Case(
        {
            **{"model_type": "mistral3", "vision_config": VISION, "tie_word_embeddings": False},
            "text_config": {
                **{"model_type": "mistral", "head_dim": 32, "sliding_window": None},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
            },
        }
    ),
}


DEEP = ("exaone4-window",)
"""Cases of so many layers that what computes them is a long test."""


def computed(names: Iterable[str]) -> list[Any]:
    """Cases as parameters of a test that computes them."""
    return [pytest.param(name, marks=[pytest.mark.long] if name in DEEP else [], id=name) for name in names]


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> dict[str, Path]:
    folder = make_sources(shelf, "transformers", CASES, write_model)
    return {name: folder / name for name in CASES}


OF_A_STATE = ("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight", "shortconv.conv.weight")
"""Tensors of Mamba-2 layers and short convolutions with two dimensions that no input is multiplied with."""
PUBLISHED = ("ministral3-wrapped",)
"""Cases that are made in FP8 too, as they are published."""


@pytest.fixture(scope="module")
def quantized(sources: dict[str, Path], shelf: Shelf) -> dict[str, Path]:
    def make(folder: Path) -> None:
        for name in PUBLISHED:
            quantize_to_static_fp8(sources[name], folder / f"{name}-fp8")

    folder = shelf.get("transformers-quantized", make)
    return {f"{name}-fp8": folder / f"{name}-fp8" for name in PUBLISHED}


@pytest.fixture(scope="module")
def converted(sources: dict[str, Path], quantized: dict[str, Path], shelf: Shelf) -> Path:
    return make_variants(shelf, "transformers", [*sources.values(), *quantized.values()])


@pytest.fixture(scope="module")
def expected(sources: dict[str, Path], quantized: dict[str, Path], shelf: Shelf) -> Path:
    return make_references(shelf, "transformers", [*sources.values(), *quantized.values()])


@requires_newest_converter
@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", [*CASES, *(f"{name}-fp8" for name in PUBLISHED)])
def test_equals_the_reference_converter(converted: Path, expected: Path, name: str, outtype: OutType) -> None:
    assert differences(gguf_of(converted, name, outtype.upper()), expected / f"{name}-{outtype}.gguf") == []


@pytest.mark.parametrize("name", computed(CASES))
def test_logits(sources: dict[str, Path], converted: Path, name: str) -> None:
    """Streamed they are the resident ones; a GGUF's are the source's, and an FP8 folder's are near."""
    variant = open_variant(sources[name])
    original = all_logits(variant, some_tokens(), Setting())
    # One expert after another: transformers' grouped products round otherwise.
    more = {"experts_implementation": "eager"} if variant.description.family.experts is not None else {}
    assert torch.equal(original, resident_logits(sources[name], some_tokens(), CASES[name].loader, **more))
    assert is_close(gguf_logits(gguf_of(converted, name, "F32")), original)
    folder = open_variant(converted / f"{name}-FP8-dynamic")
    assert folder.problems == []
    if folder.description.family.experts is None:  # where weights are random, a little noise chooses other experts
        noise = all_logits(folder, some_tokens(), Setting()) - original
        assert noise.square().mean() < 0.1 * original.square().mean()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_source_in_fp8(quantized: dict[str, Path], sources: dict[str, Path], converted: Path, name: str) -> None:
    """Scales of activations are left out, and so is the tower in the GGUF; the FP8 folder keeps it as it was."""
    source = open_checkpoint(quantized[f"{name}-fp8"])
    assert any("made from a quantized source" in note for note in source.notes)
    for folder in (f"{name}-fp8-GGUF", f"{name}-fp8-FP8-dynamic"):
        assert [problem for result in verify(converted / folder, source) for problem in result.problems] == []
    original, made = (load_file(path / "model.safetensors") for path in (sources[name], converted / folder))
    tower = [tensor for tensor in original if "vision_tower" in tensor or "multi_modal_projector" in tensor]
    assert tower
    assert all(torch.equal(original[tensor], made[tensor]) for tensor in tower)
    assert not any("activation_scale" in tensor for tensor in made)


@requires_llama_cpp
@pytest.mark.parametrize("name", computed(name for name, case in CASES.items() if not case.is_refused))
def test_llama_cpp_agrees(sources: dict[str, Path], converted: Path, name: str) -> None:
    assert divergence(sources[name], gguf_of(converted, name, "F32")) < LARGEST_DIVERGENCE


@pytest.mark.parametrize("name", computed(CASES))
def test_what_was_made_verifies_against_the_source(sources: dict[str, Path], converted: Path, name: str) -> None:
    for folder in (f"{name}-GGUF", f"{name}-FP8-dynamic"):
        check_verifies(converted / folder, sources[name])


@pytest.mark.parametrize("name", computed(name for name, case in CASES.items() if case.loads_in_fp8))
def test_fp8_folders_load_in_transformers(sources: dict[str, Path], converted: Path, name: str) -> None:
    """Every module has its weights, and what has a scale is what our reader takes for quantized."""
    pytest.importorskip("compressed_tensors")
    check_loads_in_transformers(converted / f"{name}-FP8-dynamic", sources[name], CASES[name].loader)


@pytest.mark.parametrize("name", computed(CASES))
def test_importance_has_an_entry_for_every_matrix_of_the_layers(
    sources: dict[str, Path], converted: Path, name: str
) -> None:
    check_importance(sources[name], gguf_of(converted, name, "F32"), without=OF_A_STATE)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path, name: str) -> None:
    """Of the file in BF16, with columns that K-quants take."""
    check_equals_llama_quantize(write_model(tmp_path / "Model", larger(CASES[name])), tmp_path)


def larger(case: Case) -> Case:
    """The same with rows of 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = dict(case.config)
    own = dict(config["text_config"] if case.is_wrapped else config)
    if "query_pre_attn_scalar" in own:
        sizes["query_pre_attn_scalar"] = 64
    if "shared_intermediate_size" in own:
        sizes["shared_intermediate_size"] = 512
    if "moe_intermediate_size" in own:
        sizes["moe_intermediate_size"] = 256
    if "mamba_n_heads" in own:
        sizes["mamba_n_heads"] = 8
    own |= sizes
    config = {**config, "text_config": own} if case.is_wrapped else own
    return Case(config, case.stored, case.spread)


# --- what is refused or said ----------------------------------------------------------------------------------------


def changed(source: Path, folder: Path, **values: Any) -> Path:
    """A copy of a checkpoint with other keys of config.json; `...` removes one, of text_config where there is one."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    own = config.get("text_config", config)
    own |= values
    for key in [key for key, value in own.items() if value is ...]:
        del own[key]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ministral3", {"rope_parameters": {"rope_theta": 1e6}}, "does not work for arch 'mistral3'"),
        ("ministral3", {"rope_parameters": {**YARN, "mscale": 0.7}}, "no key for"),
        ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": "a"}}, "a string where a number"),
        ("mistral3", {"rope_parameters": YARN}, "rope setting 'mscale' is not supported"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "not a value for each layer"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, "0", 1]}, "not a value for each layer"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "layers of another kind"),
        ("gemma3", {"hidden_activation": "silu"}, "an activation that llama.cpp does not use"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "layers of another kind"),
        ("gemma3", {"use_bidirectional_attention": True}, "layers of another kind"),
        ("gemma3", {"layer_types": ["full_attention"]}, "a list of 1 layers in a model of 7"),
        (
            "gemma3",
            {"rope_parameters": {**TWO_ROPES, "sliding_attention": TWO_ROPES["full_attention"]}},
            "a rope scaling of layers with a window",
        ),
        ("olmo3", {"sliding_window": None}, "null where config.json must have a value"),
        ("olmo3", {"layer_types": [FULL] * 4}, "a list of 4 layers in a model of 5"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 5}, "of an unknown type"),
        ("olmo3", {"rope_parameters": {FULL: THETA, SLIDING: YARN_OF_OLMO3}}, "a rope scaling of layers with a window"),
        ("mistral3", {"model_type": "mistral4"}, "not the model type"),
        ("granite", {"logits_scaling": 0}, "a factor of 0"),
        ("granite", {"residual_multiplier": None}, "null where"),
        ("granite", {"head_dim": 32}, "sizes that do not fit together"),
        ("granite-moe", {"num_local_experts": 6}, "shape does not fit"),
        ("granite-moe", {"intermediate_size": 80}, "shape does not fit"),
        ("granite-moe-shared", {"shared_intermediate_size": 0}, "does not explain"),
        ("granite-hybrid", {"layer_types": [*PUBLISHED_LAYERS, "mamba"]}, "a list of 5 layers in a model of 4"),
        ("granite-hybrid", {"layer_types": [*PUBLISHED_LAYERS[:3], "moe"]}, "layer 3 is of an unknown type"),
        ("granite-hybrid", {"layer_types": ["attention"] * 4}, "does not explain"),
        ("granite-hybrid", {"layer_types": ...}, "a required key is missing"),
        ("granite-hybrid", {"mamba_d_head": 32}, "sizes that do not fit together"),
        ("granite-hybrid", {"mamba_n_heads": 7}, "sizes that do not fit together"),
        ("granite-hybrid", {"mamba_n_groups": 2}, "layers of another kind"),
        ("granite-hybrid", {"mamba_expand": 3}, "layers of another kind"),
        ("granite-hybrid", {"time_step_limit": [0.1, 1.0]}, "layers of another kind"),
        ("granite-hybrid", {"num_local_experts": 0}, "does not explain"),
        ("lfm2", {"layer_types": [*CONVOLUTIONS, "conv"]}, "a list of 4 layers in a model of 3"),
        ("lfm2", {"layer_types": ["conv", "conv", "mamba"]}, "layer 2 is of an unknown type"),
        ("lfm2", {"layer_types": ..., "full_attn_idxs": [3]}, "not a list of layers"),
        ("lfm2", {"layer_types": ...}, "null where|a required key is missing"),
        ("lfm2", {"conv_L_cache": 4}, "shape does not fit"),
        ("lfm2", {"block_auto_adjust_ff_dim": True}, "shape does not fit"),
        ("lfm2", {"tie_embedding": False}, "layers of another kind"),
        ("lfm2-moe", {"num_dense_layers": 4}, "out of range"),
        ("exaone4", {"layer_types": ["full_attention"] * 4}, "a list of 4 layers in a model of 3"),
        ("exaone4", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "unknown type"),
        ("exaone4-window", {"layer_types": ..., "sliding_window_pattern": "LLLG"}, "a string where an integer"),
        ("lfm2-moe", {"use_expert_bias": False}, "layers of another kind"),
    ],
)
def test_configs_that_are_refused(
    sources: dict[str, Path], tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    folder = changed(sources[name], tmp_path / "Model", **values)
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), ConversionOptions(pre=TINY_PRE))


@pytest.mark.parametrize(("name", "theta"), [("smollm3", 2e6), ("olmo2", 5e5), ("olmo3", 5e5), ("ministral3", 1e6)])
def test_classes_with_a_rope_of_their_own(sources: dict[str, Path], name: str, theta: float) -> None:
    """What transformers' configuration class takes where config.json says nothing."""
    config = json.loads((sources[name] / "config.json").read_text())
    described = describe({key: value for key, value in config.items() if key != "rope_parameters"})
    assert described.metadata[f"{described.gguf_arch}.rope.freq_base"].value == theta


def test_layers_that_llama_cpp_would_rotate_are_a_warning(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(sources["smollm3"], tmp_path / "Model", no_rope_layers=[1, 0, 1, 0, 1])
    plan = make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), ConversionOptions(pre=TINY_PRE))
    assert any("takes every 4. layer for one of 'nope'" in note and "layer 1;" in note for note in plan.notes)
    plan = make_plan(
        open_checkpoint(sources["smollm3"]), parse_variants(["gguf:BF16"]), ConversionOptions(pre=TINY_PRE)
    )
    assert not any(note.startswith("WARNING") for note in plan.notes)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_refused])
def test_what_llama_cpp_refuses_is_a_warning(sources: dict[str, Path], name: str) -> None:
    plan = make_plan(open_checkpoint(sources[name]), parse_variants(["gguf:BF16"]), ConversionOptions(pre=TINY_PRE))
    assert any("llama.cpp will refuse to load the GGUF" in note for note in plan.notes)


THETA_OF_WINDOWS = {FULL: {**THETA, "rope_theta": 1e4}, SLIDING: THETA}
MORE_YARN: Mapping[str, float] = {"attention_factor": 1.0, "beta_fast": 8.0}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
        ("gemma3", {"layer_types": [FULL, *[SLIDING] * 6]}, "takes every 6. layer for one of"),
        ("olmo3", {"layer_types": [FULL] * 5}, "without sliding_attention: llama.cpp will refuse to load the GGUF"),
        ("olmo3", {"rope_parameters": THETA_OF_WINDOWS}, "rotates them by 10000"),
        *(
            ("olmo3-yarn", {"rope_parameters": {FULL: {**YARN_OF_OLMO3, key: value}, SLIDING: THETA}}, f"{key} = ")
            for key, value in MORE_YARN.items()
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_a_warning(
    sources: dict[str, Path], tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    options = ConversionOptions(pre=TINY_PRE)
    plans = [
        make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), options)
        for folder in (changed(sources[name], tmp_path / "Model", **values), sources[name])
    ]
    warned = [any(note.startswith("WARNING") and message in note for note in plan.notes) for plan in plans]
    assert warned == [True, False]


def test_a_rope_of_windows_as_transformers_4_has_it(sources: dict[str, Path]) -> None:
    """OLMo 3 was published with one theta, and a scaling for the layers that see all alone."""
    config = json.loads((sources["olmo3-yarn"] / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {key: value for key, value in YARN_OF_OLMO3.items() if key != "rope_theta"}
    found = describe({**config, "rope_theta": 5e5, "rope_scaling": scaling})
    assert found.metadata == describe(json.loads((sources["olmo3-yarn"] / "config.json").read_text())).metadata


def test_numbers_of_yarn_that_a_gguf_is_not_run_with_are_said(
    sources: dict[str, Path], converted: Path, tmp_path: Path
) -> None:
    """attention_factor is what cos and sin grow by: llama.cpp takes 0.1 ln(factor) + 1, not 1."""
    path = gguf_of(converted, "olmo3-yarn", "F32")
    assert open_variant(path).problems == []
    key = "olmo2.rope.scaling.yarn_attn_factor"
    other = edit_gguf(path, tmp_path / "Model-F32.gguf", keys={key: GGUFValue(1.0, GGUFValueType.FLOAT32)})
    (problem,) = open_variant(other).problems
    assert (problem.where, problem.required) == (f"key {key}", "what it uses: 1.20794")


def test_ropes_of_two_kinds_of_layers_as_transformers_4_spells_them(sources: dict[str, Path]) -> None:
    config = json.loads((sources["gemma3-wrapped"] / "config.json").read_text())
    del config["text_config"]["rope_parameters"]
    four = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    described = describe(config | {"text_config": config["text_config"] | four})
    found = {key: value.value for key, value in described.metadata.items() if ".rope." in key}
    assert found == {
        **{"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0},
        **{"gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 1e4},
    }


# --- Granite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["granite-hybrid", "granite-attention-moe"])
def test_layers_may_be_spelled_as_transformers_5_saves_them(
    sources: dict[str, Path], converted: Path, tmp_path: Path, name: str
) -> None:
    """The converter writes a file for that spelling whose layers all count as Mamba layers."""
    published = json.loads((sources[name] / "config.json").read_text())["layer_types"]
    spelled = {"mamba": "linear_attention", "attention": "full_attention"}
    folder = changed(sources[name], tmp_path / name, layer_types=[spelled[kind] for kind in published])
    convert_case(folder, tmp_path, ["gguf:BF16"])
    assert gguf_of(tmp_path, name, "BF16").read_bytes() == gguf_of(converted, name, "BF16").read_bytes()


@pytest.mark.parametrize(
    ("name", "embedding", "found"),
    [("granite-hybrid", "rope", (True, 512)), ("granite-hybrid", "nope", (False, 1 << 20))]
    + [("granite-attention", embedding, (False, 1 << 20)) for embedding in (None, "nope")],
)
def test_a_gguf_says_whether_layers_rotate(
    sources: dict[str, Path], name: str, embedding: str | None, found: tuple[bool, int]
) -> None:
    """The converter goes by the kinds of layers; transformers by this key, whatever they are."""
    config = json.loads((sources[name] / "config.json").read_text())
    described = describe({**config, "position_embedding_type": embedding})
    keys = {key.split(".", 1)[-1]: value.value for key, value in described.added_metadata.items()}
    assert (keys["rope.scaling.finetuned"], keys["context_length"]) == found
    assert described.has_rope is found[0]


@requires_llama_cpp
def test_a_model_that_does_not_rotate_although_it_has_attention_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    """Where the converter would have its GGUF rotate."""
    name = "granite-attention"
    folder = changed(sources[name], tmp_path / name, position_embedding_type=None)
    convert_case(folder, tmp_path, ["gguf:F32"])
    ours = all_logits(open_variant(folder), some_tokens(), Setting())
    assert torch.equal(ours, resident_logits(folder, some_tokens()))
    assert is_close(gguf_logits(gguf_of(tmp_path, name, "F32")), ours)
    assert not is_close(ours, all_logits(open_variant(sources[name]), some_tokens(), Setting()))
    assert divergence(folder, gguf_of(tmp_path, name, "F32")) < LARGEST_DIVERGENCE


def test_biases_that_llama_cpp_crashes_without_are_a_warning(sources: dict[str, Path]) -> None:
    config = json.loads((sources["granite-hybrid-dense"] / "config.json").read_text())
    warned = [
        any("mamba_conv_bias = false: llama.cpp will refuse" in note for note in describe({**config, **more}).notes)
        for more in ({}, {"mamba_conv_bias": False})
    ]
    assert warned == [False, True]


def test_experts_of_granite_in_fp8(sources: dict[str, Path], converted: Path) -> None:
    """A tensor for each expert, under the names that vLLM has for those of the class; the router as it was."""
    for name, parts in (("granite-moe", ("w1", "w3", "w2")), ("granite-hybrid", ("gate_proj", "up_proj", "down_proj"))):
        folder = converted / f"{name}-FP8-dynamic"
        original, made = (load_file(path / "model.safetensors") for path in (sources[name], folder))
        block = "model.layers.2.block_sparse_moe"
        assert torch.equal(made[f"{block}.router.layer.weight"], original[f"{block}.router.layer.weight"])
        whole = (*original[f"{block}.input_linear.weight"].chunk(2, 1), original[f"{block}.output_linear.weight"])
        for part, weights in zip(parts, whole, strict=True):
            for expert, weight in enumerate(weights):
                codes, scale = (made[f"{block}.experts.{expert}.{part}.{key}"] for key in ("weight", "weight_scale"))
                assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, weight.shape)
                assert torch.allclose(codes.float() * scale.float(), weight.float(), atol=0.04)
        ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
        assert "re:.*block_sparse_moe.router" in ignored
    assert not any("conv1d.weight_scale" in name for name in made)


def test_experts_of_a_hybrid_one_at_a_time(sources: dict[str, Path]) -> None:
    whole, apart = (
        all_logits(open_variant(sources["granite-hybrid"]), some_tokens(), Setting(layer_limit=limit))
        for limit in (None, 1)
    )
    assert torch.equal(whole, apart)


EXPERTS = "model.layers.0.block_sparse_moe"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("granite-moe", {f"{EXPERTS}.input_linear.weight": (5, 191, 64)}, "a shape that does not divide"),
        ("granite-moe", {f"{EXPERTS}.input_linear.weight": (4, 192, 64)}, "lacks tensors"),
        ("granite-moe", {f"{EXPERTS}.output_linear.weight": (5, 96, 64)}, "shape does not fit config.json"),
        ("granite-moe", {f"{EXPERTS}.experts.1.w1.weight": (96, 64)}, "two tensors are the same tensor"),
        ("granite-moe", {f"{EXPERTS}.router.layer.weight": (6, 64)}, "shape does not fit config.json"),
        ("granite-hybrid", {"model.layers.0.mamba.A_log": (7,)}, "shape does not fit config.json"),
        ("granite-hybrid", {"model.layers.0.mamba.conv1d.weight": (160, 4)}, "shape does not fit config.json"),
        ("granite-hybrid", {"model.layers.0.mamba.D": None}, "lacks tensors"),
        ("granite-hybrid", {"model.layers.0.mamba.conv1d.bias": None}, "lacks tensors"),
        ("granite-hybrid", {"model.layers.0.self_attn.q_proj.weight": (64, 64)}, "does not explain"),
    ],
)
def test_tensors_of_granite_that_do_not_fit(
    sources: dict[str, Path], tmp_path: Path, name: str, weights: dict[str, tuple[int, ...] | None], message: str
) -> None:
    folder = shutil.copytree(sources[name], tmp_path / "Model")
    stored = load_file(folder / "model.safetensors")
    for tensor, shape in weights.items():
        stored.pop(tensor, None)
        if shape is not None:
            stored[tensor] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), ConversionOptions(pre=TINY_PRE))


# --- LFM2 -----------------------------------------------------------------------------------------------------------


def test_layers_with_attention_may_be_told_by_their_numbers(sources: dict[str, Path]) -> None:
    config = json.loads((sources["lfm2"] / "config.json").read_text())
    numbered = {key: value for key, value in config.items() if key != "layer_types"} | {"full_attn_idxs": [1]}
    assert describe(numbered).rules == describe(config).rules
    assert describe(numbered).added_metadata["lfm2.attention.head_count_kv"].value == [0, 2, 0]


def test_the_feed_forward_is_named_as_publishers_do(sources: dict[str, Path]) -> None:
    """12288 in LFM2-1.2B, whose matrices have 8192 rows."""
    config = json.loads((sources["lfm2"] / "config.json").read_text()) | {"block_auto_adjust_ff_dim": True}
    published = {**config, "block_ff_dim": 12288, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}
    assert describe(published).metadata["lfm2.feed_forward_length"].value == 8192


def test_short_convolutions_stay_as_they_are_in_fp8(sources: dict[str, Path], converted: Path) -> None:
    original, made = (
        load_file(path / "model.safetensors") for path in (sources["lfm2-moe"], converted / "lfm2-moe-FP8-dynamic")
    )
    kept = [name for name in original if ".conv." in name or name.endswith(("feed_forward.gate.weight", "expert_bias"))]
    assert len(kept) == 2 * 3 + 2 * 2
    assert all(torch.equal(original[name], made[name]) for name in kept)
    assert made["model.layers.2.feed_forward.experts.4.w3.weight"].dtype == torch.float8_e4m3fn
    ignored = json.loads((converted / "lfm2-moe-FP8-dynamic" / "config.json").read_text())
    assert r"re:.*\.conv\.(in_proj|out_proj|conv)$" in ignored["quantization_config"]["ignore"]


# --- EXAONE 4 -------------------------------------------------------------------------------------------------------


def test_windows_that_llama_cpp_does_not_know_are_a_warning(sources: dict[str, Path]) -> None:
    config = json.loads((sources["exaone4-window"] / "config.json").read_text())
    fewer = {**config, "num_hidden_layers": 8, "layer_types": config["layer_types"][:8]}
    warned = [any("models of 64 layers alone" in note for note in describe(given).notes) for given in (config, fewer)]
    assert warned == [False, True]
