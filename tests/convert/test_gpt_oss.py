"""GPT-OSS: experts in one tensor by columns and by turns, or in MXFP4; attention sinks, windows, biases everywhere.

Checkpoints are made by transformers' own class. Whole files are compared with llama.cpp's newest converter and with
llama-quantize, logits with transformers' and llama.cpp's.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from streamquant.calibrate.importance import InputSums
from streamquant.convert.architectures import describe
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.overrides import Overrides
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.open import open_original, open_variant
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.readback.verify import verify
from tests.conftest import TINY_PRE, Shelf
from tests.family_checks import (
    LARGEST_DIVERGENCE,
    OPTIONS,
    OUTTYPES,
    add_tokenizer,
    check_equals_llama_quantize,
    check_importance,
    check_verifies,
    divergence,
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
from tests.oracle import ggml_encode
from tests.peers import requires_llama_cpp
from tests.quantized_sources import DTYPES, write
from tests.shapes import seed_tokenizer

pytestmark = [pytest.mark.xdist_group("gpt_oss"), pytest.mark.timeout(600)]

YARN = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0},
    **{"beta_slow": 1.0, "truncate": False, "rope_theta": 150000.0},
}
COMMON = {
    **{"model_type": "gpt_oss", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 5},
    **{"num_experts_per_tok": 2, "sliding_window": 8, "max_position_embeddings": 256, "rope_parameters": YARN},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
}
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "mxfp4": {"is_mxfp4": True},
    "bf16-tied": {
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    },
    "mxfp4-wide": {"is_mxfp4": True, "num_local_experts": 3, "intermediate_size": 32, "num_hidden_layers": 2},
}
FLOATS = [case for case in CASES if "is_mxfp4" not in CASES[case]]
MXFP4 = [case for case in CASES if "is_mxfp4" in CASES[case]]
DTYPES[torch.uint8] = "U8"


def write_model(folder: Path, settings: dict[str, Any]) -> Path:
    """A checkpoint with random weights; is_mxfp4: its experts are random codes and scales."""
    given = {**COMMON, **settings}
    is_mxfp4 = given.pop("is_mxfp4", False)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).float()
    randomize(model.parameters())
    model.to(torch.bfloat16).save_pretrained(folder)
    generator = torch.Generator().manual_seed(2)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if is_mxfp4:
        for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
            count, columns, rows = weights.pop(name).shape
            shape = (count, rows, columns // 32, 16)
            weights[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            weights[f"{name}_scales"] = torch.randint(118, 124, shape[:3], dtype=torch.uint8, generator=generator)
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    write(folder, weights)
    (folder / "config.json").write_text(json.dumps(config))
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> Path:
    return make_sources(shelf, "gpt_oss", CASES, write_model)


@pytest.fixture(scope="module")
def converted(sources: Path, shelf: Shelf) -> Path:
    return make_variants(shelf, "gpt_oss", [sources / case for case in CASES], ["gguf:F32,BF16,Q8_0,Q4_0"])


@pytest.fixture(scope="module")
def references(sources: Path, shelf: Shelf) -> Path:
    return make_references(shelf, "gpt_oss", [sources / case for case in CASES])


@requires_newest_converter
@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_converter(converted: Path, references: Path, case: str, outtype: OutType) -> None:
    ours, reference = gguf_of(converted, case, outtype.upper()), references / f"{case}-{outtype}.gguf"
    assert differences(ours, reference) == []


LARGER = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}


@pytest.mark.long
@pytest.mark.parametrize("is_mxfp4", [False, True])
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path, is_mxfp4: bool) -> None:
    """Of the converter's file in BF16, which keeps the experts of a source in MXFP4."""
    source = write_model(tmp_path / "Model", {**LARGER, "is_mxfp4": is_mxfp4})
    check_equals_llama_quantize(source, tmp_path, ["--allow-requantize"])


