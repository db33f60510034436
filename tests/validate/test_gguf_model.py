"""A family's tables read backwards: which family, and which booleans of config.json, a GGUF file stands for."""

from pathlib import Path

import pytest

from streamquant.convert.architectures import ARCHITECTURES
from streamquant.files.gguf_file import GgufTensor
from streamquant.model.variants.gguf_model import Keys, read_config, read_switches

LLAMA = [family for family in ARCHITECTURES.values() if family.gguf_arch == "llama"]


@pytest.mark.parametrize(
    ("architecture", "tensors", "switches"),
    [
        (
            "SeedOssForCausalLM",
            ["blk.3.attn_output.bias"],
            {"attention_bias": False, "attention_out_bias": True, "mlp_bias": False},
        ),
        (
            "SeedOssForCausalLM",
            ["blk.0.attn_k.bias"],
            {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
        ),
        ("LlamaForCausalLM", ["blk.1.attn_output.bias"], {"attention_bias": True, "mlp_bias": False}),
        ("LlamaForCausalLM", ["blk.1.ffn_up.bias"], {"attention_bias": False, "mlp_bias": True}),
        ("LlamaForCausalLM", ["blk.", "blk.bias", "attn_q.bias"], {"attention_bias": False, "mlp_bias": False}),
        ("Qwen2ForCausalLM", ["blk.0.attn_q.bias"], {}),
    ],
)
def test_switches_are_read_from_the_tensors(architecture: str, tensors: list[str], switches: dict[str, bool]) -> None:
    assert read_switches(ARCHITECTURES[architecture], tensors) == switches


@pytest.mark.parametrize(("hidden", "family"), [(96, "LlamaForCausalLM"), (100, "MistralForCausalLM")])
def test_the_first_family_that_can_have_the_sizes(hidden: int, family: str) -> None:
    """transformers refuses a Llama whose hidden size does not divide into its heads; llama.cpp does not."""
    sizes = {"embedding_length": hidden, "attention.head_count": 3, "attention.key_length": 32, "block_count": 1}
    sizes |= {"attention.value_length": 32, "feed_forward_length": 64, "context_length": 128}
    metadata = {f"llama.{name}": value for name, value in sizes.items()}
    keys = Keys(Path("x.gguf"), {**metadata, "llama.attention.layer_norm_rms_epsilon": 1e-5}, "llama")
    embeddings = GgufTensor("token_embd.weight", "F32", (10, hidden), 0, 40 * hidden)
    config = read_config(keys, LLAMA, {"token_embd.weight": embeddings})
    assert config["architectures"] == [family]
    assert ("sliding_window" in config) == (family == "MistralForCausalLM")
