"""config.json made to say what the weights say, where tools left the two in disagreement and the weights are right.

What is changed here is changed in the config.json of FP8 folders too, and every change is a note.
"""

from collections.abc import Collection, Mapping
from typing import Any

from streamquant.convert.architectures import family_of, text_config
from streamquant.convert.architectures.layers import stored_mtp_layers
from streamquant.convert.architectures.text_config import TEXT, with_value
from streamquant.convert.source.weights import CONFIG, WEIGHTS_KEY, Place

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
QUANTIZATIONS = ("quantization_config", "compression_config")
MODELOPT = "hf_quant_config.json"
"""Where ModelOpt writes how the weights are quantized."""
"""compression_config: compressed-tensors of 2024."""
_SCALES = (
    *(
        "_scale",
        "_scale_inv",
        "_scale_2",
        "_zero_point",
        "_packed",
        "_shape",
        "_g_idx",
        ".absmax",
        ".quant_map",
        ".SCB",
    ),
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".weight_format", ".codebooks"),
)
"""Endings of the tensors that quantized weights have beside them: compressed-tensors, GPTQ, AWQ, bitsandbytes, AQLM."""


def config_of_weights(config: Mapping[str, Any], tensors: Collection[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json for the tensors that a checkpoint of plain floats has, by their names, and notes on what was changed.

    A quantization_config is left out where no tensor is quantized (16-bit weights merged from a quantized base). Where
    there is no lm_head.weight the embeddings are the head, as llama.cpp's converter and loader take them; transformers
    would make up a random one. transformers_weights is left out: it names files of the source. Layers for multi-token
    prediction are those that are there.
    """
    changed, notes = {key: value for key, value in config.items() if key != WEIGHTS_KEY}, []
    if not any(name.endswith(_SCALES) or "bitsandbytes" in name for name in tensors):
        for key in QUANTIZATIONS:
            if (left := changed.get(key)) is not None:
                del changed[key]
                method = left.get("quant_method") if isinstance(left, Mapping) else None
                notes.append(
                    f"config.json has a {key} ({method!r:.60}) although no tensor is quantized: it is another model's"
                    " and is left out"
                )
    family = family_of(config)
    tied = (config if family is None else text_config(family, config)).get("tie_word_embeddings", False)
    if HEAD not in tensors and EMBEDDINGS in tensors and tied is False:
        changed["tie_word_embeddings"] = True
        changed = changed if family is None else with_value(family, changed, "tie_word_embeddings", True)
        notes.append(
            f"WARNING: there is no {HEAD} although tie_word_embeddings is false: the embeddings are the head, as"
            " llama.cpp takes them; the config.json of FP8 folders says so"
        )
    changed, told = config_of_mtp_layers(changed, tensors)
    return changed, (*notes, *told)


def read_config(place: Place) -> dict[str, Any]:
    """config.json with what is said of quantization at its top.

    ModelOpt's first checkpoints say it in hf_quant_config.json alone, which llama.cpp's converter and vLLM read, and
    transformers does not. Raises StreamquantError for a file that is no JSON object.
    """
    config = with_quantization_outside(place.read(CONFIG))
    if MODELOPT not in place.names or any(config.get(key) is not None for key in QUANTIZATIONS):
        return config
    record = place.read(MODELOPT)
    producer, found = record.get("producer"), record.get("quantization")
    if isinstance(producer, Mapping) and producer.get("name") == "modelopt" and isinstance(found, Mapping):
        config[QUANTIZATIONS[0]] = {"quant_method": "modelopt", **found}
    return config


def with_quantization_outside(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what it says of quantization at its top, and not in text_config, where Kimi K2.5 has it.

    llama.cpp's converter and vLLM read it in either place, transformers at the top alone; of two that counts.

    >>> with_quantization_outside({"text_config": {"quantization_config": {"quant_method": "fp8"}, "vocab_size": 9}})
    {'text_config': {'vocab_size': 9}, 'quantization_config': {'quant_method': 'fp8'}}
    """
    text = config.get(TEXT)
    if not isinstance(text, Mapping):
        return dict(config)
    inside = {key: text[key] for key in QUANTIZATIONS if text.get(key) is not None}
    if not inside:
        return dict(config)
    plain = {key: value for key, value in text.items() if key not in inside}
    has_own = any(config.get(key) is not None for key in QUANTIZATIONS)
    return {**config, TEXT: plain, **({} if has_own else inside)}


def config_of_mtp_layers(config: Mapping[str, Any], tensors: Collection[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json with the number of layers for multi-token prediction that a checkpoint has, and a note on them.

    Tools lose these layers, and config.json keeps their number: llama.cpp would miss a block (its issue 24737).
    """
    family = family_of(config)
    if family is None or family.mtp is None:
        return dict(config), ()
    own = text_config(family, config)
    layers = own.get("num_hidden_layers")
    if type(layers) is not int:
        return dict(config), ()  # told where it is read
    key = family.mtp.key
    said, found = own.get(key, family.defaults.get(key)), stored_mtp_layers(tensors, layers)
    if (said or 0) == found:
        return dict(config), ()
    says = "says nothing of" if said is None else f"says {said!r:.20} of"
    kept = (
        f"{found} are converted, which the checkpoint has" if found else "the checkpoint has none, nor has any variant"
    )
    return with_value(family, config, key, found), (
        f"config.json {says} layers for multi-token prediction ({key}); {kept}",
    )