@pytest.mark.parametrize("case", CASES)
def test_streamed_logits_are_transformers(sources: Path, case: str) -> None:
    """transformers decodes MXFP4 itself where it has no kernels for it."""
    ours = all_logits(open_variant(sources / case), some_tokens(), Setting())
    assert is_close(ours, resident_logits(sources / case, some_tokens()))


@pytest.mark.parametrize("case", ["bf16", "mxfp4"])
def test_experts_read_one_at_a_time_give_the_same_bits(sources: Path, case: str) -> None:
    variant = open_variant(sources / case)
    assert torch.equal(
        all_logits(variant, some_tokens(), Setting(layer_limit=1)), all_logits(variant, some_tokens(), Setting())
    )


@pytest.mark.parametrize("case", CASES)
def test_what_was_made_computes_what_the_original_does(sources: Path, converted: Path, case: str) -> None:
    """But for the bounds of yarn, which llama.cpp rounds: with those of the file both are the same."""
    for kind in ("F32", "BF16"):
        variant = open_variant(gguf_of(converted, case, kind))
        assert variant.problems == []
        original = open_variant(sources / case)
        original.rotary = variant.rotary  # type: ignore[method-assign]
        expected = all_logits(original, some_tokens(), Setting())
        found = all_logits(variant, some_tokens(), Setting(weights_only=True))
        assert is_close(found, expected), kind


@requires_llama_cpp
@pytest.mark.parametrize("case", ["bf16", "mxfp4"])
def test_llama_cpp_computes_the_same(converted: Path, case: str) -> None:
    """As our pass over the same file does: llama.cpp rounds the bounds of yarn. Prompts are longer than the window."""
    file = gguf_of(converted, case, "F32")
    assert divergence(file, file) < LARGEST_DIVERGENCE


@pytest.mark.parametrize("case", CASES)
def test_what_was_made_verifies_against_the_source(sources: Path, converted: Path, case: str) -> None:
    check_verifies(converted / f"{case}-GGUF", sources / case, 15)


@pytest.mark.parametrize("case", ["bf16", "mxfp4"])
def test_importance_has_an_entry_for_every_matrix_of_the_layers(sources: Path, converted: Path, case: str) -> None:
    check_importance(
        sources / case,
        gguf_of(converted, case, "F32"),
        (".ffn_gate_exps.bias", ".ffn_up_exps.bias", ".ffn_down_exps.bias"),
    )


@pytest.mark.parametrize("case", MXFP4)
def test_mxfp4_is_decoded_for_other_types(sources: Path, converted: Path, case: str) -> None:
    """By transformers' own decoder, and then ggml's encoder."""
    stored = load_file(sources / case / "model.safetensors")
    _, made = read_gguf(gguf_of(converted, case, "Q4_0"))
    for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        path = f"model.layers.1.mlp.experts.{name}"
        blocks, scales = stored[f"{path}_blocks"], stored[f"{path}_scales"]
        whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)  # rows by turns
        for offset, part in enumerate(parts):
            rows = whole[:, offset :: len(parts)].contiguous().numpy()
            kind, shape, raw = made[f"blk.1.ffn_{part}_exps.weight"]
            assert (kind.name, shape) == ("Q4_0", rows.shape)
            assert raw == ggml_encode(rows.reshape(-1, shape[-1]), "Q4_0").tobytes()


def test_a_published_folder_is_a_variant_too(sources: Path) -> None:
    """OpenAI's own against the BF16 model that others make of it."""
    variant, original = open_variant(sources / "mxfp4"), open_original(sources / "mxfp4")
    assert (variant.kind, variant.activations(), variant.problems) == ("quantized", None, [])
    assert variant.tensors.keys() == original.tensors.keys()
    for name in variant.tensors:
        assert torch.equal(variant.read(name, torch.float32), original.read(name, torch.float32)), name


