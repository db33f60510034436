"""The text model's part of the config.json of a multimodal model."""

from collections.abc import Mapping
from typing import Any

from streamquant.convert.architectures.config_values import ConfigValues
from streamquant.convert.architectures.family import Family

TEXT = "text_config"
PARTIAL = "partial_rotary_factor"
PARTS = (TEXT, "vision_config", "audio_config")


def text_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the text model alone: what stands under text_config, over the keys of the whole.

    That of another class, or of a text model already, comes back as it is. Raises StreamquantError if a multimodal
    model has no text_config. (TextModel.__init__ of llama.cpp's conversion/base.py)
    """
    if family.multimodal is None or config.get("model_type") != family.multimodal.model_type:
        return _with_rotated_part(family, config)
    inner = ConfigValues(config)
    text = inner.raw(TEXT)
    if not isinstance(text, Mapping):
        raise inner.refuse(TEXT, "not the config of a text model", required="an object")
    outer = {key: value for key, value in config.items() if key not in (*PARTS, "model_type")}
    return {**outer, "model_type": family.model_type, **text, "architectures": config["architectures"]}


def _with_rotated_part(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with partial_rotary_factor where it says the rotated part of a head by a key of the family's own.

    Raises StreamquantError if it says both, and they differ.
    """
    values = ConfigValues(config, defaults=family.defaults)
    if family.rotary_key is None or values.values.get(family.rotary_key) is None:
        return dict(config)
    rotary, head_dim = values.integer(family.rotary_key), values.integer("head_dim")
    if rotary > head_dim:
        raise values.refuse(family.rotary_key, "more than the whole of a head", required=f"at most {head_dim}")
    inside = next((s for key in ("rope_scaling", "rope_parameters") if isinstance(s := config.get(key), Mapping)), {})
    said = inside.get(PARTIAL, config.get(PARTIAL))
    if said is None:
        return {**config, PARTIAL: rotary / head_dim}
    if not isinstance(said, int | float) or int(head_dim * said) != rotary:
        raise values.refuse(
            family.rotary_key, "another part of a head than partial_rotary_factor says", required="one of them"
        )
    return dict(config)


def with_value(family: Family, config: Mapping[str, Any], key: str, value: object) -> dict[str, Any]:
    """config.json with another value for a key of the text model."""
    text = config.get(TEXT)
    if family.multimodal is None or not isinstance(text, Mapping):
        return {**config, key: value}
    return {**config, TEXT: {**text, key: value}}
