"""The checkpoints that the benchmarks convert: synthetic, deterministic, of the shapes of real models."""

import json
from pathlib import Path

import numpy as np

from tests.peers import DATA
from tests.synthetic import (
    Weight,
    copy_tokenizer,
    draw,
    encode,
    make_config,
    split,
    weights_of,
    write_checkpoint,
    write_side_files,
)

TOKENIZER = DATA / "tokenizers" / "hermes4-llama"
QWEN_TOKENIZER = DATA / "tokenizers" / "hermes4-14b"
# Llama 3.1 405B has 128 heads; with 8 the disk needs 20 % less and the largest matrices are the same.
LLAMA_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
BLOCK_BYTES = 64 * 2**20


def llama(folder: Path, layers: int, *, width: int = 2048, tokenizer: bool = False, shards: int = 3) -> Path:
    """A Llama of `width` with feed-forward 4 times as wide.

    Without a tokenizer it has 32000 tokens and a head; with one, 128256 tokens and tied embeddings.
    """
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128,
    }
    if tokenizer:
        return write_checkpoint(folder, size=sizes, shards=shards, tied=True, tokenizer=TOKENIZER)
    return write_checkpoint(folder, size={**sizes, "vocab_size": 32000}, shards=shards)


def mixture(folder: Path, experts: int, *, layers: int = 6, width: int = 1024) -> Path:
    """A Qwen 3 MoE with Qwen 3's tokenizer; with more experts each is smaller, and the weights are as many."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128,
        "head_dim": 128,
    }
    return write_checkpoint(
        folder,
        architecture="Qwen3MoeForCausalLM",
        size=sizes,
        shards=3,
        tied=True,
        tokenizer=QWEN_TOKENIZER,
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=32 * width // experts,
    )


def huge(folder: Path, layers: int, *, scale: int = 1) -> Path:
    """Layers of the shape of Llama 3.1 405B's, its embeddings and tokenizer; the weights repeat 64 MB of random ones.

    The embeddings are tied: two matrices of 4.2 GB in source and outputs would fill small disks and show nothing more.
    `scale` divides width and feed-forward, for a quick run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = LLAMA_405B | {key: LLAMA_405B[key] // scale for key in ("hidden_size", "intermediate_size")}
    config = make_config(
        "LlamaForCausalLM", {**sizes, "num_hidden_layers": layers}, tied=True, tokenizer=TOKENIZER, rope="llama3"
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_tokenizer(TOKENIZER, folder)
    write_side_files(folder, config)
    random = np.random.default_rng(0)
    block = encode(draw(random, 0, 1024, BLOCK_BYTES // 2 // 1024, False), "BF16").tobytes()
    parts = split(list(weights_of(config)), 2)
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        _write_shard(folder / name, part, memoryview(block))
    weight_map = {weight.name: name for name, part in zip(names, parts, strict=True) for weight in part}
    total = 2 * sum(weight.count for part in parts for weight in part)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _write_shard(path: Path, weights: list[Weight], block: memoryview) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in weights:
        header[weight.name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + 2 * weight.count],
        }
        offset += 2 * weight.count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset > 0:
            offset -= file.write(block[: min(offset, len(block))])


def source_bytes(folder: Path) -> int:
    """Bytes of the shards of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
