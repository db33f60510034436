"""Qwen2MoeForCausalLM: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B. Qwen 2 with experts in every layer, one of them shared.

The shared expert is weighed by a matrix of one row. Defaults: Qwen2MoeConfig of transformers, which has no head_dim:
see qwen2.py. The converter (Qwen2MoeModel in conversion/qwen.py of llama.cpp) stacks down, gate, up. llama.cpp does not
normalise the weights of the chosen experts in arch "qwen2moe", whatever norm_topk_prob says.
"""

import gguf

from streamquant.convert.architectures.family import (
    Experts,
    Family,
    LlamaCpp,
    VocabularyRules,
    feed_forward,
    gated_experts,
    linear,
    norm,
    router,
)
from streamquant.convert.architectures.gguf_keys import Field, u32

QWEN2_MOE = Family(
    hf_architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden"), bias="qkv_bias"),
        *linear("self_attn.k_proj", ("key_value", "hidden"), bias="qkv_bias"),
        *linear("self_attn.v_proj", ("key_value", "hidden"), bias="qkv_bias"),
        *linear("self_attn.o_proj", ("hidden", "query")),
        router("mlp.gate"),
        *gated_experts(),
        *feed_forward("mlp.shared_expert", "shared_intermediate"),
        router("mlp.shared_expert_gate", "one"),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    sizes={"shared_intermediate": (("shared_expert_intermediate_size",),)},
    defaults={
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim", "sliding_window", "mlp_only_layers"}),
    required={"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])},
    experts=Experts(
        count=("num_experts", "num_local_experts"),
        used="num_experts_per_tok",
        intermediate="moe_intermediate_size",
    ),
    unquantized=("re:.*mlp.gate$", "re:.*shared_expert_gate$"),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.QWEN2MOE,
        vocabulary=VocabularyRules(),
        keys=(
            u32(gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),
            u32(gguf.Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, Field("shared_expert_intermediate_size")),
        ),
        assumed={"norm_topk_prob": False},
    ),
)
