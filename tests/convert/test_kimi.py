"""Kimi K2 and K2.5: DeepSeek V3 under another model type, alone and with the model around it that sees, in INT4 too.

Whole files are compared with llama.cpp's newest converter, logits with those of transformers' DeepSeek V3.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.open import open_original, open_variant
from streamquant.quant.errors import StreamquantError
from tests import llama_cpp, quantized_sources
from tests.conftest import Shelf
from tests.family_checks import (
    FILE_TYPES,
    LARGEST_DIVERGENCE,
    OUTTYPES,
    check_equals_llama_quantize,
    check_importance,
    check_verifies,
    convert_case,
    divergence,
    gguf_logits,
    gguf_of,
    is_close,
    make_sources,
    make_variants,
    randomize,
    resident_logits,
    some_tokens,
)
from tests.gguf_peer import Job, OutType, convert_many, differences, read_gguf, requires_newest_converter
from tests.peers import requires_llama_cpp
from tests.tokenizer_folders import edit, write_tiktoken

pytestmark = [pytest.mark.xdist_group("kimi"), pytest.mark.timeout(600)]

YARN = {
    **{"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"mscale": 1.0, "mscale_all_dim": 1.0},
}
TEXT: Mapping[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16},
    **{"v_head_dim": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "n_shared_experts": 1},
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"max_position_embeddings": 512, "bos_token_id": 268, "eos_token_id": 269, "rope_theta": 50000.0},
    **{"routed_scaling_factor": 2.827, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0, "rope_scaling": YARN},
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "tie_word_embeddings": False},
    **{"hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1, "model_type": "kimi_k2"},
}
"""config.json of Kimi K2, its keys in that spelling, and small."""
VISION: Mapping[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"vt_hidden_size": 32, "vt_intermediate_size": 64, "vt_num_hidden_layers": 1, "vt_num_attention_heads": 2},
    **{"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2, "patch_size": 14, "merge_kernel_size": [2, 2]},
}
"""By the keys of transformers, which takes the published sizes without them, and some of those that are published."""
FILE = "model.safetensors"
CASES: Mapping[str, Mapping[str, Any]] = {
    "k2": TEXT,
    "k2-small": {**TEXT, "n_routed_experts": 5, "first_k_dense_replace": 0, "num_attention_heads": 3}
    | {"num_key_value_heads": 3, "vocab_size": 600, "rope_scaling": {**YARN, "factor": 64.0}, "norm_topk_prob": False},
    "k25": {"text_config": TEXT, "model_type": "kimi_k25", "tie_word_embeddings": False},
    "k25-deepseek": {
        "text_config": {**TEXT, "model_type": "deepseek_v3", "n_routed_experts": 3, "hidden_size": 96},
        **{"model_type": "kimi_k25", "tie_word_embeddings": False},
    },
}
INT4 = ("k2", "k25")
"""Cases that are made in INT4 too, as they are published; the second says so in text_config."""
PACKED: Mapping[str, Any] = {
    **{"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"},
    "ignore": [
        *("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"),
    ],
    "config_groups": {
        "group_0": {
            **{"targets": ["Linear"], "input_activations": None, "output_activations": None},
            "weights": {
                **{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
                **{"dynamic": False, "actorder": None, "observer": "minmax"},
            },
        }
    },
}


def text_of(case: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of the text model."""
    own: Mapping[str, Any] = case.get("text_config", case)
    return own


