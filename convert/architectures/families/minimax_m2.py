"""MiniMaxM2ForCausalLM: MiniMax M2, M2.5 and M2.7. Norms on the whole of q and k, experts in every layer. Rows stay.

The scores of experts are sigmoids, and a bias chooses among them. Part of each head is rotated, rotary_dim of it, which
transformers' MiniMaxM2Config does not read: see text_config.py. Experts are stacked w1, w2, w3 (MiniMaxM2Model in
conversion/minimax.py of llama.cpp). Defaults: MiniMaxM2Config; the names that it does not have are those of published
config.json files. Published weights are FP8 in blocks.
"""

import gguf

from streamquant.convert.architectures.families.mistral.mixtral import EXPERT_ROWS, EXPERTS
from streamquant.convert.architectures.family import (
    Family,
    LlamaCpp,
    linear,
    norm,
    router,
    router_bias,
)
from streamquant.convert.architectures.gguf_keys import u32

MINIMAX_M2 = Family(
    hf_architecture="MiniMaxM2ForCausalLM",
    model_type="minimax_m2",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden")),
        *linear("self_attn.k_proj", ("key_value", "hidden")),
        *linear("self_attn.v_proj", ("key_value", "hidden")),
        *linear("self_attn.o_proj", ("hidden", "query")),
        norm("self_attn.q_norm", "query"),
        norm("self_attn.k_norm", "key_value"),
        router("block_sparse_moe.gate"),
        router_bias("block_sparse_moe.e_score_correction_bias"),
        *EXPERT_ROWS,
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "intermediate_size": 1536,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "scoring_func": None,
        "shared_intermediate_size": 0,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim", "scoring_func", "shared_intermediate_size"}),
    required={
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "use_routing_bias": (True,),
        "scoring_func": ("sigmoid", None),
        "shared_intermediate_size": (0, None),
    },
    experts=EXPERTS,
    unquantized=("re:.*block_sparse_moe.gate$",),
    partial_rotary=1.0,
    rotary_key="rotary_dim",
    default_rope={"rope_type": "default", "rope_theta": 5000000.0},
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.MINIMAXM2,
        keys=(
            u32(gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),
            u32(gguf.Keys.Rope.DIMENSION_COUNT, "rotary"),
        ),
    ),
)
