"""SeedOssForCausalLM: Seed-OSS 36B, Hermes 4.3 36B. heads * head_dim is not hidden_size; rows stay.

The norm before the feed-forward is `post_attention_norm` in this arch, not `ffn_norm` (SeedOssModel in
conversion/olmo.py of llama.cpp adds nothing to the common converter). Defaults: SeedOssConfig of transformers.
"""

import gguf

from streamquant.convert.architectures.family import Family, LlamaCpp, linear, norm

SEED_OSS = Family(
    hf_architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden"), bias="attention_bias"),
        *linear("self_attn.k_proj", ("key_value", "hidden"), bias="attention_bias"),
        *linear("self_attn.v_proj", ("key_value", "hidden"), bias="attention_bias"),
        *linear("self_attn.o_proj", ("hidden", "query"), bias="attention_out_bias"),
        *linear("mlp.gate_proj", ("intermediate", "hidden"), bias="mlp_bias"),
        *linear("mlp.up_proj", ("intermediate", "hidden"), bias="mlp_bias"),
        *linear("mlp.down_proj", ("hidden", "intermediate"), bias="mlp_bias"),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    llama_cpp=LlamaCpp(arch=gguf.MODEL_ARCH.SEED_OSS, unread=("attention_out_bias", "mlp_bias")),
)