def tower(hidden: int) -> dict[str, torch.Tensor]:
    """What sees, by its published names."""
    size, wide = VISION["hidden_size"], VISION["intermediate_size"]
    merged = 4 * size
    shapes = {
        **{"mm_projector.pre_norm": (size,), "mm_projector.proj.0": (merged, merged)},
        **{"mm_projector.proj.2": (hidden, merged), "vision_tower.patch_embed.proj": (size, 3, 14, 14)},
        "vision_tower.encoder.final_layernorm": (size,),
    }
    block = {"mlp.fc0": (wide, size), "mlp.fc1": (size, wide), "norm0": (size,), "norm1": (size,), "wo": (size, size)}
    shapes |= {f"vision_tower.encoder.blocks.0.{name}": shape for name, shape in block.items()}
    shapes |= {"vision_tower.encoder.blocks.0.wqkv": (3 * size, size)}
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    weights["vision_tower.patch_embed.pos_emb.weight"] = torch.randn(4, 4, size)
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def write_model(folder: Path, case: Mapping[str, Any]) -> Path:
    """A checkpoint in BF16 with the names and the config.json of published ones."""
    known = AutoConfig.for_model(**{**text_of(case), "model_type": "deepseek_v3"})
    model = AutoModelForCausalLM.from_config(known).float()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    randomize(tensor for name, tensor in named.items() if "rotary" not in name)
    for name in (name for name in named if "norm" in name):
        named[name].data.add_(1)
    model.to(torch.bfloat16).save_pretrained(folder)
    name = "KimiK25ForConditionalGeneration" if "text_config" in case else "DeepseekV3ForCausalLM"
    config = {"architectures": [name], "dtype": "bfloat16", **case}
    if "text_config" in case:
        config["vision_config"], config["projection_hidden_size"] = VISION, VISION["hidden_size"]
        weights = {f"language_model.{name}": tensor for name, tensor in load_file(folder / FILE).items()}
        save_file(weights | tower(known.hidden_size), folder / FILE)
    (folder / "config.json").write_text(json.dumps(config))
    return write_tiktoken(folder)


def quantize(source: Path, folder: Path) -> Path:
    """The checkpoint with its experts in INT4, as K2-Thinking and later are published."""
    shutil.copytree(source, folder)
    is_wrapped = "text_config" in json.loads((folder / "config.json").read_text())
    quantized_sources.quantize(folder, quantized_sources.Packed(), PACKED, chosen=lambda name: ".experts." in name)
    if is_wrapped:
        edit(
            folder / "config.json",
            lambda config: config["text_config"].update(quantization_config=config.pop("quantization_config")),
        )
    return folder


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> Path:
    return make_sources(shelf, "kimi", CASES, write_model)


@pytest.fixture(scope="module")
def quantized(sources: Path, shelf: Shelf) -> Path:
    def make(folder: Path) -> None:
        for case in INT4:
            quantize(sources / case, folder / f"{case}-int4")

    return shelf.get("kimi-quantized", make)


@pytest.fixture(scope="module")
def every_source(sources: Path, quantized: Path) -> list[Path]:
    return [*(sources / case for case in CASES), *(quantized / f"{case}-int4" for case in INT4)]


@pytest.fixture(scope="module")
def converted(every_source: list[Path], shelf: Shelf) -> Path:
    return make_variants(shelf, "kimi", every_source)


@pytest.fixture(scope="module")
def references(every_source: list[Path], shelf: Shelf) -> Path:
    def make(folder: Path) -> None:
        convert_many(
            [
                Job(str(source), outtype, str(folder / f"{source.name}-{outtype}.gguf"), "kimi-k2", newest=True)
                for source in every_source
                for outtype in OUTTYPES
            ]
        )

    return shelf.get("kimi-references", make)


def loader_of(name: str) -> Any:
    """The class of transformers."""
    return AutoModelForImageTextToText if "text_config" in CASES[name] else AutoModelForCausalLM


def loadable(folder: Path, into: Path) -> Path:
    """A checkpoint of K2 alone under the model type that transformers has for it; others as they are."""
    if "text_config" in json.loads((folder / "config.json").read_text()):
        return folder
    shutil.copytree(folder, into)
    edit(into / "config.json", lambda config: config.update(model_type="deepseek_v3"))
    return into


@requires_newest_converter
@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", [*CASES, *(f"{case}-int4" for case in INT4)])
def test_equals_the_reference_converter(converted: Path, references: Path, name: str, outtype: OutType) -> None:
    ours, reference = gguf_of(converted, name, outtype.upper()), references / f"{name}-{outtype}.gguf"
    if name.endswith("-int4"):  # the converter puts what it unpacked last
        assert read_gguf(ours) == read_gguf(reference)
        assert list(read_gguf(ours)[0]) == list(read_gguf(reference)[0])
    else:
        assert differences(ours, reference) == []


@pytest.mark.parametrize("name", CASES)
def test_streamed_logits_are_transformers(sources: Path, tmp_path: Path, name: str) -> None:
    """transformers loads K2 under another model type alone, and the wrapped ones as they are."""
    ours = all_logits(open_variant(sources / name), some_tokens(), Setting())
    assert is_close(ours, resident_logits(loadable(sources / name, tmp_path / "Model"), some_tokens(), loader_of(name)))


