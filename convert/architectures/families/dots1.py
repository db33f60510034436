"""Dots1ForCausalLM: dots.llm1. Qwen 3's attention; dense layers first, then experts with shared ones beside them.

Rows stay. Defaults: Dots1Config of transformers, which leaves head_dim open (see qwen2.py). The converter (Dots1Model
in conversion/dots1.py of llama.cpp) stacks down, gate, up.
"""

import gguf

from streamquant.convert.architectures.families.qwen.qwen3 import ATTENTION
from streamquant.convert.architectures.family import (
    Experts,
    Family,
    LlamaCpp,
    VocabularyRules,
    feed_forward,
    gated_experts,
    norm,
    router,
    router_bias,
)
from streamquant.convert.architectures.gguf_keys import Field, f32, flag, u32
from streamquant.convert.architectures.layers import DENSE, SPARSE, DenseFirst

LLM = gguf.Keys.LLM

DOTS1 = Family(
    hf_architecture="Dots1ForCausalLM",
    model_type="dots1",
    layer=(
        *ATTENTION,
        *feed_forward("mlp", on=DENSE),
        router("mlp.gate", on=SPARSE),
        router_bias("mlp.gate.e_score_correction_bias", on=SPARSE),
        *gated_experts(on=SPARSE),
        *feed_forward("mlp.shared_experts", "shared_intermediate", on=SPARSE),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    layers=(DenseFirst("first_k_dense_replace"),),
    sizes={"shared_intermediate": (("moe_intermediate_size", "n_shared_experts"),)},
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "sliding_window": None,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
    required={"scoring_func": ("sigmoid",)},
    experts=Experts(
        count=("n_routed_experts", "num_local_experts"),
        used="num_experts_per_tok",
        intermediate="moe_intermediate_size",
    ),
    unquantized=("re:.*mlp.gate$",),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.DOTS1,
        vocabulary=VocabularyRules(),
        keys=(
            u32(LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),
            u32(LLM.LEADING_DENSE_BLOCK_COUNT, Field("first_k_dense_replace")),
            u32(LLM.EXPERT_SHARED_COUNT, Field("n_shared_experts")),
            f32(LLM.EXPERT_WEIGHTS_SCALE, Field("routed_scaling_factor")),
            flag(LLM.EXPERT_WEIGHTS_NORM, Field("norm_topk_prob")),
        ),
        unread=("attention_bias",),
        all_heads=True,
    ),
)
