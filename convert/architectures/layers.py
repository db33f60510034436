"""The kinds of layers of a model, as its family's file says by data how config.json tells them.

A layer has tags: "dense" or "sparse" by its feed-forward, "full_attention", "linear_attention" or "sliding_attention"
by its attention, "nope" where queries and keys are not rotated, "mtp" for a layer that predicts a further token behind
the last one. A row of a family's table may be limited to the layers that have a tag.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from streamquant.convert.architectures.config_values import ConfigValues, describe_type, shorten

DENSE, SPARSE = "dense", "sparse"
ROPE, NOPE = "rope", "nope"
FULL, LINEAR, SLIDING = "full_attention", "linear_attention", "sliding_attention"
MTP = "mtp"


class LayerKinds(Protocol):
    """Gives each layer one tag."""

    def tags(self, config: ConfigValues, count: int) -> list[str]:
        """The tags of `count` layers. Raises StreamquantError where config.json does not fit them."""


@dataclass(frozen=True, slots=True)
class DenseFirst:
    """The first layers are dense, the others have experts: `key` says how many, or a list of "dense" and "sparse"."""

    key: str = "first_k_dense_replace"
    listed: str | None = None
    """The key of the list, which wins."""

    def tags(self, config: ConfigValues, count: int) -> list[str]:
        """See LayerKinds.tags."""
        if self.listed is not None and config.values.get(self.listed) is not None:
            tags = ListedTypes({DENSE: DENSE, SPARSE: SPARSE}, self.listed).tags(config, count)
            first = tags.count(DENSE)
            if DENSE in tags[first:] or (self.key in config and config.integer(self.key, least=0) != first):
                raise config.refuse(
                    self.listed,
                    "layers that llama.cpp cannot tell by the number of dense ones",
                    required=f"dense layers, then sparse ones, as many as {self.key} says",
                )
            return tags
        first = config.integer(self.key, least=0, most=count)
        return [DENSE] * first + [SPARSE] * (count - first)


@dataclass(frozen=True, slots=True)
class SparseStep:
    """Every `step`-th layer has experts, but for those that a list of numbers names (Qwen 2 and 3)."""

    step: str = "decoder_sparse_step"
    dense: str = "mlp_only_layers"

    def tags(self, config: ConfigValues, count: int) -> list[str]:
        """See LayerKinds.tags."""
        step, listed = config.integer(self.step), config.raw(self.dense)
        numbers = [] if listed is None else listed
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < count for n in numbers):
            raise config.refuse(self.dense, "not a list of layers", required=f"numbers from 0 to {count - 1}")
        return [DENSE if n in numbers or (n + 1) % step else SPARSE for n in range(count)]


@dataclass(frozen=True, slots=True)
class RopeFlags:
    """A list with 1 for each layer that rotates queries and keys, else 0; without it every n-th layer does not."""

    key: str
    interval: str

    def tags(self, config: ConfigValues, count: int) -> list[str]:
        """See LayerKinds.tags."""
        listed = config.raw(self.key)
        if listed is None:
            n = config.integer(self.interval)
            return [ROPE if (layer + 1) % n else NOPE for layer in range(count)]
        if not isinstance(listed, list) or len(listed) < count or not all(type(n) is int for n in listed):
            raise config.refuse(self.key, "not a value for each layer", required=f"{count} values, 0 or 1")
        return [ROPE if flag else NOPE for flag in listed[:count]]


@dataclass(frozen=True, slots=True)
class ListedTypes:
    """A list with the type of each layer; without it, every n-th layer is of another type than the rest.

    types has the spellings of config.json -> the tag. The n-th, 2n-th, ... layer is `nth`, the others are `rest`, n by
    the key `interval` or its default, or `interval` itself; without an interval the list is required.
    """

    types: Mapping[str, str]
    key: str = "layer_types"
    interval: str | int | None = None
    numbers: str | None = None
    """The key of a list of the numbers of the layers that are `nth`, where config.json has no list of types."""
    nth: str = FULL
    rest: str = LINEAR

    def tags(self, config: ConfigValues, count: int) -> list[str]:
        """See LayerKinds.tags."""
        if self.interval is not None and not config.has_value(self.key):
            n = self.interval if isinstance(self.interval, int) else config.integer(self.interval)
            return [self.rest if (layer + 1) % n else self.nth for layer in range(count)]
        if self.numbers is not None and not config.has_value(self.key) and config.has_value(self.numbers):
            numbers = config.raw(self.numbers)
            if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < count for n in numbers):
                raise config.refuse(self.numbers, "not a list of layers", required=f"numbers from 0 to {count - 1}")
            return [self.nth if layer in numbers else self.rest for layer in range(count)]
        listed = config.raw(self.key)
        if not isinstance(listed, list):
            raise config.refuse(
                self.key, f"{describe_type(listed)} where a list of layers is required", required="a list"
            )
        if len(listed) != count:
            raise config.refuse(
                self.key,
                f"a list of {len(listed)} layers in a model of {count}",
                required=f"{count} entries, one for each of num_hidden_layers",
            )
        for number, name in enumerate(listed):
            if not isinstance(name, str) or name not in self.types:
                raise config.refuse(
                    self.key,
                    f"layer {number} is of an unknown type: {shorten(name)}",
                    required=f"one of {', '.join(self.types)}",
                )
        return [self.types[name] for name in listed]


def windows(interval: str | int) -> ListedTypes:
    """Layers with a window, and every n-th, or those that `layer_types` lists, with full attention; see ListedTypes.

    >>> windows(4).nth, windows(4).rest
    ('full_attention', 'sliding_attention')
    """
    types = {"full_attention": FULL, "sliding_attention": SLIDING}
    return ListedTypes(types, interval=interval, nth=FULL, rest=SLIDING)


@dataclass(frozen=True, slots=True)
class Switch:
    """All layers have one tag or the other, those for multi-token prediction too: by whether a key has a value."""

    key: str
    given: str
    absent: str

    def tags(self, config: ConfigValues, count: int) -> list[str]:
        """See LayerKinds.tags."""
        return [self.given if config.has_value(self.key) else self.absent] * count


@dataclass(frozen=True, slots=True)
class SizeSwitch:
    """All layers have one tag or the other: by whether a size of config.json is 0."""

    key: str
    given: str
    absent: str

    def tags(self, config: ConfigValues, count: int) -> list[str]:
        """See LayerKinds.tags."""
        return [self.given if config.integer(self.key, least=0) else self.absent] * count


@dataclass(frozen=True, slots=True)
class MtpLayers:
    """The layers behind the last one that predict further tokens (multi-token prediction; llama.cpp: nextn).

    Neither transformers nor an importance matrix computes them. How many there are is a matter of the tensors that a
    checkpoint has: tools lose them, and config.json keeps the number.
    """

    key: str
    """The number of them, in config.json."""
    tags: frozenset[str]
    """What these layers are beside MTP."""
    unquantized: tuple[str, ...] = ()
    """Modules of theirs that compressed-tensors must leave alone, in its spelling."""
    is_plain: bool = False
    """Whether runtimes want all of them unquantized in safetensors."""
    in_gguf: bool = True
    """Whether llama.cpp's converter takes them into a GGUF."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Where checkpoints keep them as `mtp.MODULE` beside the other layers, and not as layers behind the last one:
    the module -> its name in the layer. Layers of theirs are `mtp.layers.0` and so on."""

    def layer_name(self, name: str, layers: int) -> str:
        """The name of a tensor as one of a layer behind the last of `layers`; others come back as they are.

        >>> mtp = MtpLayers("mtp_num_hidden_layers", frozenset(), modules={"fc": "eh_proj"})
        >>> mtp.layer_name("mtp.layers.0.mlp.up_proj.weight", 40), mtp.layer_name("mtp.fc.weight", 40)
        ('model.layers.40.mlp.up_proj.weight', 'model.layers.40.eh_proj.weight')
        """
        parts = name.split(".", 3)
        if parts[0] != "mtp" or not self.modules:
            return name
        if len(parts) == 4 and parts[1] == "layers" and parts[2].isdecimal() and len(parts[2]) < 7:
            return f"model.layers.{layers + int(parts[2])}.{parts[3]}"
        module, _, local = name.removeprefix("mtp.").rpartition(".")
        return f"model.layers.{layers}.{self.modules[module]}.{local}" if module in self.modules else name

    def count(self, config: ConfigValues, most: int) -> int:
        """Layers of this kind by config.json, at most `most`."""
        return config.integer(self.key, least=0, most=most) if config.has_value(self.key) else 0


_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


def stored_mtp_layers(names: Collection[str], layers: int) -> int:
    """The layers behind the last of `layers` of which tensors are there.

    >>> stored_mtp_layers(["model.layers.0.enorm.weight", "model.layers.46.enorm.weight"], 46)
    1
    """
    numbers = {int(match[1]) for name in names if (match := _LAYER.match(name)) is not None}
    return max(0, max(numbers, default=-1) + 1 - layers)
