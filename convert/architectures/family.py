"""The records that a model family's file is made of.

A family is data: Hugging Face's class with its defaults, a table of the tensors of one layer, and what llama.cpp's
converter and loader do for its architecture. from_config.py reads a config.json by it.
"""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import gguf

from streamquant.convert.architectures.config_values import ConfigValues
from streamquant.convert.architectures.gguf_keys import GgufKey
from streamquant.convert.architectures.layers import MTP, LayerKinds, MtpLayers
from streamquant.convert.architectures.tensor_view import ValueMap


class TensorKind(enum.Enum):
    """What a tensor is for; recipes choose formats by it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    LINEAR = "linear"
    BIAS = "bias"
    ROUTER = "router"
    """The matrix that chooses the experts of a token; runtimes want it unquantized."""
    ROUTER_BIAS = "router bias"
    """What is added to the scores of a router before the best are chosen: numbers that stay as they are."""
    EXPERT = "expert"
    """A projection of one expert. GGUF stacks those of a layer in one tensor."""
    CONVOLUTION = "convolution"
    """The short one of a linear attention; never quantized."""
    STATE = "state"
    """Numbers for each head of a linear attention: its decay, the bias of its step."""
    LATENT = "projection to a latent vector"
    """What makes the vector of all heads' keys and values, or queries; runtimes want it unquantized in safetensors."""
    STATE_INPUT = "input of a state"
    """The small matrices of a linear attention that make decay and step; runtimes want them unquantized."""
    SINK = "attention sink"
    """A number for each head that stands for what a token attends to beside the others."""
    MTP = "multi-token prediction"
    """A matrix that only a layer for multi-token prediction has; runtimes want it unquantized in safetensors."""

    @property
    def is_linear(self) -> bool:
        """Whether it is a matrix that schemes for "Linear" quantize."""
        return self in (TensorKind.LINEAR, TensorKind.EXPERT)


MERGED: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w1", "w3"), "w13"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
}
"""A linear layer -> the matrix that runtimes make of it and its neighbours (packed_modules_mapping of vLLM's models;
FUSED_LAYER_NAMES in llm-compressor's observers/helpers.py has all but the last)."""

EXPERT_NUMBER = "{expert}"
"""Stands in the suffix of a tensor of which every expert has one."""

Size = str
"""A name of those that all models have (Dimensions.size in from_config.py), or of the family's own."""
Terms = tuple[tuple[str | int, ...], ...]
"""A sum of products: each factor is a number, a size by its name, or an integer of config.json by its key."""


@dataclass(frozen=True, slots=True)
class ViewRow:
    """What the converter does to a tensor, as a row of a table has it (tensor_view.py): sizes by name, or numbers."""

    pattern: str = ""
    sizes: tuple[tuple[str, Size | int], ...] = ()
    value: ValueMap | None = None


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """A tensor of one decoder layer; `when` names the boolean of config.json without which it does not exist.

    With it, a bias may still be missing, in all layers: it is zero then, in transformers and in llama.cpp.
    Of a tensor of kind EXPERT there is one for each expert, its number in place of EXPERT_NUMBER in the suffix.
    `on` is the tag of the layers that have it (layers.py), None: all of them.
    """

    suffix: str
    kind: TensorKind
    shape: tuple[Size, ...]
    rope: Literal["query", "key"] | None = None
    when: str | None = None
    on: str | None = None
    optional: bool = False
    """Whether a checkpoint may lack it."""
    view: ViewRow | None = None
    merged: str | None = None
    """The matrix that runtimes make of it and its neighbours, one of each expert; None: it stays alone."""
    parts: "tuple[tuple[str, ViewRow], ...]" = ()
    """Where llama.cpp cuts it into several tensors: the suffix by which each is named, and what it is of this one."""


