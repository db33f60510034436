"""Synthetic checkpoints: deterministic folders that look like a Hugging Face repository of a supported family.

Names, shapes and config keys are written down here on their own, from the published repositories, and not taken from
convert/architectures: they are what that package is tested against. Nothing is instantiated; the weights go to disk as
they are drawn, a few MB at a time, so that checkpoints of many GB need little memory.
"""

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

ConfigStyle = Literal["v4", "v5"]

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SeedOssForCausalLM",
)
MIXTURES = (
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    "Glm4MoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Dots1ForCausalLM",
    "OlmoeForCausalLM",
)

# What each family's config.json carries besides the sizes (transformers 4.57 and 5 agree on these keys).
FAMILY_KEYS: Mapping[str, Mapping[str, object]] = {
    "LlamaForCausalLM": {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": None},
    "Qwen2ForCausalLM": {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 1,
    },
    "Qwen3ForCausalLM": {
        "model_type": "qwen3",
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 1,
    },
    "MixtralForCausalLM": {
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    },
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "Glm4MoeForCausalLM": {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 96,
        "n_group": 1,
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    "Qwen2MoeForCausalLM": {
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 96,
        "norm_topk_prob": False,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 160,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "Dots1ForCausalLM": {
        "model_type": "dots1",
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 96,
        "n_group": 1,
        "n_routed_experts": 5,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "sliding_window": None,
        "topk_group": 1,
    },
    "OlmoeForCausalLM": {
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    "SeedOssForCausalLM": {
        "model_type": "seed_oss",
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "residual_dropout": 0.1,
        "pretraining_tp": 1,
    },
}
THETA = {
    "LlamaForCausalLM": 500000.0,
    "MistralForCausalLM": 1000000.0,
    "Qwen2ForCausalLM": 1000000.0,
    "Qwen3ForCausalLM": 1000000.0,
    "MixtralForCausalLM": 1000000.0,
    "Qwen3MoeForCausalLM": 1000000.0,
    "Glm4MoeForCausalLM": 1000000.0,
    "Qwen2MoeForCausalLM": 1000000.0,
    "Dots1ForCausalLM": 10000000.0,
    "OlmoeForCausalLM": 10000.0,
    "SeedOssForCausalLM": 10000000.0,
}
SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}
# Families whose heads are as wide as the config says: heads * head_dim is not hidden_size, as in Seed-OSS-36B.
HEAD_DIM = {
    ("Qwen3ForCausalLM", "tiny"): 32,
    ("Qwen3ForCausalLM", "small"): 64,
    ("Qwen3MoeForCausalLM", "tiny"): 32,
    ("Qwen3MoeForCausalLM", "small"): 64,
    ("Glm4MoeForCausalLM", "tiny"): 32,
    ("Glm4MoeForCausalLM", "small"): 64,
    ("SeedOssForCausalLM", "tiny"): 32,
    ("SeedOssForCausalLM", "small"): 64,
}
ROPE: Mapping[str, Mapping[str, object]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
TORCH_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
)
GLM_TOKENS = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
"""The special tokens by which llama.cpp's converter knows a tokenizer of GLM."""
CHUNK_WEIGHTS = 1 << 22
DEFAULT_VOCABULARY = 512

README = """---
language:
- en
license: apache-2.0
base_model: example-org/Synthetic-Base-1B
library_name: transformers
pipeline_tag: text-generation
tags:
- synthetic
- {tag}
---

# Synthetic {name}

Random weights, written by the tests of streamquant.
"""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to write: its HF name, shape, and whether its values lie near 1 (norms) or near 0."""

    name: str
    shape: tuple[int, ...]
    is_norm: bool = False
    dtype: str | None = None
    """Where it is not that of the checkpoint."""

    def nbytes(self, dtype: str) -> int:
        """Bytes in a checkpoint of this dtype."""
        return self.count * ITEM_BYTES[self.dtype or dtype]

    @property
    def count(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))


def write_checkpoint(
    folder: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    size: str | Mapping[str, int] = "tiny",
    dtype: str = "BF16",
    shards: int = 1,
    tied: bool = False,
    seed: int = 0,
    tokenizer: Path | None = None,
    rope: str | Mapping[str, object] = "default",
    config_style: ConfigStyle = "v5",
    extra_side_files: bool = True,
    pth: bool = False,
    duplicate_head: bool = False,
    **config_overrides: object,
) -> Path:
    """Write a checkpoint folder and return it.

    size is "tiny", "small", or the size keys of config.json. rope is a name of ROPE or the dict itself (rope_theta in
    it replaces the family's). Overrides replace or add keys of config.json; the value `...` removes one. tokenizer is a
    folder whose tokenizer files are copied; the vocabulary is then as large as that tokenizer needs, rounded up to 64.
    pth adds original/consolidated.00.pth, as Llama's own repositories have. duplicate_head writes lm_head.weight
    although the embeddings are tied.
    The same arguments give the same bytes; the weights depend on seed and tensor name only, not on the sharding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(architecture, size, dtype, tied, tokenizer, rope, config_style, config_overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    head = [Weight("lm_head.weight", next(weights_of(config)).shape)] if duplicate_head else []
    write_weights(folder, [*weights_of(config), *head], dtype, shards, seed)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    if extra_side_files:
        write_side_files(folder, config)
    if pth:
        (folder / "original").mkdir(exist_ok=True)
        (folder / "original" / "consolidated.00.pth").write_bytes(b"not a real pickle" * 64)
    return folder


def make_config(
    architecture: str,
    size: str | Mapping[str, int] = "tiny",
    dtype: str = "BF16",
    tied: bool = False,
    tokenizer: Path | None = None,
    rope: str | Mapping[str, object] = "default",
    config_style: ConfigStyle = "v5",
    overrides: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """config.json as transformers 4 or 5 would write it for such a model."""
    config: dict[str, object] = {"architectures": [architecture], **FAMILY_KEYS[architecture]}
    config.update(
        attention_dropout=0.0,
        hidden_act="silu",
        initializer_range=0.02,
        max_position_embeddings=131072,
        rms_norm_eps=1e-05,
        tie_word_embeddings=tied,
        use_cache=True,
        vocab_size=DEFAULT_VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
    )
    if tokenizer is not None:
        config.update(vocabulary_keys(tokenizer))
    config.update(SIZES[size] if isinstance(size, str) else size)
    if isinstance(size, str) and (architecture, size) in HEAD_DIM:
        config["head_dim"] = HEAD_DIM[architecture, size]
    config.update(rope_keys(architecture, rope, config_style))
    config["dtype" if config_style == "v5" else "torch_dtype"] = TORCH_DTYPE[dtype]
    config["transformers_version"] = "5.17.0" if config_style == "v5" else "4.57.6"
    config.update(overrides or {})
    return {key: value for key, value in config.items() if value is not ...}


def rope_keys(architecture: str, rope: str | Mapping[str, object], style: ConfigStyle) -> dict[str, object]:
    """The rope settings where transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) keeps them."""
    settings = dict(ROPE[rope] if isinstance(rope, str) else rope)
    theta = settings.pop("rope_theta", THETA[architecture])
    if style == "v4":
        return {"rope_theta": theta, "rope_scaling": settings or None}
    return {"rope_parameters": {"rope_type": "default", **settings, "rope_theta": theta}}


def weights_of(config: Mapping[str, object]) -> Iterator[Weight]:
    """Every tensor of a checkpoint with this config, in the order of a state dict."""
    sizes = {key: value for key, value in config.items() if isinstance(value, int)}
    hidden, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    yield Weight("model.embed_tokens.weight", (vocabulary, hidden))
    for layer in range(sizes["num_hidden_layers"] + sizes.get("num_nextn_predict_layers", 0)):
        for weight in layer_weights(config, sizes, layer):
            yield replace(weight, name=f"model.layers.{layer}.{weight.name}")
    yield Weight("model.norm.weight", (hidden,), is_norm=True)
    if not config.get("tie_word_embeddings", False):
        yield Weight("lm_head.weight", (vocabulary, hidden))


def layer_weights(config: Mapping[str, object], sizes: Mapping[str, int], layer: int) -> Iterator[Weight]:
    """The tensors of one decoder layer, named inside the layer."""
    kind = config["model_type"]
    glm = kind == "glm4_moe"
    qwen2, qwen3_moe = (config["model_type"] == name for name in ("qwen2", "qwen3_moe"))
    qwen3 = qwen3_moe or config["model_type"] == "qwen3"
    seed_oss = config["model_type"] == "seed_oss"
    hidden, wide, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    fixed_head_dim = (
        config["model_type"] == "qwen3" or seed_oss
    ) and "head_dim" not in config  # an explicit null is hidden // heads again
    head_dim = sizes.get("head_dim", 128 if fixed_head_dim else hidden // heads)
    rows = {"q": heads * head_dim, "k": sizes.get("num_key_value_heads", heads) * head_dim}
    rows["v"] = rows["k"]
    attention_bias = qwen2 or bool(config.get("attention_bias", config.get("qkv_bias", False)))
    out_bias = (
        bool(config.get("attention_out_bias", False))
        if seed_oss
        else attention_bias and not (qwen2 or glm or kind == "qwen2_moe")
    )
    for part in "qkv":
        yield Weight(f"self_attn.{part}_proj.weight", (rows[part], hidden))
        if attention_bias:
            yield Weight(f"self_attn.{part}_proj.bias", (rows[part],))
    yield Weight("self_attn.o_proj.weight", (hidden, rows["q"]))
    if out_bias:
        yield Weight("self_attn.o_proj.bias", (hidden,))
    if kind == "olmoe":
        yield Weight("self_attn.q_norm.weight", (rows["q"],), is_norm=True)
        yield Weight("self_attn.k_norm.weight", (rows["k"],), is_norm=True)
    elif qwen3 or kind == "dots1" or config.get("use_qk_norm", False):
        yield Weight("self_attn.q_norm.weight", (head_dim,), is_norm=True)
        yield Weight("self_attn.k_norm.weight", (head_dim,), is_norm=True)
    if (glm or kind == "dots1") and layer >= sizes["first_k_dense_replace"]:
        yield from glm_experts(config, sizes, layer)
    elif qwen3_moe or kind in ("qwen2_moe", "olmoe"):
        narrow = sizes.get("moe_intermediate_size", wide)
        if kind == "qwen2_moe":
            shared = sizes["shared_expert_intermediate_size"]
            yield Weight("mlp.shared_expert_gate.weight", (1, hidden))
            for part, shape in (("gate", (shared, hidden)), ("up", (shared, hidden)), ("down", (hidden, shared))):
                yield Weight(f"mlp.shared_expert.{part}_proj.weight", shape)
        names = {"gate_proj": (narrow, hidden), "up_proj": (narrow, hidden), "down_proj": (hidden, narrow)}
        yield from expert_weights("mlp", sizes["num_experts"], hidden, names)
    elif config["model_type"] == "mixtral":
        names = {"w1": (wide, hidden), "w2": (hidden, wide), "w3": (wide, hidden)}
        yield from expert_weights("block_sparse_moe", sizes["num_local_experts"], hidden, names)
    else:
        for part, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            yield Weight(f"mlp.{part}_proj.weight", shape)
            if config.get("mlp_bias", False):
                yield Weight(f"mlp.{part}_proj.bias", shape[:1])
    yield Weight("input_layernorm.weight", (hidden,), is_norm=True)
    yield Weight("post_attention_layernorm.weight", (hidden,), is_norm=True)


def glm_experts(config: Mapping[str, object], sizes: Mapping[str, int], layer: int) -> Iterator[Weight]:
    """The feed-forward of a layer of GLM-4.5 and dots.llm1 with experts, and what only GLM's last layer has."""
    hidden, narrow, vocabulary = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["vocab_size"]
    wide = sizes["n_shared_experts"] * narrow
    for name, shape in (("gate_proj", (wide, hidden)), ("up_proj", (wide, hidden)), ("down_proj", (hidden, wide))):
        yield Weight(f"mlp.shared_experts.{name}.weight", shape)
    names = {"gate_proj": (narrow, hidden), "up_proj": (narrow, hidden), "down_proj": (hidden, narrow)}
    yield from expert_weights("mlp", sizes["n_routed_experts"], hidden, names)
    yield Weight("mlp.gate.e_score_correction_bias", (sizes["n_routed_experts"],), dtype="F32")
    if layer >= sizes["num_hidden_layers"]:
        yield Weight("eh_proj.weight", (hidden, 2 * hidden))
        yield Weight("enorm.weight", (hidden,), is_norm=True)
        yield Weight("hnorm.weight", (hidden,), is_norm=True)
        yield Weight("shared_head.norm.weight", (hidden,), is_norm=True)
        if config.get("own_ends", True):
            yield Weight("embed_tokens.weight", (vocabulary, hidden))
            yield Weight("shared_head.head.weight", (vocabulary, hidden))


def expert_weights(path: str, count: int, hidden: int, names: Mapping[str, tuple[int, int]]) -> Iterator[Weight]:
    """The router and the experts of a layer, in the order of a state dict before transformers fused them."""
    yield Weight(f"{path}.gate.weight", (count, hidden))
    for expert in range(count):
        for name, shape in names.items():
            yield Weight(f"{path}.experts.{expert}.{name}.weight", shape)


def write_weights(folder: Path, weights: list[Weight], dtype: str, shards: int, seed: int) -> None:
    """Write model.safetensors, or `shards` files of about equal size and their index, in Hugging Face's naming."""
    if shards == 1:
        write_shard(folder / "model.safetensors", weights, dtype, seed)
        return
    parts = split(weights, shards)
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    for name, part in zip(names, parts, strict=True):
        write_shard(folder / name, part, dtype, seed)
    weight_map = {weight.name: name for name, part in zip(names, parts, strict=True) for weight in part}
    total = sum(weight.count for weight in weights)
    index = {
        "metadata": {
            "total_parameters": total,
            "total_size": sum(w.count * ITEM_BYTES[w.dtype or dtype] for w in weights),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def split(weights: list[Weight], shards: int) -> list[list[Weight]]:
    """Cut the list into `shards` runs of about equal numbers of weights; no run is empty."""
    if shards > len(weights):
        raise ValueError(f"{len(weights)} tensors do not fill {shards} shards")
    total = sum(weight.count for weight in weights)
    parts: list[list[Weight]] = [[]]
    written = 0
    for position, weight in enumerate(weights):
        full = written >= total * len(parts) / shards
        needed = shards - len(parts) >= len(weights) - position
        if parts[-1] and len(parts) < shards and (full or needed):
            parts.append([])
        parts[-1].append(weight)
        written += weight.count
    return parts


def write_shard(path: Path, weights: list[Weight], dtype: str, seed: int) -> None:
    """Write one safetensors file, streaming: its header, then the tensors in the order of their names, without gaps."""
    with path.open("wb") as file:
        file.write(shard_header(weights, dtype))
        for weight in sorted(weights, key=lambda weight: weight.name):
            write_values(file, weight, dtype, seed)


def shard_header(weights: list[Weight], dtype: str) -> bytes:
    """The header of a safetensors file: u64 length, JSON padded to 8 bytes; tensors in the order of their names."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in sorted(weights, key=lambda weight: weight.name):
        end = offset + weight.nbytes(dtype)
        header[weight.name] = {
            "dtype": weight.dtype or dtype,
            "shape": list(weight.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_values(file: BinaryIO, weight: Weight, dtype: str, seed: int) -> None:
    """Draw a tensor chunk by chunk and write it."""
    generator = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
    columns = weight.shape[-1]
    rows = weight.count // columns
    step = max(1, CHUNK_WEIGHTS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        values = draw(generator, first, count, columns, weight.is_norm)
        file.write(encode(values, weight.dtype or dtype).tobytes())


def draw(generator: np.random.Generator, first: int, rows: int, columns: int, is_norm: bool) -> NDArray[np.float32]:
    """float32[rows, columns]: normal, spread 0.02 (norms: 1 + 0.1 * normal); every 16th row has heavy tails."""
    values = generator.standard_normal((rows, columns), dtype=np.float32)
    if is_norm:
        return np.float32(1.0) + np.float32(0.1) * values
    heavy = (np.arange(first, first + rows) % 16) == 5
    values[heavy] *= np.abs(values[heavy])
    values *= np.float32(0.02)
    return values


def encode(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """float32 to the stored dtype; BF16 as uint16 bit patterns, rounded to nearest even."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    bits += ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    bits >>= np.uint32(16)
    return bits.astype(np.uint16)


def vocabulary_keys(tokenizer: Path) -> dict[str, object]:
    """vocab_size, bos_token_id and eos_token_id that fit a tokenizer folder."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    ids: dict[str, int] = dict(content["model"]["vocab"])
    ids.update({token["content"]: token["id"] for token in content["added_tokens"]})
    keys: dict[str, object] = {"vocab_size": -(-(max(ids.values()) + 1) // 64) * 64}
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    for name in ("bos", "eos"):
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        keys[f"{name}_token_id"] = ids.get(text)
    return keys


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy the files of a tokenizer that exist."""
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def write_side_files(folder: Path, config: Mapping[str, object]) -> None:
    """generation_config.json with Hermes' sampling, README.md with front matter, LICENSE."""
    generation = {
        "_from_model_config": True,
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": config["eos_token_id"],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": config["transformers_version"],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    model_type = str(config["model_type"])
    (folder / "README.md").write_text(README.format(tag=model_type, name=model_type.title()))
    (folder / "LICENSE").write_text("Apache License, Version 2.0\nhttps://www.apache.org/licenses/LICENSE-2.0\n")
