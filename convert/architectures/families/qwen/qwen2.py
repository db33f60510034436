"""Qwen2ForCausalLM: Qwen 2 and 2.5. Biases on q, k and v, always; rows stay (Qwen2Model, conversion/qwen.py).

Defaults: Qwen2Config of transformers, which has no head_dim: the converter writes key_length only where config.json
names one.
"""

import gguf

from streamquant.convert.architectures.family import Family, LlamaCpp, VocabularyRules, linear, norm

QWEN2 = Family(
    hf_architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden"), bias=True),
        *linear("self_attn.k_proj", ("key_value", "hidden"), bias=True),
        *linear("self_attn.v_proj", ("key_value", "hidden"), bias=True),
        *linear("self_attn.o_proj", ("hidden", "query")),
        *linear("mlp.gate_proj", ("intermediate", "hidden")),
        *linear("mlp.up_proj", ("intermediate", "hidden")),
        *linear("mlp.down_proj", ("hidden", "intermediate")),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim", "sliding_window"}),
    llama_cpp=LlamaCpp(arch=gguf.MODEL_ARCH.QWEN2, vocabulary=VocabularyRules(sentencepiece=True), pooling=True),
)