@pytest.mark.parametrize("name", [*CASES, *(f"{case}-int4" for case in INT4)])
def test_what_was_made_computes_what_the_original_does(every_source: list[Path], converted: Path, name: str) -> None:
    source = next(path for path in every_source if path.name == name)
    original = all_logits(open_original(source), some_tokens(), Setting())
    assert is_close(gguf_logits(gguf_of(converted, name, "F32")), original)
    assert open_variant(converted / f"{name}-FP8-dynamic").problems == []
    for folder in (f"{name}-GGUF", f"{name}-FP8-dynamic"):
        check_verifies(converted / folder, source)


@requires_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(sources: Path, converted: Path, name: str) -> None:
    assert divergence(sources / name, gguf_of(converted, name, "F32")) < LARGEST_DIVERGENCE


@pytest.mark.parametrize("name", CASES)
def test_fp8_folders_load_in_transformers(sources: Path, converted: Path, tmp_path: Path, name: str) -> None:
    """Every module has its weights; routers, latent projections, the head and what sees are as they were."""
    pytest.importorskip("compressed_tensors")
    folder = loadable(converted / f"{name}-FP8-dynamic", tmp_path / "Model")
    _, info = loader_of(name).from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    before, made = (load_file(path / FILE) for path in (sources / name, folder))
    plain = {tensor for tensor, value in made.items() if value.dtype != torch.float8_e4m3fn}
    kept: tuple[str, ...] = (
        "mlp.gate.weight",
        "q_a_proj.weight",
        "kv_a_proj_with_mqa.weight",
        "lm_head.weight",
        "embed_tokens.weight",
    )
    kept += tuple(tensor for tensor in before if tensor.startswith(("vision_tower.", "mm_projector.")))
    assert all(torch.equal(made[tensor], value) for tensor, value in before.items() if tensor.endswith(kept))
    assert {tensor for tensor in before if tensor.endswith(kept)} <= plain
    experts = {tensor for tensor in before if ".experts." in tensor}
    assert experts
    assert not experts & plain


