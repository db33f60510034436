"""The steps from a config.json to the description of its model, by the tables of its family.

The reference is llama.cpp's converter (conversion/base.py, TextModel.set_gguf_parameters and
ModelBase.map_tensor_name): the same names, keys, types and values.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import gguf
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from streamquant.convert.architectures.config_values import LARGEST_INTEGER, ConfigValues
from streamquant.convert.architectures.description import ExpertSlot, ExtraTensor, ModelDescription, TensorRule
from streamquant.convert.architectures.family import (
    EXPERT_NUMBER,
    Family,
    LayerTensor,
    Size,
    TensorKind,
    Terms,
    ViewRow,
)
from streamquant.convert.architectures.gguf_keys import EXPERT_GROUPS, KeySources, key_values
from streamquant.convert.architectures.gguf_names import gguf_name
from streamquant.convert.architectures.layers import MTP, Switch
from streamquant.convert.architectures.rope import (
    ROPE_FREQS,
    YARN_BOUNDS,
    YARN_TOLERANCE,
    RopeSettings,
    llama3_rope_freqs,
    read_rope,
    rope_scaling_metadata,
    split_by_layer_type,
    taken_by_yarn,
    with_default_rope,
)
from streamquant.convert.architectures.tensor_view import TensorView, rope_view
from streamquant.quant.errors import StreamquantError

# llama.cpp's LLAMA_MAX_LAYERS (src/llama-hparams.h): a file with more blocks does not load.
MAX_LAYERS = 512
# Far above any model; keeps a hostile config.json from asking for a rope table of gigabytes.
MAX_HEAD_DIM = 1 << 16
# llama.cpp's LLAMA_MAX_EXPERTS (src/llama-hparams.h).
MAX_EXPERTS = 512


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
    rotary: int
    """The part of head_dim that is rotated."""
    experts: int = 0
    """Experts of a layer; 0 in dense models."""
    experts_used: int = 0
    expert_intermediate: int = 0
    mtp_layers: int = 0
    """Layers for multi-token prediction, which `layers` does not count."""
    mtp_in_gguf: bool = True
    """Whether a GGUF has them."""
    own: Mapping[Size, int] = field(default_factory=dict)
    """The sizes that only the family has."""

    @property
    def blocks(self) -> int:
        """All layers of a GGUF."""
        return self.layers + (self.mtp_layers if self.mtp_in_gguf else 0)

    @property
    def common(self) -> dict[Size, int]:
        """The sizes that all models have, by their names in the tables."""
        return {
            "one": 1,
            "hidden": self.hidden,
            "two_hidden": 2 * self.hidden,
            "query": self.heads * self.head_dim,
            "key_value": self.kv_heads * self.head_dim,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "intermediate": self.intermediate,
            "head_dim": self.head_dim,
            "rotary": self.rotary,
            "vocabulary": self.vocabulary,
            "context": self.context,
            "experts": self.experts,
            "expert_intermediate": self.expert_intermediate,
            "mtp_layers": self.mtp_layers,
        }

    def size(self, name: Size) -> int:
        """A size by its name in the tables."""
        return self.own[name] if name in self.own else self.common[name]

    def named(self) -> dict[str, int]:
        """ModelDescription.hyperparameters."""
        return {
            "layers": self.layers,
            "hidden size": self.hidden,
            "feed-forward size": self.intermediate,
            "attention heads": self.heads,
            "key-value heads": self.kv_heads,
            **(self._named_experts() if self.experts else {}),
            **self.own,
        }

    def _named_experts(self) -> dict[str, int]:
        return {
            "experts": self.experts,
            "experts of a token": self.experts_used,
            "expert feed-forward size": self.expert_intermediate,
        }


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
    values, sliding_theta = split_by_layer_type(values, family.sliding_theta)
    values, rope_notes = with_default_rope(values, family.default_rope)
    config = ConfigValues(values, defaults=family.defaults, nullable=family.nullable)
    refuse_other_models(family, config)
    sizes = read_dimensions(family, config)
    tied = config.boolean("tie_word_embeddings")
    epsilon = config.number(family.epsilon)
    rope = read_rope(config, sizes.context, family.partial_rotary, family.llama_cpp.yarn_keys)
    check_rope_type(family, config, rope)
    check_latent_rope(family, config, rope)
    rope = replace(rope, sliding_theta=sliding_theta)
    sizes = replace(sizes, rotary=read_rotary(config, sizes.head_dim, rope))
    tags = read_tags(family, config, sizes)
    notes = [*assumed_notes(config), *rope_notes, *rope.notes]
    window = read_window(family, config)
    notes += [*window_notes(family, window, sizes), *unread_notes(family, config), *other_value_notes(family, config)]
    metadata = common_metadata(family, config, sizes, rope)
    sources = KeySources(family.gguf_arch, config, sizes.size, tags, metadata, rope.numbers)
    notes += [*refused_notes(family, config, sizes, tags), *step_notes(family, tags)]
    notes += [*latent_notes(family, config, sizes), *left_out_notes(family, sizes)]
    notes += [*query_scalar_notes(family, config, sizes), *sliding_theta_notes(family, rope), *yarn_notes(family, rope)]
    notes += group_notes(family, config)
    if tied:
        notes.append("tie_word_embeddings: no output.weight unless the checkpoint has lm_head.weight")
    return ModelDescription(
        family=family,
        layer_count=sizes.layers,
        block_count=sizes.blocks,
        mtp_layer_count=sizes.mtp_layers,
        vocab_size=sizes.vocabulary,
        hyperparameters=MappingProxyType(sizes.named()),
        norm_epsilon=epsilon,
        sliding_window=window,
        tied_embeddings=tied,
        has_rope=has_rope(family, config),
        rules=MappingProxyType({rule.hf_name: rule for rule in make_rules(family, config, sizes, tags)}),
        metadata=MappingProxyType(metadata),
        added_metadata=MappingProxyType(key_values(family.llama_cpp.keys, sources)),
        extra_tensors=extra_tensors(rope, sizes),
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
    key, activation = family.activation
    if config.text(key) != activation:
        raise config.refuse(key, "an activation that llama.cpp does not use for this family", required=activation)
    own = family.experts.count if family.experts is not None else ()
    for key, (fine, meaning) in REFUSED_KEYS.items():
        if key not in own and not is_one_of(config.values.get(key), fine):
            raise config.refuse(key, f"{meaning}, which {family.hf_architecture} is not", required="no such key")
    for key, fine in family.required.items():
        if not is_one_of(config.raw(key), fine):
            raise config.refuse(
                key, "layers of another kind, which this version does not know", required=" or ".join(map(str, fine))
            )


def is_one_of(value: object, fine: tuple[object, ...]) -> bool:
    """Whether a value of JSON is one of these; true is not 1."""
    return any(value is item or (type(value) is type(item) and value == item) for item in fine)


def read_dimensions(family: Family, config: ConfigValues) -> Dimensions:
    """Read and check the sizes, but for the rotated part of the heads: it is all of them here."""
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
    is_written = "head_dim" in family.defaults or config.values.get("head_dim") is not None
    if "head_dim" in family.quotients:
        is_written = False
    if family.latent is not None:
        is_written = family.latent.is_written_early
        if kv_heads != heads:
            raise config.refuse(
                "num_key_value_heads", "latent attention with heads that share keys", required=f"{heads}, as heads"
            )
    experts, used, expert_intermediate = read_experts(family, config)
    layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    sizes = Dimensions(
        layers=layers,
        vocabulary=config.integer("vocab_size"),
        context=config.integer("max_position_embeddings"),
        hidden=hidden,
        intermediate=read_intermediate(family, config),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_is_written=is_written,
        rotary=head_dim,
        experts=experts,
        experts_used=used,
        expert_intermediate=expert_intermediate,
        mtp_layers=0 if family.mtp is None else family.mtp.count(config, MAX_LAYERS - layers),
        mtp_in_gguf=family.mtp is None or family.mtp.in_gguf,
    )
    sizes = replace(sizes, own={name: total(terms, sizes, config) for name, terms in family.sizes.items()})
    check_quotients(family, config, sizes)
    return sizes


def check_quotients(family: Family, config: ConfigValues, sizes: Dimensions) -> None:
    """Refuse a key that is not the quotient which llama.cpp takes for it; "auto" is what transformers computes too."""
    for key, (whole, parts) in family.quotients.items():
        quotient, rest = divmod(sizes.size(whole), sizes.size(parts))
        if rest or (config.values.get(key) not in (None, "auto") and config.integer(key) != quotient):
            raise config.refuse(
                key, "sizes that do not fit together", required=f"{sizes.size(whole)} / {sizes.size(parts)}"
            )


def read_intermediate(family: Family, config: ConfigValues) -> int:
    """The feed-forward size of dense layers; 0 for a mixture of experts whose config.json has none."""
    if family.feed_forward is not None:
        return family.feed_forward(config)
    key = family.intermediate
    without = family.experts is not None and key not in family.defaults
    return 0 if without and key not in config else config.integer(key)


def total(terms: Terms, sizes: Dimensions, config: ConfigValues) -> int:
    """The value of a family's own size."""

    def value(factor: str | int) -> int:
        if isinstance(factor, int):
            return factor
        if factor in sizes.common:
            return sizes.size(factor)
        if factor in config.nullable:
            return config.integer_or_null(factor) or 0
        return config.integer(factor, least=0 if config.defaults.get(factor) == 0 else 1)

    result = sum(math.prod(map(value, factors)) for factors in terms)
    if result > LARGEST_INTEGER:
        keys = (factor for factors in terms for factor in factors if isinstance(factor, str))
        key = max(keys, key=value)
        raise config.refuse(key, "sizes out of range", required=f"products up to {LARGEST_INTEGER}")
    return result


