"""Model families: HF tensor name -> GGUF tensor name, row order, hyperparameters. What is unknown is an error.

All that is known of a family is in its file (family.py has the records); FAMILIES below lists them.

>>> sorted(ARCHITECTURES)[:2]
['DeepseekV2ForCausalLM', 'DeepseekV3ForCausalLM']
"""

from collections.abc import Mapping
from types import MappingProxyType

from streamquant.convert.architectures.config_values import describe_type, shorten
from streamquant.convert.architectures.description import ExtraTensor, ModelDescription, TensorRule
from streamquant.convert.architectures.families.deepseek.deepseek_v2 import DEEPSEEK_V2
from streamquant.convert.architectures.families.deepseek.deepseek_v3 import DEEPSEEK_V3, GLM4_MOE_LITE
from streamquant.convert.architectures.families.deepseek.kimi_k2 import KIMI_K2, KIMI_K25, KIMI_K25_DEEPSEEK
from streamquant.convert.architectures.families.dots1 import DOTS1
from streamquant.convert.architectures.families.exaone4 import EXAONE4, EXAONE4_WINDOW
from streamquant.convert.architectures.families.gemma3 import GEMMA3, GEMMA3_VL
from streamquant.convert.architectures.families.glm4_moe import GLM4_MOE
from streamquant.convert.architectures.families.gpt_oss import GPT_OSS
from streamquant.convert.architectures.families.granite.granite import GRANITE, GRANITE_MOE, GRANITE_MOE_SHARED
from streamquant.convert.architectures.families.granite.granite_hybrid import GRANITE_HYBRID
from streamquant.convert.architectures.families.lfm2 import LFM2, LFM2_MOE
from streamquant.convert.architectures.families.llama import LLAMA
from streamquant.convert.architectures.families.minimax_m2 import MINIMAX_M2
from streamquant.convert.architectures.families.mistral.mistral import MISTRAL
from streamquant.convert.architectures.families.mistral.mistral3 import MINISTRAL3, MINISTRAL3_VL, MISTRAL3
from streamquant.convert.architectures.families.mistral.mixtral import MIXTRAL
from streamquant.convert.architectures.families.olmo2 import OLMO2
from streamquant.convert.architectures.families.olmo3 import OLMO3
from streamquant.convert.architectures.families.olmoe import OLMOE
from streamquant.convert.architectures.families.qwen.qwen2 import QWEN2
from streamquant.convert.architectures.families.qwen.qwen2_moe import QWEN2_MOE
from streamquant.convert.architectures.families.qwen.qwen3 import QWEN3
from streamquant.convert.architectures.families.qwen.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_VL, QWEN3_5_VL
from streamquant.convert.architectures.families.qwen.qwen3_moe import QWEN3_MOE
from streamquant.convert.architectures.families.qwen.qwen3_next import QWEN3_NEXT
from streamquant.convert.architectures.families.seed_oss import SEED_OSS
from streamquant.convert.architectures.families.smollm3 import SMOLLM3
from streamquant.convert.architectures.family import Experts, Family, TensorKind, VocabularyRules
from streamquant.convert.architectures.from_config import describe_model
from streamquant.convert.architectures.rope import ROPE_FREQS
from streamquant.convert.architectures.text_config import text_config
from streamquant.quant.errors import StreamquantError

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "ROPE_FREQS",
    "Experts",
    "ExtraTensor",
    "Family",
    "ModelDescription",
    "TensorKind",
    "TensorRule",
    "VocabularyRules",
    "describe",
    "family_of",
    "text_config",
]

FAMILIES = (
    *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE, QWEN3_5_VL, QWEN3_5_MOE_VL),
    *(SEED_OSS, GPT_OSS, MINIMAX_M2, GLM4_MOE, QWEN2_MOE, DOTS1, OLMOE),
    *(MISTRAL3, MINISTRAL3_VL, MINISTRAL3, SMOLLM3, OLMO3, OLMO2, GEMMA3, GEMMA3_VL),
    *(DEEPSEEK_V3, KIMI_K2, KIMI_K25, KIMI_K25_DEEPSEEK, GLM4_MOE_LITE, DEEPSEEK_V2),
    *(*GRANITE_HYBRID, GRANITE, GRANITE_MOE_SHARED, GRANITE_MOE),
    *(LFM2, LFM2_MOE, EXAONE4_WINDOW, EXAONE4),
)
ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {name: next(f for f in FAMILIES if f.hf_architecture == name) for name in (f.hf_architecture for f in FAMILIES)}
)
"""Of families with one class, which are told by the model type of their text model or by other keys, the first."""


def family_of(config: Mapping[str, object]) -> Family | None:
    """The family that config.json names; None where `describe` would refuse it."""
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        return None
    return _family_called(named[0], config) if named[0] in ARCHITECTURES else None


def _family_called(name: str, config: Mapping[str, object]) -> Family:
    """The family of a class that is known; a class around several text models is as many families."""
    text = config.get("text_config")
    model_type = (text if isinstance(text, Mapping) else config).get("model_type")
    own = [family for family in FAMILIES if family.hf_architecture == name and family.model_type == model_type]
    meant = (family for family in own if family.is_meant_by is None or family.is_meant_by(config))
    return next(meant, ARCHITECTURES[name])


def describe(config: Mapping[str, object]) -> ModelDescription:
    """Describe the model of a parsed config.json: tensors, GGUF metadata, extra tensors. No weights are needed.

    Raises StreamquantError naming the key where config.json is incomplete, contradicts itself, or asks for something
    that is not supported. The reference is llama.cpp's convert_hf_to_gguf.py (conversion/base.py, llama.py, qwen.py).
    """
    family = _family_called(architecture_of(config), config)
    return describe_model(family, text_config(family, config))


def architecture_of(config: Mapping[str, object]) -> str:
    """The one supported class name under `architectures`."""
    if not isinstance(config, Mapping):
        raise StreamquantError(
            "config.json is not an object", where="config.json", found=describe_type(config), required="an object"
        )
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise StreamquantError(
            "config.json does not name one model class",
            where="config.json, key 'architectures'",
            found="no such key" if named is None else shorten(named),
            required="a list of one class name",
        )
    if named[0] not in ARCHITECTURES:
        raise StreamquantError(
            f"unknown architecture {shorten(named[0])}",
            where="config.json, key 'architectures'",
            found=shorten(named[0]),
            required=f"one of {', '.join(ARCHITECTURES)}",
            hint="docs/adding-an-architecture.md tells how to add one",
        )
    return named[0]