def test_mxfp4_that_stays_is_said(sources: Path) -> None:
    plan = make_plan(open_checkpoint(sources / "mxfp4"), parse_variants(["gguf:BF16,Q4_K_M,MXFP4_MOE"]), OPTIONS)
    assert any(note.startswith("made from a quantized source (mxfp4: MXFP4, a scale") for note in plan.notes)
    assert any("gguf:BF16: the experts stay in MXFP4" in note for note in plan.notes)
    for variant, kinds in zip(plan.variants, ({"MXFP4"}, {"Q5_0", "Q8_0"}, {"MXFP4"}), strict=True):
        experts = [t for t in variant.tensors if "_exps.weight" in t.name]
        assert {tensor.format for tensor in experts} <= kinds


def test_a_type_by_pattern_counts_before_the_source(sources: Path) -> None:
    options = ConversionOptions(pre=TINY_PRE, overrides=Overrides(tensor_types=(("ffn_up_exps", "Q5_0"),)))
    plan = make_plan(open_checkpoint(sources / "mxfp4"), parse_variants(["gguf:MXFP4_MOE"]), options)
    formats = {tensor.name: tensor.format for tensor in plan.variants[0].tensors}
    assert formats["blk.0.ffn_up_exps.weight"] == "Q5_0"
    assert formats["blk.0.ffn_gate_exps.weight"] == "MXFP4"


def test_each_expert_is_given_its_own_importance(sources: Path) -> None:
    rules = describe(open_checkpoint(sources / "bf16").config).rules
    name = "model.layers.0.mlp.experts.{}.gate_proj"
    sums = InputSums({name.format(e): rules[f"{name.format(e)}.weight"] for e in range(5)})
    for expert in range(5):
        sums.observe(name.format(expert), torch.full((expert + 1, 64), 2.0))
    found = sums.sums["blk.0.ffn_gate_exps.weight"]
    assert np.array_equal(found[:, 0], [4.0 * (expert + 1) for expert in range(5)])


EXPERTS = "model.layers.1.mlp.experts"
Change = Callable[[dict[str, torch.Tensor]], object]


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(f"{EXPERTS}.{name}")


def changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{EXPERTS}.{name}": value(tensors[f"{EXPERTS}.{name}"]).contiguous()})


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("mxfp4", without("down_proj_scales"), r"without their scales[\s\S]*experts\.down_proj_scales"),
        ("mxfp4", without("gate_up_proj_blocks"), r"scales without their weights[\s\S]*gate_up_proj_blocks"),
        ("mxfp4", changed("down_proj_scales", lambda t: t[:, 1:]), r"scales of the wrong shape[\s\S]*\[5, 64, 3\]"),
        ("mxfp4", changed("down_proj_scales", lambda t: t.int()), r"scales of the wrong shape[\s\S]*I32"),
        ("mxfp4", changed("gate_up_proj_blocks", lambda t: t[:, 1:]), "a shape that does not divide"),
        ("mxfp4", changed("gate_up_proj_blocks", lambda t: t.flatten(2)), "a shape that does not divide"),
        ("mxfp4", changed("gate_up_proj_bias", lambda t: t[:4]), r"lacks tensors[\s\S]*experts\.4\.gate_proj\.bias"),
        ("bf16", changed("gate_up_proj", lambda t: t[:4]), r"lacks tensors[\s\S]*experts\.4\.gate_proj\.weight"),
        ("bf16", changed("gate_up_proj", lambda t: t[..., 1:]), "a shape that does not divide"),
        ("bf16", changed("gate_up_proj", lambda t: t.mT), "shape does not fit config.json"),
        ("bf16", changed("down_proj", lambda t: t.mT), "shape does not fit config.json"),
        ("bf16", changed("down_proj_bias", lambda t: t[0]), "a shape that does not divide"),
        ("bf16", without("down_proj_bias"), r"lacks tensors[\s\S]*down_proj\.bias"),
        (
            "mxfp4",
            lambda t: t.update({f"{EXPERTS}.down_proj": torch.zeros(5, 96, 64).bfloat16()}),
            "two tensors are the same tensor",
        ),
        (
            "bf16",
            lambda t: t.update({f"{EXPERTS}.3.up_proj.weight": torch.zeros(96, 64).bfloat16()}),
            "two tensors are the same tensor",
        ),
        ("bf16", lambda t: t.pop("model.layers.0.self_attn.sinks"), r"lacks tensors[\s\S]*sinks"),
    ],
)
def test_experts_that_do_not_fit(sources: Path, tmp_path: Path, case: str, change: Change, message: str) -> None:
    folder = shutil.copytree(sources / case, tmp_path / "Model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    write(folder, tensors)
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), OPTIONS)