@dataclass(frozen=True, slots=True)
class VocabularyRules:
    """What the class of llama.cpp's converter does about the tokenizer (its set_vocab). Sizes count tokens.

    sentencepiece: tokenizer.model wins over tokenizer.json. add_space_prefix: add_prefix_space of tokenizer_config.json
    is written. no_bos: sizes of vocabularies for which BOS exists but must not be added. fill_in_the_middle: size of a
    vocabulary -> ids by kind (prefix, suffix, middle, eot), for tokenizers whose files do not name them. special: kind
    (bos, eot, unk, eom) -> text of the added token that it is, where the files do not name one.
    """

    sentencepiece: bool = False
    add_space_prefix: bool = False
    space_prefix: bool | None = None
    """What is written, for vocabularies of SentencePiece, whatever the files say; None: nothing."""
    no_bos: frozenset[int] = frozenset()
    fill_in_the_middle: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)
    tiktoken: bool = False
    """Whether the vocabulary may be a tiktoken.model, without tokenizer.json."""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """What llama.cpp's converter and loader do for an architecture, where it is not what they do for all.

    keys are those that the converter's class writes after the common ones, in its order; a key of the common ones keeps
    its place and takes this value.
    rope_freqs says whether the loader reads rope_freqs.weight, without which rope of type "llama3" would run unscaled.
    unread are the booleans of config.json whose biases the converter writes but the loader does not read.
    assumed are keys of config.json that no GGUF key carries, with the value that llama.cpp computes with.
    all_heads: the loader wants as many key-value heads as heads; own_head: it wants an output.weight.
    pooling says whether the converter writes and the loader reads how an embedding model pools.
    steps: tag of layers -> the loader takes every so many-th for one of them, whatever config.json says.
    yarn_keys: further numbers of yarn, which is then the only rope if it is not optional, with the one value that each
    may have, None: any. reads_yarn_bounds: the loader reads beta_fast and beta_slow, else it takes 32 and 1.
    known_by is the key, or key and value, that a GGUF of the family has and others of its architecture have not.
    grouped: the key that says how experts are chosen, its value where they are in groups, and without. alike: two
    sizes in config.json of which the loader reads the first for both. query_scalar: the key of the number whose
    root divides the scores, which the loader takes to be head_dim, or hidden_size / heads in a model of so many
    layers. counts_experts: the converter writes how many experts there are where there are none. needed are the
    booleans of config.json without whose biases llama.cpp ends, needed_layers tags of which it wants a layer.
    reads_sliding_theta: whether the loader rotates layers with a window by a theta of their own
    (Family.sliding_theta). window_layers: the one number of layers with which it attends to windows.
    """

    arch: gguf.MODEL_ARCH
    vocabulary: VocabularyRules = VocabularyRules()
    keys: tuple[GgufKey, ...] = ()
    rope_freqs: bool = False
    unread: tuple[str, ...] = ()
    assumed: Mapping[str, object] = field(default_factory=dict)
    pooling: bool = False
    all_heads: bool = False
    own_head: bool = False
    steps: Mapping[str, int] = field(default_factory=dict)
    yarn_keys: Mapping[str, float | None] = field(default_factory=dict)
    yarn_is_optional: bool = False
    reads_yarn_bounds: bool = False
    known_by: tuple[str, int | None] | None = None
    grouped: tuple[str, str, str] | None = None
    query_scalar: tuple[str, int] | None = None
    alike: tuple[str, str] | None = None
    counts_experts: bool = False
    needed: tuple[str, ...] = ()
    window_layers: int | None = None
    needed_layers: tuple[str, ...] = ()
    reads_sliding_theta: bool = True

    @property
    def rope_types(self) -> frozenset[str]:
        """The rope types that llama.cpp computes for the architecture."""
        if self.yarn_keys and not self.yarn_is_optional:
            return frozenset({"yarn"})
        return frozenset({"default", "linear", "yarn"} | ({"llama3"} if self.rope_freqs else set()))


