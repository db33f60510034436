"""Mistral3ForConditionalGeneration and Ministral3ForCausalLM: Mistral Small 3.1 and 3.2, Magistral, Ministral 3.

The class that also sees images is around one of two text models: "mistral", or "ministral3" with yarn and queries that
grow with their position. The converter treats both as Llama in GGUF arch "mistral3" (Ministral3Model in
conversion/mistral3.py of llama.cpp) and leaves the images out. Defaults: MistralConfig and Ministral3Config of
transformers.
"""

from dataclasses import replace

import gguf

from streamquant.convert.architectures.families.llama import LLAMA_MODEL
from streamquant.convert.architectures.families.mistral.mistral import MISTRAL
from streamquant.convert.architectures.family import Multimodal
from streamquant.convert.architectures.gguf_keys import RopeNumber, f32

_LEFT_OUT = ("vision_tower.", "multi_modal_projector.")
_AROUND = Multimodal("mistral3", (*_LEFT_OUT, *(f"model.{name}" for name in _LEFT_OUT)))
_UNQUANTIZED = ("re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")
"""Checkpoints call the head language_model.lm_head, transformers lm_head."""

MISTRAL3 = replace(
    MISTRAL,
    hf_architecture="Mistral3ForConditionalGeneration",
    multimodal=_AROUND,
    unquantized=_UNQUANTIZED,
    llama_cpp=replace(LLAMA_MODEL, arch=gguf.MODEL_ARCH.MISTRAL3, rope_freqs=False, reads_yarn_bounds=True),
)
MINISTRAL3 = replace(
    MISTRAL,
    hf_architecture="Ministral3ForCausalLM",
    model_type="ministral3",
    defaults={
        **MISTRAL.defaults,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    default_rope={
        **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0},
        **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        "original_max_position_embeddings": 16384,
    },
    llama_cpp=replace(
        MISTRAL3.llama_cpp,
        keys=(
            *LLAMA_MODEL.keys,
            f32(gguf.Keys.Rope.SCALING_YARN_LOG_MUL, RopeNumber("mscale_all_dim")),
            f32(gguf.Keys.Attention.TEMPERATURE_SCALE, RopeNumber("llama_4_scaling_beta")),
        ),
        yarn_keys={"mscale": 1.0, "mscale_all_dim": None, "llama_4_scaling_beta": None},
        known_by=(gguf.Keys.Attention.TEMPERATURE_SCALE, None),
    ),
)
MINISTRAL3_VL = replace(
    MINISTRAL3,
    hf_architecture="Mistral3ForConditionalGeneration",
    multimodal=_AROUND,
    unquantized=_UNQUANTIZED,
)
