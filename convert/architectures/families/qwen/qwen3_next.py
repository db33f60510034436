"""Qwen3NextForCausalLM: Qwen3-Next-80B-A3B, Qwen3-Coder-Next. The layers of Qwen 3.5 with experts, stored otherwise.

One matrix of a linear attention makes query, key, values and gates of one key head after another, a second one the two
numbers of each value head. llama.cpp cuts the first in two, queries, keys and values of all heads and their gates; the
order of value heads stays (Qwen3NextModel in conversion/qwen.py). It normalises the weights of the chosen experts
whatever norm_topk_prob says. Defaults: Qwen3NextConfig of transformers.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.families.qwen.qwen3_5 import (
    FULL_ATTENTION,
    KEY_DIM,
    KEY_HEADS,
    MIXTURE,
    MIXTURE_KEYS,
    QWEN3_5_MOE,
    STATE_KEYS,
    UNQUANTIZED_ROUTERS,
    VALUE_DIM,
    VALUE_HEADS,
)
from streamquant.convert.architectures.family import NEXTN, LayerTensor, TensorKind, ViewRow, linear
from streamquant.convert.architectures.layers import LINEAR
from streamquant.convert.architectures.tensor_view import MINUS_EXP

_HEADS = (
    *(("g", "linear key heads"), ("q", "linear key head"), ("k", "linear key head")),
    *(("d", "linear value head"), ("e", "linear value head")),
)
_BY_KEY_HEAD = "(g {q k (r d) (r e)}) c"


def linear_attention() -> tuple[LayerTensor, ...]:
    """The rows of a layer table for linear attention."""
    (matrix,) = linear("linear_attn.in_proj_qkvz", ("linear queries to gates", "hidden"))
    cut = (
        ("linear_attn.in_proj_qkv.weight", ViewRow(f"{_BY_KEY_HEAD} -> {{(g q) (g k) (g r d)}} c", _HEADS)),
        ("linear_attn.in_proj_z.weight", ViewRow(f"{_BY_KEY_HEAD} -> (g r e) c", _HEADS)),
    )
    by_head, channels = "linear value heads", ("linear channels", "one", "convolution")
    squeezed = ViewRow("rows one c -> rows c")
    rows = (
        replace(matrix, parts=cut),
        LayerTensor("linear_attn.in_proj_ba.weight", TensorKind.STATE_INPUT, ("two linear value heads", "hidden")),
        LayerTensor("linear_attn.conv1d.weight", TensorKind.CONVOLUTION, channels, view=squeezed),
        LayerTensor("linear_attn.dt_bias", TensorKind.STATE, (by_head,)),
        LayerTensor("linear_attn.A_log", TensorKind.STATE, (by_head,), view=ViewRow(value=MINUS_EXP)),
        LayerTensor("linear_attn.norm.weight", TensorKind.NORM, ("linear value head",), view=ViewRow()),
        *linear("linear_attn.out_proj", ("hidden", "linear values")),
    )
    return tuple(replace(row, on=LINEAR) for row in rows)


QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    hf_architecture="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    layer=(*linear_attention(), *FULL_ATTENTION, *MIXTURE, *NEXTN),
    sizes={
        **QWEN3_5_MOE.sizes,
        "linear key head": ((KEY_DIM,),),
        "two linear value heads": ((2, VALUE_HEADS),),
        "linear queries to gates": ((2, KEY_HEADS, KEY_DIM), (2, VALUE_HEADS, VALUE_DIM)),
    },
    defaults={
        **QWEN3_5_MOE.defaults,
        "intermediate_size": 5632,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    required={**QWEN3_5_MOE.required, "decoder_sparse_step": (1,)},
    unquantized=(r"re:.*linear_attn\.in_proj_ba$", r"re:.*linear_attn\.conv1d$", *UNQUANTIZED_ROUTERS),
    llama_cpp=replace(
        QWEN3_5_MOE.llama_cpp,
        arch=gguf.MODEL_ARCH.QWEN3NEXT,
        keys=(*MIXTURE_KEYS, *STATE_KEYS),
        assumed={"norm_topk_prob": True},
    ),
)
