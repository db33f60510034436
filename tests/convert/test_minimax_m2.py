"""MiniMax M2: norms on the whole of q and k, heads rotated in part, experts chosen by a bias, FP8 in blocks.

Checkpoints are made by transformers' own class. Whole files are compared with llama.cpp's newest converter and with
llama-quantize, logits with transformers' and llama.cpp's.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from streamquant.convert.architectures import describe
from streamquant.model.forward import Lane, Setting, all_logits, run_layers
from streamquant.model.variants.open import open_original, open_variant
from streamquant.quant.errors import StreamquantError
from tests import quantized_sources as quantized
from tests.conftest import Shelf
from tests.family_checks import (
    LARGEST_DIVERGENCE,
    add_tokenizer,
    check_equals_llama_quantize,
    check_importance,
    check_verifies,
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
from tests.gguf_peer import OutType, differences, requires_newest_converter
from tests.peers import requires_llama_cpp
from tests.tokenizer_folders import edit

pytestmark = [pytest.mark.xdist_group("minimax_m2"), pytest.mark.timeout(600)]

OUTTYPES: tuple[OutType, ...] = ("f32", "q8_0")
COMMON = {
    **{"model_type": "minimax_m2", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"num_local_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 256},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
}
PUBLISHED = {"scoring_func": "sigmoid", "rotary_dim": 16, "use_qk_norm": True, "qk_norm_type": "per_layer"}
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "tied": {"tie_word_embeddings": True, "num_local_experts": 7, "num_experts_per_tok": 3, "num_hidden_layers": 3},
    "fp8": {"is_fp8": True, "hidden_size": 128},
}


def write_model(folder: Path, settings: dict[str, Any]) -> Path:
    """A checkpoint with random weights and a config.json as published, where rotary_dim alone tells what is rotated."""
    given = {**COMMON, **settings}
    is_fp8 = given.pop("is_fp8", False)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).float()
    randomize((*model.parameters(), *(b for name, b in model.named_buffers() if "e_score" in name)))
    model.to(torch.bfloat16).save_pretrained(folder)
    quantized.write(folder, load_file(folder / "model.safetensors"))
    config = {**json.loads((folder / "config.json").read_text()), **PUBLISHED, "rope_theta": 5000000}
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    if is_fp8:
        quantized.quantize(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> Path:
    return make_sources(shelf, "minimax_m2", CASES, write_model)


@pytest.fixture(scope="module")
def converted(sources: Path, shelf: Shelf) -> Path:
    return make_variants(shelf, "minimax_m2", [sources / case for case in CASES], ["gguf:F32,Q8_0", "fp8-dynamic"])


@pytest.fixture(scope="module")
def references(sources: Path, shelf: Shelf) -> Path:
    return make_references(shelf, "minimax_m2", [sources / case for case in CASES], outtypes=OUTTYPES)


@requires_newest_converter
@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_converter(converted: Path, references: Path, case: str, outtype: OutType) -> None:
    ours, reference = gguf_of(converted, case, outtype.upper()), references / f"{case}-{outtype}.gguf"
    assert differences(ours, reference) == []


@pytest.mark.long
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path) -> None:
    source = write_model(tmp_path / "Model", {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64})
    edit(source / "config.json", lambda config: config.update(rotary_dim=32))
    check_equals_llama_quantize(source, tmp_path)


@pytest.mark.parametrize("case", ["bf16", "tied"])
def test_streamed_logits_are_transformers(sources: Path, case: str) -> None:
    """With the part of the heads that rotary_dim says, which the class does not read by itself."""
    ours = all_logits(open_variant(sources / case), some_tokens(), Setting())
    config = AutoConfig.from_pretrained(sources / case)
    config.rope_parameters["partial_rotary_factor"] = 0.5
    assert is_close(ours, resident_logits(sources / case, some_tokens(), config=config))
    assert torch.equal(ours, all_logits(open_variant(sources / case), some_tokens(), Setting(layer_limit=1)))


@pytest.mark.parametrize("case", CASES)
def test_what_was_made_computes_what_the_original_does(sources: Path, converted: Path, case: str) -> None:
    original = all_logits(open_original(sources / case), some_tokens(), Setting())
    assert is_close(gguf_logits(gguf_of(converted, case, "F32")), original)
    assert open_variant(converted / f"{case}-FP8-dynamic").problems == []
    for folder in (f"{case}-GGUF", f"{case}-FP8-dynamic"):
        check_verifies(converted / folder, sources / case)


@requires_llama_cpp
def test_llama_cpp_computes_the_same(sources: Path, converted: Path) -> None:
    assert divergence(sources / "bf16", gguf_of(converted, "bf16", "F32")) < LARGEST_DIVERGENCE


@pytest.mark.parametrize("case", ["bf16", "tied"])
def test_importance_has_an_entry_for_every_matrix_of_the_layers(sources: Path, converted: Path, case: str) -> None:
    check_importance(sources / case, gguf_of(converted, case, "F32"))


def test_the_router_is_watched_although_it_is_given_its_bias_too(sources: Path) -> None:
    seen: set[str] = set()
    run_layers(
        [Lane(open_variant(sources / "bf16"), on_input=lambda name, _x: seen.add(name))], some_tokens(), Setting()
    )
    path = "model.layers.1.block_sparse_moe"
    assert {f"{path}.gate", "model.layers.0.self_attn.o_proj"} <= seen
    assert any(name.startswith(f"{path}.experts.") and name.endswith(".w2") for name in seen)


def test_fp8_leaves_routers_alone(sources: Path, converted: Path) -> None:
    made = converted / "bf16-FP8-dynamic"
    ignore = json.loads((made / "config.json").read_text())["quantization_config"]["ignore"]
    assert "re:.*block_sparse_moe.gate$" in ignore
    weights = load_file(next(made.glob("*.safetensors")))
    assert weights["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.bfloat16
    assert weights["model.layers.0.block_sparse_moe.experts.4.w2.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 64}, "more than the whole of a head"),
        ({"rotary_dim": 7}, "cannot be rotated by halves"),
        ({"rotary_dim": "16"}, "a string where an integer"),
        ({"rotary_dim": 16, "partial_rotary_factor": 1.0}, "another part of a head than"),
        ({"scoring_func": "softmax"}, "layers of another kind"),
        ({"qk_norm_type": "per_head"}, "layers of another kind"),
        ({"shared_intermediate_size": 96}, "layers of another kind"),
    ],
)
def test_configs_that_are_refused(sources: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((sources / "bf16" / "config.json").read_text())
    with pytest.raises(StreamquantError, match=message):
        describe({**config, **change})


def test_how_much_of_a_head_is_rotated(sources: Path) -> None:
    config = json.loads((sources / "bf16" / "config.json").read_text())
    for rotary in (16, 32):
        found = describe({**config, "rotary_dim": rotary}).added_metadata["minimax-m2.rope.dimension_count"]
        assert found.value == rotary
    assert not any("rope settings" in note for note in describe(config).notes)