def test_a_value_that_is_no_number_is_found_at_its_place(sources: Path, tmp_path: Path) -> None:
    """Of an up projection: gate, which lies beside it, is fine."""
    folder = shutil.copytree(sources / "bf16", tmp_path / "Model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{EXPERTS}.gate_up_proj"][2, 40, 2 * 33 + 1] = float("nan")
    write(folder, tensors)
    with pytest.raises(StreamquantError, match=r"not a number[\s\S]*experts\.2\.up_proj\.weight', row 33, column 40"):
        convert(make_plan(open_checkpoint(folder), parse_variants(["gguf:Q8_0"]), OPTIONS), tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer_types", ["full_attention"] * 4, "a list of 4 layers in a model of 3"),
        ("layer_types", ["chunked_attention"] * 3, "unknown type"),
        ("swiglu_limit", 5.0, "layers of another kind"),
        ("attention_bias", False, "layers of another kind"),
        ("sliding_window", None, "null where"),
        ("num_local_experts", 1, "out of range"),
    ],
)
def test_configs_that_are_refused(sources: Path, key: str, value: object, message: str) -> None:
    config = json.loads((sources / "bf16" / "config.json").read_text())
    with pytest.raises(StreamquantError, match=message):
        describe({**config, key: value})


def test_what_llama_cpp_does_otherwise_is_said(sources: Path) -> None:
    config = json.loads((sources / "bf16" / "config.json").read_text())
    assert any(note.startswith("yarn without truncation") for note in describe(config).notes)
    assert not any(note.startswith("WARNING") for note in describe(config).notes)
    types = {**config, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    (note,) = (note for note in describe(types).notes if note.startswith("WARNING"))
    assert "llama.cpp takes every 2. layer for one of 'full_attention'" in note
    assert "in layer 0" in note


def test_rope_that_config_json_leaves_to_the_class(sources: Path) -> None:
    """GptOssConfig has yarn of its own, as the converter reads it."""
    config = json.loads((sources / "bf16" / "config.json").read_text())
    del config["rope_parameters"]
    metadata = describe(config).metadata
    theirs = AutoConfig.for_model("gpt_oss").rope_parameters
    assert metadata["gpt-oss.rope.freq_base"].value == theirs["rope_theta"] == 150000.0
    assert metadata["gpt-oss.rope.scaling.factor"].value == theirs["factor"]
    assert metadata["gpt-oss.rope.scaling.original_context_length"].value == theirs["original_max_position_embeddings"]


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_what_transformers_makes_of_it(sources: Path, tmp_path: Path, case: str) -> None:
    """Of MXFP4 by its own decoder; of BF16 a copy. It loads, verifies, and is a source with the same GGUF but MXFP4."""
    source = open_checkpoint(sources / case)
    plan = make_plan(source, parse_variants(["bf16"]), OPTIONS)
    convert(plan, tmp_path, RunOptions(jobs=2))
    folder = tmp_path / f"{case}-BF16"
    made, stored = load_file(folder / "model.safetensors"), load_file(sources / case / "model.safetensors")
    for name in [name for name in stored if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        stored[base] = convert_moe_packed_tensors(stored.pop(name), stored.pop(f"{base}_scales"))
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[name], stored[name]) for name in stored)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (result,) = verify(tmp_path, source)
    assert result.problems == []
    assert any("this is a copy" in note for note in plan.notes) is (case in FLOATS)
    ours = all_logits(open_variant(folder), some_tokens(), Setting())
    assert torch.equal(ours, all_logits(open_variant(sources / case), some_tokens(), Setting()))


