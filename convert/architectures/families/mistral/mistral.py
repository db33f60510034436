"""MistralForCausalLM in Hugging Face's layout: Mistral 7B, Nemo, Small 24B.

The converter treats it as Llama (LlamaModel in conversion/llama.py of llama.cpp), GGUF arch "llama" included.
Mistral's own layout (params.json, consolidated.safetensors) has other names and is not read. Defaults: MistralConfig
of transformers.
"""

from streamquant.convert.architectures.families.llama import LLAMA_MODEL
from streamquant.convert.architectures.family import Family, linear, norm

ATTENTION = (
    *linear("self_attn.q_proj", ("query", "hidden"), rope="query"),
    *linear("self_attn.k_proj", ("key_value", "hidden"), rope="key"),
    *linear("self_attn.v_proj", ("key_value", "hidden")),
    *linear("self_attn.o_proj", ("hidden", "query")),
)
"""The attention of a layer, with experts or without."""

MISTRAL = Family(
    hf_architecture="MistralForCausalLM",
    model_type="mistral",
    layer=(
        *ATTENTION,
        *linear("mlp.gate_proj", ("intermediate", "hidden")),
        *linear("mlp.up_proj", ("intermediate", "hidden")),
        *linear("mlp.down_proj", ("hidden", "intermediate")),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
    nullable=frozenset({"head_dim", "sliding_window"}),
    llama_cpp=LLAMA_MODEL,
)
