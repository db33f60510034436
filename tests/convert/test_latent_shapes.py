"""Models with latent attention in full size, by their headers alone: DeepSeek V3.1, Kimi K2.6, GLM-4.7-Flash.

Sizes are those of the published config.json files and lists of tensors. Shards are sparse files, one a layer.
"""

import base64
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests.conftest import Shelf
from tests.shapes import seed_tokenizer
from tests.synthetic import GLM_TOKENS
from tests.tokenizer_folders import KIMI_CODE, KIMI_NAMES

ITEM_BYTES = {"BF16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}
Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""
MOST_MEMORY = 1.2 * 2**30
MOST_SECONDS = 15  # of CPU
YARN = {"type": "yarn", "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
COMMON: Mapping[str, Any] = {
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512, "q_lora_rank": 1536},
    **{"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_shared_experts": 1},
    **{"num_hidden_layers": 61, "num_experts_per_tok": 8, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    **{"norm_topk_prob": True, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False},
    **{"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1},
}
DEEPSEEK = {
    **{**COMMON, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_group": 8, "topk_group": 4},
    **{"first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 10000},
    **{"max_position_embeddings": 163840, "rope_scaling": {**YARN, "factor": 40, "beta_fast": 32, "beta_slow": 1}},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
KIMI = {
    **{**COMMON, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "vocab_size": 163840},
    **{"num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "num_nextn_predict_layers": 0},
    **{"routed_scaling_factor": 2.827, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "max_position_embeddings": 262144},
    "rope_scaling": {**YARN, "factor": 64.0, "beta_fast": 32.0, "beta_slow": 1.0},
    "quantization_config": {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
        },
    },
}
GLM = {
    **{**COMMON, "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "vocab_size": 154880},
    **{"hidden_size": 2048, "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20},
    **{"q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "intermediate_size": 10240},
    **{"moe_intermediate_size": 1536, "n_routed_experts": 64, "num_experts_per_tok": 4, "routed_scaling_factor": 1.8},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1000000, "max_position_embeddings": 202752},
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model: its text model's config.json, where its experts or all matrices are quantized, its size."""

    config: Mapping[str, Any]
    billions: float
    """Weights, as the Hub counts those of plain floats."""
    gib: float | None = None
    """Of all tensors, as they are published."""
    around: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the class around it."""
    more: tuple[Tensor, ...] = ()
    """What that class has beside."""
    is_in_time: bool = True
    """Whether its plan is made within MOST_SECONDS."""


def tower() -> Iterator[Tensor]:
    """What of Kimi K2.6 sees."""
    shapes: dict[str, tuple[int, ...]] = {
        **{"mm_projector.pre_norm": (1152,), "mm_projector.proj.0": (4608, 4608), "mm_projector.proj.2": (7168, 4608)},
        **{"vision_tower.patch_embed.proj": (1152, 3, 14, 14), "vision_tower.encoder.final_layernorm": (1152,)},
    }
    block = {"mlp.fc0": (4304, 1152), "mlp.fc1": (1152, 4304), "norm0": (1152,), "norm1": (1152,)}
    block |= {"wo": (1152, 1152), "wqkv": (3456, 1152)}
    shapes |= {f"vision_tower.encoder.blocks.{n}.{name}": shape for n in range(27) for name, shape in block.items()}
    for name, shape in shapes.items():
        yield f"{name}.weight", "BF16", shape
        yield f"{name}.bias", "BF16", shape[:1]
    yield "vision_tower.patch_embed.pos_emb.weight", "BF16", (64, 64, 1152)


SHAPES: Mapping[str, Shape] = {
    "DeepSeek-V3.1": Shape(DEEPSEEK, 684.49),
    "Kimi-K2.6": Shape(
        KIMI,
        1026.41 + 0.47,
        554.27,
        {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "tie_word_embeddings": False},
        tuple(tower()),
        is_in_time=False,  # 208,000 tensors and 163,000 ranks of tiktoken: 16 to 30 s, by what else the machine does
    ),
    "GLM-4.7-Flash": Shape(GLM, 31.22),
}


def layer(config: Mapping[str, Any], number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a layer with their shapes, before they are quantized."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotated, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    queries = config["q_lora_rank"]
    yield from {
        **{"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_a_layernorm": (queries,)},
        **{"self_attn.kv_a_layernorm": (rank,), "self_attn.q_a_proj": (queries, hidden)},
        **{"self_attn.q_b_proj": (heads * (plain + rotated), queries), "self_attn.o_proj": (hidden, heads * value)},
        **{"self_attn.kv_a_proj_with_mqa": (rank + rotated, hidden)},
        **{"self_attn.kv_b_proj": (heads * (plain + value), rank)},
    }.items()
    experts, narrow = config["n_routed_experts"], config["moe_intermediate_size"]
    blocks = {"mlp": config["intermediate_size"]}
    if number >= config["first_k_dense_replace"]:
        blocks = {f"mlp.experts.{expert}": narrow for expert in range(experts)}
        blocks["mlp.shared_experts"] = narrow * config["n_shared_experts"]
        yield "mlp.gate", (experts, hidden)
        yield "mlp.gate.e_score_correction_bias", (experts,)
    for path, wide in blocks.items():
        yield f"{path}.gate_proj", (wide, hidden)
        yield f"{path}.up_proj", (wide, hidden)
        yield f"{path}.down_proj", (hidden, wide)
    if number >= config["num_hidden_layers"]:
        yield from {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,)}.items()
        yield from {"shared_head.norm": (hidden,), "shared_head.head": (config["vocab_size"], hidden)}.items()
        yield "embed_tokens", (config["vocab_size"], hidden)


def stored(config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor as it is published."""
    method = config.get("quantization_config", {}).get("quant_method")
    if name.endswith("e_score_correction_bias"):
        yield name, "F32", shape
    elif method == "fp8" and name.endswith(("_proj", "_mqa")) and "eh_proj" not in name:
        yield f"{name}.weight", "F8_E4M3", shape
        yield f"{name}.weight_scale_inv", "F32", tuple(math.ceil(size / 128) for size in shape)
    elif method == "compressed-tensors" and ".experts." in name:
        yield f"{name}.weight_packed", "I32", (shape[0], shape[1] // 8)
        yield f"{name}.weight_scale", "BF16", (shape[0], shape[1] // 32)
        yield f"{name}.weight_shape", "I32", (2,)
    else:
        yield f"{name}.weight", "BF16", shape


def write_shard(path: Path, tensors: list[Tensor]) -> None:
    """A sparse file with the header of these tensors."""
    header, at = {}, 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """One of as many tokens: Kimi's of tiktoken, with 163,584 ranks of 7.5 bytes on average."""
    if config["model_type"] != "kimi_k2":
        special = GLM_TOKENS if config["model_type"] == "glm4_moe_lite" else ()
        seed_tokenizer(config["vocab_size"] - 256, special).save(str(folder / "tokenizer.json"))
        settings = {"bos_token": "<seed:bos>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return
    tokens = [bytes([byte]) for byte in range(256)]
    for first, last, count in ((0, 256, 2000), (256, 2256, 20000), (2256, 22256, 163584 - 22256)):
        pool = tokens[first:last]
        tokens += [pool[number % len(pool)] + pool[number // len(pool)] for number in range(count)]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    (folder / "tokenization_kimi.py").write_text(KIMI_CODE)
    named = {str(163584 + place): {"content": text, "special": True} for place, text in KIMI_NAMES.items()}
    auto_map = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    of_kimi = {"added_tokens_decoder": named, "auto_map": auto_map, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(of_kimi))


def write_shape(folder: Path, shape: Shape) -> Path:
    """The checkpoint, with its index."""
    folder.mkdir(parents=True)
    config, outer = shape.config, "language_model." if shape.around else ""
    matrix = (config["vocab_size"], config["hidden_size"])
    ends = [
        *stored(config, "model.embed_tokens", matrix),
        *stored(config, "model.norm", matrix[1:]),
        *stored(config, "lm_head", matrix),
    ]
    shards = [[(outer + name, dtype, size) for name, dtype, size in ends] + list(shape.more)]
    for number in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        of_layer = (tensor for name, size in layer(config, number) for tensor in stored(config, name, size))
        shards.append([(f"{outer}model.layers.{number}.{name}", dtype, size) for name, dtype, size in of_layer])
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        write_shard(folder / name, tensors)
    weight_map = {tensor[0]: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole = {**shape.around, "text_config": config, "vision_config": {}} if shape.around else config
    (folder / "config.json").write_text(json.dumps(whole))
    write_tokenizer(folder, config)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.timeout(600)
def test_plans_in_full_size(shelf: Shelf, name: str) -> None:
    shape = SHAPES[name]
    folder = shelf.get(f"latent-{name}", lambda place: write_shape(place / name, shape)) / name
    started = time.process_time()
    source = open_checkpoint(folder)
    plan = make_plan(source, parse_variants(["gguf:BF16,Q4_K_M", "fp8-dynamic"]), ConversionOptions())
    chunks = len(plan.chunks)
    seconds = time.process_time() - started
    assert source.parameter_count / 1e9 == pytest.approx(shape.billions, abs=0.005)
    assert shape.gib is None or source.nbytes / 2**30 == pytest.approx(shape.gib, abs=0.01)
    assert chunks >= sum(".experts." in tensor for tensor in source.tensors)
    assert plan.memory_bytes(16) < MOST_MEMORY
    assert seconds < MOST_SECONDS or not shape.is_in_time
