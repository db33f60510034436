"""Checkpoints in the exact shape of published models, without their weights: names, shapes, shards, index, side files.

    write_shape(SHAPES["Hermes-4-405B"], folder, data)      # 812 GB of sparse files: a few MB on the disk
    hub.add_repo("NousResearch/Hermes-4-405B", files_of(SHAPES["Hermes-4-405B"], data))

Config values are those of the models' cards and of their base models (shared/reference/hermes4.md, section 2). Shards
are cut as transformers' save_pretrained cuts them, by huggingface_hub's own function at 5 GB. Tokenizers are those of
shared/data/tokenizers; Seed-OSS' is not at hand, so that Hermes-4.3-36B gets a made-up one of as many tokens, with its
pre-tokenizer and special tokens, whose texts are about as long as real ones (`seed_tokenizer`).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tests.hub.blobs import SparseFile
from tests.synthetic import FAMILY_KEYS, GLM_TOKENS, TOKENIZER_FILES, Weight, shard_header, weights_of

MAX_SHARD_SIZE = "5GB"
"""save_pretrained's limit before transformers 5, under which the Hermes models were saved."""
_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA = {
    "rope_theta": 500000.0,
    "rope_scaling": _LLAMA3_ROPE,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 131072,
}
_LLAMA_TOKENS = {"vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128009}
_SEED_TEXTS = {"bos": "<seed:bos>", "eos": "<|eot_id|>", "pad": "<seed:pad>"}
_SEED_MORE = ("<|start_header_id|>", "<|end_header_id|>")
_SEED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model.

    sizes      what its config.json says besides what its family always says
    tokenizer  folder of shared/data/tokenizers; None: made up
    shards     files that its weights lie in
    """

    name: str
    architecture: str
    sizes: Mapping[str, object]
    tokenizer: str | None
    shards: int
    license: str
    base_model: str

    @property
    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": [self.architecture],
            **FAMILY_KEYS[self.architecture],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.55.0",
            **self.sizes,
        }

    @property
    def weights(self) -> list[Weight]:
        """Every tensor, in the order of the state dict."""
        return list(weights_of(self.config))


def _sizes(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate,
    }


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "Hermes-4-405B",
            "LlamaForCausalLM",
            {**_sizes(16384, 126, 128, 53248), **_LLAMA, **_LLAMA_TOKENS},
            "hermes4-llama",
            191,
            "llama3",
            "meta-llama/Meta-Llama-3.1-405B",
        ),
        Shape(
            "Hermes-4-70B",
            "LlamaForCausalLM",
            {**_sizes(8192, 80, 64, 28672), **_LLAMA, **_LLAMA_TOKENS},
            "hermes4-llama",
            30,
            "llama3",
            "meta-llama/Meta-Llama-3.1-70B",
        ),
        Shape(
            "Hermes-4-14B",
            "Qwen3ForCausalLM",
            {
                **_sizes(5120, 40, 40, 17408),
                **{"rope_theta": 1000000, "rope_scaling": None, "rms_norm_eps": 1e-06, "max_window_layers": 40},
                **{"vocab_size": 151936, "max_position_embeddings": 40960, "bos_token_id": 151643},
                "eos_token_id": 151645,
            },
            "hermes4-14b",
            6,
            "apache-2.0",
            "Qwen/Qwen3-14B",
        ),
        Shape(
            "Hermes-4.3-36B",
            "SeedOssForCausalLM",
            {
                **_sizes(5120, 64, 80, 27648),
                **{"rope_theta": 10000000.0, "rope_scaling": {"rope_type": "default"}, "rms_norm_eps": 1e-06},
                **{"vocab_size": 155136, "max_position_embeddings": 524288, "bos_token_id": 0, "eos_token_id": 2},
                "pad_token_id": 1,
            },
            None,
            15,
            "apache-2.0",
            "ByteDance-Seed/Seed-OSS-36B-Base",
        ),
    )
}
"""By name. The parts of sizes whose source is memory of the base model are marked [M] in hermes4.md; all sums agree."""


_QWEN3_MOE: dict[str, object] = {
    **{"head_dim": 128, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
    **{"rope_theta": 1000000.0, "rope_scaling": None, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960},
    **{"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645},
}
MIXTURES: Mapping[str, Shape] = {
    name: Shape(
        name, "Qwen3MoeForCausalLM", {**_QWEN3_MOE, **sizes}, "hermes4-14b", shards, "apache-2.0", f"Qwen/{name}"
    )
    for name, shards, sizes in (
        (
            "Qwen3-30B-A3B",
            13,
            {
                **{"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32},
                **{"intermediate_size": 6144, "moe_intermediate_size": 768},
            },
        ),
        (
            "Qwen3-235B-A22B",
            96,
            {
                **{"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64},
                **{"intermediate_size": 12288, "moe_intermediate_size": 1536},
            },
        ),
    )
}
MIXTURES = {
    **MIXTURES,
    "GLM-4.7": Shape(
        "GLM-4.7",
        "Glm4MoeForCausalLM",
        {
            **{"hidden_size": 5120, "num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8},
            **{"head_dim": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160},
            **{"num_experts_per_tok": 8, "first_k_dense_replace": 3, "rope_theta": 1000000, "rope_scaling": None},
            **{"rms_norm_eps": 1e-05, "max_position_embeddings": 202752, "vocab_size": 151552},
            **{"bos_token_id": None, "eos_token_id": 151329},
        },
        None,
        150,
        "mit",
        "zai-org/GLM-4.7",
    ),
}
"""Mixtures of experts by name; shards as they come out at MAX_SHARD_SIZE, which is not how they were published."""


def shards_of(shape: Shape) -> dict[str, SparseFile]:
    """The shards by file name: header and full size."""
    weights = {weight.name: weight for weight in shape.weights}
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.nbytes("BF16"),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE,
    )
    shards = {}
    for name, members in split.filename_to_tensors.items():
        held = [weights[member] for member in members]
        header = shard_header(held, "BF16")
        shards[name] = SparseFile(header, len(header) + sum(weight.nbytes("BF16") for weight in held))
    return shards


def files_of(shape: Shape, data: Path) -> dict[str, bytes | Path | SparseFile]:
    """Every file of the repo by name, as tests/hub takes it. `data` is the folder of the shared test data."""
    shards = shards_of(shape)
    weight_map = {
        tensor: name
        for name, shard in shards.items()
        for tensor in json.loads(shard.header[8:])
        if tensor != "__metadata__"
    }
    index = {
        "metadata": {"total_size": sum(weight.nbytes("BF16") for weight in shape.weights)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return {
        **shards,
        "model.safetensors.index.json": _json(index),
        "config.json": _json(shape.config),
        "generation_config.json": _json(_generation(shape)),
        "README.md": _card(shape),
        **_tokenizer_files(shape, data),
    }


def write_shape(shape: Shape, folder: Path, data: Path) -> Path:
    """Write the checkpoint into `folder`, shards as sparse files, and return the folder."""
    folder.mkdir(parents=True)
    for name, content in files_of(shape, data).items():
        path = folder / name
        match content:
            case SparseFile():
                with path.open("wb") as file:
                    file.write(content.header)
                    file.truncate(content.size)
            case bytes():
                path.write_bytes(content)
            case _:
                shutil.copyfile(content, path)
    return folder


def seed_tokenizer(vocab_size: int, more: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` tokens with Seed-OSS' pre-tokenizer and special tokens.

    Every token but the letters has its merge, of two shorter ones, and the texts are 9.6 bytes long on average,
    against 9.0 in Qwen3's vocabulary of 151,643: the metadata of a GGUF then has about the size that it has there.
    `more` are further special tokens.
    """
    special = [_SEED_TEXTS["bos"], _SEED_TEXTS["pad"], _SEED_TEXTS["eos"], *_SEED_MORE, *more]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*special, *letters]
    merges: list[tuple[str, str]] = []

    def grow(left: list[str], right: list[str], count: int) -> list[str]:
        made = []
        for number in range(count):
            pair = left[number // len(right)], right[number % len(right)]
            merges.append(pair)
            made.append("".join(pair))
        texts.extend(made)
        return made

    pairs = grow(letters, letters, 2000)
    fours = grow(pairs, pairs, 20000)
    sixes = grow(fours, pairs, 5000)
    grow(fours, sixes, vocab_size - len(texts))
    backend = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(texts)}, merges=merges))
    split = pre_tokenizers.Split(Regex(_SEED_SPLIT), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def _tokenizer_files(shape: Shape, data: Path) -> dict[str, bytes | Path]:
    tokenizers = data / "tokenizers"
    if shape.tokenizer is not None:
        folder = tokenizers / shape.tokenizer
        return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    size = shape.sizes["vocab_size"]
    assert isinstance(size, int)
    more = GLM_TOKENS if shape.architecture == "Glm4MoeForCausalLM" else ()
    settings = {f"{name}_token": text for name, text in _SEED_TEXTS.items()}
    return {
        "tokenizer.json": seed_tokenizer(size, more).to_str().encode(),
        "tokenizer_config.json": _json({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}),
        "chat_template.jinja": tokenizers / "hermes4-llama" / "chat_template.jinja",
    }


def _generation(shape: Shape) -> dict[str, object]:
    tokens = {key: shape.sizes[key] for key in ("bos_token_id", "eos_token_id")}
    return {**tokens, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def _card(shape: Shape) -> bytes:
    lines = [
        *("---", "language:", "- en", f"license: {shape.license}", "tags:", "- instruct", "- reasoning", "- chat"),
        *(f"base_model: {shape.base_model}", "library_name: transformers", "---", "", f"# {shape.name}", ""),
    ]
    return "\n".join(lines).encode()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