@dataclass(frozen=True, slots=True)
class Experts:
    """The keys of config.json that describe a mixture of experts, as the family's configuration class calls them."""

    count: tuple[str, ...]
    """Experts of a layer; the first of these keys that config.json has."""
    used: str
    """Experts that a token goes through."""
    intermediate: str
    """Feed-forward size of one expert."""
    path: str = "mlp"
    """The block with router and experts within a layer of transformers."""
    stored_path: str = "mlp"
    """What checkpoints call that block."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    is_fused: bool = False
    """Whether checkpoints may store those of a layer in one tensor (convert/source/fused_experts.py)."""
    by_turns: bool = False
    """Whether that has gate and up by turns, by columns, with biases, or in MXFP4; else gate before up."""
    fused_names: tuple[str, str] | None = None
    """What checkpoints call that of gate and up, and that of down, in the block; None: transformers' names for them."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """A module of the block in checkpoints -> its name in transformers, where that is another."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The keys of config.json that describe multi-head latent attention (MLA).

    Keys and values of all heads are made of one vector of `key_value_rank` for each token, queries of one of
    `query_rank`, or of the hidden state where that is null. The last `rotated` of a key's components are rotated, and
    the same for all heads; the others have no position.
    """

    query_rank: str = "q_lora_rank"
    key_value_rank: str = "kv_lora_rank"
    plain: str = "qk_nope_head_dim"
    rotated: str = "qk_rope_head_dim"
    value: str = "v_head_dim"
    is_written_early: bool = True
    """Whether the lengths of keys and values stand in a GGUF where other families have them: the class in transformers
    has a head_dim."""


@dataclass(frozen=True, slots=True)
class Multimodal:
    """The class around a text model that also sees or hears: the text model alone becomes a GGUF.

    Its config.json has the text model's under text_config, its tensors have `language_model.` in their names. FP8
    folders keep the names and, byte for byte, what is left out of GGUF files.
    """

    model_type: str
    left_out: tuple[str, ...]
    """What the names of tensors begin with that are no part of the text model."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: Hugging Face's class, and where it differs from the others.

    defaults are those of the configuration class in transformers, for keys that a config.json may leave out; nullable
    are the keys where null is allowed. A family whose defaults have no head_dim writes key_length only if config.json
    has it. hidden_divides_by_heads: the configuration class refuses a hidden_size that is no multiple of the heads; a
    GGUF with such sizes is read as the next family of its architecture. required are the values that keys may have:
    others mean layers that the table does not describe. experts is None for dense models. layers says how config.json
    tells the kinds of layers, where they differ; sizes are the family's own, for its table and its keys. unquantized
    are the modules that compressed-tensors must leave alone beside the head and the embeddings, in its spelling.
    partial_rotary: the share of a head that is rotated, where config.json does not say; None: heads are rotated whole.
    latent is set for multi-head latent attention (MLA).
    multimodal is set for a class around a text model, whose model_type and tables the others are.
    norm_value: what the converter makes of norms, but for those whose row has a view of its own.
    rotary_key: where config.json says the rotated part of a head in dimensions, which transformers does not read.
    activation: the key of config.json, and the one value that llama.cpp computes with. sliding_theta: the key of the
    rope_theta of layers with a window, which have a rope of their own, None where only rope_parameters has it, and its
    default.
    is_meant_by says whether a config.json of the class is one of this family's, where a class is several families, and
    fixed are the keys by which it is told, for what is read from a GGUF. intermediate is the key of the feed-forward
    size. rope_switch: the key of config.json, and the value with which queries and keys are rotated. quotients: a key
    that config.json may have -> the sizes of which it must be the quotient. epsilon is the key of the norms' epsilon,
    final_norm the module of the last norm, feed_forward what makes the feed-forward size of dense layers of the keys.
    default_rope: the rope_parameters of the configuration class where config.json has none; `truncate: false` in it
    means that the class does not round yarn's bounds, which llama.cpp always does.
    """

    hf_architecture: str
    model_type: str
    layer: tuple[LayerTensor, ...]
    defaults: Mapping[str, object]
    nullable: frozenset[str]
    llama_cpp: LlamaCpp
    hidden_divides_by_heads: bool = False
    required: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    experts: Experts | None = None
    layers: tuple[LayerKinds, ...] = ()
    mtp: MtpLayers | None = None
    sizes: Mapping[Size, Terms] = field(default_factory=dict)
    unquantized: tuple[str, ...] = ()
    partial_rotary: float | None = None
    latent: LatentAttention | None = None
    multimodal: Multimodal | None = None
    norm_value: ValueMap | None = None
    default_rope: Mapping[str, object] | None = None
    rotary_key: str | None = None
    activation: tuple[str, str] = ("hidden_act", "silu")
    sliding_theta: tuple[str | None, float] | None = None
    is_meant_by: Callable[[Mapping[str, object]], bool] | None = None
    fixed: Mapping[str, object] = field(default_factory=dict)
    intermediate: str = "intermediate_size"
    rope_switch: tuple[str, str] | None = None
    quotients: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)
    epsilon: str = "rms_norm_eps"
    final_norm: str = "model.norm"
    feed_forward: Callable[[ConfigValues], int] | None = None
    in_transformers: str | None = None
    """The model type that transformers has for it, where it is another."""

    @property
    def gguf_arch(self) -> str:
        """llama.cpp's name of the architecture, the prefix of its keys."""
        return str(gguf.MODEL_ARCH_NAMES[self.llama_cpp.arch])