def read_rotary(config: ConfigValues, head_dim: int, rope: RopeSettings) -> int:
    """The part of each head that is rotated."""
    rotary = int(head_dim * rope.partial)
    if rotary < 2 or rotary % 2 != 0:
        raise StreamquantError(
            "the heads cannot be rotated by halves",
            where=config.where("partial_rotary_factor"),
            found=f"{rope.partial:g} of a head_dim of {head_dim}",
            required="an even number of at least 2",
        )
    return rotary


def read_tags(family: Family, config: ConfigValues, sizes: Dimensions) -> tuple[frozenset[str], ...]:
    """The tags of each layer (layers.py), those for multi-token prediction behind the others."""
    found: list[frozenset[str]] = [frozenset()] * sizes.layers
    for kinds in family.layers:
        listed = kinds.tags(config, sizes.layers)
        found = [tags | {tag} for tags, tag in zip(found, listed, strict=True)]
    behind = frozenset() if family.mtp is None else family.mtp.tags | {MTP}
    behind |= {kinds.tags(config, 1)[0] for kinds in family.layers if isinstance(kinds, Switch)}
    return (*found, *[behind] * sizes.mtp_layers)


def read_experts(family: Family, config: ConfigValues) -> tuple[int, int, int]:
    """(experts of a layer, experts that a token goes through, feed-forward size of one); zeros for a dense family."""
    if family.experts is None:
        return 0, 0, 0
    spelled = next((key for key in family.experts.count if key in config), family.experts.count[0])
    count = config.integer(spelled, least=2, most=MAX_EXPERTS)
    used = config.integer(family.experts.used, most=count)
    return count, used, config.integer(family.experts.intermediate)