def test_int4_is_not_said_of_what_was_made(quantized: Path, converted: Path) -> None:
    """Neither at the top of config.json nor in text_config, where the source has it."""
    source = open_checkpoint(quantized / "k25-int4")
    assert source.quantized is not None
    assert source.quantized.tensors == 2 * 3 * 6
    config = json.loads((converted / "k25-int4-FP8-dynamic" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    assert "quantization_config" not in config["text_config"]
    made = load_file(converted / "k25-int4-FP8-dynamic" / FILE)
    assert not any(tensor.endswith(("_packed", "_shape")) for tensor in made)
    assert made["language_model.model.layers.1.mlp.experts.3.down_proj.weight"].dtype == torch.float8_e4m3fn


def test_quantization_that_is_said_twice(quantized: Path, tmp_path: Path) -> None:
    """Tools write what text_config says at the top too."""
    folder = shutil.copytree(quantized / "k25-int4", tmp_path / "Model")
    edit(folder / "config.json", lambda config: config.update(quantization_config=PACKED))
    assert open_checkpoint(folder).config == open_checkpoint(quantized / "k25-int4").config


@pytest.mark.parametrize("name", ["k2", "k25"])
def test_importance_has_an_entry_for_every_matrix_of_the_layers(sources: Path, converted: Path, name: str) -> None:
    without = (".attn_k_b.weight", ".attn_v_b.weight")
    check_importance(sources / name, gguf_of(converted, name, "F32"), without)


@requires_llama_cpp
def test_bounds_of_yarn_that_llama_cpp_does_not_read_are_a_warning(sources: Path, tmp_path: Path) -> None:
    """Kimi K2 of July 2025 has beta_fast 1: llama.cpp computes with 32, and so does what reads the file here."""
    folder = shutil.copytree(sources / "k2", tmp_path / "Model")
    longer = {"beta_fast": 1.0, "original_max_position_embeddings": 512}
    edit(folder / "config.json", lambda config: config["rope_scaling"].update(longer))
    plan = make_plan(open_checkpoint(folder), parse_variants(["gguf:F32"]), ConversionOptions())
    assert any("WARNING: beta_fast = 1: llama.cpp does not read it" in note for note in plan.notes)
    other = make_plan(open_checkpoint(sources / "k2"), parse_variants(["gguf:F32"]), ConversionOptions())
    assert not any(note.startswith("WARNING") for note in other.notes)
    convert(plan, tmp_path, RunOptions(jobs=2))
    made = gguf_of(tmp_path, "Model", "F32")
    assert divergence(folder, made) > 100 * LARGEST_DIVERGENCE
    assert divergence(made, made) < LARGEST_DIVERGENCE
    (problem,) = open_variant(made).problems
    assert problem.where == "key deepseek2.rope.scaling.yarn_beta_fast"


EXPERT = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("case", "weights", "config", "message"),
    [
        ("k2", {f"{EXPERT}.3.up_proj.weight": None}, {}, "lacks tensors"),
        ("k2", {f"{EXPERT}.9.up_proj.weight": (32, 64)}, {}, "does not explain"),
        ("k2", {f"{EXPERT}.2.up_proj.weight": (31, 64)}, {}, "shape does not fit config.json"),
        ("k2", {"model.layers.1.mlp.gate.weight": (7, 64)}, {}, "shape does not fit config.json"),
        ("k2", {}, {"model_type": "kimi_k3"}, "not the model type"),
        ("k2", {}, {"qk_rope_head_dim": None}, "null where"),
        ("k25", {f"language_model.{EXPERT}.3.up_proj.weight": None}, {}, "lacks tensors"),
        ("k25", {"language_model.lm_head.weight": (320, 63)}, {}, "shape does not fit config.json"),
        ("k25", {"audio_tower.weight": (3, 3)}, {}, "does not explain"),
        ("k25", {}, {"text_config": None}, "null where"),
        ("k25", {}, {"text_config": [TEXT]}, "not the config of a text model"),
        ("k25", {}, {"text_config": {**TEXT, "model_type": "kimi_linear"}}, "not the model type"),
        ("k25", {}, {"text_config": {**TEXT, "num_key_value_heads": 1}}, "heads that share keys"),
    ],
)
def test_what_does_not_fit_is_refused(
    sources: Path, tmp_path: Path, case: str, weights: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(sources / case, tmp_path / "Model")
    tensors = load_file(folder / FILE)
    for name, shape in weights.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / FILE)
    edit(folder / "config.json", lambda values: values.update(config))
    with pytest.raises(StreamquantError, match=message):
        make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"]), ConversionOptions())


PACKED_EXPERT = "language_model.model.layers.1.mlp.experts.0.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{PACKED_EXPERT}_scale"), "quantized weights without their scales"),
        (lambda tensors: tensors.pop(f"{PACKED_EXPERT}_packed"), "scales without their weights"),
        (
            lambda tensors: tensors.update({f"{PACKED_EXPERT}_packed": tensors[f"{PACKED_EXPERT}_packed"][:-1]}),
            "scales of the wrong shape",
        ),
    ],
)
def test_int4_that_does_not_fit_is_refused(
    quantized: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    folder = shutil.copytree(quantized / "k25-int4", tmp_path / "Model")
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)
    with pytest.raises(StreamquantError, match=message):
        open_checkpoint(folder)


@pytest.mark.long
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path) -> None:
    """Of the file in BF16; of a source in INT4, whose weights BF16 would round, of that in F32."""
    larger = {"hidden_size": 256, "q_lora_rank": 256, "kv_lora_rank": 256, "moe_intermediate_size": 256}
    plain = write_model(tmp_path / "Plain", {**CASES["k2"], **larger, "intermediate_size": 512})
    check_equals_llama_quantize(plain, tmp_path)
    case = {**CASES["k25"], "text_config": {**TEXT, **larger, "intermediate_size": 512}}
    source = quantize(write_model(tmp_path / "Wrapped", case), tmp_path / "Model")
    convert_case(source, tmp_path, [f"gguf:F32,{','.join(FILE_TYPES)}"])
    for kind in FILE_TYPES:
        theirs = llama_cpp.quantize(gguf_of(tmp_path, "Model", "F32"), tmp_path / f"{kind}.gguf", kind)
        assert read_gguf(gguf_of(tmp_path, "Model", kind))[1] == read_gguf(theirs)[1]
