"""Glm4MoeForCausalLM: GLM-4.5, 4.6, 4.7 and their Air. Dense layers first, then experts, of which one is shared.

The norm before the feed-forward is `post_attention_norm` in this arch, half of each head is rotated, and the last layer
is one for multi-token prediction. Rows stay (Glm4MoeModel in conversion/glm.py of llama.cpp). Defaults: Glm4MoeConfig
of transformers, which leaves head_dim open (see qwen2.py).
"""

import gguf

from streamquant.convert.architectures.family import (
    NEXTN,
    Experts,
    Family,
    LlamaCpp,
    VocabularyRules,
    feed_forward,
    gated_experts,
    linear,
    norm,
    router,
    router_bias,
)
from streamquant.convert.architectures.gguf_keys import Constant, Field, f32, flag, u32
from streamquant.convert.architectures.layers import DENSE, SPARSE, DenseFirst, MtpLayers

LLM = gguf.Keys.LLM
GLM_VOCABULARY = VocabularyRules(
    special={"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
)
"""What the converter does about the tokenizers of GLM (_set_vocab_glm of conversion/base.py)."""

GLM4_MOE = Family(
    hf_architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden"), bias="attention_bias"),
        *linear("self_attn.k_proj", ("key_value", "hidden"), bias="attention_bias"),
        *linear("self_attn.v_proj", ("key_value", "hidden"), bias="attention_bias"),
        *linear("self_attn.o_proj", ("hidden", "query")),
        norm("self_attn.q_norm", "head_dim", when="use_qk_norm"),
        norm("self_attn.k_norm", "head_dim", when="use_qk_norm"),
        *feed_forward("mlp", on=DENSE),
        router("mlp.gate", on=SPARSE),
        router_bias("mlp.gate.e_score_correction_bias", on=SPARSE),
        *gated_experts(on=SPARSE),
        *feed_forward("mlp.shared_experts", "shared_intermediate", on=SPARSE),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
        *NEXTN,
    ),
    layers=(DenseFirst("first_k_dense_replace"),),
    mtp=MtpLayers(
        "num_nextn_predict_layers",
        frozenset({SPARSE}),
        unquantized=("re:.*eh_proj$", "re:.*shared_head.head$", "re:.*embed_tokens$"),
    ),
    sizes={"shared_intermediate": (("moe_intermediate_size", "n_shared_experts"),)},
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_qk_norm": False,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    experts=Experts(
        count=("n_routed_experts", "num_local_experts"),
        used="num_experts_per_tok",
        intermediate="moe_intermediate_size",
    ),
    unquantized=("re:.*mlp.gate$",),
    partial_rotary=0.5,
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.GLM4_MOE,
        vocabulary=GLM_VOCABULARY,
        keys=(
            u32(gguf.Keys.Rope.DIMENSION_COUNT, "rotary"),
            u32(LLM.EXPERT_COUNT, "experts"),
            u32(LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),
            u32(LLM.EXPERT_SHARED_COUNT, Field("n_shared_experts")),
            u32(LLM.LEADING_DENSE_BLOCK_COUNT, Field("first_k_dense_replace")),
            u32(LLM.EXPERT_GATING_FUNC, Constant(2)),
            f32(LLM.EXPERT_WEIGHTS_SCALE, Field("routed_scaling_factor")),
            flag(LLM.EXPERT_WEIGHTS_NORM, Field("norm_topk_prob")),
            u32(LLM.NEXTN_PREDICT_LAYERS, "mtp_layers"),
        ),
    ),
)
