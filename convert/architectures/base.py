"""What all families share: the records of a described model, and the steps from config.json to them.

A family is data (`Family`): class names, defaults, and a table of the tensors of one layer. `describe_model` reads a
config.json by it. The reference is llama.cpp's converter (conversion/base.py, TextModel.set_gguf_parameters and
ModelBase.map_tensor_name): the same names, keys, types and values.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import gguf
import numpy as np
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from streamquant.convert.architectures.config_values import ConfigValues
from streamquant.convert.architectures.rope import RopeSettings, llama3_rope_freqs, read_rope, rope_scaling_metadata
from streamquant.quant.errors import StreamquantError

# llama.cpp's LLAMA_MAX_LAYERS (src/llama-hparams.h): a file with more blocks does not load.
MAX_LAYERS = 512
# Far above any model; keeps a hostile config.json from asking for a rope table of gigabytes.
MAX_HEAD_DIM = 1 << 16

# Tensors that old checkpoints carry and no GGUF has (llama.cpp, conversion/base.py, prepare_tensors).
IGNORED_SUFFIXES = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


class TensorKind(enum.Enum):
    """What a tensor is for; recipes choose formats by it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    LINEAR = "linear"
    BIAS = "bias"


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor of a model: its two names and the shape that config.json demands, in Hugging Face's order.

    rope_heads is the number of heads whose rows llama.cpp wants interleaved (rope_row_order), None where rows stay.
    A tensor that is not required may be missing from the checkpoint.
    """

    hf_name: str
    gguf_name: str
    kind: TensorKind
    shape: tuple[int, ...]
    rope_heads: int | None
    required: bool


@dataclass(frozen=True, slots=True, eq=False)
class ExtraTensor:
    """A tensor that GGUF has and the checkpoint has not; values are float32, one-dimensional. Equal by its bytes."""

    gguf_name: str
    values: NDArray[np.float32]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtraTensor):
            return NotImplemented
        return self.gguf_name == other.gguf_name and self.values.tobytes() == other.values.tobytes()

    def __hash__(self) -> int:
        return hash((self.gguf_name, self.values.tobytes()))


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as its config.json describes it, in the terms of both worlds."""

    hf_architecture: str
    gguf_arch: str
    block_count: int
    vocab_size: int
    tied_embeddings: bool
    rules: Mapping[str, TensorRule]
    """By HF name: every tensor that this model may have, in the order of a state dict."""
    metadata: Mapping[str, GGUFValue]
    """The {arch}.* keys, in the reference converter's order."""
    extra_tensors: tuple[ExtraTensor, ...]
    ignored: tuple[str, ...]
    """Suffixes of HF names that are known and not wanted in a GGUF."""
    notes: tuple[str, ...]
    """Decisions that a user should see in the plan."""

    def is_ignored(self, name: str) -> bool:
        """Whether the HF tensor is known and not wanted in a GGUF."""
        return name.endswith(self.ignored)

    def hf_name(self, gguf_name: str) -> str:
        """The HF name of a GGUF tensor. Raises StreamquantError for a name that this model does not have."""
        for rule in self.rules.values():
            if rule.gguf_name == gguf_name:
                return rule.hf_name
        raise StreamquantError(
            "unknown GGUF tensor name", found=gguf_name, required=f"a tensor of {self.hf_architecture}"
        )

    def hf_names(self) -> dict[str, str]:
        """GGUF name -> HF name of all rules."""
        return {rule.gguf_name: rule.hf_name for rule in self.rules.values()}

    def match(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorRule, ...]:
        """The rules of the tensors that a checkpoint has, in the checkpoint's order, ignored tensors left out.

        Raises StreamquantError on a tensor that this model does not have, a missing required one, or a wrong shape.
        """
        found = []
        for name, shape in shapes.items():
            rule = self.rules.get(name)
            if rule is not None:
                check_shape(rule, shape)
                found.append(rule)
            elif not self.is_ignored(name):
                raise StreamquantError(
                    "the checkpoint has a tensor that its config.json does not explain",
                    where=f"tensor {name!r}",
                    found=f"shape {list(shape)}",
                    required=f"a tensor of {self.hf_architecture}",
                    hint="check config.json (number of layers, *_bias, architectures)",
                )
        missing = [rule.hf_name for rule in self.rules.values() if rule.required and rule.hf_name not in shapes]
        if missing:
            raise StreamquantError(
                "the checkpoint lacks tensors that its config.json demands",
                where=f"tensor {missing[0]!r}",
                found=f"{len(missing)} missing",
                required=f"all tensors of {self.hf_architecture} with {self.block_count} layers",
                hint="is a shard missing?",
            )
        return tuple(found)


