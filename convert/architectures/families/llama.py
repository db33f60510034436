"""LlamaForCausalLM: Llama 1 to 3.3, Hermes 4 70B and 405B, SmolLM2.

llama.cpp rotates neighbouring rows in arch "llama", so the rows of q and k are interleaved (LlamaModel in
conversion/llama.py). Defaults: LlamaConfig of transformers.
"""

import gguf

from streamquant.convert.architectures.family import Family, LlamaCpp, VocabularyRules, linear, norm
from streamquant.convert.architectures.gguf_keys import u32

LLAMA_MODEL = LlamaCpp(
    arch=gguf.MODEL_ARCH.LLAMA,
    vocabulary=VocabularyRules(
        sentencepiece=True,
        add_space_prefix=True,
        no_bos=frozenset({49152}),  # small Granite models and SmolLM
        fill_in_the_middle={32016: {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}},  # CodeLlama
    ),
    keys=(u32(gguf.Keys.LLM.VOCAB_SIZE, "vocabulary"), u32(gguf.Keys.Rope.DIMENSION_COUNT, "head_dim")),
    rope_freqs=True,
)
"""The converter's class LlamaModel (conversion/llama.py) and the loader of arch "llama"."""

LLAMA = Family(
    hf_architecture="LlamaForCausalLM",
    model_type="llama",
    layer=(
        *linear("self_attn.q_proj", ("query", "hidden"), rope="query", bias="attention_bias"),
        *linear("self_attn.k_proj", ("key_value", "hidden"), rope="key", bias="attention_bias"),
        *linear("self_attn.v_proj", ("key_value", "hidden"), bias="attention_bias"),
        *linear("self_attn.o_proj", ("hidden", "query"), bias="attention_bias"),
        *linear("mlp.gate_proj", ("intermediate", "hidden"), bias="mlp_bias"),
        *linear("mlp.up_proj", ("intermediate", "hidden"), bias="mlp_bias"),
        *linear("mlp.down_proj", ("hidden", "intermediate"), bias="mlp_bias"),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    llama_cpp=LLAMA_MODEL,
    hidden_divides_by_heads=True,
)
