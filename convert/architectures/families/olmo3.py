"""Olmo3ForCausalLM: OLMo 3, its Think and Instruct models. OLMo 2 with windows in three of four layers.

GGUF has it in OLMo 2's architecture, told by the window (Olmo2Model in conversion/olmo.py of llama.cpp). llama.cpp
rotates the layers with a window by theta of the others, unscaled. Defaults: Olmo3Config of transformers.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.families.olmo2 import OLMO2
from streamquant.convert.architectures.gguf_keys import Field, GgufKey, PerLayer, u32
from streamquant.convert.architectures.layers import SLIDING, windows

ATTENTION = gguf.Keys.Attention

OLMO3 = replace(
    OLMO2,
    hf_architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    layers=(windows(4),),
    defaults={**OLMO2.defaults, "sliding_window": 4096},
    nullable=OLMO2.nullable | {"layer_types"},
    sliding_theta=(None, 5e5),
    llama_cpp=replace(
        OLMO2.llama_cpp,
        keys=(
            u32(ATTENTION.SLIDING_WINDOW, Field("sliding_window")),
            GgufKey(ATTENTION.SLIDING_WINDOW_PATTERN, gguf.GGUFValueType.BOOL, PerLayer({SLIDING: True}, False)),
        ),
        known_by=(ATTENTION.SLIDING_WINDOW, None),
        reads_sliding_theta=False,
        needed_layers=(SLIDING,),
    ),
)
