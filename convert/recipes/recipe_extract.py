"""The recipe of an existing GGUF: the file type whose mix explains its tensors, and rules for those it does not.

What is compared is the type of each tensor with what llama-quantize would have chosen (mix.py). A tensor with a
rule of its own is not counted by the mix, so that a rule can change what the mix chooses for others: rules are added
until everything is explained.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import LlamaFileType

from streamquant.convert.recipes.mix import (
    DEFAULTS,
    ENDS,
    UNQUANTIZED,
    MixModel,
    MixTensor,
    choose_mix,
    is_quantized,
    kind_of,
    layer_of,
)
from streamquant.convert.recipes.overrides import GGML_TYPES, NO_OVERRIDES, Overrides
from streamquant.convert.recipes.recipe_file import RecipeFile, check_label
from streamquant.files.gguf_file import GgufKeys, GgufTensor, first_of_split, read_split_set
from streamquant.quant.errors import StreamquantError
from streamquant.quant.formats import FORMATS


@dataclass(frozen=True, slots=True)
class ExtractedRecipe:
    """A recipe, and what a user should know of it."""

    recipe: RecipeFile
    notes: tuple[str, ...]


def extract_recipe(path: Path, label: str | None = None) -> ExtractedRecipe:
    """The recipe of a GGUF file of any publisher; of a split set, whichever of its files is named.

    Reads headers only. `label` defaults to the file type and "-like". Raises StreamquantError for a file that is
    broken, or missing from its set, or no model.
    """
    label = None if label is None else check_label(label, "--label")
    metadata, tensors = _read_set(path)
    model = _model(metadata, path)
    actual = {tensor.name: tensor.stored_as for tensor in tensors}
    mix = [MixTensor(tensor.name, tensor.shape) for tensor in tensors]
    free = [tensor.name for tensor in mix if is_quantized(tensor)]
    if not free:
        raise StreamquantError("no weights of a model here", where=str(path), required="a GGUF of a model")
    if strange := sorted(name for name in free if actual[name] not in GGML_TYPES):
        raise StreamquantError("not a type of weights", where=f"{path}, {strange[0]!r}", found=actual[strange[0]])
    imatrix = any(key.startswith("quantize.imatrix.") for key in metadata)
    said = _base_of(metadata.get("general.file_type"))
    explainers = [_Explainer(base, mix, model, actual, imatrix) for base in ([said] if said else []) or DEFAULTS]
    best = min(explainers, key=lambda explainer: len(explainer.deviations(NO_OVERRIDES)))
    if said is not None and len(best.deviations(NO_OVERRIDES)) > len(free) // 2:
        others = [_Explainer(base, mix, model, actual, imatrix) for base in DEFAULTS]
        best = min([best, *others], key=lambda explainer: len(explainer.deviations(NO_OVERRIDES)))
    overrides = best.overrides()
    notes = []
    if said is None:
        notes.append(f"the file does not say which file type it is; {best.base} explains most of its tensors")
    elif best.base != said:
        notes.append(f"the file says {said}, but {best.base} explains more of its tensors")
    if unmade := sorted({actual[name] for name in free} - FORMATS.keys()):
        notes.append(f"types that cannot be made yet: {', '.join(unmade)}")
    if imatrix:
        notes.append("made with an importance matrix: --imatrix is not part of a recipe")
    name = GgufKeys(path, metadata).text("general.name") or path.stem
    recipe = RecipeFile(label or f"{best.base}-like", best.base, overrides, f"the mix of {name}"[:200])
    return ExtractedRecipe(recipe, tuple(notes))


def _read_set(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata of the first file, tensors of all."""
    headers = list(read_split_set(first_of_split(path)).values())
    tensors = [tensor for header in headers for tensor in header.tensors]
    if twice := [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]:
        raise StreamquantError("a tensor is in two files of a set", where=str(path), found=twice[0])
    return headers[0].metadata, tensors


def _model(metadata: Mapping[str, Any], path: Path) -> MixModel:
    arch = metadata.get("general.architecture")

    def number(key: str) -> int:
        found = metadata.get(f"{arch}.{key}", 0)
        found = found[0] if isinstance(found, list) and found else found  # by layer: the first decides
        if not isinstance(found, int) or isinstance(found, bool):
            raise StreamquantError("not a number", where=f"{path}, {arch}.{key}", found=f"{found!r:.100}")
        return found

    if not isinstance(arch, str) or not (blocks := number("block_count")):
        raise StreamquantError(
            "not a model", where=str(path), required="general.architecture and its block_count", found=f"{arch!r:.100}"
        )
    heads = number("attention.head_count")
    return MixModel(arch, blocks, heads, number("attention.head_count_kv") or heads, number("expert_count"))


def _base_of(file_type: object) -> str | None:
    """general.file_type -> llama-quantize's name, if it is one whose mix is known."""
    try:
        name = LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return None
    return name if name in DEFAULTS else None


