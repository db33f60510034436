"""Checkpoints whose config.json and weights disagree: a head, a bias, a quantization or rows that are not there.

The references: llama.cpp's converter for GGUF, transformers for FP8 folders.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.convert.source.weights import SINGLE_FILE
from streamquant.model.variants.checkpoint import CheckpointVariant
from streamquant.model.variants.compressed import CompressedVariant
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError
from tests import gguf_peer, synthetic
from tests.attacks.harness import edit_json, pack, run, unpack
from tests.conftest import TINY_PRE, write_small_tokenizer
from tests.gguf_peer import read_gguf
from tests.hub import Hub
from tests.hub_source import REPO, files
from tests.tokenizer_folders import sentencepiece_model

LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS = synthetic.ARCHITECTURES
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write(folder: Path, **options: Any) -> Path:
    tokenizer = write_small_tokenizer(folder.parent / "tokenizer", add_bos_token=True)
    return synthetic.write_checkpoint(folder, tokenizer=tokenizer, size=WIDE, **options)


def without(folder: Path, *endings: str) -> Path:
    """Take tensors out of model.safetensors."""
    header, data = unpack(folder / SINGLE_FILE)
    kept, content = {}, b""
    for name, entry in header.items():
        if name != "__metadata__" and not name.endswith(endings):
            start, stop = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [len(content), len(content) + stop - start]}
            content += data[start:stop]
    assert len(kept) < len(header) - 1
    (folder / SINGLE_FILE).write_bytes(pack({"__metadata__": {"format": "pt"}, **kept}, content))
    return folder


def convert(source: object, out: Path, *to: str) -> Path:
    variants = [word for variant in to for word in ("--to", variant)]
    run("convert", source, *variants, "--pre", TINY_PRE, "--out", out).done()
    return out


def fp8_of(out: Path) -> Path:
    (folder,) = out.glob("*-FP8-dynamic")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def notes_of(folder: Path) -> str:
    return "\n".join(make_plan(open_checkpoint(folder), parse_variants(["fp8-dynamic"])).notes)


def logits(folder: Path, **options: Any) -> tuple[Any, Any]:
    """transformers' logits of a folder in float32, and what it says of loading."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    with torch.no_grad():
        return model(torch.tensor([[5, 17, 80, 33, 2]])).logits.float(), info


# A head that is not there


@gguf_peer.requires_converter
@pytest.mark.parametrize("architecture", [LLAMA, QWEN3])
def test_without_a_head_the_embeddings_are_the_head(architecture: str, tmp_path: Path) -> None:
    source = without(write(tmp_path / "Tiny", architecture=architecture), "lm_head.weight")
    out = convert(source, tmp_path / "out", "gguf:BF16", "fp8-dynamic")
    (ours,) = out.rglob("*.gguf")
    theirs = gguf_peer.synthetic_pre(source, "bf16", tmp_path / "theirs.gguf", pre=TINY_PRE)
    assert ours.read_bytes() == theirs.read_bytes()
    assert "the embeddings are the head" in notes_of(source)
    fp8 = fp8_of(out)
    assert config_of(fp8)["tie_word_embeddings"] is True
    found, info = logits(fp8)
    assert not info["missing_keys"]
    shutil.copytree(source, tmp_path / "tied")
    edit_json(tmp_path / "tied" / "config.json", tie_word_embeddings=True)
    expected, _ = logits(tmp_path / "tied")
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert open_variant(source).head_name == "model.embed_tokens.weight"


def test_a_missing_layer_is_still_missed(tmp_path: Path) -> None:
    source = without(write(tmp_path / "Tiny"), "lm_head.weight", "layers.1.mlp.up_proj.weight")
    run("plan", source, "--to", "fp8-dynamic").refused(1, "lacks tensors", "layers.1.mlp.up_proj.weight", "1 missing")


# A quantization that is not there

LEFT: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
}


@pytest.mark.parametrize("method", LEFT)
def test_a_quantization_config_that_was_left(method: str, tmp_path: Path) -> None:
    plain = convert(write(tmp_path / "Tiny"), tmp_path / "plain", "gguf:BF16", "fp8-dynamic")
    source = write(tmp_path / "left" / "Tiny", quantization_config=LEFT[method], compression_config=LEFT[method])
    out = convert(source, tmp_path / "out", "gguf:BF16", "fp8-dynamic")
    assert next(out.rglob("*.gguf")).read_bytes() == next(plain.rglob("*.gguf")).read_bytes()
    assert config_of(fp8_of(out)) == config_of(fp8_of(plain))
    assert "no tensor is quantized" in notes_of(source)
    # as a variant, a folder that says it is of compressed-tensors is taken at its word: its runtimes do that
    expected = CheckpointVariant if method != "compressed-tensors" else CompressedVariant
    assert isinstance(open_variant(source), expected)


