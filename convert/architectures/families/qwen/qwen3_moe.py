"""Qwen3MoeForCausalLM: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder. Qwen 3 with experts in every layer.

Defaults: Qwen3MoeConfig of transformers, which has no head_dim: see qwen2.py. The converter (Qwen2MoeModel in
conversion/qwen.py) stacks the experts of a layer when it has read the last of them: down, gate, up. llama.cpp
normalises the weights of the chosen experts in arch "qwen3moe" whatever norm_topk_prob says, and has no dense layers.
"""

import gguf

from streamquant.convert.architectures.families.qwen.qwen3 import ATTENTION
from streamquant.convert.architectures.family import (
    Experts,
    Family,
    LlamaCpp,
    VocabularyRules,
    gated_experts,
    norm,
    router,
)
from streamquant.convert.architectures.gguf_keys import u32

QWEN3_MOE = Family(
    hf_architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    layer=(
        *ATTENTION,
        router("mlp.gate"),
        *gated_experts(),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
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
    unquantized=("re:.*mlp.gate$",),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.QWEN3MOE,
        vocabulary=VocabularyRules(sentencepiece=True),
        keys=(u32(gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),),
        unread=("attention_bias",),
        assumed={"norm_topk_prob": True},
    ),
)
