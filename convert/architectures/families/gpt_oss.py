"""GptOssForCausalLM: gpt-oss-20b and -120b. Experts with biases, attention sinks, every other layer with a window.

The norm before the feed-forward is `post_attention_norm` in this arch, and rows stay. Checkpoints have the experts of a
layer in one tensor, as floats or in MXFP4 (convert/source/fused_experts.py; GptOssModel in conversion/gpt_oss.py of
llama.cpp). Defaults: GptOssConfig of transformers. transformers and llama.cpp both cut the inputs of the gate at 7,
whatever swiglu_limit says.
"""

from collections.abc import Iterator

import gguf

from streamquant.convert.architectures.family import (
    EXPERT_NUMBER,
    Experts,
    Family,
    LayerTensor,
    LlamaCpp,
    TensorKind,
    experts,
    linear,
    norm,
    router,
)
from streamquant.convert.architectures.gguf_keys import Field, u32
from streamquant.convert.architectures.layers import FULL, windows


def _experts() -> Iterator[LayerTensor]:
    """Weights and biases of the experts, in the converter's order."""
    for name, shape in (
        ("down_proj", ("hidden", "expert_intermediate")),
        ("gate_proj", ("expert_intermediate", "hidden")),
        ("up_proj", ("expert_intermediate", "hidden")),
    ):
        path = f"mlp.experts.{EXPERT_NUMBER}.{name}"
        yield experts(path, shape)
        yield LayerTensor(f"{path}.bias", TensorKind.BIAS, shape[:1])


GPT_OSS = Family(
    hf_architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden"), bias=True),
        *linear("self_attn.k_proj", ("key_value", "hidden"), bias=True),
        *linear("self_attn.v_proj", ("key_value", "hidden"), bias=True),
        *linear("self_attn.o_proj", ("hidden", "query"), bias=True),
        LayerTensor("self_attn.sinks", TensorKind.SINK, ("heads",)),
        router("mlp.router"),
        LayerTensor("mlp.router.bias", TensorKind.BIAS, ("experts",)),
        *_experts(),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    layers=(windows(2),),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    required={"attention_bias": (True,), "swiglu_limit": (7.0, 7)},
    experts=Experts(
        count=("num_local_experts", "num_experts"),
        used="num_experts_per_tok",
        intermediate="intermediate_size",
        is_fused=True,
        by_turns=True,
    ),
    unquantized=("re:.*mlp.router$",),
    default_rope={
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.GPT_OSS,
        keys=(
            u32(gguf.Keys.Attention.SLIDING_WINDOW, Field("sliding_window")),
            u32(gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, "expert_intermediate"),
        ),
        steps={FULL: 2},
    ),
)
