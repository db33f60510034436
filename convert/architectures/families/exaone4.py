"""Exaone4ForCausalLM: EXAONE 4.0, 1.2B with full attention and 32B with a window in three of four layers.

Norms behind attention and feed-forward, none before, as in OLMo 2, and on each head of q and k. Where there are windows
the layers without do not rotate. Rows stay (Exaone4Model in conversion/exaone.py of llama.cpp). The loader knows
windows in models of 64 layers alone (src/models/exaone4.cpp). Defaults: Exaone4Config of transformers.
"""

from collections.abc import Mapping
from dataclasses import replace

import gguf

from streamquant.convert.architectures.family import Family, LlamaCpp, feed_forward, linear, norm
from streamquant.convert.architectures.gguf_keys import Field, GgufKey, PerLayer, u32
from streamquant.convert.architectures.layers import FULL, SLIDING, ListedTypes, windows

ATTENTION = gguf.Keys.Attention
KEYS = (u32(gguf.Keys.LLM.VOCAB_SIZE, "vocabulary"),)


def has_window(config: Mapping[str, object]) -> bool:
    """Whether a config.json of the class has layers with a window; 4096 if it says nothing."""
    return config.get("sliding_window", 4096) is not None


EXAONE4_WINDOW = Family(
    hf_architecture="Exaone4ForCausalLM",
    model_type="exaone4",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden")),
        *linear("self_attn.k_proj", ("key_value", "hidden")),
        *linear("self_attn.v_proj", ("key_value", "hidden")),
        *linear("self_attn.o_proj", ("hidden", "query")),
        norm("self_attn.q_norm", "head_dim"),
        norm("self_attn.k_norm", "head_dim"),
        *feed_forward("mlp"),
        norm("post_attention_layernorm"),
        norm("post_feedforward_layernorm"),
    ),
    layers=(windows("sliding_window_pattern"),),
    defaults={
        "num_key_value_heads": 32,
        "intermediate_size": 16384,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim", "layer_types", "sliding_window", "sliding_window_pattern"}),
    is_meant_by=has_window,
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.EXAONE4,
        keys=(
            *KEYS,
            u32(ATTENTION.SLIDING_WINDOW, Field("sliding_window")),
            GgufKey(ATTENTION.SLIDING_WINDOW_PATTERN, gguf.GGUFValueType.BOOL, PerLayer({SLIDING: True}, False)),
        ),
        rope_freqs=True,
        known_by=(ATTENTION.SLIDING_WINDOW, None),
        window_layers=64,
    ),
)
EXAONE4 = replace(
    EXAONE4_WINDOW,
    layers=(ListedTypes({"full_attention": FULL}),),
    defaults={**EXAONE4_WINDOW.defaults, "sliding_window": None},
    is_meant_by=lambda config: not has_window(config),
    llama_cpp=replace(EXAONE4_WINDOW.llama_cpp, keys=KEYS, known_by=None, window_layers=None),
)
