"""Olmo2ForCausalLM: OLMo 2. Norms behind attention and feed-forward, none before; norms on the whole of q and k.

Rows stay (Olmo2Model in conversion/olmo.py of llama.cpp). Defaults: Olmo2Config of transformers, which has no head_dim
(see qwen2.py).
"""

import gguf

from streamquant.convert.architectures.family import Family, LlamaCpp, feed_forward, linear, norm

OLMO2 = Family(
    hf_architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden"), bias="attention_bias"),
        *linear("self_attn.k_proj", ("key_value", "hidden"), bias="attention_bias"),
        *linear("self_attn.v_proj", ("key_value", "hidden"), bias="attention_bias"),
        *linear("self_attn.o_proj", ("hidden", "query"), bias="attention_bias"),
        norm("self_attn.q_norm", "query"),
        norm("self_attn.k_norm", "key_value"),
        *feed_forward("mlp"),
        norm("post_attention_layernorm"),
        norm("post_feedforward_layernorm"),
    ),
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    default_rope={"rope_type": "default", "rope_theta": 5e5},
    llama_cpp=LlamaCpp(arch=gguf.MODEL_ARCH.OLMO2, unread=("attention_bias",), own_head=True),
)
