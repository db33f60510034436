"""What a GGUF file says of its model, read as llama.cpp reads it: config.json's terms, and the rotary frequencies.

The inverse of convert/architectures. Keys, defaults and the arithmetic of rope are those of llama.cpp 11434
(src/llama-model.cpp, load_hparams; src/llama-context.cpp; ggml_rope_yarn in ggml/src/ggml-cpu/ops.cpp): yarn's own keys
besides factor, context and attn_factor are not read for these architectures.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from numpy.typing import NDArray

from streamquant.convert.architectures import FAMILIES, ROPE_FREQS, Family, describe, family_of
from streamquant.convert.architectures.family import LatentAttention
from streamquant.convert.architectures.gguf_keys import (
    EXPERT_GROUPS,
    Choice,
    Counted,
    Field,
    PerLayer,
    Product,
    RopeNumber,
)
from streamquant.convert.architectures.layers import ListedTypes
from streamquant.convert.architectures.rope import YARN_BOUNDS, YARN_NUMBERS, YARN_TOLERANCE, taken_by_yarn
from streamquant.convert.recipes.mix import MAIN_TYPES
from streamquant.files.gguf_file import GgufTensor
from streamquant.model.problem import Problem
from streamquant.quant.errors import StreamquantError

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""llama.cpp's yarn_beta_fast and yarn_beta_slow."""
LOG_MULTIPLIER = "yarn_log_multiplier"


SLIDING_THETA = "sliding theta"
"""Where read_config leaves theta of the layers with a window until the rope settings are put together."""


@dataclass(frozen=True, slots=True)
class GgufRope:
    """Rope as llama.cpp computes it: theta, factor and context of the file; scaling is "none", "linear" or "yarn"."""

    head_dim: int
    """The part of a head that is rotated."""
    theta: float
    scaling: str
    factor: float
    context: int
    attn_factor: float
    beta_fast: float = BETA_FAST
    beta_slow: float = BETA_SLOW
    log_multiplier: float = 0.0
    """Of the logarithm of the factor by which yarn's own growth of cos and sin is divided; 0: it is not."""

    def frequencies(self, divisors: NDArray[np.float32] | None) -> tuple[NDArray[np.float32], float]:
        """(float32[head_dim / 2] in radians per position, factor of cos and sin); divisors are rope_freqs.weight."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        base = np.float32(1) / np.power(np.float64(self.theta), exponents.astype(np.float64)).astype(np.float32)
        if divisors is not None:
            base = base / divisors
        scale = np.float32(1 / self.factor if self.factor != 0 and self.scaling != "none" else 1)
        if self.scaling != "yarn":
            return base * scale, self.attn_factor
        low = max(0.0, math.floor(self._correction(self.beta_fast)))
        high = min(self.head_dim - 1.0, math.ceil(self._correction(self.beta_slow)))
        ramp = (np.arange(self.head_dim // 2, dtype=np.float32) - low) / max(0.001, high - low)
        mix = (1 - np.clip(ramp, 0, 1)).astype(np.float32)
        growth, divisor = (0.1 * times * math.log(max(1 / float(scale), 1)) + 1 for times in (1.0, self.log_multiplier))
        return base * scale * (1 - mix) + base * mix, self.attn_factor * growth / divisor

    def _correction(self, rotations: float) -> float:
        """The dimension that turns so many times within the context (ggml_rope_yarn_corr_dim)."""
        turns = self.context / (rotations * 2 * math.pi)
        return self.head_dim * math.log(turns) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model as its GGUF describes it: a config.json for transformers, rope, and what is doubtful."""

    config: Mapping[str, Any]
    rope: GgufRope
    sliding_rope: GgufRope | None = None
    """Of the layers with a window, where it is another."""
    problems: list[Problem] = field(default_factory=list)