def read_head_dim(family: Family, config: ConfigValues, hidden: int, heads: int) -> int:
    """head_dim, or hidden_size / num_attention_heads where config.json leaves it to that; of MLA the rotated part."""
    if family.latent is not None:
        rotated = config.integer(family.latent.rotated, most=MAX_HEAD_DIM)
        if rotated % 2:
            key = family.latent.rotated
            raise config.refuse(key, "the heads cannot be rotated by halves", required="an even number")
        return rotated
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


def has_rope(family: Family, config: ConfigValues) -> bool:
    """Whether queries and keys are rotated at all."""
    return family.rope_switch is None or config.raw(family.rope_switch[0]) == family.rope_switch[1]


def check_rope_type(family: Family, config: ConfigValues, rope: RopeSettings) -> None:
    """Refuse a rope type that llama.cpp cannot run for this architecture."""
    if rope.rope_type not in family.llama_cpp.rope_types:
        raise StreamquantError(
            f"rope type {rope.rope_type!r} does not work for arch {family.gguf_arch!r} in llama.cpp",
            where=config.where("rope_scaling" if config.section("rope_scaling") else "rope_parameters"),
            found=rope.rope_type,
            required=f"one of {', '.join(sorted(family.llama_cpp.rope_types))}",
            hint="llama.cpp reads rope_freqs.weight for arch 'llama' only; the model would run unscaled",
        )


