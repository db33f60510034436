"""SmolLM3ForCausalLM: SmolLM3 3B. Llama whose every fourth layer does not rotate queries and keys (NoPE).

The converter treats it as Llama in GGUF arch "smollm3" (SmolLM3Model in conversion/llama.py of llama.cpp) and writes
nothing of the layers: the loader takes every fourth. Defaults: SmolLM3Config of transformers, which has no head_dim
(see qwen2.py) and a rope_theta of its own.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.families.llama import LLAMA, LLAMA_MODEL
from streamquant.convert.architectures.layers import NOPE, RopeFlags

SMOLLM3 = replace(
    LLAMA,
    hf_architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    layers=(RopeFlags("no_rope_layers", "no_rope_layer_interval"),),
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim", "sliding_window", "no_rope_layers"}),
    required={"use_sliding_window": (False,)},
    hidden_divides_by_heads=False,
    default_rope={"rope_type": "default", "rope_theta": 2e6},
    llama_cpp=replace(LLAMA_MODEL, arch=gguf.MODEL_ARCH.SMOLLM3, rope_freqs=False, steps={NOPE: 4}),
)
