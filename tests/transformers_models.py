"""Tiny checkpoints of transformers' own classes, by the keys of their config.json."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.family_checks import add_tokenizer, randomize
from tests.quantized_sources import write
from tests.tokenizer_folders import edit

VOCABULARY = 320


@dataclass(frozen=True, slots=True)
class Case:
    """A model: the keys of its config.json over those of COMMON, and what is done to the folder after saving."""

    config: Mapping[str, Any]
    stored: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that transformers does not write as publishers do; `...` removes one."""
    spread: float = 0.1
    """Of the matrices."""
    has_sentencepiece: bool = False
    """Whether its vocabulary is a tokenizer.model."""
    is_refused: bool = False
    """Whether llama.cpp does not load it, which is a warning in the plan."""
    loads_in_fp8: bool = True
    """Whether transformers loads a tensor for each expert in FP8 into its class."""

    @property
    def is_wrapped(self) -> bool:
        """Whether it also sees."""
        return "text_config" in self.config

    @property
    def loader(self) -> Any:
        """The class of transformers that loads it."""
        return AutoModelForImageTextToText if self.is_wrapped else AutoModelForCausalLM


COMMON: Mapping[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
}


def write_model(folder: Path, case: Case) -> Path:
    """The checkpoint of a case in BF16, with a small tokenizer."""
    settings = {**({} if case.is_wrapped else COMMON), **case.config}
    if case.is_wrapped:
        settings["text_config"] = {**COMMON, **case.config["text_config"]}
    model = case.loader.from_config(AutoConfig.for_model(**settings)).float()
    biases = (tensor for name, tensor in model.named_buffers() if name.endswith("expert_bias"))
    randomize([*model.parameters(), *biases], case.spread)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = {**json.loads((folder / "config.json").read_text()), **case.stored}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    add_tokenizer(folder)
    if case.has_sentencepiece:
        (folder / "tokenizer.json").unlink()
        write_sentencepiece(folder / "tokenizer.model")
    return folder


def write_sentencepiece(path: Path) -> None:
    """A small vocabulary as Gemma's: BPE with bytes, no space put in front."""
    words = [f"{a}{b}" for a in ("sun", "moon", "rain", "wind") for b in ("set", "rise", "light", "fall", "storm")]
    texts = [f"{word} and {other}" for word in words for other in words]
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()


def quantize_to_static_fp8(source: Path, folder: Path) -> Path:
    """The checkpoint in FP8 with one scale a matrix and one for its input, as Ministral 3 is published."""
    shutil.copytree(source, folder)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = tensor
        if name.endswith("_proj.weight") and "vision_tower" not in name:
            scale = (tensor.float().abs().max() / 448).bfloat16()
            stored[name] = (tensor.float() / scale.float()).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            stored[name.replace(".weight", ".activation_scale")] = torch.tensor(0.25).bfloat16()
    write(folder, stored)
    quantization = {
        **{"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    edit(folder / "config.json", lambda config: config.update(quantization_config=quantization))
    return folder
