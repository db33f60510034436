"""Families of which transformers makes tiny checkpoints: whole files, logits, llama.cpp, what was made read back.

Whole files are compared with llama.cpp's newest converter, logits with transformers' resident ones, the next token's
probabilities with llama.cpp's.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
CASES: Mapping[str, Case] = {
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


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> dict[str, Path]:
    folder = make_sources(shelf, "transformers", CASES, write_model)
    return {name: folder / name for name in CASES}


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


@pytest.mark.parametrize("name", CASES)
def test_logits(sources: dict[str, Path], converted: Path, name: str) -> None:
    """Streamed they are the resident ones; a GGUF's are the source's, and an FP8 folder's are near."""
    original = all_logits(open_variant(sources[name]), some_tokens(), Setting())
    assert torch.equal(original, resident_logits(sources[name], some_tokens(), CASES[name].loader))
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
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_refused])
def test_llama_cpp_agrees(sources: dict[str, Path], converted: Path, name: str) -> None:
    assert divergence(sources[name], gguf_of(converted, name, "F32")) < LARGEST_DIVERGENCE


@pytest.mark.parametrize("name", CASES)
def test_what_was_made_verifies_against_the_source(sources: dict[str, Path], converted: Path, name: str) -> None:
    for folder in (f"{name}-GGUF", f"{name}-FP8-dynamic"):
        check_verifies(converted / folder, sources[name])


@pytest.mark.parametrize("name", CASES)
def test_fp8_folders_load_in_transformers(sources: dict[str, Path], converted: Path, name: str) -> None:
    """Every module has its weights, and what has a scale is what our reader takes for quantized."""
    pytest.importorskip("compressed_tensors")
    check_loads_in_transformers(converted / f"{name}-FP8-dynamic", sources[name], CASES[name].loader)


@pytest.mark.parametrize("name", CASES)
def test_importance_has_an_entry_for_every_matrix_of_the_layers(
    sources: dict[str, Path], converted: Path, name: str
) -> None:
    check_importance(sources[name], gguf_of(converted, name, "F32"))


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
        ("mistral3", {"model_type": "mistral4"}, "not the model type"),
    ],
)
def test_configs_that_are_refused(
    sources: dict[str, Path], tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    folder = changed(sources[name], tmp_path / "Model", **values)
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), ConversionOptions(pre=TINY_PRE))


@pytest.mark.parametrize(("name", "theta"), [("smollm3", 2e6), ("olmo2", 5e5), ("ministral3", 1e6)])
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
        ({"layer_types": ["full_attention", *["sliding_attention"] * 6]}, "takes every 6. layer for one of"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_a_warning(
    sources: dict[str, Path], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    options = ConversionOptions(pre=TINY_PRE)
    plans = [
        make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), options)
        for folder in (changed(sources["gemma3"], tmp_path / "Model", **values), sources["gemma3"])
    ]
    warned = [any(note.startswith("WARNING") and message in note for note in plan.notes) for plan in plans]
    assert warned == [True, False]


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