def check_latent_rope(family: Family, config: ConfigValues, rope: RopeSettings) -> None:
    """Refuse two numbers of yarn of which a GGUF has one (llama_context of src/llama-context.cpp, "mscale")."""
    key, other = "mscale", "mscale_all_dim"
    if family.latent is not None and rope.numbers.get(key) != rope.numbers.get(other):
        settings = "rope_scaling" if config.section("rope_scaling") else "rope_parameters"
        raise StreamquantError(
            "yarn whose numbers differ, of which a GGUF has one",
            where=config.where(f"{settings}.{key}"),
            found=f"{rope.numbers.get(key)}, and {other} = {rope.numbers.get(other)}",
            required="the same number for both",
        )


def assumed_notes(config: ConfigValues) -> Iterator[str]:
    """A note for each number that config.json left out; booleans and names that it left out are the plain case."""
    for key, value in config.assumed.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"config.json has no {key}; transformers' default of {value:g} is used"


def read_window(family: Family, config: ConfigValues) -> int | None:
    """The window that Hugging Face attends to; transformers' use_sliding_window, where a class has it, switches it."""
    if "sliding_window" not in family.defaults:
        return None
    if "use_sliding_window" in family.defaults and not config.boolean("use_sliding_window"):
        return None
    return config.integer_or_null("sliding_window")


def window_notes(family: Family, window: int | None, sizes: Dimensions) -> Iterator[str]:
    """A note where Hugging Face attends to a window only: GGUF of these families has no key for it."""
    has_key = any(key.name == gguf.Keys.Attention.SLIDING_WINDOW for key in family.llama_cpp.keys)
    if window is not None and window < sizes.context and not has_key:
        yield (
            f"sliding_window = {window} is not carried over: llama.cpp has no key for it in arch "
            f"{family.gguf_arch!r} and attends to the whole context"
        )
    if family.llama_cpp.window_layers not in (None, sizes.layers):
        yield (
            f"WARNING: sliding_window = {window}: in arch {family.gguf_arch!r} llama.cpp knows windows in models of"
            f" {family.llama_cpp.window_layers} layers alone, and this has {sizes.layers}; the GGUF will answer"
            " differently"
        )


def unread_notes(family: Family, config: ConfigValues) -> Iterator[str]:
    """A warning where the reference converter writes biases that make llama.cpp refuse the file, or lacks some.

    Seen with llama.cpp 11434: "done_getting_tensors: wrong number of tensors", and a segmentation fault.
    """
    for key in family.llama_cpp.unread:
        if config.boolean(key):
            yield (
                f"WARNING: {key} = true: llama.cpp does not read all of these biases in arch {family.gguf_arch!r} "
                "and will refuse to load the GGUF (wrong number of tensors)"
            )
    for key in family.llama_cpp.needed:
        if not config.boolean(key):
            yield (
                f"WARNING: {key} = false: llama.cpp will refuse to load the GGUF: in arch {family.gguf_arch!r} it wants"
                " these biases (it crashes)"
            )


def refused_notes(
    family: Family, config: ConfigValues, sizes: Dimensions, tags: Sequence[frozenset[str]]
) -> Iterator[str]:
    """A warning where llama.cpp's loader wants tensors, or layers, that the model does not have.

    Seen with llama.cpp 11434 and 11549.
    """
    refuses = f"llama.cpp will refuse to load the GGUF: in arch {family.gguf_arch!r} it wants"
    if family.llama_cpp.all_heads and sizes.kv_heads != sizes.heads:
        yield f"WARNING: num_key_value_heads = {sizes.kv_heads}: {refuses} as many as attention heads (wrong shape)"
    if family.llama_cpp.own_head and config.boolean("tie_word_embeddings"):
        yield f"WARNING: tie_word_embeddings: {refuses} an output.weight (not found)"
    if family.llama_cpp.alike is not None:
        read, other = family.llama_cpp.alike
        if config.integer(other) != config.integer(read):
            yield f"WARNING: {other} = {config.integer(other)}: {refuses} {read}, {config.integer(read)} (wrong shape)"
    for tag in family.llama_cpp.needed_layers:
        if not any(tag in own for own in tags[: sizes.layers]):
            yield f"WARNING: layer_types without {tag}: {refuses} layers of that kind (it ends when it loads the file)"