class _Explainer:
    """Finds the rules by which one file type becomes what a file holds."""

    def __init__(
        self, base: str, tensors: Sequence[MixTensor], model: MixModel, actual: Mapping[str, str], imatrix: bool
    ) -> None:
        self.base, self.tensors, self.model, self.actual, self.imatrix = base, tensors, model, actual, imatrix
        self.kinds: dict[str, dict[int, str]] = {}
        for tensor in tensors:
            if is_quantized(tensor) and tensor.name not in ENDS:
                self.kinds.setdefault(_without_layer(tensor.name), {})[layer_of(tensor.name)] = actual[tensor.name]

    def deviations(self, overrides: Overrides, among: Sequence[MixTensor] | None = None) -> list[str]:
        """The tensors that are of another type than the file type and these overrides say, in their order."""
        among = self.tensors if among is None else among
        chosen = choose_mix(self.base, among, self.model, imatrix=self.imatrix, overrides=overrides)
        return [name for name, choice in chosen.items() if choice.format != self.actual[name]]

    def overrides(self) -> Overrides:
        """Few rules that explain everything; for an unquantized file type, tensors one by one."""
        found = self._ends()
        if self.base in UNQUANTIZED:
            names = self.deviations(found)
            return replace(found, tensors={name: self.actual[name] for name in names})
        for kind in sorted(self.kinds):
            found = replace(found, tensor_types=found.tensor_types + self._rules(kind, found))
        while left := self.deviations(found):  # what no pattern can say
            found = replace(found, tensors={**found.tensors, **{name: self.actual[name] for name in left}})
        return found

    def _ends(self) -> Overrides:
        """Embeddings and output have options of their own."""
        off = set(self.deviations(NO_OVERRIDES)) & set(ENDS)
        return Overrides(
            output_tensor_type=self.actual["output.weight"] if "output.weight" in off else None,
            token_embedding_type=self.actual["token_embd.weight"] if "token_embd.weight" in off else None,
        )

    def _rules(self, kind: str, so_far: Overrides) -> tuple[tuple[str, str], ...]:
        """The shortest of: rules for the layers that deviate, found one by one or at once, and for all layers."""
        types = self.kinds[kind]
        if not re.fullmatch(r"[a-z0-9_.-]+", kind):
            return ()
        alone, together = (self._deviating(kind, so_far, at_once=at_once) for at_once in (False, True))
        if not alone:
            return ()
        some = [_patterns(kind, {layer: types[layer] for layer in layers}) for layers in (alone, together)]
        every = _patterns(kind, types, catch_all=True)
        return min(*some, every, key=lambda rules: (len(rules), sum(len(pattern) for pattern, _ in rules)))

    def _deviating(self, kind: str, so_far: Overrides, *, at_once: bool) -> set[int]:
        """Layers of a kind that need a rule: those that deviate while the ones found before have theirs."""
        types = self.kinds[kind]
        same = [tensor for tensor in self.tensors if kind_of(tensor.name) == kind_of(kind)]
        layers: set[int] = set()
        while True:
            rules = _patterns(kind, {layer: types[layer] for layer in layers})
            names = self.deviations(replace(so_far, tensor_types=so_far.tensor_types + rules), same)
            more = [layer_of(name) for name in names if _without_layer(name) == kind and layer_of(name) not in layers]
            if not more:
                return layers
            layers |= set(more if at_once else more[:1])


def _without_layer(name: str) -> str:
    return re.sub(r"^blk\.\d+\.", "", name)


def _patterns(kind: str, types: Mapping[int, str], *, catch_all: bool = False) -> tuple[tuple[str, str], ...]:
    """Rules for layers of a kind; with catch_all the most frequent type is said last, for all other layers."""
    groups: dict[str, set[int]] = {}
    for layer, name in types.items():
        if layer >= 0:
            groups.setdefault(name, set()).add(layer)
    tail = re.escape(kind)
    rules = [(f"^{tail}$", types[-1])] if -1 in types else []
    for name, layers in sorted(groups.items(), key=lambda item: (len(item[1]), min(item[1]))):
        rules.append((rf"^blk\.({layers_pattern(layers)})\.{tail}$", name))
    if catch_all and groups:
        rules[-1] = (rf"^blk\.[0-9]+\.{tail}$", rules[-1][1])
    return tuple(rules)


def layers_pattern(numbers: Iterable[int]) -> str:
    """A regex for exactly these numbers, not negative.

    >>> layers_pattern([0, 1, 2, 3, 7]), layers_pattern(range(8, 30)), layers_pattern([5])
    ('[0-37]', '[89]|[12][0-9]', '5')
    """
    by_prefix: dict[int | None, set[int]] = {}
    for number in numbers:
        by_prefix.setdefault(number // 10 or None, set()).add(number % 10)
    by_digits: dict[str, list[int | None]] = {}
    for prefix, last in sorted(by_prefix.items(), key=lambda item: item[0] or 0):
        by_digits.setdefault(_digits(last), []).append(prefix)
    parts = []
    for digits, prefixes in by_digits.items():
        if None in prefixes:
            parts.append(digits)
        if larger := [prefix for prefix in prefixes if prefix is not None]:
            before = layers_pattern(larger)
            parts.append(f"({before}){digits}" if "|" in before else before + digits)
    return "|".join(parts)


def _digits(digits: set[int]) -> str:
    """A character class for digits: runs of three and more with a hyphen."""
    if len(digits) == 1:
        return str(min(digits))
    text, ordered = "", sorted(digits)
    while ordered:
        run = [ordered.pop(0)]
        while ordered and ordered[0] == run[-1] + 1:
            run.append(ordered.pop(0))
        text += f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run))
    return f"[{text}]"
