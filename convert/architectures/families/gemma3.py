"""Gemma3ForCausalLM and Gemma3ForConditionalGeneration: Gemma 3, its QAT checkpoints too, text alone or with images.

Five of six layers attend to a window and have a rope of their own; norms are stored as 1 + weight, rows stay
(Gemma3Model in conversion/gemma.py of llama.cpp). The loader scales queries by the width of a head, in models of 62
layers by hidden_size / num_attention_heads. Defaults: Gemma3TextConfig of transformers.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.family import (
    Family,
    LlamaCpp,
    Multimodal,
    VocabularyRules,
    feed_forward,
    linear,
    norm,
)
from streamquant.convert.architectures.gguf_keys import Field, u32
from streamquant.convert.architectures.layers import FULL, windows
from streamquant.convert.architectures.tensor_view import PLUS_ONE

_LEFT_OUT = ("vision_tower.", "multi_modal_projector.")

GEMMA3 = Family(
    hf_architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden")),
        *linear("self_attn.k_proj", ("key_value", "hidden")),
        *linear("self_attn.v_proj", ("key_value", "hidden")),
        *linear("self_attn.o_proj", ("hidden", "query")),
        norm("self_attn.q_norm", "head_dim"),
        norm("self_attn.k_norm", "head_dim"),
        *feed_forward("mlp"),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
        norm("pre_feedforward_layernorm"),
        norm("post_feedforward_layernorm"),
    ),
    layers=(windows("sliding_window_pattern"),),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    nullable=frozenset(
        {"layer_types", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"}
    ),
    required={
        "attention_bias": (False,),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    norm_value=PLUS_ONE,
    default_rope={"rope_type": "default", "rope_theta": 1e6},
    sliding_theta=("rope_local_base_freq", 1e4),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.GEMMA3,
        vocabulary=VocabularyRules(sentencepiece=True, space_prefix=False),
        keys=(u32(gguf.Keys.Attention.SLIDING_WINDOW, Field("sliding_window")),),
        steps={FULL: 6},
        query_scalar=("query_pre_attn_scalar", 62),
    ),
)
GEMMA3_VL = replace(
    GEMMA3,
    hf_architecture="Gemma3ForConditionalGeneration",
    multimodal=Multimodal("gemma3", (*_LEFT_OUT, *(f"model.{name}" for name in _LEFT_OUT))),
    unquantized=("re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
)
