"""MixtralForCausalLM: Mixtral 8x7B and 8x22B and their fine-tunes (Nous Hermes 2). Llama with experts.

The converter treats it as Llama (LlamaModel in conversion/llama.py), GGUF arch "llama" included, and stacks the experts
of a layer when it has read the last of them: w1 (gate), w2 (down), w3 (up). Defaults: MixtralConfig of transformers,
which leaves head_dim open (see qwen2.py), and whose modules are called mlp where checkpoints say block_sparse_moe.
"""

from streamquant.convert.architectures.families.llama import LLAMA_MODEL
from streamquant.convert.architectures.families.mistral.mistral import ATTENTION
from streamquant.convert.architectures.family import Experts, Family, experts, norm, router

EXPERT_ROWS = (
    experts("block_sparse_moe.experts.{expert}.w1", ("expert_intermediate", "hidden")),
    experts("block_sparse_moe.experts.{expert}.w2", ("hidden", "expert_intermediate")),
    experts("block_sparse_moe.experts.{expert}.w3", ("expert_intermediate", "hidden")),
)
EXPERTS = Experts(
    count=("num_local_experts", "num_experts"),
    used="num_experts_per_tok",
    intermediate="intermediate_size",
    stored_path="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
)

MIXTRAL = Family(
    hf_architecture="MixtralForCausalLM",
    model_type="mixtral",
    layer=(
        *ATTENTION,
        router("block_sparse_moe.gate"),
        *EXPERT_ROWS,
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
    ),
    defaults={
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    nullable=frozenset({"head_dim", "sliding_window"}),
    experts=EXPERTS,
    unquantized=("re:.*block_sparse_moe.gate$",),
    llama_cpp=LLAMA_MODEL,
)
