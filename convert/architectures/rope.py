"""Rotary position embeddings: what config.json says of them, GGUF metadata, rope_freqs.weight."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import gguf
import numpy as np
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from streamquant.convert.architectures.config_values import ConfigValues, shorten

ROPE_FREQS = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"
"""The GGUF tensor by whose values llama.cpp divides the rotation frequencies."""

# What transformers assumes when config.json names no theta (RotaryEmbeddingConfigMixin.default_theta).
DEFAULT_THETA = 10000.0

ORIGINAL_CONTEXT = "original_max_position_embeddings"

# Rope type -> keys that it uses, besides rope_theta (transformers/modeling_rope_utils.py, _validate_*_rope_parameters;
# attn_factor and extrapolation_factor are read by llama.cpp's converter).
ROPE_TYPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "attn_factor",
            "extrapolation_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
        }
    ),
}
COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section"})
# Keys where null means the same as no key.
NULLABLE_KEYS = frozenset(
    {"attention_factor", "attn_factor", "extrapolation_factor", "beta_fast", "beta_slow", "truncate"}
)
KNOWN_KEYS = COMMON_KEYS | {"finetuned", "mrope_interleaved"} | frozenset().union(*ROPE_TYPE_KEYS.values())

REFUSED_TYPES: Mapping[str, str] = {
    "dynamic": "its base changes with the length of the text, which GGUF has no key for",
    "longrope": "its factors are tensors that only Phi-3 and MiniCPM have in llama.cpp",
    "su": "it is the old name of longrope, whose factors only Phi-3 and MiniCPM have in llama.cpp",
}
REFUSED_KEYS: Mapping[str, str] = {
    "mscale": "llama.cpp reads it for DeepSeek only",
    "mscale_all_dim": "llama.cpp reads it for DeepSeek only",
    "full_attention": "rope settings by layer type are not supported",
    "sliding_attention": "rope settings by layer type are not supported",
}

# yarn's optional numbers: key of config.json -> GGUF key (llama.cpp, conversion/base.py, set_gguf_parameters).
YARN_NUMBERS: tuple[tuple[str, str], ...] = (
    ("extrapolation_factor", gguf.Keys.Rope.SCALING_YARN_EXT_FACTOR),
    ("attention_factor", gguf.Keys.Rope.SCALING_YARN_ATTN_FACTOR),
    ("beta_fast", gguf.Keys.Rope.SCALING_YARN_BETA_FAST),
    ("beta_slow", gguf.Keys.Rope.SCALING_YARN_BETA_SLOW),
)

YARN_TOLERANCE = 1e-4
"""Share by which a number of yarn may differ from the one that is computed with: publishers round them."""


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """The rope of a model: its type, theta, and the numbers of that type by their names in config.json."""

    rope_type: str
    theta: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    original_context: int | None = None
    notes: tuple[str, ...] = ()
    sections: tuple[int, ...] = ()
    """mrope_section, for the key of that name alone."""
    partial: float = 1.0
    """The share of each head that is rotated."""
    sliding_theta: float | None = None
    """Theta of the layers with a window, where they have a rope of their own."""


def read_rope(
    config: ConfigValues,
    max_position_embeddings: int,
    partial: float | None = None,
    yarn_keys: Mapping[str, float | None] = MappingProxyType({}),
) -> RopeSettings:
    """The rope settings of config.json, spelled as in transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Follows convert_rope_params_to_dict of transformers/modeling_rope_utils.py: a theta inside the settings wins over
    the top-level one. yarn_keys are further numbers of yarn, and the one value that each may have, None: any. Raises
    StreamquantError on an unknown type or key, and where the two spellings contradict.
    """
    notes: list[str] = []
    settings = find_settings(config)
    rope_type = read_type(settings)
    check_keys(settings, rope_type, notes, yarn_keys)
    share = read_partial(config, settings, partial)
    theta = read_theta(config, settings, notes)
    numbers: dict[str, float] = {}
    context: int | None = None
    if rope_type != "default":
        numbers["factor"] = at_least_one(settings, "factor")
    if rope_type == "llama3":
        numbers |= read_llama3(settings)
        context = settings.integer(ORIGINAL_CONTEXT)
    elif rope_type == "yarn":
        numbers |= read_yarn(settings, yarn_keys)
        context = original_context(settings, max_position_embeddings, notes)
    if rope_type in ("llama3", "yarn"):
        note_context_outside(config, settings, context, notes)
    return RopeSettings(rope_type, theta, numbers, context, tuple(notes), read_sections(settings, notes), share)


YARN_BOUNDS = frozenset({"beta_fast", "beta_slow"})
"""Numbers of yarn that the loaders of some architectures read (LlamaCpp.reads_yarn_bounds)."""


def taken_by_yarn(factor: float) -> dict[str, float]:
    """The numbers of yarn with which llama.cpp computes for architectures whose loader does not read them, and
    transformers where config.json does not say: cos and sin grow with the factor (ggml_rope_yarn of ggml's ops.cpp).

    >>> taken_by_yarn(8.0)["attention_factor"]
    1.2079441541679836
    """
    growth = 0.1 * math.log(max(factor, 1.0)) + 1.0
    return {"extrapolation_factor": 1.0, "attention_factor": growth, "beta_fast": 32.0, "beta_slow": 1.0}


def split_by_layer_type(
    values: Mapping[str, object], sliding: tuple[str | None, float] | None
) -> tuple[Mapping[str, object], float | None]:
    """(config.json with the rope of the layers that see all, theta of those with a window): Family.sliding_theta.

    transformers 5 has both in rope_parameters, by the type of the layers; 4 may have a key for theta of the second.
    Raises StreamquantError if a scaling is meant for layers with a window: llama.cpp scales the others alone.
    """
    if sliding is None:
        return values, None
    key, default = sliding
    config = ConfigValues(values, defaults={} if key is None else {key: default})
    both = ConfigValues(config.section("rope_parameters"), prefix="rope_parameters.")
    if not both.values.keys() & {"full_attention", "sliding_attention"}:
        return values, default if key is None else config.number(key, above=1.0)
    own = ConfigValues(
        both.section("sliding_attention"),
        defaults={"rope_theta": default},
        prefix="rope_parameters.sliding_attention.",
    )
    if own.values.get("rope_type", "default") != "default":
        raise own.refuse("rope_type", "a rope scaling of layers with a window", required="default")
    return {**values, "rope_parameters": both.section("full_attention")}, own.number("rope_theta", above=1.0)


def with_default_rope(
    values: Mapping[str, object], default: Mapping[str, object] | None
) -> tuple[Mapping[str, object], tuple[str, ...]]:
    """config.json of a class that has a rope of its own (Family.default_rope), with that where it says nothing.

    Its "truncate": false is left out, as no GGUF has it; a note says what that means.
    """
    if default is None:
        return values, ()
    notes = []
    key = next((key for key in ("rope_scaling", "rope_parameters") if values.get(key)), None)
    settings = dict(default)
    if key is None:
        key, settings = "rope_parameters", {**default}
        if values.get("rope_theta") is not None:
            settings["rope_theta"] = values["rope_theta"]
        if settings["rope_type"] != "default" or values.get("rope_theta") is None:
            notes.append(f"config.json has no rope settings; transformers' default is used: {shorten(settings)}")
    elif isinstance(given := values[key], Mapping):
        theta = {} if values.get("rope_theta") is not None else {"rope_theta": default["rope_theta"]}
        settings = {**theta, **given}
    else:
        return values, ()
    if settings.get("truncate") is False and default.get("truncate") is False:
        del settings["truncate"]
        notes.append(
            "yarn without truncation: llama.cpp rounds the bounds between slow and fast rotations to whole dimensions,"
            " transformers does not; a few dimensions of each head turn a little differently in GGUF"
        )
    return {**values, key: settings}, tuple(notes)


def find_settings(config: ConfigValues) -> ConfigValues:
    """The one rope object of config.json; both spellings at once are fine only if they say the same."""
    old, new = config.section("rope_scaling"), config.section("rope_parameters")
    theta = config.values.get("rope_theta")
    if old and new and canonical(old, theta) != canonical(new, theta):
        raise config.refuse(
            "rope_scaling",
            "rope_scaling and rope_parameters contradict each other",
            required=f"one of them, or the same settings as rope_parameters = {shorten(dict(new))}",
            hint="remove the wrong one from config.json",
        )
    name = "rope_scaling" if old else "rope_parameters"
    return ConfigValues(old or new, nullable=NULLABLE_KEYS, prefix=f"{name}.")


def canonical(section: Mapping[str, object], theta: object) -> dict[str, object]:
    """A rope object with its type under one name, its theta inside, and without nulls."""
    values = {"rope_theta": theta, "rope_type": section.get("type", "default"), **section, "type": None}
    return {key: value for key, value in values.items() if value is not None}


def read_type(settings: ConfigValues) -> str:
    """The rope type, "default" where there are no settings but theta; raises StreamquantError on an unsupported one."""
    named = [key for key in ("rope_type", "type") if settings.values.get(key) is not None]
    if not named:
        if set(settings.values) - COMMON_KEYS:
            raise settings.refuse(
                "rope_type", "rope settings without a type", required=f"one of {', '.join(ROPE_TYPE_KEYS)}"
            )
        return "default"
    types = {key: settings.text(key) for key in named}
    if len(set(types.values())) > 1:
        raise settings.refuse("rope_type", "rope_type and type differ", required=f"type = {types['type']!r}, or none")
    rope_type = types[named[0]]
    if rope_type not in ROPE_TYPE_KEYS:
        reason = REFUSED_TYPES.get(rope_type)
        raise settings.refuse(
            named[0],
            f"rope type {rope_type!r} is {'not supported' if reason else 'unknown'}",
            required=f"one of {', '.join(ROPE_TYPE_KEYS)}",
            hint=f"none: {reason}" if reason else None,
        )
    return rope_type


def check_keys(settings: ConfigValues, rope_type: str, notes: list[str], more: Collection[str] = frozenset()) -> None:
    """Refuse keys of unknown meaning; note those that belong to another type, which transformers ignores as well."""
    for key, value in settings.values.items():
        if value is None or key in COMMON_KEYS or key in ROPE_TYPE_KEYS[rope_type] or key in more:
            continue
        if key not in KNOWN_KEYS:
            raise settings.refuse(
                key,
                f"rope setting {key!r} is not supported: {REFUSED_KEYS.get(key, 'its meaning is unknown')}",
                required=f"for rope type {rope_type!r} one of {', '.join(sorted(ROPE_TYPE_KEYS[rope_type])) or 'none'}",
            )
        notes.append(f"config.json: {settings.prefix}{key} has no meaning for rope type {rope_type!r}; ignored")


def read_partial(config: ConfigValues, settings: ConfigValues, default: float | None) -> float:
    """The share of each head that is rotated; a default of None is a family of llama.cpp that rotates all of it.

    Inside the settings it wins over the top level, as theta does.
    """
    key = "partial_rotary_factor"
    for values in (settings, config):
        if values.values.get(key) is not None:
            share = values.number(key)
            if default is None and share != 1.0:
                raise values.refuse(key, "partial rotation is not supported", required="1.0, or no such key")
            if share > 1.0:
                raise values.refuse(key, "more than the whole of a head", required="at most 1")
            if default is not None:
                return share
    return 1.0 if default is None else default


def read_theta(config: ConfigValues, settings: ConfigValues, notes: list[str]) -> float:
    """rope_theta: inside the settings, else at the top level, else transformers' default."""
    if "rope_theta" in settings:
        theta = settings.number("rope_theta", above=1.0)
        if "rope_theta" in config and config.number("rope_theta", above=1.0) != theta:
            outer = config.values["rope_theta"]
            notes.append(f"config.json: {settings.prefix}rope_theta = {theta:g} wins over rope_theta = {outer}")
        return theta
    if "rope_theta" in config:
        return config.number("rope_theta", above=1.0)
    notes.append(f"config.json has no rope_theta; transformers' default of {DEFAULT_THETA:g} is used")
    return DEFAULT_THETA


def at_least_one(settings: ConfigValues, key: str) -> float:
    """A scaling factor."""
    value = settings.number(key)
    if value < 1.0:
        raise settings.refuse(key, "a rope factor below 1", required="1 or more")
    return value


def read_llama3(settings: ConfigValues) -> dict[str, float]:
    """low_freq_factor and high_freq_factor."""
    low, high = settings.number("low_freq_factor", above=1e-6), settings.number("high_freq_factor")
    if high <= low:
        raise settings.refuse(
            "high_freq_factor", "high_freq_factor must exceed low_freq_factor", required=f"more than {low:g}"
        )
    return {"low_freq_factor": low, "high_freq_factor": high}


def read_yarn(settings: ConfigValues, more: Mapping[str, float | None]) -> dict[str, float]:
    """yarn's optional numbers and those of `more`; "attn_factor" is an older name of "attention_factor"."""
    if "truncate" in settings and settings.raw("truncate") is not None and not settings.boolean("truncate"):
        raise settings.refuse(
            "truncate", "yarn without truncation is not supported", required="true: llama.cpp always truncates"
        )
    numbers = {}
    for name, _ in YARN_NUMBERS:
        key = "attn_factor" if name == "attention_factor" and name not in settings else name
        if settings.values.get(key) is not None:
            numbers[name] = settings.number(key)
    for key, only in more.items():
        numbers[key] = settings.number(key)
        if only is not None and numbers[key] != only:
            raise settings.refuse(key, "a number of yarn that llama.cpp has no key for", required=f"{only:g}")
    return numbers


def original_context(settings: ConfigValues, max_position_embeddings: int, notes: list[str]) -> int:
    """original_max_position_embeddings, which transformers takes to be max_position_embeddings where it is missing."""
    if ORIGINAL_CONTEXT in settings:
        return settings.integer(ORIGINAL_CONTEXT)
    notes.append(
        f"config.json: yarn without {ORIGINAL_CONTEXT}; max_position_embeddings = {max_position_embeddings} is used"
    )
    return max_position_embeddings


def note_context_outside(config: ConfigValues, settings: ConfigValues, context: int | None, notes: list[str]) -> None:
    """Say so where original_max_position_embeddings stands beside the rope settings: these classes do not read it.

    (RotaryEmbeddingConfigMixin.convert_rope_params_to_dict of transformers reads one of classes that declare it.)
    """
    if config.values.get(ORIGINAL_CONTEXT) is not None and config.integer(ORIGINAL_CONTEXT) != context:
        notes.append(
            f"WARNING: config.json: {ORIGINAL_CONTEXT} = {config.values[ORIGINAL_CONTEXT]} stands beside"
            f" {settings.prefix.rstrip('.')}, where transformers does not read it for this class: {context} is used;"
            " move it inside if it is meant"
        )


def read_sections(settings: ConfigValues, notes: list[str]) -> tuple[int, ...]:
    """mrope_section, which a text model keeps of its multimodal parent: four numbers for GGUF, or none.

    In text the positions of all sections are one, so that nothing changes; transformers and llama.cpp do not look at it
    in these classes.
    """
    value = settings.values.get("mrope_section")
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > 4 or not all(type(n) is int and 0 <= n < 1 << 16 for n in value):
        raise settings.refuse("mrope_section", "not the sections of a head", required="up to four integers")
    notes.append(f"config.json: {settings.prefix}mrope_section is for images; in text it changes nothing")
    return (*value, *[0] * (4 - len(value)))


def rope_scaling_metadata(rope: RopeSettings, arch: str) -> dict[str, GGUFValue]:
    """The {arch}.rope.scaling.* keys: none for "default", and none for "llama3", which is a tensor instead; and
    {arch}.rope.dimension_sections.

    Keys and types as in set_gguf_parameters, conversion/base.py of llama.cpp.
    """
    keys = gguf.Keys.Rope
    values: dict[str, GGUFValue] = {}
    if rope.rope_type in ("linear", "yarn"):
        values[keys.SCALING_TYPE] = GGUFValue(rope.rope_type, GGUFValueType.STRING)
        values[keys.SCALING_FACTOR] = GGUFValue(rope.numbers["factor"], GGUFValueType.FLOAT32)
    if rope.rope_type == "yarn":
        values[keys.SCALING_ORIG_CTX_LEN] = GGUFValue(rope.original_context, GGUFValueType.UINT32)
        for name, key in YARN_NUMBERS:
            if name in rope.numbers:
                values[key] = GGUFValue(rope.numbers[name], GGUFValueType.FLOAT32)
    if rope.sections:
        values[keys.DIMENSION_SECTIONS] = GGUFValue(list(rope.sections), GGUFValueType.ARRAY, GGUFValueType.INT32)
    return {key.format(arch=arch): value for key, value in values.items()}


def llama3_rope_freqs(rope: RopeSettings, head_dim: int) -> NDArray[np.float32]:
    """float32[head_dim / 2]: the values of rope_freqs.weight, by which llama.cpp divides each rotation frequency.

    Wavelengths below original_context / high_freq_factor keep 1, those above original_context / low_freq_factor get
    `factor`, and those between are interpolated (Llama 3.1; generate_extra_tensors of conversion/llama.py, llama.cpp).

    The reference computes in float32 torch tensors, where a scalar divided by a tensor is a reciprocal and a product;
    the order of operations is kept, so that the bits agree. The power is rounded from float64, as libm's powf does.
    torch's vectorized powf is off by one unit in about 1 of 1000 values (up to 4 in the result), by CPU; none of them
    is in the tables of the published models (theta 5e5, head_dim 64 or 128, factor 8 or 32).
    """
    f32 = np.float32
    factor, context = rope.numbers["factor"], rope.original_context
    low, high = rope.numbers["low_freq_factor"], rope.numbers["high_freq_factor"]
    if context is None:
        raise ValueError("llama3 rope settings without an original context")
    # The interpolation is computed everywhere and used in its band; elsewhere it may divide by zero.
    with np.errstate(all="ignore"):
        exponents = np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim)
        powers = np.power(np.float64(f32(rope.theta)), exponents.astype(np.float64)).astype(f32)
        frequencies = f32(1.0) / powers
        wavelengths = (f32(1.0) / frequencies) * f32(2 * math.pi)
        smooth = ((f32(1.0) / wavelengths) * f32(context) - f32(low)) / f32(high - low)
        between = f32(1.0) / ((f32(1.0) - smooth) / f32(factor) + smooth)
        long = np.where(wavelengths > f32(context / low), f32(factor), between)
        return np.where(wavelengths < f32(context / high), f32(1.0), long).astype(f32)
