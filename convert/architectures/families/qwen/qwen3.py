"""Qwen3ForCausalLM: Qwen 3 dense models, Hermes 4 14B. Norms on q and k of each head; rows stay (conversion/qwen.py).

Defaults: Qwen3Config of transformers. Its attention_bias puts a bias on q, k, v and o.
"""

import gguf

from streamquant.convert.architectures.family import Family, LlamaCpp, VocabularyRules, linear, norm

ATTENTION = (
    *linear("self_attn.q_proj", ("query", "hidden"), bias="attention_bias"),
    *linear("self_attn.k_proj", ("key_value", "hidden"), bias="attention_bias"),
    *linear("self_attn.v_proj", ("key_value", "hidden"), bias="attention_bias"),
    *linear("self_attn.o_proj", ("hidden", "query"), bias="attention_bias"),
    norm("self_attn.q_norm", "head_dim"),
    norm("self_attn.k_norm", "head_dim"),
)
"""The attention of a layer, with experts or without."""

QWEN3 = Family(
    hf_architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    layer=(
        *ATTENTION,
        *linear("mlp.gate_proj", ("intermediate", "hidden")),
        *linear("mlp.up_proj", ("intermediate", "hidden")),
        *linear("mlp.down_proj", ("hidden", "intermediate")),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.QWEN3,
        vocabulary=VocabularyRules(sentencepiece=True),
        unread=("attention_bias",),
        pooling=True,
    ),
)
