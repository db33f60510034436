"""MiniMax M2: norms on the whole of q and k, heads rotated in part, experts chosen by a bias, FP8 in blocks.

Checkpoints are made by transformers' own class. Whole files are compared with llama.cpp's newest converter and with
llama-quantize, logits with transformers' and llama.cpp's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from streamquant.convert.architectures import describe
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.forward import Lane, Setting, all_logits, run_layers
from streamquant.model.variants.open import open_original, open_variant
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.readback.verify import verify
from tests import llama_cpp
from tests import quantized_sources as quantized
from tests.conftest import TINY_PRE, Shelf, write_small_tokenizer
from tests.convert.test_gguf_parity import differences
from tests.gguf_peer import Job, OutType, convert_many, read_gguf, requires_newest_converter
from tests.tokenizer_folders import edit

pytestmark = [pytest.mark.xdist_group("minimax_m2"), pytest.mark.timeout(600)]

OUTTYPES: tuple[OutType, ...] = ("f32", "q8_0")
OPTIONS = ConversionOptions(pre=TINY_PRE)
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
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *(b for name, b in model.named_buffers() if "e_score" in name)):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim > 1 else 0.3))
    model.to(torch.bfloat16).save_pretrained(folder)
    quantized.write(folder, load_file(folder / "model.safetensors"))
    config = {**json.loads((folder / "config.json").read_text()), **PUBLISHED, "rope_theta": 5000000}
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    if is_fp8:
        quantized.quantize(folder)
    tokenizer = write_small_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    edit(tokenizer / "tokenizer_config.json", lambda config: config.update(add_bos_token=True))
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def sources(shelf: Shelf) -> Path:
    def make(folder: Path) -> None:
        for case, settings in CASES.items():
            write_model(folder / case, settings)

    return shelf.get("minimax_m2-sources", make)


@pytest.fixture(scope="module")
def converted(sources: Path, shelf: Shelf) -> Path:
    variants = parse_variants(["gguf:F32,Q8_0", "fp8-dynamic"])

    def make(folder: Path) -> None:
        for case in CASES:
            convert(make_plan(open_checkpoint(sources / case), variants, OPTIONS), folder, RunOptions(jobs=2))

    return shelf.get("minimax_m2-converted", make)


@pytest.fixture(scope="module")
def references(sources: Path, shelf: Shelf) -> Path:
    def make(folder: Path) -> None:
        convert_many(
            [
                Job(str(sources / case), outtype, str(folder / f"{case}-{outtype}.gguf"), TINY_PRE, newest=True)
                for case in CASES
                for outtype in OUTTYPES
            ]
        )

    return shelf.get("minimax_m2-references", make)


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


@pytest.mark.long
@pytest.mark.usefixtures("llama_quantize")
@pytest.mark.timeout(3600)
def test_equals_llama_quantize(tmp_path: Path) -> None:
    source = write_model(tmp_path / "Model", {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64})
    edit(source / "config.json", lambda config: config.update(rotary_dim=32))
    types = ("Q4_K_M", "Q2_K", "IQ4_XS", "MXFP4_MOE")
    variants = parse_variants([f"gguf:BF16,{','.join(types)}"])
    convert(make_plan(open_checkpoint(source), variants, OPTIONS), tmp_path, RunOptions(jobs=2))
    made = tmp_path / "Model-GGUF"
    for kind in types:
        theirs = llama_cpp.quantize(made / "Model-BF16.gguf", tmp_path / f"{kind}.gguf", kind)
        assert read_gguf(made / f"Model-{kind}.gguf")[1] == read_gguf(theirs)[1]


@pytest.mark.parametrize("case", ["bf16", "tied"])
def test_streamed_logits_are_transformers(sources: Path, case: str) -> None:
    """With the part of the heads that rotary_dim says, which the class does not read by itself."""
    ours = all_logits(open_variant(sources / case), tokens(), Setting())
    config = AutoConfig.from_pretrained(sources / case)
    config.rope_parameters["partial_rotary_factor"] = 0.5
    model = AutoModelForCausalLM.from_pretrained(sources / case, config=config, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens())).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert torch.equal(ours, all_logits(open_variant(sources / case), tokens(), Setting(layer_limit=1)))


@pytest.mark.parametrize("case", CASES)
def test_what_was_made_computes_what_the_original_does(sources: Path, converted: Path, case: str) -> None:
    original = all_logits(open_original(sources / case), tokens(), Setting())
    variant = open_variant(gguf_of(converted, case, "F32"))
    assert variant.problems == []
    found = all_logits(variant, tokens(), Setting(weights_only=True))
    assert (found - original).abs().max() < 1e-4 * original.abs().max()
    assert open_variant(converted / f"{case}-FP8-dynamic").problems == []
    for folder in (f"{case}-GGUF", f"{case}-FP8-dynamic"):
        for result in verify(converted / folder, open_checkpoint(sources / case)):
            assert result.problems == []
            assert result.total.sqnr_db > 25


def test_llama_cpp_computes_the_same(sources: Path, converted: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp (package xllamacpp) is not installed")
    prompts = [[5, 17, 33], [5, 17, 33, 60, 99, 120, 7, 42, 250, 199, 3, 77]]
    engine = EngineProcess(gguf_of(converted, "bf16", "F32"))
    try:
        answers = engine.next_token_logprobs(prompts, 20)
    finally:
        engine.close()
    original = open_variant(sources / "bf16")
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = torch.log_softmax(all_logits(original, np.array([prompt]), Setting())[0, -1].double(), -1)
        assert np.allclose(answer.logprobs, expected[list(answer.ids)], atol=3e-3)


def test_the_router_is_watched_although_it_is_given_its_bias_too(sources: Path) -> None:
    seen: set[str] = set()
    run_layers([Lane(open_variant(sources / "bf16"), on_input=lambda name, _x: seen.add(name))], tokens(), Setting())
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
