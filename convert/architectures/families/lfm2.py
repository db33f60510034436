"""Lfm2ForCausalLM and Lfm2MoeForCausalLM: LFM2 and LFM2.5, dense and LFM2-8B-A1B with experts.

Most layers have a short convolution between two gates in place of attention: llama.cpp takes a layer without key-value
heads for one of them. Rows stay; the dense feed-forward is smaller than config.json says, unless it says that it is not
(LFM2Model and LFM2MoeModel in conversion/lfm2.py of llama.cpp). vLLM has the short convolutions unquantized
(model_executor/layers/mamba/short_conv.py). Defaults: Lfm2Config and Lfm2MoeConfig of transformers.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.config_values import ConfigValues
from streamquant.convert.architectures.family import (
    Experts,
    Family,
    LayerTensor,
    LlamaCpp,
    Size,
    TensorKind,
    ViewRow,
    experts,
    linear,
    norm,
    router,
    router_bias,
)
from streamquant.convert.architectures.gguf_keys import Constant, Field, GgufKey, PerLayer, u32
from streamquant.convert.architectures.layers import DENSE, FULL, LINEAR, SPARSE, DenseFirst, ListedTypes

ATTENTION, LLM = gguf.Keys.Attention, gguf.Keys.LLM
ADJUSTED, MULTIPLIER, MULTIPLE = "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"


def feed_forward_size(config: ConfigValues) -> int:
    """The size of the feed-forward: of a fraction of what config.json says, the next multiple (Lfm2MLP)."""
    size = config.integer("block_ff_dim" if "block_ff_dim" in config else "intermediate_size")
    if not config.boolean(ADJUSTED):
        return size
    size = int(2 * size / 3)
    if config.has_value(MULTIPLIER):
        size = int(config.number(MULTIPLIER) * size)
    multiple = config.integer(MULTIPLE)
    return max(1, multiple * ((size + multiple - 1) // multiple))


def short_convolution() -> tuple[LayerTensor, ...]:
    """The rows of a layer table for the short convolution and its gates."""
    rows = (
        LayerTensor("conv.in_proj.weight", TensorKind.STATE_INPUT, ("three hidden", "hidden")),
        LayerTensor("conv.in_proj.bias", TensorKind.BIAS, ("three hidden",), when="conv_bias"),
        LayerTensor(
            "conv.conv.weight", TensorKind.CONVOLUTION, ("hidden", "one", "kernel"), view=ViewRow("c one k -> c k")
        ),
        LayerTensor("conv.conv.bias", TensorKind.BIAS, ("hidden",), when="conv_bias"),
        LayerTensor("conv.out_proj.weight", TensorKind.STATE_INPUT, ("hidden", "hidden")),
        LayerTensor("conv.out_proj.bias", TensorKind.BIAS, ("hidden",), when="conv_bias"),
    )
    return tuple(replace(row, on=LINEAR) for row in rows)


def attention() -> tuple[LayerTensor, ...]:
    """The rows of a layer table for attention."""
    rows = (
        *linear("self_attn.q_proj", ("query", "hidden")),
        *linear("self_attn.k_proj", ("key_value", "hidden")),
        *linear("self_attn.v_proj", ("key_value", "hidden")),
        *linear("self_attn.out_proj", ("hidden", "query")),
        norm("self_attn.q_layernorm", "head_dim"),
        norm("self_attn.k_layernorm", "head_dim"),
    )
    return tuple(replace(row, on=FULL) for row in rows)


def dense(on: str | None = None) -> tuple[LayerTensor, ...]:
    """The rows of a layer table for a dense feed-forward."""
    shapes: dict[str, tuple[Size, Size]] = {
        "w1": ("intermediate", "hidden"),
        "w2": ("hidden", "intermediate"),
        "w3": ("intermediate", "hidden"),
    }
    rows = (row for name, shape in shapes.items() for row in linear(f"feed_forward.{name}", shape))
    return tuple(replace(row, on=on) for row in rows)


NORMS = (norm("operator_norm"), norm("ffn_norm"))
KEYS = (u32(LLM.VOCAB_SIZE, "vocabulary"), u32(gguf.Keys.ShortConv.L_CACHE, Field("conv_L_cache")))
KEY_VALUE_HEADS = GgufKey(ATTENTION.HEAD_COUNT_KV, gguf.GGUFValueType.INT32, PerLayer({FULL: "kv_heads"}, 0))
LFM2 = Family(
    hf_architecture="Lfm2ForCausalLM",
    model_type="lfm2",
    layer=(*short_convolution(), *attention(), *dense(), *NORMS),
    layers=(ListedTypes({"full_attention": FULL, "conv": LINEAR}, numbers="full_attn_idxs"),),
    sizes={"three hidden": ((3, "hidden"),), "kernel": (("conv_L_cache",),)},
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 128000,
        "norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "tie_embedding": True,
        "intermediate_size": 12288,
        "conv_bias": False,
        "conv_L_cache": 3,
        ADJUSTED: True,
        MULTIPLIER: 1.0,
        MULTIPLE: 256,
    },
    nullable=frozenset({"head_dim", "layer_types", "full_attn_idxs", MULTIPLIER}),
    required={"tie_embedding": (True,)},
    unquantized=(r"re:.*\.conv\.(in_proj|out_proj|conv)$",),
    default_rope={"rope_type": "default", "rope_theta": 1e6},
    quotients={"head_dim": ("hidden", "heads")},
    hidden_divides_by_heads=True,
    epsilon="norm_eps",
    final_norm="model.embedding_norm",
    feed_forward=feed_forward_size,
    fixed={ADJUSTED: False},
    llama_cpp=LlamaCpp(arch=gguf.MODEL_ARCH.LFM2, keys=(KEY_VALUE_HEADS, *KEYS), unread=("conv_bias",)),
)
LFM2_MOE = replace(
    LFM2,
    hf_architecture="Lfm2MoeForCausalLM",
    model_type="lfm2_moe",
    layer=(
        *short_convolution(),
        *attention(),
        *dense(DENSE),
        router("feed_forward.gate", on=SPARSE),
        router_bias("feed_forward.expert_bias", on=SPARSE),
        experts("feed_forward.experts.{expert}.w1", ("expert_intermediate", "hidden"), on=SPARSE),
        experts("feed_forward.experts.{expert}.w2", ("hidden", "expert_intermediate"), on=SPARSE),
        experts("feed_forward.experts.{expert}.w3", ("expert_intermediate", "hidden"), on=SPARSE),
        *NORMS,
    ),
    layers=(ListedTypes({"full_attention": FULL, "conv": LINEAR}), DenseFirst("num_dense_layers")),
    defaults={
        **{key: value for key, value in LFM2.defaults.items() if not key.startswith("block_")},
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    nullable=frozenset({"head_dim"}),
    required={**LFM2.required, "use_expert_bias": (True,)},
    experts=Experts(
        count=("num_experts", "num_local_experts"),
        used="num_experts_per_tok",
        intermediate="moe_intermediate_size",
        path="feed_forward",
        stored_path="feed_forward",
        gate="w1",
        up="w3",
        down="w2",
    ),
    unquantized=(*LFM2.unquantized, "re:.*feed_forward.gate$"),
    feed_forward=None,
    fixed={},
    llama_cpp=replace(
        LFM2.llama_cpp,
        arch=gguf.MODEL_ARCH.LFM2MOE,
        keys=(
            KEY_VALUE_HEADS,
            u32(LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),
            u32(LLM.LEADING_DENSE_BLOCK_COUNT, Field("num_dense_layers")),
            u32(LLM.EXPERT_GATING_FUNC, Constant(2)),
            *KEYS,
        ),
        assumed={"norm_topk_prob": True, "routed_scaling_factor": 1.0},
    ),
)