Size = Literal["hidden", "query", "key_value", "intermediate", "head_dim"]


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """A tensor of one decoder layer; `when` names the boolean of config.json without which it does not exist."""

    suffix: str
    kind: TensorKind
    shape: tuple[Size, ...]
    rope: Literal["query", "key"] | None = None
    when: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: Hugging Face's class, llama.cpp's architecture, and where it differs from the others.

    defaults are those of the configuration class in transformers, for keys that a config.json may leave out; nullable
    are the keys where null is allowed. A family whose defaults have no head_dim writes key_length only if config.json
    has it. adds_vocab_size stands for the two keys that llama.cpp's LlamaModel adds to the common ones. unread are the
    booleans whose biases the converter writes but llama.cpp's loader of this architecture does not read.
    """

    hf_architecture: str
    model_type: str
    arch: gguf.MODEL_ARCH
    layer: tuple[LayerTensor, ...]
    defaults: Mapping[str, object]
    nullable: frozenset[str]
    rope_types: frozenset[str] = frozenset({"default", "linear", "yarn"})
    adds_vocab_size: bool = False
    hidden_divides_by_heads: bool = False
    window_switch: str | None = None
    unread: tuple[str, ...] = ()

    @property
    def gguf_arch(self) -> str:
        """llama.cpp's name of the architecture, the prefix of its keys."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The checked sizes of a model."""

    layers: int
    vocabulary: int
    context: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_is_written: bool

    def size(self, name: Size) -> int:
        """A size by its name in the tables."""
        return {
            "hidden": self.hidden,
            "query": self.heads * self.head_dim,
            "key_value": self.kv_heads * self.head_dim,
            "intermediate": self.intermediate,
            "head_dim": self.head_dim,
        }[name]


def linear(
    path: str, shape: tuple[Size, Size], *, rope: Literal["query", "key"] | None = None, bias: str | bool = False
) -> tuple[LayerTensor, ...]:
    """The rows of a layer table for one projection; bias is True, False, or the boolean of config.json it hangs on."""
    weight = LayerTensor(f"{path}.weight", TensorKind.LINEAR, shape, rope)
    if bias is False:
        return (weight,)
    when = bias if isinstance(bias, str) else None
    return weight, LayerTensor(f"{path}.bias", TensorKind.BIAS, shape[:1], rope, when)


def norm(path: str, size: Size = "hidden") -> LayerTensor:
    """The row of a layer table for one norm."""
    return LayerTensor(f"{path}.weight", TensorKind.NORM, (size,))


# Keys that would make the model something else than its class name says: key -> (values that are fine, what it means).
REFUSED_KEYS: Mapping[str, tuple[tuple[object, ...], str]] = {
    "num_local_experts": ((None, 0), "a mixture of experts"),
    "num_experts": ((None, 0), "a mixture of experts"),
    "n_routed_experts": ((None, 0), "a mixture of experts"),
    "is_causal": ((None, True), "attention in both directions"),
    "draft_vocab_size": ((None,), "a draft model for speculative decoding"),
    "text_config": ((None,), "a multimodal model"),
    "vision_config": ((None,), "a multimodal model"),
    "audio_config": ((None,), "a multimodal model"),
}


def describe_model(family: Family, values: Mapping[str, object]) -> ModelDescription:
    """Describe the model of a config.json by its family's tables. Raises StreamquantError on anything unsupported."""
    config = ConfigValues(values, defaults=family.defaults, nullable=family.nullable)
    refuse_other_models(family, config)
    sizes = read_dimensions(family, config)
    tied = config.boolean("tie_word_embeddings")
    epsilon = config.number("rms_norm_eps")
    rope = read_rope(config, sizes.context)
    check_rope_type(family, config, rope)
    notes = [*assumed_notes(config), *rope.notes, *window_notes(family, config, sizes), *unread_notes(family, config)]
    if tied:
        notes.append("tie_word_embeddings: no output.weight unless the checkpoint has lm_head.weight")
    return ModelDescription(
        hf_architecture=family.hf_architecture,
        gguf_arch=family.gguf_arch,
        block_count=sizes.layers,
        vocab_size=sizes.vocabulary,
        tied_embeddings=tied,
        rules=MappingProxyType({rule.hf_name: rule for rule in make_rules(family, config, sizes, tied)}),
        metadata=MappingProxyType(make_metadata(family, sizes, rope, epsilon)),
        extra_tensors=extra_tensors(rope, sizes),
        ignored=IGNORED_SUFFIXES,
        notes=tuple(notes),
    )