@pytest.mark.parametrize("kind", ["fp8-dynamic", "fp8-block"])
def test_fp8_is_refused(sources: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="cannot be made of this family yet"):
        make_plan(open_checkpoint(sources / "mxfp4"), parse_variants([kind]), OPTIONS)


# --- gpt-oss-120b ---------------------------------------------------------------------------------------------------

FULL = {
    **{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64},
    **{"num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4},
    **{"vocab_size": 201088, "sliding_window": 128, "max_position_embeddings": 131072, "swiglu_limit": 7.0},
    **{"hidden_act": "silu", "rms_norm_eps": 1e-05, "attention_bias": True, "tie_word_embeddings": False},
    **{"rope_theta": 150000, "initial_context_length": 4096, "experts_per_token": 4, "attention_dropout": 0.0},
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        **{"beta_fast": 32.0, "beta_slow": 1.0},
    },
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"},
    **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
}


def full_tensors(*, is_mxfp4: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of gpt-oss-120b's tensors, as published or in BF16."""
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", "BF16", (201088, 2880)
    yield "model.norm.weight", "BF16", (2880,)
    for layer in range(36):
        plain: dict[str, tuple[int, ...]] = {"self_attn.sinks": (64,), "mlp.router.bias": (128,)}
        plain |= {"mlp.router.weight": (128, 2880), "mlp.experts.down_proj_bias": (128, 2880)}
        plain |= {"input_layernorm.weight": (2880,), "post_attention_layernorm.weight": (2880,)}
        plain["mlp.experts.gate_up_proj_bias"] = (128, 5760)
        for part, (rows, columns) in {"q": (4096, 2880), "k": (512, 2880), "v": (512, 2880), "o": (2880, 4096)}.items():
            plain |= {f"self_attn.{part}_proj.weight": (rows, columns), f"self_attn.{part}_proj.bias": (rows,)}
        for name, rows in (("gate_up_proj", 5760), ("down_proj", 2880)):
            if not is_mxfp4:
                plain[f"mlp.experts.{name}"] = (128, 2880, rows)
                continue
            yield f"model.layers.{layer}.mlp.experts.{name}_blocks", "U8", (128, rows, 90, 16)
            yield f"model.layers.{layer}.mlp.experts.{name}_scales", "U8", (128, rows, 90)
        for name, shape in plain.items():
            yield f"model.layers.{layer}.{name}", "BF16", shape


@pytest.mark.parametrize("is_mxfp4", [True, False])
def test_the_full_size_by_header(tmp_path: Path, is_mxfp4: bool) -> None:
    """116.83 billion weights, as published; a plan in seconds, and bounded memory."""
    header: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in full_tensors(is_mxfp4=is_mxfp4):
        size = math.prod(shape) * (1 if dtype == "U8" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    config = dict(FULL)
    if not is_mxfp4:
        del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(seed_tokenizer(201088).to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    started = time.process_time()
    source = open_checkpoint(tmp_path)
    plan = make_plan(source, parse_variants(["gguf:BF16,Q8_0,Q4_K_M,MXFP4_MOE"]), ConversionOptions())
    assert len(plan.chunks) >= 36 * 128 * 3
    assert time.process_time() - started < 15
    assert source.parameter_count / 1e9 == pytest.approx(116.83, abs=0.005)
    assert source.nbytes == at
    assert plan.memory_bytes(16) < 1.2 * 2**30