class Keys:
    """Checked reads of metadata; `arch.` is put before the names."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], arch: str) -> None:
        self.path, self.metadata, self.arch = path, metadata, arch

    def refuse(self, name: str, what: str, required: str) -> StreamquantError:
        """The error about a key."""
        key = f"{self.arch}.{name}"
        found = self.metadata.get(key, "no such key")
        return StreamquantError(what, where=f"{self.path}, key {key!r}", found=str(found)[:100], required=required)

    def count(self, name: str, default: int | None = None, *, least: int = 1, of_some: bool = False) -> int:
        """An integer of at least `least`; without it the default, or an error. of_some: layers without it have 0."""
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if isinstance(value, list) and value:  # one value for each layer
            values = [item for item in value if not of_some or item != 0] or value
            value = values[0] if all(item == values[0] for item in values) else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self.refuse(name, "a hyperparameter that is missing or cannot be", "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number, not negative; without it the default, or an error."""
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.refuse(name, "a hyperparameter that is missing or cannot be", "a number of at least 0")
        return float(value)

    def text(self, name: str, default: str) -> str:
        """A string, or the default."""
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if not isinstance(value, str):
            raise self.refuse(name, "a hyperparameter of the wrong type", "a string")
        return value


def read_model(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> GgufModel:
    """Metadata and tensor infos of a GGUF (of all its files) -> its model.

    Raises StreamquantError for an architecture without an inverse here, a key that is missing or makes no sense, and
    for what is not a dense decoder.
    """
    arch = metadata.get("general.architecture")
    known = [family for family in FAMILIES if family.gguf_arch == arch and is_said_by(family, metadata)]
    known = [family for family in known if family.multimodal is None] or known
    if not known:
        raise StreamquantError(
            "unknown architecture",
            where=f"{path}, key 'general.architecture'",
            found=str(arch)[:100],
            required=", ".join(sorted({family.gguf_arch for family in FAMILIES})),
        )
    keys = Keys(path, metadata, str(arch))
    is_mixture = bool(metadata.get(f"{arch}.expert_count"))
    families = [family for family in known if (family.experts is not None) is is_mixture]
    if is_mixture and not families:
        raise keys.refuse("expert_count", "a mixture of experts, which this architecture is not here", "no experts")
    families = families or known
    if metadata.get(f"{arch}.nextn_predict_layers"):
        families = [family for family in families if family.mtp is not None and family.mtp.in_gguf] or families
    problems: list[Problem] = []
    config = read_config(keys, families, tensors)
    rope = read_rope(keys, config, problems)
    sliding = None
    if (theta := config.pop(SLIDING_THETA, None)) is not None:
        sliding = replace(rope, theta=theta, scaling="none", attn_factor=1.0)
        of_window = {"rope_type": "default", "rope_theta": theta}
        config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": of_window}
    try:
        describe(config)
    except StreamquantError as error:
        found = " ".join(str(error).split())
        raise StreamquantError("the metadata does not describe a model", where=str(path), found=found) from error
    check_vocabulary(keys, metadata, config, problems)
    check_rope_freqs(path, tensors, rope)
    return GgufModel(config, rope, sliding, problems)


def is_said_by(family: Family, metadata: Mapping[str, Any]) -> bool:
    """Whether the keys of a GGUF may be those of a family."""
    if family.llama_cpp.known_by is None:
        return True
    key, value = family.llama_cpp.known_by
    found = metadata.get(key.format(arch=family.gguf_arch))
    return found is not None and value in (None, found)


def read_config(keys: Keys, families: Sequence[Family], tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """config.json for the first of the architecture's families whose class of transformers can have these sizes."""
    embeddings = tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise StreamquantError("a tensor is missing", where=f"{keys.path}, tensor 'token_embd.weight'")
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    latent = families[0].latent
    head_dim = keys.count("attention.key_length" if latent is None else "rope.dimension_count", hidden // heads or 1)
    if latent is None and keys.count("attention.value_length", head_dim) != head_dim:
        raise keys.refuse("attention.value_length", "values of another width than keys", str(head_dim))
    fitting = (family for family in families if hidden % heads == 0 or not family.hidden_divides_by_heads)
    family = next(fitting, families[0])
    rotary = keys.count("rope.dimension_count", head_dim)
    if rotary != head_dim and (family.partial_rotary is None or rotary > head_dim):
        raise keys.refuse("rope.dimension_count", "heads that are rotated in part", str(head_dim))
    partial = {"partial_rotary_factor": rotary / head_dim} if family.partial_rotary is not None else {}
    mtp_layers = 0 if family.mtp is None or not family.mtp.in_gguf else keys.count("nextn_predict_layers", 0, least=0)
    layers = keys.count("block_count") - mtp_layers
    if layers < 1:
        raise keys.refuse("nextn_predict_layers", "a hyperparameter that is missing or cannot be", "fewer than blocks")
    no_window = {"sliding_window": None, "use_sliding_window": False}
    return {
        "architectures": [family.hf_architecture],
        "model_type": family.model_type,
        family.activation[0]: family.activation[1],
        "hidden_size": hidden,
        **read_intermediate(family, keys),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **(read_latent(latent, keys, heads) if latent is not None else read_heads(family, keys, heads, head_dim)),
        "vocab_size": embeddings.shape[0],
        "max_position_embeddings": keys.count("context_length"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": keys.number("rope.freq_base", 10000.0),
            **partial,
            **read_yarn_keys(family, keys),
        },
        "tie_word_embeddings": "output.weight" not in tensors,
        **{key: value for key, value in no_window.items() if key in family.defaults},
        **({} if family.mtp is None else {family.mtp.key: mtp_layers}),
        **read_experts(family, keys),
        **read_fields(family, keys, {"hidden_size": hidden}),
        **family.fixed,
        family.epsilon: keys.number("attention.layer_norm_rms_epsilon"),
        **read_layer_types(family, keys, layers),
        **read_query_scalar(family, layers, (hidden, heads, head_dim)),
        **read_sliding_theta(family, keys),
        **read_switches(family, tensors),
    }


def read_yarn_keys(family: Family, keys: Keys) -> dict[str, Any]:
    """The rope settings of a class that computes with its numbers of yarn itself."""
    of_rope = {row.value: row.name for row in family.llama_cpp.keys if isinstance(row.value, RopeNumber)}
    is_yarn = not family.llama_cpp.yarn_is_optional or keys.text("rope.scaling.type", "linear") == "yarn"
    if not family.llama_cpp.yarn_keys or not is_yarn:
        return {}
    numbers = {
        row.key: round(keys.number(name.removeprefix("{arch}.")) / row.times, 6) for row, name in of_rope.items()
    }
    if family.latent is not None:
        numbers["mscale"] = numbers["mscale_all_dim"]  # a GGUF has one of the two
    return {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
        **{key: only for key, only in family.llama_cpp.yarn_keys.items() if only is not None},
        **numbers,
    }


def read_heads(family: Family, keys: Keys, heads: int, head_dim: int) -> dict[str, int]:
    """The heads of keys and values, and the length of all."""
    of_some = any(
        isinstance(row.value, PerLayer) and row.name == gguf.Keys.Attention.HEAD_COUNT_KV
        for row in family.llama_cpp.keys
    )
    kv_heads = keys.count("attention.head_count_kv", heads, of_some=of_some)
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def read_latent(latent: LatentAttention, keys: Keys, heads: int) -> dict[str, Any]:
    """The same of MLA, which a GGUF has as one head that all share (DeepseekV2Model of conversion/deepseek.py)."""
    rotated, rank = keys.count("rope.dimension_count"), keys.count("attention.kv_lora_rank")
    lengths = {"attention.head_count_kv": 1, "attention.key_length": rank + rotated, "attention.value_length": rank}
    for name, required in lengths.items():
        if keys.count(name) != required:
            raise keys.refuse(name, "not the size that latent attention has", str(required))
    whole = keys.count("attention.key_length_mla", least=rotated + 1)
    has_query_rank = f"{keys.arch}.attention.q_lora_rank" in keys.metadata
    return {
        "num_key_value_heads": heads,
        latent.query_rank: keys.count("attention.q_lora_rank") if has_query_rank else None,
        latent.key_value_rank: rank,
        latent.plain: whole - rotated,
        latent.rotated: rotated,
        latent.value: keys.count("attention.value_length_mla"),
    }


def rotated_head(config: Mapping[str, Any]) -> int:
    """The size of a head of which `partial_rotary_factor` is rotated; of MLA, of the part that is rotated."""
    family = family_of(config)
    return int(config["head_dim" if family is None or family.latent is None else family.latent.rotated])


def is_latent(config: Mapping[str, Any]) -> bool:
    """Whether the model has MLA."""
    family = family_of(config)
    return family is not None and family.latent is not None


def read_query_scalar(family: Family, layers: int, sizes: tuple[int, int, int]) -> dict[str, int]:
    """The number whose root divides the scores, as llama.cpp takes it; sizes are hidden size, heads, head_dim."""
    if family.llama_cpp.query_scalar is None:
        return {}
    key, wide = family.llama_cpp.query_scalar
    hidden, heads, head_dim = sizes
    return {key: hidden // heads if layers == wide else head_dim}


def read_sliding_theta(family: Family, keys: Keys) -> dict[str, float]:
    """Theta of the layers with a window, where it is their own; without a key llama.cpp takes the family's."""
    if family.sliding_theta is None:
        return {}
    if not family.llama_cpp.reads_sliding_theta:
        return {SLIDING_THETA: keys.number("rope.freq_base", 10000.0)}
    return {SLIDING_THETA: keys.number("rope.freq_base_swa", family.sliding_theta[1])}


def read_intermediate(family: Family, keys: Keys) -> dict[str, int]:
    """The feed-forward size of dense layers; a mixture of experts that has no such layers may have no such key."""
    may_lack = family.experts is not None and family.intermediate not in family.defaults
    if may_lack and f"{keys.arch}.feed_forward_length" not in keys.metadata:
        return {}
    return {family.intermediate: keys.count("feed_forward_length")}


def read_experts(family: Family, keys: Keys) -> dict[str, Any]:
    """The keys of config.json about experts, and those that no GGUF key carries as llama.cpp takes them."""
    if family.experts is None:
        return {}
    name = "expert_feed_forward_length"
    own_size = keys.count(name if f"{keys.arch}.{name}" in keys.metadata else "feed_forward_length")
    return {
        family.experts.count[0]: keys.count("expert_count"),
        family.experts.used: keys.count("expert_used_count"),
        family.experts.intermediate: own_size,
        **family.llama_cpp.assumed,
        **read_choice(family, keys),
    }


def read_choice(family: Family, keys: Keys) -> dict[str, str]:
    """How experts are chosen, by whether they are in groups."""
    if family.llama_cpp.grouped is None:
        return {}
    key, in_groups, alone = family.llama_cpp.grouped
    return {key: in_groups if keys.count("expert_group_count", 1, least=0) > 1 else alone}


def read_fields(family: Family, keys: Keys, known: Mapping[str, int]) -> dict[str, Any]:
    """The keys of config.json that the family's file writes into the GGUF as they are; `known` are some of all."""
    found: dict[str, Any] = dict(known)
    for row in (*EXPERT_GROUPS, *family.llama_cpp.keys):
        value = keys.metadata.get(row.name.format(arch=keys.arch))
        if isinstance(row.value, Product):
            first = found[row.value.first]  # its row stands before
            of_both = keys.count(row.name.removeprefix("{arch}."))
            if type(first) is not int or first < 1 or of_both % first:
                raise keys.refuse(row.name.removeprefix("{arch}."), "a product of heads and their size", f"of {first}")
            found[row.value.second] = of_both // first
        if isinstance(row.value, Choice) and row.value.then is True:
            found[row.value.key] = row.value.text if value is True else None
        if isinstance(row.value, Counted):
            found[row.value.key] = keys.count(row.name.removeprefix("{arch}."), 0, least=0)
        if isinstance(row.value, Field) and row.value.only_true:
            found[row.value.key] = False if row.type is GGUFValueType.BOOL else 0  # unless the GGUF has it
        if not isinstance(row.value, Field) or value is None:
            continue
        of_number = {number: text for text, number in (row.value.values or {}).items()}
        found[row.value.key] = of_number.get(value, value) if type(value) is int else value
    return found


def read_layer_types(family: Family, keys: Keys, layers: int) -> dict[str, list[str]]:
    """The list of the types of layers, where the GGUF has one; else the family's rule counts."""
    found: dict[str, list[str]] = {}
    for kinds in family.layers:
        if not isinstance(kinds, ListedTypes):
            continue
        spelled = {tag: name for name, tag in reversed(list(kinds.types.items()))}
        if len(spelled) == 1:
            found[kinds.key] = [*spelled.values()] * layers
        for row in family.llama_cpp.keys:
            tags = set(row.value.by_tag) & spelled.keys() if isinstance(row.value, PerLayer) else set()
            values = keys.metadata.get(row.name.format(arch=keys.arch))
            if not isinstance(row.value, PerLayer) or not tags or values is None:
                continue
            by_value = {row.value.otherwise: next(tag for tag in (kinds.nth, kinds.rest) if tag not in tags)}
            by_value |= {row.value.by_tag[tag]: tag for tag in tags}
            known = isinstance(values, list) and len(values) >= layers
            if not known or not all(type(value) is type(row.value.otherwise) for value in values):
                raise keys.refuse(row.name.removeprefix("{arch}."), "not a value for each layer", f"{layers} values")
            of_size = next((tag for tag in tags if isinstance(row.value.by_tag[tag], str)), None)
            found[kinds.key] = [spelled[by_value.get(value, of_size or "")] for value in values[:layers]]
    return found


def read_switches(family: Family, tensors: Iterable[str]) -> dict[str, bool]:
    """The booleans of config.json that put tensors into the layers -> whether a layer of the file has one of them."""
    names = gguf.get_tensor_name_map(family.llama_cpp.arch, 1)
    present = {name.split(".", 2)[-1] for name in tensors if name.startswith("blk.")}
    switches: dict[str, bool] = {}
    for tensor in family.layer:
        if tensor.when is not None:
            name = names.get_name(f"model.layers.0.{tensor.suffix}", try_suffixes=(".weight", ".bias"))
            found = name is not None and name.split(".", 2)[-1] in present
            switches[tensor.when] = found or switches.get(tensor.when, False)
    return switches


def read_rope(keys: Keys, config: Mapping[str, Any], problems: list[Problem]) -> GgufRope:
    """The rope keys."""
    reads_yarn = bool(config["rope_parameters"].keys() - {"rope_type", "rope_theta", "partial_rotary_factor"})
    scaling = keys.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise keys.refuse("rope.scaling.type", "a rope scaling without an inverse here", "none, linear or yarn")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    family = family_of(config)
    reads_bounds = family is not None and family.llama_cpp.reads_yarn_bounds
    for key, taken in taken_by_yarn(factor or 1.0).items():
        name = dict(YARN_NUMBERS)[key].removeprefix("{arch}.rope.scaling.")
        value = keys.metadata.get(f"{keys.arch}.rope.scaling.{name}")
        same = isinstance(value, int | float) and math.isclose(value, taken, rel_tol=YARN_TOLERANCE)
        is_read = reads_bounds if key in YARN_BOUNDS else reads_yarn
        if scaling == "yarn" and not is_read and value is not None and not same:
            problems.append(
                Problem(
                    "rope",
                    "warning",
                    "llama.cpp does not read this key for the architecture",
                    where=f"key {keys.arch}.rope.scaling.{name}",
                    found=str(value)[:40],
                    required=f"what it uses: {taken:g}",
                )
            )
    fast, slow = BETA_FAST, BETA_SLOW
    if reads_bounds:
        fast = keys.number("rope.scaling.yarn_beta_fast", fast)
        slow = keys.number("rope.scaling.yarn_beta_slow", slow)
    log_multiplier = keys.number(f"rope.scaling.{LOG_MULTIPLIER}", 0.0) if reads_yarn else 0.0
    if reads_yarn and "mscale" in config["rope_parameters"] and is_latent(config):
        log_multiplier = 1.0  # "mscale" over "mscale_all_dim", which are the same
    return GgufRope(
        int(rotated_head(config) * config["rope_parameters"].get("partial_rotary_factor", 1)),
        config["rope_parameters"]["rope_theta"],
        scaling,
        factor,
        keys.count("rope.scaling.original_context_length", config["max_position_embeddings"]),
        keys.number("rope.scaling.attn_factor", 1.0),
        fast,
        slow,
        log_multiplier,
    )


def check_vocabulary(
    keys: Keys, metadata: Mapping[str, Any], config: Mapping[str, Any], problems: list[Problem]
) -> None:
    """A vocabulary of another size than the embeddings is a problem: llama.cpp refuses it."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    sizes = {
        f"{keys.arch}.vocab_size": metadata.get(f"{keys.arch}.vocab_size"),
        "tokenizer.ggml.tokens": len(tokens) if isinstance(tokens, list) else None,
    }
    for key, size in sizes.items():
        if size is not None and size != config["vocab_size"]:
            problems.append(
                Problem(
                    "vocabulary",
                    "error",
                    "vocabulary and embeddings are of different sizes: llama.cpp refuses the file",
                    where=f"key {key}",
                    found=str(size)[:40],
                    required=f"{config['vocab_size']} rows of token_embd.weight",
                )
            )


def check_rope_freqs(path: Path, tensors: Mapping[str, GgufTensor], rope: GgufRope) -> None:
    """rope_freqs.weight must have a divisor for each frequency."""
    found = tensors.get(ROPE_FREQS)
    if found is not None and found.shape != (rope.head_dim // 2,):
        raise StreamquantError(
            "a tensor's shape does not fit the hyperparameters",
            where=f"{path}, tensor {ROPE_FREQS!r}",
            found=list(found.shape),
            required=[rope.head_dim // 2],
        )


# The type that a file claims


CLAIM = re.compile(
    r"(?<![A-Z0-9])(?:MXFP4|NVFP4|BF16|F16|F32|TQ\d_0|I?Q\d_[A-Z0-9]+)(?:_(?:XXS|XS|S|M|L|XL))?(?![A-Z0-9])"
)
FLOATS = frozenset({"F32", "F16", "BF16"})


def base_types(claim: str) -> tuple[str, ...]:
    """The types of which one must be in a file that is called so: "Q4_K_M" -> ("Q4_K",)."""
    if claim in MAIN_TYPES:
        return MAIN_TYPES[claim]
    shorter = re.sub(r"_(?:S|M|L|XL|XS|XXS)$", "", claim) if claim not in GGMLQuantizationType.__members__ else claim
    return (shorter,) if shorter in GGMLQuantizationType.__members__ else ()


def claims(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Where -> the type that the file claims there: its name, and general.file_type."""
    found = {}
    named = CLAIM.findall(path.stem.upper())
    if named:
        found[f"the name {path.name}"] = named[-1]
    number = metadata.get("general.file_type")
    if isinstance(number, int):
        try:
            label = LlamaFileType(number & ~LlamaFileType.GUESSED).name
        except ValueError:
            label = ""
        found["general.file_type"] = re.sub(r"^(MOSTLY|ALL)_", "", label)
    return found


def _may_keep_mxfp4(metadata: Mapping[str, Any]) -> bool:
    """Whether a file is of a family whose experts are published in MXFP4."""
    arch = metadata.get("general.architecture")
    return any(f.gguf_arch == arch and f.experts is not None and f.experts.by_turns for f in FAMILIES)


def check_file_type(path: Path, metadata: Mapping[str, Any], tensors: Iterable[GgufTensor]) -> list[Problem]:
    """A problem for each claim that the tensors contradict.

    One of the matrices in the layers must be of the claimed type; where rows do not fit it and llama-quantize has to
    fall back, it is enough that none is unquantized. An unquantized or 8-bit claim must be the type of most weights,
    but for experts that were in MXFP4 before: the converter keeps them (convert/recipes/recipe.py).
    """
    counts: Counter[str] = Counter()
    lengths: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        if len(tensor.shape) in (2, 3) and tensor.name.startswith("blk."):
            counts[tensor.stored_as] += math.prod(tensor.shape)
            lengths.setdefault(tensor.stored_as, []).append(tensor)
    problems = []
    for where, claim in claims(path, metadata).items():
        bases = base_types(claim)
        if not bases or not counts:
            continue
        block = GGML_QUANT_SIZES[GGMLQuantizationType[bases[0]]][0]
        all_fit = all(tensor.shape[-1] % block == 0 for found in lengths.values() for tensor in found)
        if bases[0] in ("F32", "F16", "BF16", "Q8_0"):
            kept = "MXFP4" if _may_keep_mxfp4(metadata) else None
            others = Counter({name: n for name, n in counts.items() if name != kept}) or counts
            fine = others.most_common(1)[0][0] in bases
        else:
            fine = not counts.keys().isdisjoint(bases) or (not all_fit and counts.keys().isdisjoint(FLOATS))
        if not fine:
            main = ", ".join(f"{name} {100 * n / counts.total():.0f}%" for name, n in counts.most_common(3))
            problems.append(
                Problem(
                    "file-type",
                    "warning",
                    "the file says another type than its tensors have",
                    where=where,
                    found=main,
                    required=f"{claim}: {' or '.join(bases)}",
                )
            )
    return problems