def query_scalar_notes(family: Family, config: ConfigValues, sizes: Dimensions) -> Iterator[str]:
    """A warning where llama.cpp scales queries otherwise."""
    if family.llama_cpp.query_scalar is None:
        return
    key, wide = family.llama_cpp.query_scalar
    taken = sizes.hidden // sizes.heads if sizes.layers == wide else sizes.head_dim
    if config.number(key) != taken:
        yield (
            f"WARNING: {key} = {config.raw(key)}: llama.cpp has no key for it in arch {family.gguf_arch!r} and computes"
            f" as if it were {taken}; the GGUF will answer differently"
        )


def sliding_theta_notes(family: Family, rope: RopeSettings) -> Iterator[str]:
    """A warning where llama.cpp rotates layers with a window by theta of the others."""
    own = rope.sliding_theta
    if not family.llama_cpp.reads_sliding_theta and own is not None and own != rope.theta:
        yield (
            f"WARNING: rope_theta = {own:g} of layers with a window: llama.cpp does not read it in arch"
            f" {family.gguf_arch!r} and rotates them by {rope.theta:g}; the GGUF will answer differently"
        )


def yarn_notes(family: Family, rope: RopeSettings) -> Iterator[str]:
    """A warning where llama.cpp computes with other numbers of yarn, but for what transformers does not know either."""
    if rope.rope_type != "yarn":
        return
    known = {"extrapolation_factor", *(YARN_BOUNDS if family.llama_cpp.reads_yarn_bounds else ())}
    known |= {"attention_factor"} if family.llama_cpp.yarn_keys else set()
    for key, taken in taken_by_yarn(rope.numbers["factor"]).items():
        own = rope.numbers.get(key, taken)
        if key not in known and not math.isclose(own, taken, rel_tol=YARN_TOLERANCE):
            yield (
                f"WARNING: {key} = {own:g}: llama.cpp does not read it in arch {family.gguf_arch!r} and computes with"
                f" {taken:g}; the GGUF will answer differently"
            )


def group_notes(family: Family, config: ConfigValues) -> Iterator[str]:
    """A warning where llama.cpp chooses groups of experts otherwise (build_moe_ffn of src/llama-graph.cpp)."""
    if family.llama_cpp.grouped is not None and config.has_value("n_group") and config.integer("n_group") > 1:
        key = family.llama_cpp.grouped[0]
        yield (
            f"WARNING: {key} = {config.text(key)}, n_group = {config.integer('n_group')}: llama.cpp takes the groups"
            " whose two best experts have the highest scores together; the GGUF will answer differently"
        )


def step_notes(family: Family, tags: Sequence[frozenset[str]]) -> Iterator[str]:
    """A warning where llama.cpp takes other layers for those of a kind, because GGUF has no list of them."""
    for tag, step in family.llama_cpp.steps.items():
        other = [number for number, own in enumerate(tags) if (tag in own) != ((number + 1) % step == 0)]
        if other:
            yield (
                f"WARNING: in arch {family.gguf_arch!r} llama.cpp takes every {step}. layer for one of {tag!r}, and no"
                f" other, which is not so in layer {other[0]}; the GGUF will answer differently"
            )


def latent_notes(family: Family, config: ConfigValues, sizes: Dimensions) -> Iterator[str]:
    """A warning where llama.cpp takes queries for made of a latent vector, or not: it knows the models without by their
    layers (load_arch_hparams of src/models/deepseek2.cpp; seen with llama.cpp 11434)."""
    if family.latent is None:
        return
    key, has_rank = family.latent.query_rank, config.has_value(family.latent.query_rank)
    is_lite = sizes.blocks in (26, 27) or (sizes.blocks, sizes.vocabulary) == (48, 128256)
    if is_lite is has_rank:
        yield (
            f"WARNING: {key} = {config.raw(key) if has_rank else 'null'}: llama.cpp will refuse to load the GGUF: in"
            f" arch {family.gguf_arch!r} it takes models with 26 or 27 layers, and no others, for those without"
        )


def left_out_notes(family: Family, sizes: Dimensions) -> Iterator[str]:
    """A note where a GGUF lacks layers that the checkpoint has."""
    if sizes.mtp_layers and not sizes.mtp_in_gguf:
        yield (
            f"{sizes.mtp_layers} layers for multi-token prediction stay out of GGUF files: llama.cpp does not read them"
            f" in arch {family.gguf_arch!r}"
        )


