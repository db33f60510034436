"""GraniteMoeHybridForCausalLM: Granite 4, of Mamba-2 layers and a few with attention, or of attention alone.

Most have no positions: the layers with attention do not rotate. All have a shared feed-forward, the larger ones experts
beside it. One class, three architectures of llama.cpp: one without Mamba layers is `granite`, or `granitemoe` with
experts (GraniteHybridModel in conversion/granite.py, which takes layers that are spelled as transformers 5 saves them,
"full_attention", for Mamba layers). Defaults: GraniteMoeHybridConfig of transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import gguf

from streamquant.convert.architectures.families.granite.granite import (
    FACTORS,
    MOE_DEFAULTS,
    MOE_EXPERTS,
    NORMS,
    QUOTIENTS,
    SHARED_LENGTH,
    SIZES,
    attention,
    mixture,
    shared_mlp,
)
from streamquant.convert.architectures.families.llama import LLAMA_MODEL
from streamquant.convert.architectures.family import Family
from streamquant.convert.architectures.gguf_keys import Choice, GgufKey, PerLayer, Product, flag, u32
from streamquant.convert.architectures.layers import FULL, LINEAR, ListedTypes
from streamquant.convert.architectures.mamba import HEADS, INNER, MambaKeys

LAYERS = ListedTypes({"full_attention": FULL, "linear_attention": LINEAR, "attention": FULL, "mamba": LINEAR})
"""As transformers 5 saves them, and as they are published."""
MAMBA = MambaKeys(
    inner=(("mamba_expand", "hidden"),),
    heads="mamba_n_heads",
    groups="mamba_n_groups",
    state="mamba_d_state",
    kernel="mamba_d_conv",
    conv_bias="mamba_conv_bias",
    proj_bias="mamba_proj_bias",
)
_ROPE = "position_embedding_type", "rope"
_NO_CONTEXT = 1 << 20
"""What the converter writes for models without positions."""
KEYS = (
    *LLAMA_MODEL.keys,
    *FACTORS,
    SHARED_LENGTH,
    *MAMBA.gguf(Product("hidden_size", "mamba_expand")),
    GgufKey(gguf.Keys.Attention.HEAD_COUNT_KV, gguf.GGUFValueType.INT32, PerLayer({FULL: "kv_heads"}, 0)),
    flag(gguf.Keys.Rope.SCALING_FINETUNED, Choice(*_ROPE, then=True, otherwise=False)),
    u32(gguf.Keys.LLM.CONTEXT_LENGTH, Choice(*_ROPE, then="context", otherwise=_NO_CONTEXT)),
)
"""llama.cpp takes a layer without key-value heads for a Mamba layer, and "finetuned" for whether it rotates."""
EXPERTS = replace(MOE_EXPERTS, gate="gate_proj", up="up_proj", down="down_proj")
_DEFAULTS = {
    **MOE_DEFAULTS,
    "shared_intermediate_size": 1024,
    "position_embedding_type": None,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": None,
}


def has_experts(config: Mapping[str, object]) -> bool:
    """Whether a config.json of the class has experts; 8 if it says nothing."""
    return config.get("num_local_experts", 8) != 0


def has_mamba(config: Mapping[str, object]) -> bool:
    """Whether a config.json of the class has Mamba layers."""
    types = config.get("layer_types")
    return not isinstance(types, list) or any(kind not in ("attention", "full_attention") for kind in types)


HYBRID_MOE = Family(
    hf_architecture="GraniteMoeHybridForCausalLM",
    model_type="granitemoehybrid",
    layer=(
        *MAMBA.rows("mamba"),
        *(replace(row, on=FULL) for row in attention()),
        *mixture(EXPERTS),
        *shared_mlp("mlp.shared_expert"),
        *NORMS,
    ),
    layers=(LAYERS,),
    sizes={**SIZES, **MAMBA.sizes},
    defaults=_DEFAULTS,
    nullable=frozenset({"num_key_value_heads", "head_dim", "position_embedding_type", "time_step_limit"}),
    required={
        "mamba_n_groups": (1,),  # llama.cpp norms each group by itself, transformers all channels together
        "mamba_expand": (2,),  # the loader wants it
        "time_step_limit": (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}]),  # no key for another
    },
    experts=EXPERTS,
    unquantized=("re:.*block_sparse_moe.router", "re:.*mamba.conv1d$"),
    quotients={**QUOTIENTS, "mamba_d_head": (INNER, HEADS)},
    hidden_divides_by_heads=True,
    rope_switch=_ROPE,
    is_meant_by=lambda config: has_mamba(config) and has_experts(config),
    llama_cpp=replace(
        LLAMA_MODEL,
        arch=gguf.MODEL_ARCH.GRANITE_HYBRID,
        keys=KEYS,
        unread=("mamba_proj_bias",),
        needed=("mamba_conv_bias",),
        counts_experts=True,
        known_by=(gguf.Keys.Rope.SCALING_FINETUNED, None),
    ),
)
HYBRID = replace(
    HYBRID_MOE,
    layer=(
        *MAMBA.rows("mamba"),
        *(replace(row, on=FULL) for row in attention()),
        *shared_mlp("mlp"),
        *NORMS,
    ),
    experts=None,
    intermediate="shared_intermediate_size",
    unquantized=("re:.*mamba.conv1d$",),
    fixed={"num_local_experts": 0},
    is_meant_by=lambda config: has_mamba(config) and not has_experts(config),
)
ATTENTION_MOE = replace(
    HYBRID_MOE,
    layer=(*attention(), *mixture(EXPERTS), *shared_mlp("mlp.shared_expert"), *NORMS),
    unquantized=("re:.*block_sparse_moe.router",),
    is_meant_by=lambda config: not has_mamba(config) and has_experts(config),
    llama_cpp=replace(HYBRID_MOE.llama_cpp, arch=gguf.MODEL_ARCH.GRANITE_MOE, unread=(), needed=()),
)
ATTENTION = replace(
    HYBRID,
    layer=(*attention(), *shared_mlp("mlp"), *NORMS),
    unquantized=(),
    is_meant_by=lambda config: not has_mamba(config) and not has_experts(config),
    llama_cpp=replace(HYBRID.llama_cpp, arch=gguf.MODEL_ARCH.GRANITE, unread=(), needed=()),
)
GRANITE_HYBRID = (HYBRID_MOE, HYBRID, ATTENTION_MOE, ATTENTION)