def refuse_other_models(family: Family, config: ConfigValues) -> None:
    """Refuse a config that is quantized, belongs to another class, or switches on what the class has not."""
    quantization = config.section("quantization_config")
    if quantization:
        raise StreamquantError(
            "the checkpoint is already quantized",
            where=config.where("quantization_config"),
            found=f"quant_method {quantization.get('quant_method')!r}",
            required="a BF16, F16 or F32 checkpoint",
            hint="start from the original checkpoint",
        )
    if "model_type" in config and config.text("model_type") != family.model_type:
        raise config.refuse("model_type", f"not the model type of {family.hf_architecture}", required=family.model_type)
    if config.text("hidden_act") != "silu":
        raise config.refuse("hidden_act", "an activation that llama.cpp does not use for this family", required="silu")
    for key, (fine, meaning) in REFUSED_KEYS.items():
        value = config.values.get(key)
        if not any(value is item or (type(value) is type(item) and value == item) for item in fine):
            raise config.refuse(key, f"{meaning}, which {family.hf_architecture} is not", required="no such key")


def read_dimensions(family: Family, config: ConfigValues) -> Dimensions:
    """Read and check the sizes."""
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads", most=hidden)
    kv_heads = config.integer_or_null("num_key_value_heads") or heads
    if heads % kv_heads != 0:
        raise config.refuse(
            "num_key_value_heads",
            "the attention heads do not share the key-value heads evenly",
            required=f"a divisor of num_attention_heads = {heads}",
        )
    head_dim = read_head_dim(family, config, hidden, heads)
    return Dimensions(
        layers=config.integer("num_hidden_layers", most=MAX_LAYERS),
        vocabulary=config.integer("vocab_size"),
        context=config.integer("max_position_embeddings"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_is_written="head_dim" in family.defaults or config.values.get("head_dim") is not None,
    )


def read_head_dim(family: Family, config: ConfigValues, hidden: int, heads: int) -> int:
    """head_dim, or hidden_size / num_attention_heads where config.json leaves it to that."""
    has_key = "head_dim" in config or "head_dim" in family.defaults
    explicit = config.integer_or_null("head_dim", most=MAX_HEAD_DIM) if has_key else None
    if (explicit is None or family.hidden_divides_by_heads) and hidden % heads != 0:
        raise config.refuse(
            "hidden_size", "hidden_size does not divide into the heads", required=f"a multiple of {heads} heads"
        )
    head_dim = hidden // heads if explicit is None else explicit
    if head_dim % 2 != 0 or head_dim > MAX_HEAD_DIM:
        raise StreamquantError(
            "the heads cannot be rotated by halves",
            where=config.where("head_dim"),
            found=head_dim,
            required=f"an even head_dim up to {MAX_HEAD_DIM}",
        )
    return head_dim


def check_rope_type(family: Family, config: ConfigValues, rope: RopeSettings) -> None:
    """Refuse a rope type that llama.cpp cannot run for this architecture."""
    if rope.rope_type not in family.rope_types:
        raise StreamquantError(
            f"rope type {rope.rope_type!r} does not work for arch {family.gguf_arch!r} in llama.cpp",
            where=config.where("rope_scaling" if config.section("rope_scaling") else "rope_parameters"),
            found=rope.rope_type,
            required=f"one of {', '.join(sorted(family.rope_types))}",
            hint="llama.cpp reads rope_freqs.weight for arch 'llama' only; the model would run unscaled",
        )


def assumed_notes(config: ConfigValues) -> Iterator[str]:
    """A note for each number that config.json left out; booleans and names that it left out are the plain case."""
    for key, value in config.assumed.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"config.json has no {key}; transformers' default of {value:g} is used"


def window_notes(family: Family, config: ConfigValues, sizes: Dimensions) -> Iterator[str]:
    """A note where Hugging Face attends to a window only: GGUF of these families has no key for it."""
    if "sliding_window" not in family.defaults:
        return
    if family.window_switch is not None and not config.boolean(family.window_switch):
        return
    window = config.integer_or_null("sliding_window")
    if window is not None and window < sizes.context:
        yield (
            f"sliding_window = {window} is not carried over: llama.cpp has no key for it in arch "
            f"{family.gguf_arch!r} and attends to the whole context"
        )


def unread_notes(family: Family, config: ConfigValues) -> Iterator[str]:
    """A warning where the reference converter writes biases that make llama.cpp refuse the file.

    Seen with llama.cpp 11434: "done_getting_tensors: wrong number of tensors" (src/models/qwen3.cpp, seed-oss.cpp).
    """
    for key in family.unread:
        if config.boolean(key):
            yield (
                f"WARNING: {key} = true: llama.cpp does not read all of these biases in arch {family.gguf_arch!r} "
                "and will refuse to load the GGUF (wrong number of tensors)"
            )


def make_rules(family: Family, config: ConfigValues, sizes: Dimensions, tied: bool) -> Iterator[TensorRule]:
    """The rules of all tensors, in the order of a state dict."""
    names = gguf.get_tensor_name_map(family.arch, sizes.layers)
    switches = {tensor.when for tensor in family.layer if tensor.when is not None}
    switched_on = {None, *(key for key in sorted(switches) if config.boolean(key))}
    tensors = [tensor for tensor in family.layer if tensor.when in switched_on]
    matrix = (sizes.vocabulary, sizes.hidden)
    yield make_rule(names, "model.embed_tokens.weight", TensorKind.EMBEDDING, matrix)
    for number in range(sizes.layers):
        for tensor in tensors:
            heads = {"query": sizes.heads, "key": sizes.kv_heads, None: None}[tensor.rope]
            shape = tuple(sizes.size(name) for name in tensor.shape)
            yield make_rule(names, f"model.layers.{number}.{tensor.suffix}", tensor.kind, shape, rope_heads=heads)
    yield make_rule(names, "model.norm.weight", TensorKind.NORM, (sizes.hidden,))
    yield make_rule(names, "lm_head.weight", TensorKind.HEAD, matrix, required=not tied)


def make_rule(
    names: gguf.TensorNameMap,
    hf_name: str,
    kind: TensorKind,
    shape: tuple[int, ...],
    *,
    rope_heads: int | None = None,
    required: bool = True,
) -> TensorRule:
    """A rule, its GGUF name looked up in the table of the package gguf."""
    gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
    if gguf_name is None:
        raise StreamquantError(
            "the installed package gguf has no name for a tensor",
            where=f"tensor {hf_name!r}",
            found="no entry in its table of names",
            required="gguf 0.19",
            hint="install the version that pyproject.toml asks for",
        )
    return TensorRule(hf_name, gguf_name, kind, shape, rope_heads, required)


def make_metadata(family: Family, sizes: Dimensions, rope: RopeSettings, epsilon: float) -> dict[str, GGUFValue]:
    """The {arch}.* keys with the types of gguf.GGUFWriter, in the reference converter's order."""
    llm, attention = gguf.Keys.LLM, gguf.Keys.Attention
    head_dim = sizes.head_dim if sizes.head_dim_is_written else None
    added = family.adds_vocab_size
    counts: tuple[tuple[str, int | None], ...] = (
        (llm.BLOCK_COUNT, sizes.layers),
        (llm.CONTEXT_LENGTH, sizes.context),
        (llm.EMBEDDING_LENGTH, sizes.hidden),
        (llm.FEED_FORWARD_LENGTH, sizes.intermediate),
        (attention.HEAD_COUNT, sizes.heads),
        (attention.HEAD_COUNT_KV, sizes.kv_heads),
    )
    later: tuple[tuple[str, int | None], ...] = (
        (attention.KEY_LENGTH, head_dim),
        (attention.VALUE_LENGTH, head_dim),
        (llm.VOCAB_SIZE, sizes.vocabulary if added else None),
        (gguf.Keys.Rope.DIMENSION_COUNT, sizes.head_dim if added else None),
    )
    arch = family.gguf_arch
    numbers = {gguf.Keys.Rope.FREQ_BASE: rope.theta, attention.LAYERNORM_RMS_EPS: epsilon}
    return {
        **count_values(arch, counts),
        **rope_scaling_metadata(rope, arch),
        **{key.format(arch=arch): GGUFValue(value, GGUFValueType.FLOAT32) for key, value in numbers.items()},
        **count_values(arch, later),
    }


def count_values(arch: str, counts: tuple[tuple[str, int | None], ...]) -> dict[str, GGUFValue]:
    """uint32 entries for the counts that are there."""
    return {key.format(arch=arch): GGUFValue(n, GGUFValueType.UINT32) for key, n in counts if n is not None}


def extra_tensors(rope: RopeSettings, sizes: Dimensions) -> tuple[ExtraTensor, ...]:
    """rope_freqs.weight for llama3's rope; nothing otherwise."""
    if rope.rope_type != "llama3":
        return ()
    name = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"
    return (ExtraTensor(name, llama3_rope_freqs(rope, sizes.head_dim)),)


def check_shape(rule: TensorRule, shape: tuple[int, ...]) -> None:
    """Raise StreamquantError if a tensor has another shape than config.json demands."""
    if tuple(shape) != rule.shape:
        raise StreamquantError(
            "a tensor's shape does not fit config.json",
            where=f"tensor {rule.hf_name!r}",
            found=list(shape),
            required=list(rule.shape),
        )
