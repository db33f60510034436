"""The {arch}.* keys of a GGUF that a family's file lists: rows of a name, a type and where the value comes from."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import gguf
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from streamquant.convert.architectures.config_values import LARGEST_FLOAT32, ConfigValues
from streamquant.convert.architectures.layers import MTP


@dataclass(frozen=True, slots=True)
class Field:
    """The value of a key of config.json, or its default; where there is neither, or null, the GGUF has no key."""

    key: str
    values: Mapping[str, int] | None = None
    """For a text that GGUF has a number for."""
    only_true: bool = False
    """Whether false, or 0, is no key."""
    is_factor: bool = False
    """Whether it must be there, and 0 is an error: llama.cpp would take it for no such key."""


@dataclass(frozen=True, slots=True)
class RopeNumber:
    """A number of the rope settings by its key there (LlamaCpp.yarn_keys), times a factor; no key where it has none."""

    key: str
    times: float = 1.0


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value for every model."""

    value: int | float | bool | str


@dataclass(frozen=True, slots=True)
class Choice:
    """The one value where a key of config.json has this text, the other where it has another, or none.

    Values are names of sizes, or the numbers and booleans themselves. Of booleans, the text is read back.
    """

    key: str
    text: str
    then: str | int | bool
    otherwise: str | int | bool


@dataclass(frozen=True, slots=True)
class Counted:
    """The number of decoder layers that have a tag. Read backwards, it is that of a key of config.json."""

    tag: str
    key: str


@dataclass(frozen=True, slots=True)
class Product:
    """The product of two integers of config.json. Read backwards, the first one is known."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Otherwise:
    """A list for a key that the common ones do not have, because config.json says nothing."""

    value: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PerLayer:
    """A list with a value for each layer: that of the first tag that the layer has, or `otherwise`.

    Values are names of sizes, or the numbers and booleans themselves. Layers for multi-token prediction count.
    """

    by_tag: Mapping[str, str | int | bool]
    otherwise: str | int | bool


@dataclass(frozen=True, slots=True)
class GgufKey:
    """A key: name with {arch}, type (of a list, that of its elements), and where its value comes from.

    A text is the name of a size. A size of 0 means that the model has no such part, and the GGUF no key.
    """

    name: str
    type: GGUFValueType
    value: str | Field | RopeNumber | Constant | Choice | Counted | Product | Otherwise | PerLayer


def u32(name: str, value: str | Field | Constant | Choice | Counted | Product) -> GgufKey:
    """A count."""
    return GgufKey(name, GGUFValueType.UINT32, value)


def f32(name: str, value: Field | RopeNumber | Constant) -> GgufKey:
    """A number."""
    return GgufKey(name, GGUFValueType.FLOAT32, value)


def flag(name: str, value: Field | Constant | Choice) -> GgufKey:
    """A boolean."""
    return GgufKey(name, GGUFValueType.BOOL, value)


GATING: Mapping[str, int] = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}
"""How scores of experts are made -> llama.cpp's number (gguf.ExpertGatingFuncType)."""
EXPERT_GROUPS = (
    u32(gguf.Keys.LLM.EXPERT_GROUP_COUNT, Field("n_group")),
    u32(gguf.Keys.LLM.EXPERT_GROUP_USED_COUNT, Field("topk_group")),
    u32(gguf.Keys.LLM.EXPERT_GATING_FUNC, Field("scoring_func", GATING)),
)
"""What the converter writes behind expert_used_count for every model whose config.json has it."""


@dataclass(frozen=True, slots=True)
class KeySources:
    """Where the values of a model's keys come from."""

    arch: str
    config: ConfigValues
    size: Callable[[str], int]
    """A size by its name."""
    layers: Sequence[frozenset[str]] = ()
    """The tags of each layer."""
    known: Collection[str] = ()
    """The keys that the GGUF has already."""
    rope: Mapping[str, float] = field(default_factory=dict)
    """The numbers of the rope settings."""


def key_values(rows: Iterable[GgufKey], sources: KeySources) -> dict[str, GGUFValue]:
    """The rows of a model as GGUF values, in their order. Raises StreamquantError for a value of the wrong kind."""
    config, size = sources.config, sources.size
    found: dict[str, GGUFValue] = {}
    for row in rows:
        name = row.name.format(arch=sources.arch)
        match row.value:
            case PerLayer(by_tag=by_tag, otherwise=otherwise):
                picked = [next((by_tag[tag] for tag in by_tag if tag in layer), otherwise) for layer in sources.layers]
                values = [size(value) if isinstance(value, str) else value for value in picked]
                found[name] = GGUFValue(values, GGUFValueType.ARRAY, row.type)
            case RopeNumber(key=key, times=times):
                if key in sources.rope:
                    found[name] = GGUFValue(times * sources.rope[key], row.type)
            case Choice(key=key, text=text, then=then, otherwise=other):
                chosen = then if config.has_value(key) and config.text(key) == text else other
                found[name] = GGUFValue(size(chosen) if isinstance(chosen, str) else chosen, row.type)
            case Constant(value=value):
                found[name] = GGUFValue(value, row.type)
            case Counted(tag=tag):
                found[name] = GGUFValue(sum(tag in layer and MTP not in layer for layer in sources.layers), row.type)
            case Product(first=first, second=second):
                found[name] = GGUFValue(config.integer(first) * config.integer(second), row.type)
            case Otherwise(value=otherwise_list):
                if name not in sources.known:
                    found[name] = GGUFValue(list(otherwise_list), GGUFValueType.ARRAY, row.type)
            case Field() as of_config:
                if (of_config.is_factor or config.has_value(of_config.key)) and not (
                    of_config.only_true and not config.raw(of_config.key)
                ):
                    found[name] = GGUFValue(_read(config, of_config, row.type), row.type)
            case str(of):
                if size(of):
                    found[name] = GGUFValue(size(of), row.type)
    return found


def _read(config: ConfigValues, of: Field, kind: GGUFValueType) -> int | float | bool | str:
    if of.values is not None:
        text = config.text(of.key)
        if text not in of.values:
            raise config.refuse(
                of.key, "a value that llama.cpp has no number for", required=f"one of {', '.join(of.values)}"
            )
        return of.values[text]
    match kind:
        case GGUFValueType.BOOL:
            return config.boolean(of.key)
        case GGUFValueType.FLOAT32:
            number = config.number(of.key, above=-LARGEST_FLOAT32)
            if of.is_factor and number == 0:
                raise config.refuse(of.key, "a factor of 0, which llama.cpp takes for none", required="another number")
            return number
        case GGUFValueType.STRING:
            return config.text(of.key)
    return config.integer(of.key, least=0)
