"""DeepseekV3ForCausalLM and Glm4MoeLiteForCausalLM: DeepSeek V3, R1 and V3.1, GLM-4.7-Flash.

Keys and values of all heads are made of one latent vector for each token (MLA). llama.cpp computes with that vector: it
wants kv_b_proj as two tensors, the part for keys transposed in each head. Its heads then share one key, which has the
length of the latent vector and the rotated part; the true lengths are keys of their own. Rotated components are
neighbours already, so that rows stay. DeepSeek's layers for multi-token prediction are left out, GLM's are not
(DeepseekV2Model in conversion/deepseek.py, Glm4MoeLiteModel in conversion/glm.py of llama.cpp). Defaults:
DeepseekV3Config and Glm4MoeLiteConfig of transformers, which have sigmoid scores of experts and no key for them.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.families.glm4_moe import GLM_VOCABULARY
from streamquant.convert.architectures.family import (
    NEXTN,
    Experts,
    Family,
    LatentAttention,
    LayerTensor,
    LlamaCpp,
    Size,
    TensorKind,
    Terms,
    ViewRow,
    VocabularyRules,
    feed_forward,
    gated_experts,
    linear,
    norm,
    router,
    router_bias,
)
from streamquant.convert.architectures.gguf_keys import GATING, Constant, Counted, Field, RopeNumber, f32, flag, u32
from streamquant.convert.architectures.layers import DENSE, SPARSE, DenseFirst, MtpLayers, Switch

LLM, ATTENTION = gguf.Keys.LLM, gguf.Keys.Attention
QUERY_RANK, NO_QUERY_RANK = "query rank", "no query rank"
PLAIN, ROTATED, VALUE = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
SIZES: dict[Size, Terms] = {
    "query rank": (("q_lora_rank",),),
    "key-value rank": (("kv_lora_rank",),),
    "latent": (("kv_lora_rank",), (ROTATED,)),
    "plain key": ((PLAIN,),),
    "key": ((PLAIN,), (ROTATED,)),
    "value": ((VALUE,),),
    "queries": (("heads", PLAIN), ("heads", ROTATED)),
    "keys and values": (("heads", PLAIN), ("heads", VALUE)),
    "values": (("heads", VALUE),),
    "shared_intermediate": (("moe_intermediate_size", "n_shared_experts"),),
}
_OF_A_HEAD = ("head", "heads"), ("k", "plain key"), ("v", "value")


def latent_attention() -> tuple[LayerTensor, ...]:
    """The rows of a layer table for MLA. Runtimes want the projections to latent vectors unquantized in FP8: their rows
    (576 in DeepSeek V3) do not divide into blocks of 128 (the examples of llm-compressor for Kimi K2)."""
    query = (
        LayerTensor("self_attn.q_a_proj.weight", TensorKind.LATENT, ("query rank", "hidden")),
        norm("self_attn.q_a_layernorm", "query rank"),
        *linear("self_attn.q_b_proj", ("queries", "query rank")),
    )
    cut = (
        ("self_attn.k_b_proj.weight", ViewRow("(head {k v}) r -> head r k", _OF_A_HEAD)),
        ("self_attn.v_b_proj.weight", ViewRow("(head {k v}) r -> head v r", _OF_A_HEAD)),
    )
    (key_value,) = linear("self_attn.kv_b_proj", ("keys and values", "key-value rank"))
    return (
        *(replace(row, on=NO_QUERY_RANK) for row in linear("self_attn.q_proj", ("queries", "hidden"))),
        *(replace(row, on=QUERY_RANK) for row in query),
        LayerTensor("self_attn.kv_a_proj_with_mqa.weight", TensorKind.LATENT, ("latent", "hidden")),
        norm("self_attn.kv_a_layernorm", "key-value rank"),
        replace(key_value, parts=cut),
        *linear("self_attn.o_proj", ("hidden", "values")),
    )


KEYS = (
    u32(ATTENTION.HEAD_COUNT_KV, Constant(1)),
    u32(LLM.LEADING_DENSE_BLOCK_COUNT, Counted(DENSE, "first_k_dense_replace")),
    u32(LLM.VOCAB_SIZE, "vocabulary"),
    u32(ATTENTION.Q_LORA_RANK, "query rank"),
    u32(ATTENTION.KV_LORA_RANK, "key-value rank"),
    u32(ATTENTION.KEY_LENGTH, "latent"),
    u32(ATTENTION.VALUE_LENGTH, "key-value rank"),
    u32(ATTENTION.KEY_LENGTH_MLA, "key"),
    u32(ATTENTION.VALUE_LENGTH_MLA, "value"),
    u32(LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),
    u32(LLM.EXPERT_COUNT, "experts"),
    u32(LLM.EXPERT_SHARED_COUNT, Field("n_shared_experts")),
    f32(LLM.EXPERT_WEIGHTS_SCALE, Field("routed_scaling_factor")),
    flag(LLM.EXPERT_WEIGHTS_NORM, Field("norm_topk_prob", only_true=True)),
    u32(gguf.Keys.Rope.DIMENSION_COUNT, "rotary"),
    f32(gguf.Keys.Rope.SCALING_YARN_LOG_MUL, RopeNumber("mscale_all_dim", 0.1)),
)
MTP_LAYERS = MtpLayers(
    "num_nextn_predict_layers",
    frozenset({SPARSE}),
    unquantized=("re:.*eh_proj$", "re:.*shared_head.head$", "re:.*embed_tokens$"),
)
DEEPSEEK_V3 = Family(
    hf_architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    layer=(
        *latent_attention(),
        *feed_forward("mlp", on=DENSE),
        router("mlp.gate", on=SPARSE),
        router_bias("mlp.gate.e_score_correction_bias", on=SPARSE),
        *gated_experts(on=SPARSE),
        *feed_forward("mlp.shared_experts", "shared_intermediate", on=SPARSE),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
        *NEXTN,
    ),
    layers=(DenseFirst("first_k_dense_replace"), Switch("q_lora_rank", QUERY_RANK, NO_QUERY_RANK)),
    mtp=replace(MTP_LAYERS, in_gguf=False),
    sizes=SIZES,
    latent=LatentAttention(),
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rope_interleave": True,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        PLAIN: 128,
        ROTATED: 64,
        VALUE: 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "moe_layer_freq": 1,
    },
    nullable=frozenset({"num_key_value_heads", "q_lora_rank"}),
    required={
        "attention_bias": (False,),
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    experts=Experts(
        count=("n_routed_experts", "num_local_experts"),
        used="num_experts_per_tok",
        intermediate="moe_intermediate_size",
    ),
    unquantized=("re:.*mlp.gate$", "re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$"),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.DEEPSEEK2,
        vocabulary=VocabularyRules(tiktoken=True),
        keys=KEYS,
        yarn_keys={"mscale": None, "mscale_all_dim": None},
        yarn_is_optional=True,
        known_by=(LLM.EXPERT_GATING_FUNC, GATING["sigmoid"]),
    ),
)
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    hf_architecture="Glm4MoeLiteForCausalLM",
    model_type="glm4_moe_lite",
    latent=LatentAttention(is_written_early=False),
    mtp=MTP_LAYERS,
    layers=(DenseFirst("first_k_dense_replace", listed="mlp_layer_types"), *DEEPSEEK_V3.layers[1:]),
    defaults={
        **DEEPSEEK_V3.defaults,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "q_lora_rank": 768,
        PLAIN: 192,
        VALUE: 256,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 0,
    },
    llama_cpp=replace(
        DEEPSEEK_V3.llama_cpp,
        vocabulary=GLM_VOCABULARY,
        keys=(*KEYS, u32(LLM.NEXTN_PREDICT_LAYERS, "mtp_layers")),
    ),
)
