"""Qwen3_5ForCausalLM and Qwen3_5MoeForCausalLM: Qwen 3.5 and 3.6, dense and with experts, and the models around them.

Three of four layers have linear attention (a gated delta rule with a short convolution), the others full attention
whose queries bring a gate. llama.cpp wants the value heads by their number within a key head, then by key head, where
Hugging Face has them by key head; norms but that of the linear attention as 1 + weight, and -exp(A_log)
(_LinearAttentionVReorderBase and Qwen3NextModel in conversion/qwen.py). Defaults: Qwen3_5TextConfig and
Qwen3_5MoeTextConfig of transformers.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.family import (
    NEXTN,
    Experts,
    Family,
    LayerTensor,
    LlamaCpp,
    Multimodal,
    Size,
    TensorKind,
    Terms,
    ViewRow,
    feed_forward,
    gated_experts,
    linear,
    norm,
    router,
)
from streamquant.convert.architectures.gguf_keys import Field, Otherwise, PerLayer, Product, u32
from streamquant.convert.architectures.gguf_keys import GgufKey as Key
from streamquant.convert.architectures.layers import FULL, LINEAR, ListedTypes, MtpLayers
from streamquant.convert.architectures.tensor_view import MINUS_EXP, PLUS_ONE

KEY_HEADS, VALUE_HEADS = "linear_num_key_heads", "linear_num_value_heads"
KEY_DIM, VALUE_DIM = "linear_key_head_dim", "linear_value_head_dim"
SIZES: dict[Size, Terms] = {
    "query and gate": ((2, "query"),),
    "linear key heads": ((KEY_HEADS,),),
    "linear value heads": ((VALUE_HEADS,),),
    "linear value head": ((VALUE_DIM,),),
    "linear keys": ((KEY_HEADS, KEY_DIM),),
    "linear values": ((VALUE_HEADS, VALUE_DIM),),
    "linear channels": ((2, KEY_HEADS, KEY_DIM), (VALUE_HEADS, VALUE_DIM)),
    "convolution": (("linear_conv_kernel_dim",),),
}
_HEADS = ("k", "linear key heads"), ("d", "linear value head")
_PARTS = ("q", "linear keys"), ("key", "linear keys"), *_HEADS
ROWS = ViewRow("(k r d) c -> (r k d) c", _HEADS)
EACH_HEAD = ViewRow("(k r) c -> (r k) c", _HEADS[:1])


def linear_attention() -> tuple[LayerTensor, ...]:
    """The rows of a layer table for linear attention."""
    by_head = "linear value heads"
    rows = (
        *linear("linear_attn.in_proj_qkv", ("linear channels", "hidden")),
        *linear("linear_attn.in_proj_z", ("linear values", "hidden")),
        LayerTensor("linear_attn.in_proj_b.weight", TensorKind.STATE_INPUT, (by_head, "hidden"), view=EACH_HEAD),
        LayerTensor("linear_attn.in_proj_a.weight", TensorKind.STATE_INPUT, (by_head, "hidden"), view=EACH_HEAD),
        LayerTensor("linear_attn.conv1d.weight", TensorKind.CONVOLUTION, ("linear channels", "one", "convolution")),
        LayerTensor("linear_attn.dt_bias", TensorKind.STATE, (by_head,), view=ViewRow("(k r) -> (r k)", _HEADS[:1])),
        LayerTensor(
            "linear_attn.A_log", TensorKind.STATE, (by_head,), view=ViewRow("(k r) -> (r k)", _HEADS[:1], MINUS_EXP)
        ),
        LayerTensor("linear_attn.norm.weight", TensorKind.NORM, ("linear value head",), view=ViewRow()),
        *linear("linear_attn.out_proj", ("hidden", "linear values")),
    )
    views = {
        "linear_attn.in_proj_qkv.weight": ViewRow("{q key (k r d)} c -> {q key (r k d)} c", _PARTS),
        "linear_attn.in_proj_z.weight": ROWS,
        "linear_attn.conv1d.weight": ViewRow("{q key (k r d)} one c -> {q key (r k d)} c", _PARTS),
        "linear_attn.out_proj.weight": ViewRow("o (k r d) -> o (r k d)", _HEADS),
    }
    return tuple(replace(row, on=LINEAR, view=views.get(row.suffix, row.view)) for row in rows)


def full_attention() -> tuple[LayerTensor, ...]:
    """The rows of a layer table for full attention; the rows of a head's query and its gate follow each other."""
    rows = (
        *linear("self_attn.q_proj", ("query and gate", "hidden")),
        *linear("self_attn.k_proj", ("key_value", "hidden")),
        *linear("self_attn.v_proj", ("key_value", "hidden")),
        *linear("self_attn.o_proj", ("hidden", "query")),
        norm("self_attn.q_norm", "head_dim"),
        norm("self_attn.k_norm", "head_dim"),
    )
    return tuple(replace(row, on=FULL) for row in rows)