def other_value_notes(family: Family, config: ConfigValues) -> Iterator[str]:
    """A warning where llama.cpp computes something else, because GGUF has no key for what config.json says."""
    for key, assumed in family.llama_cpp.assumed.items():
        if config.raw(key) != assumed:
            yield (
                f"WARNING: {key} = {config.raw(key)}: llama.cpp has no key for it in arch {family.gguf_arch!r} and "
                f"computes as if it were {assumed}; the GGUF will answer differently"
            )


def make_rules(
    family: Family, config: ConfigValues, sizes: Dimensions, tags: Sequence[frozenset[str]]
) -> Iterator[TensorRule]:
    """The rules of all tensors, in the order of a state dict."""
    names = gguf.get_tensor_name_map(family.llama_cpp.arch, sizes.layers + sizes.mtp_layers)
    switches = {tensor.when for tensor in family.layer if tensor.when is not None}
    switched_on = {None, *(key for key in sorted(switches) if config.boolean(key))}
    tensors = [tensor for tensor in family.layer if tensor.when in switched_on]
    matrix = (sizes.vocabulary, sizes.hidden)
    yield make_rule(names, "model.embed_tokens.weight", TensorKind.EMBEDDING, matrix)
    for number, own in enumerate(tags):
        for tensor in tensors:
            if tensor.on is not None and tensor.on not in own:
                continue
            heads = {"query": sizes.heads, "key": sizes.kv_heads, None: None}[tensor.rope]
            shape = tuple(sizes.size(name) for name in tensor.shape)
            is_mtp = MTP in own
            if EXPERT_NUMBER in tensor.suffix:
                stacked = stacked_rule(names, number, tensor, shape)
                yield from expert_rules(replace(stacked, is_mtp=is_mtp), tensor, sizes.experts)
            else:
                may_be_zero = tensor.when is not None and tensor.kind is TensorKind.BIAS
                required = not (tensor.optional or may_be_zero)
                name = f"model.layers.{number}.{tensor.suffix}"
                looked_up = f"model.layers.{number}.{tensor.parts[0][0]}" if tensor.parts else name
                rule = replace(make_rule(names, looked_up, tensor.kind, shape, required=required), hf_name=name)
                merged = None if tensor.merged is None else f"model.layers.{number}.{tensor.merged}"
                rule = replace(rule, layer=number, is_mtp=is_mtp, merged=merged)
                view = rope_view(heads, len(shape)) if heads else read_view(family, tensor, sizes)
                yield cut(rule, tensor, names, sizes) if tensor.parts else with_view(rule, view)
    last = make_rule(names, f"{family.final_norm}.weight", TensorKind.NORM, (sizes.hidden,))
    yield with_view(last, norm_view(family))
    tied = config.boolean("tie_word_embeddings")
    yield make_rule(names, "lm_head.weight", TensorKind.HEAD, matrix, required=not tied)


def cut(rule: TensorRule, tensor: LayerTensor, names: gguf.TensorNameMap, sizes: Dimensions) -> TensorRule:
    """The rule of a tensor that GGUF cuts into several."""
    parts = []
    for suffix, row in tensor.parts:
        name = gguf_name(names, f"model.layers.{rule.layer}.{suffix}")
        parts.append(with_view(replace(rule, gguf_name=name), view_of_row(row, sizes)))
    return replace(parts[0], parts=tuple(parts))


def norm_view(family: Family) -> TensorView | None:
    """What the converter makes of a norm."""
    return None if family.norm_value is None else TensorView(value=family.norm_value)


def read_view(family: Family, tensor: LayerTensor, sizes: Dimensions) -> TensorView | None:
    """The view of a row of a layer table, with the sizes of the model."""
    row = tensor.view
    if row is None:
        return norm_view(family) if tensor.kind is TensorKind.NORM else None
    return view_of_row(row, sizes)


def view_of_row(row: ViewRow, sizes: Dimensions) -> TensorView:
    """The view that a row of a table describes, with the sizes of the model."""
    known = tuple((name, size if isinstance(size, int) else sizes.size(size)) for name, size in row.sizes)
    return TensorView(row.pattern, known, row.value)


def with_view(rule: TensorRule, view: TensorView | None) -> TensorRule:
    """A rule with its view. Raises StreamquantError if the sizes of config.json do not fit it."""
    if view is None:
        return rule
    try:
        _ = view.stored_shape(rule.shape)
    except StreamquantError as error:
        raise error.at(f"config.json, for tensor {rule.hf_name!r}") from None
    return replace(rule, view=view)