def test_a_quantization_config_that_is_meant(tmp_path: Path) -> None:
    source = write(tmp_path / "Tiny", quantization_config=LEFT["gptq"])
    header, data = unpack(source / SINGLE_FILE)
    header["model.layers.0.self_attn.q_proj.scales"] = header.pop("model.layers.0.self_attn.q_proj.weight")
    (source / SINGLE_FILE).write_bytes(pack(header, data))
    run("plan", source, "--to", "fp8-dynamic").refused(1, "the checkpoint is already quantized", "gptq")


def test_both_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    source = without(write(tmp_path / "Tiny", quantization_config=LEFT["bitsandbytes"]), "lm_head.weight")
    hub.add_repo(REPO, files(source))
    out = convert(REPO, tmp_path / "out", "fp8-dynamic")
    config = config_of(fp8_of(out))
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


# Biases that are not there


@gguf_peer.requires_converter
@pytest.mark.parametrize("endings", [("o_proj.bias",), ("_proj.bias",)])
def test_biases_that_no_layer_has_are_zero(endings: tuple[str, ...], tmp_path: Path) -> None:
    source = without(write(tmp_path / "Tiny", attention_bias=True), *endings)
    out = convert(source, tmp_path / "out", "gguf:BF16", "fp8-dynamic")
    (ours,) = out.rglob("*.gguf")
    theirs = gguf_peer.synthetic_pre(source, "bf16", tmp_path / "theirs.gguf", pre=TINY_PRE)
    assert ours.read_bytes() == theirs.read_bytes()
    assert "no layer has self_attn.o_proj.bias" in notes_of(source)
    found, _ = logits(fp8_of(out))
    expected, _ = logits(source)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_bias_that_some_layers_have_is_missed(tmp_path: Path) -> None:
    source = without(write(tmp_path / "Tiny", attention_bias=True), "layers.1.self_attn.o_proj.bias")
    run("plan", source, "--to", "fp8-dynamic").refused(1, "lacks tensors", "layers.1.self_attn.o_proj.bias")
    with pytest.raises(StreamquantError, match=r"layers\.1\.self_attn\.o_proj\.bias"):
        open_variant(source)


def test_a_bias_that_some_layers_of_a_variant_have_is_missed(tmp_path: Path) -> None:
    """Else it would be taken for zero."""
    fp8 = fp8_of(convert(write(tmp_path / "Tiny", attention_bias=True), tmp_path / "out", "fp8-dynamic"))
    without(fp8, "layers.1.self_attn.o_proj.bias")
    with pytest.raises(StreamquantError, match=r"layers\.1\.self_attn\.o_proj\.bias"):
        open_variant(fp8)


def test_a_bias_that_a_class_always_has_is_missed(tmp_path: Path) -> None:
    source = without(write(tmp_path / "Tiny", architecture=QWEN2), "q_proj.bias")
    with pytest.raises(StreamquantError, match="lacks tensors"):
        make_plan(open_checkpoint(source), parse_variants(["fp8-dynamic"]))


# Rows that are not there


@gguf_peer.requires_converter
def test_added_tokens_beyond_the_rows_of_the_embedding(tmp_path: Path) -> None:
    """tokenizer.model with two added tokens that the model was not resized for: left out, as by the converter."""
    case = sentencepiece_model(tmp_path / "tokenizer")
    source = synthetic.write_checkpoint(tmp_path / "Tiny", size=WIDE, vocab_size=350, bos_token_id=1, eos_token_id=2)
    shutil.copy(case.folder / "tokenizer.model", source)
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": 350, "<|im_end|>": 351}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "LlamaTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    told = " ".join(run("plan", source, "--to", "gguf:BF16").done().out.split())
    assert "2 added tokens are left out: the embedding ends at row 349: 350 '<pad>', 351 '<|im_end|>'" in told
    run("convert", source, "--to", "gguf:BF16", "--out", tmp_path / "out").done()
    (ours,) = (tmp_path / "out").rglob("*.gguf")
    theirs = gguf_peer.convert(source, "bf16", tmp_path / "theirs.gguf")
    assert read_gguf(ours) == read_gguf(theirs)
