"""GraniteForCausalLM, GraniteMoeForCausalLM and GraniteMoeSharedForCausalLM: Granite 3, dense and with experts.

Llama with a factor for the embeddings, for the scores of attention, for what a layer adds, and a divisor of the logits.
Checkpoints have the experts of a layer in two tensors, and gate and up of the shared one in one (GraniteModel and
GraniteMoeModel in conversion/granite.py of llama.cpp). FP8 folders have a tensor for each expert under the names that
vLLM gives them. Defaults: GraniteConfig, GraniteMoeConfig and GraniteMoeSharedConfig of transformers.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.families.llama import LLAMA, LLAMA_MODEL
from streamquant.convert.architectures.family import (
    Experts,
    Family,
    LayerTensor,
    ViewRow,
    experts,
    linear,
    norm,
    router,
)
from streamquant.convert.architectures.gguf_keys import Field, f32, u32
from streamquant.convert.architectures.layers import SizeSwitch

SHARED, NOT_SHARED = "shared", "not shared"
SHARED_SIZE, SHARED_TWICE = "shared intermediate", "shared gate and up"
SIZES = {SHARED_SIZE: (("shared_intermediate_size",),), SHARED_TWICE: ((2, "shared_intermediate_size"),)}
FACTORS = (
    f32(gguf.Keys.Attention.SCALE, Field("attention_multiplier", is_factor=True)),
    f32(gguf.Keys.LLM.EMBEDDING_SCALE, Field("embedding_multiplier", is_factor=True)),
    f32(gguf.Keys.LLM.RESIDUAL_SCALE, Field("residual_multiplier", is_factor=True)),
    f32(gguf.Keys.LLM.LOGIT_SCALE, Field("logits_scaling", is_factor=True)),
)
SHARED_LENGTH = u32(gguf.Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, Field("shared_intermediate_size", only_true=True))
_LIKE_LLAMA = {key: value for key, value in LLAMA.defaults.items() if key not in ("head_dim", "mlp_bias")}
MOE_DEFAULTS = {
    **_LIKE_LLAMA,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "intermediate_size": 11008,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QUOTIENTS = {"head_dim": ("hidden", "heads")}
"""llama.cpp takes the width of a head for that, whatever config.json says."""


def attention() -> tuple[LayerTensor, ...]:
    """The rows of a layer table for attention."""
    return (
        *linear("self_attn.q_proj", ("query", "hidden"), rope="query", bias="attention_bias"),
        *linear("self_attn.k_proj", ("key_value", "hidden"), rope="key", bias="attention_bias"),
        *linear("self_attn.v_proj", ("key_value", "hidden"), bias="attention_bias"),
        *linear("self_attn.o_proj", ("hidden", "query"), bias="attention_bias"),
    )


def mixture(of: Experts) -> tuple[LayerTensor, ...]:
    """The rows of a layer table for router and experts, in the converter's order."""
    path = f"{of.stored_path}.experts.{{expert}}"
    return (
        router("block_sparse_moe.router.layer"),
        experts(f"{path}.{of.gate}", ("expert_intermediate", "hidden")),
        experts(f"{path}.{of.up}", ("expert_intermediate", "hidden")),
        experts(f"{path}.{of.down}", ("hidden", "expert_intermediate")),
    )


def shared_mlp(path: str) -> tuple[LayerTensor, ...]:
    """The rows of a layer table for the shared expert; path: what other families call gate, up and down."""
    (first,), (last,) = (
        linear("shared_mlp.input_linear", (SHARED_TWICE, "hidden")),
        linear("shared_mlp.output_linear", ("hidden", SHARED_SIZE)),
    )
    halves = (("gate", SHARED_SIZE), ("up", SHARED_SIZE))
    cut = tuple((f"{path}.{name}_proj.weight", ViewRow(f"{{gate up}} c -> {name} c", halves)) for name, _ in halves)
    return (
        replace(first, parts=cut),
        replace(last, parts=((f"{path}.down_proj.weight", ViewRow()),)),
    )


NORMS = (norm("input_layernorm"), norm("post_attention_layernorm"))
GRANITE = replace(
    LLAMA,
    hf_architecture="GraniteForCausalLM",
    model_type="granite",
    defaults={**MOE_DEFAULTS, "mlp_bias": False},
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    quotients=QUOTIENTS,
    llama_cpp=replace(LLAMA_MODEL, arch=gguf.MODEL_ARCH.GRANITE, keys=(*LLAMA_MODEL.keys, *FACTORS)),
)
MOE_EXPERTS = Experts(
    count=("num_local_experts",),
    used="num_experts_per_tok",
    intermediate="intermediate_size",
    path="block_sparse_moe",
    stored_path="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    is_fused=True,
    fused_names=("input_linear", "output_linear"),
    renamed={"router.layer": "router"},
)
GRANITE_MOE = Family(
    hf_architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    layer=(*attention(), *mixture(MOE_EXPERTS), *NORMS),
    defaults=MOE_DEFAULTS,
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    experts=MOE_EXPERTS,
    unquantized=("re:.*block_sparse_moe.router",),
    quotients=QUOTIENTS,
    hidden_divides_by_heads=True,
    llama_cpp=replace(LLAMA_MODEL, arch=gguf.MODEL_ARCH.GRANITE_MOE, keys=(*LLAMA_MODEL.keys, *FACTORS)),
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    hf_architecture="GraniteMoeSharedForCausalLM",
    model_type="granitemoeshared",
    layer=(
        *GRANITE_MOE.layer[:-2],
        *(replace(row, on=SHARED) for row in shared_mlp("mlp.shared_expert")),
        *NORMS,
    ),
    layers=(SizeSwitch("shared_intermediate_size", SHARED, NOT_SHARED),),
    sizes=SIZES,
    defaults={**MOE_DEFAULTS, "shared_intermediate_size": 0},
    llama_cpp=replace(
        GRANITE_MOE.llama_cpp,
        keys=(*GRANITE_MOE.llama_cpp.keys, SHARED_LENGTH),
        known_by=(gguf.Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, None),
    ),
)