def stacked_rule(names: gguf.TensorNameMap, layer: int, tensor: LayerTensor, shape: tuple[int, ...]) -> TensorRule:
    """The rule of one projection of all experts of a layer, which llama.cpp stacks in one tensor."""
    name = f"model.layers.{layer}.{tensor.suffix}"
    return replace(make_rule(names, name.replace(f"{EXPERT_NUMBER}.", ""), tensor.kind, shape), layer=layer)


def expert_rules(stacked: TensorRule, tensor: LayerTensor, count: int) -> Iterator[TensorRule]:
    """The rules of its experts. (Made one by one, without dataclasses.replace: large models have 70,000.)"""
    common = stacked.gguf_name, stacked.kind, stacked.shape, stacked.view, stacked.required
    name = f"model.layers.{stacked.layer}.{tensor.suffix}"
    for expert in range(count):
        hf_name, slot = name.replace(EXPERT_NUMBER, str(expert)), ExpertSlot(expert, count)
        merged = None
        if tensor.merged is not None:
            merged = f"model.layers.{stacked.layer}.{tensor.merged}".replace(EXPERT_NUMBER, str(expert))
        yield TensorRule(hf_name, *common, slot, stacked.layer, stacked.is_mtp, merged)


def make_rule(
    names: gguf.TensorNameMap,
    hf_name: str,
    kind: TensorKind,
    shape: tuple[int, ...],
    *,
    required: bool = True,
) -> TensorRule:
    """A rule, with its GGUF name (gguf_names.py)."""
    return TensorRule(hf_name, gguf_name(names, hf_name), kind, shape, None, required)


def common_metadata(
    family: Family, config: ConfigValues, sizes: Dimensions, rope: RopeSettings
) -> dict[str, GGUFValue]:
    """The {arch}.* keys of all families with the types of gguf.GGUFWriter, in the reference converter's order."""
    arch, llm, attention = family.gguf_arch, gguf.Keys.LLM, gguf.Keys.Attention
    counts = {
        llm.BLOCK_COUNT: sizes.blocks,
        llm.CONTEXT_LENGTH: sizes.context,
        llm.EMBEDDING_LENGTH: sizes.hidden,
        **({llm.FEED_FORWARD_LENGTH: sizes.intermediate} if sizes.intermediate else {}),
        attention.HEAD_COUNT: sizes.heads,
        attention.HEAD_COUNT_KV: sizes.kv_heads,
    }
    has_counts = bool(sizes.experts) or family.llama_cpp.counts_experts
    experts = {llm.EXPERT_COUNT: sizes.experts, llm.EXPERT_USED_COUNT: sizes.experts_used} if has_counts else {}
    widths = (attention.KEY_LENGTH, attention.VALUE_LENGTH) if sizes.head_dim_is_written else ()
    numbers = {
        gguf.Keys.Rope.FREQ_BASE: rope.theta,
        **({} if rope.sliding_theta is None else {gguf.Keys.Rope.FREQ_BASE_SWA: rope.sliding_theta}),
        attention.LAYERNORM_RMS_EPS: config.number(family.epsilon),
    }
    return {
        **count_values(arch, counts),
        **rope_scaling_metadata(rope, arch),
        **{key.format(arch=arch): GGUFValue(value, GGUFValueType.FLOAT32) for key, value in numbers.items()},
        **count_values(arch, experts),
        **(key_values(EXPERT_GROUPS, KeySources(arch, config, sizes.size)) if experts else {}),
        **count_values(arch, dict.fromkeys(widths, sizes.head_dim)),
    }


def count_values(arch: str, counts: Mapping[str, int]) -> dict[str, GGUFValue]:
    """uint32 entries."""
    return {key.format(arch=arch): GGUFValue(n, GGUFValueType.UINT32) for key, n in counts.items()}


def extra_tensors(rope: RopeSettings, sizes: Dimensions) -> tuple[ExtraTensor, ...]:
    """rope_freqs.weight for llama3's rope; nothing otherwise."""
    if rope.rope_type != "llama3":
        return ()
    return (ExtraTensor(ROPE_FREQS, llama3_rope_freqs(rope, sizes.head_dim)),)
