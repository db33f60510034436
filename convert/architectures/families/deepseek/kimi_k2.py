"""Kimi K2 and K2-Thinking (DeepseekV3ForCausalLM), Kimi K2.5 and K2.6 (KimiK25ForConditionalGeneration).

The text model is DeepSeek V3's in every part. Kimi K2 calls its model type "kimi_k2", which transformers does not know:
the converter takes config.json as it stands, without the head_dim of transformers' class. Around it K2.5 and K2.6 see
images, which stay out; transformers knows that class, and takes either name of the text model (Kimi_K25Config).
K2-Thinking and later have their experts in INT4 (DeepseekV2Model in conversion/deepseek.py of llama.cpp).
"""

from dataclasses import replace

from streamquant.convert.architectures.families.deepseek.deepseek_v3 import DEEPSEEK_V3
from streamquant.convert.architectures.family import LatentAttention, Multimodal

MODEL_TYPE = "kimi_k2"
_LEFT_OUT = ("vision_tower.", "mm_projector.")

KIMI_K2 = replace(
    DEEPSEEK_V3,
    model_type=MODEL_TYPE,
    in_transformers=DEEPSEEK_V3.model_type,
    latent=LatentAttention(is_written_early=False),
)
KIMI_K25 = replace(
    KIMI_K2,
    hf_architecture="KimiK25ForConditionalGeneration",
    latent=LatentAttention(),
    multimodal=Multimodal("kimi_k25", (*_LEFT_OUT, *(f"model.{name}" for name in _LEFT_OUT))),
    unquantized=(*KIMI_K2.unquantized, "re:.*lm_head", "re:.*vision_tower.*", "re:.*mm_projector.*"),
)
KIMI_K25_DEEPSEEK = replace(KIMI_K25, model_type=DEEPSEEK_V3.model_type, in_transformers=None)
"""The same where config.json calls the text model by the name that transformers has for it."""