FULL_ATTENTION = (*full_attention(), norm("input_layernorm"), norm("post_attention_layernorm"))
"""The rows of full attention, and the norms of all layers."""
ATTENTION = (*linear_attention(), *FULL_ATTENTION)
MIXTURE = (
    router("mlp.gate"),
    *gated_experts(),
    *feed_forward("mlp.shared_expert", "shared expert"),
    router("mlp.shared_expert_gate", "one"),
)
LAYERS = ListedTypes({"full_attention": FULL, "linear_attention": LINEAR}, interval="full_attention_interval")
MTP_LAYERS = MtpLayers(
    "mtp_num_hidden_layers",
    frozenset({FULL}),
    unquantized=("re:.*mtp.*",),
    modules={
        "fc": "eh_proj",
        "pre_fc_norm_embedding": "enorm",
        "pre_fc_norm_hidden": "hnorm",
        "norm": "shared_head.norm",
    },
    is_plain=True,
)
DEFAULTS: dict[str, object] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attn_output_gate": True,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    KEY_DIM: 128,
    VALUE_DIM: 128,
    KEY_HEADS: 16,
    VALUE_HEADS: 32,
    "full_attention_interval": 4,
}
STATE_KEYS = (
    u32(gguf.Keys.LLM.NEXTN_PREDICT_LAYERS, "mtp_layers"),
    u32(gguf.Keys.SSM.CONV_KERNEL, Field("linear_conv_kernel_dim")),
    u32(gguf.Keys.SSM.STATE_SIZE, Field(KEY_DIM)),
    u32(gguf.Keys.SSM.GROUP_COUNT, Field(KEY_HEADS)),
    u32(gguf.Keys.SSM.TIME_STEP_RANK, Field(VALUE_HEADS)),
    u32(gguf.Keys.SSM.INNER_SIZE, Product(VALUE_HEADS, VALUE_DIM)),
    Key("{arch}.attention.recurrent_layers", gguf.GGUFValueType.BOOL, PerLayer({LINEAR: True}, False)),
    u32(gguf.Keys.LLM.FULL_ATTENTION_INTERVAL, Field("full_attention_interval")),
    u32(gguf.Keys.Rope.DIMENSION_COUNT, "rotary"),
)
"""What the converter writes behind the keys about experts."""
KEYS = (*STATE_KEYS, Key(gguf.Keys.Rope.DIMENSION_SECTIONS, gguf.GGUFValueType.INT32, Otherwise((11, 11, 10, 0))))
"""llama.cpp refuses a file without sections, images or not."""
MIXTURE_KEYS = (
    u32(gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),
    u32(gguf.Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, Field("shared_expert_intermediate_size")),
)
UNQUANTIZED = (r"re:.*linear_attn\.in_proj_[ab]$", r"re:.*linear_attn\.conv1d$")
UNQUANTIZED_ROUTERS = ("re:.*mlp.gate$", "re:.*shared_expert_gate$")
QWEN3_5 = Family(
    hf_architecture="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    layer=(*ATTENTION, *feed_forward("mlp"), *NEXTN),
    layers=(LAYERS,),
    mtp=MTP_LAYERS,
    sizes=SIZES,
    defaults={**DEFAULTS, "num_key_value_heads": 4, "intermediate_size": 12288},
    nullable=frozenset({"num_key_value_heads", "layer_types", "mlp_only_layers"}),
    required={"attention_bias": (False,), "attn_output_gate": (True,)},
    unquantized=UNQUANTIZED,
    partial_rotary=0.25,
    norm_value=PLUS_ONE,
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.QWEN35, keys=KEYS, alike=(KEY_DIM, VALUE_DIM), needed_layers=(FULL, LINEAR)
    ),
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    hf_architecture="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    layer=(*ATTENTION, *MIXTURE, *NEXTN),
    sizes={**SIZES, "shared expert": (("shared_expert_intermediate_size",),)},
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "mlp_only_layers": None,
    },
    required={**QWEN3_5.required, "mlp_only_layers": (None, [])},
    experts=Experts(
        count=("num_experts", "num_local_experts"),
        used="num_experts_per_tok",
        intermediate="moe_intermediate_size",
        is_fused=True,
    ),
    unquantized=(*UNQUANTIZED, *UNQUANTIZED_ROUTERS),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.QWEN35MOE,
        keys=(*MIXTURE_KEYS, *KEYS),
        alike=(KEY_DIM, VALUE_DIM),
        needed_layers=(FULL, LINEAR),
    ),
)


def around(text: Family, hf_architecture: str, model_type: str) -> Family:
    """The class that sees images too."""
    multimodal = Multimodal(model_type, ("model.visual.", "visual."))
    return replace(
        text,
        hf_architecture=hf_architecture,
        multimodal=multimodal,
        unquantized=(*text.unquantized, "re:.*visual.*"),
    )


QWEN3_5_VL = around(QWEN3_5, "Qwen3_5ForConditionalGeneration", "qwen3_5")
QWEN3_5_MOE_VL = around(QWEN3_5_MOE, "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe")
