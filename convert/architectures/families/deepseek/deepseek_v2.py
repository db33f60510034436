"""DeepseekV2ForCausalLM: DeepSeek V2, V2-Lite and V2.5. The latent attention of V3; experts by softmax, without a bias.

Of experts in groups V2 takes the groups with the best one, llama.cpp those with the best two, as V3 does
(build_moe_ffn of src/llama-graph.cpp). Defaults: DeepseekV2Config of transformers, whose class never normalises the
weights of experts; DeepSeek's own code does where norm_topk_prob is true, which no published model has.
"""

from dataclasses import replace

from streamquant.convert.architectures.families.deepseek.deepseek_v3 import DEEPSEEK_V3, PLAIN, ROTATED, VALUE
from streamquant.convert.architectures.family import TensorKind
from streamquant.convert.architectures.layers import MTP

DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    hf_architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    layer=tuple(row for row in DEEPSEEK_V3.layer if row.kind is not TensorKind.ROUTER_BIAS and row.on != MTP),
    mtp=None,
    hidden_divides_by_heads=True,
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        PLAIN: 128,
        ROTATED: 64,
        VALUE: 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": None,
        "moe_layer_freq": 1,
    },
    nullable=frozenset({"num_key_value_heads", "q_lora_rank", "n_group", "topk_group", "scoring_func"}),
    required={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "scoring_func": (None, "softmax"),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
        "moe_layer_freq": (1,),
    },
    llama_cpp=replace(
        DEEPSEEK_V3.llama_cpp,
        known_by=None,
        grouped=("topk_method", "group_limited_greedy", "greedy"),
    ),
)