def linear(
    path: str, shape: tuple[Size, Size], *, rope: Literal["query", "key"] | None = None, bias: str | bool = False
) -> tuple[LayerTensor, ...]:
    """The rows of a layer table for one projection; bias is True, False, or the boolean of config.json it hangs on."""
    weight = LayerTensor(f"{path}.weight", TensorKind.LINEAR, shape, rope, merged=_merged(path))
    if bias is False:
        return (weight,)
    when = bias if isinstance(bias, str) else None
    return weight, LayerTensor(f"{path}.bias", TensorKind.BIAS, shape[:1], rope, when)


def _merged(path: str) -> str | None:
    """What a linear layer becomes a part of.

    >>> _merged("mlp.experts.{expert}.up_proj"), _merged("mlp.down_proj")
    ('mlp.experts.{expert}.gate_up_proj', None)
    """
    block, dot, name = path.rpartition(".")
    return f"{block}{dot}{MERGED[name]}" if name in MERGED else None


def feed_forward(path: str, size: Size = "intermediate", *, on: str | None = None) -> tuple[LayerTensor, ...]:
    """The rows of a layer table for gate, up and down, without biases: of a dense layer, or of shared experts."""
    rows = (
        *linear(f"{path}.gate_proj", (size, "hidden")),
        *linear(f"{path}.up_proj", (size, "hidden")),
        *linear(f"{path}.down_proj", ("hidden", size)),
    )
    return tuple(replace(row, on=on) for row in rows)


def norm(path: str, size: Size = "hidden", *, on: str | None = None, when: str | None = None) -> LayerTensor:
    """The row of a layer table for one norm."""
    return LayerTensor(f"{path}.weight", TensorKind.NORM, (size,), on=on, when=when)


def experts(path: str, shape: tuple[Size, Size], *, on: str | None = None) -> LayerTensor:
    """The row of a layer table for one projection of all experts; EXPERT_NUMBER stands in the path."""
    return LayerTensor(f"{path}.weight", TensorKind.EXPERT, shape, on=on, merged=_merged(path))


def gated_experts(*, on: str | None = None) -> tuple[LayerTensor, ...]:
    """The rows of a layer table for down, gate and up of all experts, in the order in which most converters stack them.

    (Qwen2MoeModel.modify_tensors of llama.cpp's conversion/qwen.py)
    """
    names = {
        "down_proj": ("hidden", "expert_intermediate"),
        "gate_proj": ("expert_intermediate", "hidden"),
        "up_proj": ("expert_intermediate", "hidden"),
    }
    return tuple(experts(f"mlp.experts.{EXPERT_NUMBER}.{name}", shape, on=on) for name, shape in names.items())


def router(path: str, size: Size = "experts", *, on: str | None = None) -> LayerTensor:
    """The row of a layer table for the matrix that chooses the experts, or weighs the shared one (a single row)."""
    return LayerTensor(f"{path}.weight", TensorKind.ROUTER, (size, "hidden"), on=on)


def router_bias(name: str, *, on: str | None = None) -> LayerTensor:
    """The row of a layer table for the bias with which experts are chosen."""
    return LayerTensor(name, TensorKind.ROUTER_BIAS, ("experts",), on=on)


NEXTN = (
    LayerTensor("eh_proj.weight", TensorKind.MTP, ("hidden", "two_hidden"), on=MTP),
    norm("enorm", on=MTP),
    norm("hnorm", on=MTP),
    norm("shared_head.norm", on=MTP),
    LayerTensor("embed_tokens.weight", TensorKind.MTP, ("vocabulary", "hidden"), on=MTP, optional=True),
    LayerTensor("shared_head.head.weight", TensorKind.MTP, ("vocabulary", "hidden"), on=MTP, optional=True),
)
"""The rows of a layer table that only layers for multi-token prediction have."""
