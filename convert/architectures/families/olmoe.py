"""OlmoeForCausalLM: OLMoE 1B-7B. Norms on the whole of q and k, experts in every layer. Rows stay.

Defaults: OlmoeConfig of transformers, which has no head_dim: see qwen2.py. The converter (OlmoeModel in
conversion/olmo.py of llama.cpp) stacks down, gate, up, and writes 1e-5 for every rms_norm_eps. llama.cpp does not
normalise the weights of the chosen experts in arch "olmoe".
"""

import gguf

from streamquant.convert.architectures.family import (
    Experts,
    Family,
    LlamaCpp,
    VocabularyRules,
    gated_experts,
    linear,
    norm,
    router,
)
from streamquant.convert.architectures.gguf_keys import Constant, f32

OLMOE = Family(
    hf_architecture="OlmoeForCausalLM",
    model_type="olmoe",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden")),
        *linear("self_attn.k_proj", ("key_value", "hidden")),
        *linear("self_attn.v_proj", ("key_value", "hidden")),
        *linear("self_attn.o_proj", ("hidden", "query")),
        norm("self_attn.q_norm", "query"),
        norm("self_attn.k_norm", "key_value"),
        router("mlp.gate"),
        *gated_experts(),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
        "intermediate_size": 2048,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim", "clip_qkv"}),
    required={"attention_bias": (False,), "clip_qkv": (None,)},
    experts=Experts(
        count=("num_experts", "num_local_experts"), used="num_experts_per_tok", intermediate="intermediate_size"
    ),
    unquantized=("re:.*mlp.gate$",),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.OLMOE,
        vocabulary=VocabularyRules(),
        keys=(f32(gguf.Keys.Attention.LAYERNORM_RMS_EPS, Constant(1e-5)),),
        assumed={"norm_topk_prob": False, "rms_norm_eps": 1e-5},
        all_heads=True,
        own_head=True,
    ),
)
