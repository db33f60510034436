"""What the layouts of all containers share: the draft of a plan, a tensor to place, and the protocol itself.

A container is one file layout_NAME.py with a `Layout`, and one line in LAYOUTS (convert/plan/planner.py).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from streamquant.convert.architectures import ModelDescription
from streamquant.convert.architectures.tensor_view import TensorView, resolve
from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.classifier import Classifier
from streamquant.convert.plan.importance import PlannedImportance
from streamquant.convert.plan.records import OutputFile, OutputTensor, Region, VariantPlan
from streamquant.convert.recipes.mix import Choice
from streamquant.convert.recipes.overrides import NO_OVERRIDES
from streamquant.convert.recipes.recipe import ChoiceOptions, Recipe
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.tensor import SourceTensor
from streamquant.files.sizes import human_bytes
from streamquant.quant.formats import FORMATS


@dataclass(slots=True)
class Draft:
    """A plan that is being made: its inputs, and the files and notes so far, which layouts add to."""

    checkpoint: Checkpoint
    model: ModelDescription
    options: ConversionOptions
    importance: PlannedImportance
    files: list[OutputFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wholes: dict[str, SourceTensor] = field(default_factory=dict)
    """Further sources by name, which lie where tensors of the checkpoint do: all experts of a layer in one."""

    @property
    def name(self) -> str:
        """The model's name in file names."""
        return self.options.name or self.checkpoint.name

    def choices(self, recipe: Recipe, classifier: Classifier | None = None) -> dict[str, Choice]:
        """The format of every tensor that a variant stores of the model (Recipe.choose), and of the classifier of a
        reranker."""
        rules = self.model.rules
        known = [(tensor, rules[name]) for name, tensor in self.checkpoint.tensors.items() if name in rules]
        if classifier is not None:
            left = classifier.head.name if classifier.replaces_head else None
            known = [(tensor, rule) for tensor, rule in known if tensor.name != left]
            known.append((classifier.tensor, classifier.rule))
        overrides = self.options.overrides if recipe.takes_overrides else NO_OVERRIDES
        ignore = self.options.ignore if recipe.takes_ignore else ()
        return recipe.choose(known, self.model, ChoiceOptions(self.importance.matrix is not None, overrides, ignore))


class Layout(ABC):
    """How a container stores variants: which files there are, and which bytes of a tensor stand where."""

    def __init__(self, draft: Draft) -> None:
        """One layout serves all variants of its container in a plan."""
        self.draft = draft

    @abstractmethod
    def lay_out(self, recipe: Recipe) -> VariantPlan:
        """Lay out a variant, add its files and notes to the draft. Raises StreamquantError, UsageError."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to place: source tensors of one shape with their choice, or a generated one with its bytes."""

    name: str
    sources: tuple[SourceTensor, ...]
    choice: Choice
    shape: tuple[int, ...]
    view: TensorView | None = None
    data: bytes = b""
    """The bytes of a tensor without a source."""
    importance: str | None = None
    """The entry of the importance matrix that its encoder is given."""

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Bytes of each part of its format."""
        if not self.sources:
            rows, n = math.prod(self.shape[:-1]), self.shape[-1]
            return tuple(part.nbytes(rows, n) for part in FORMATS[self.choice.format].parts)
        stored = resolve(self.view, self.sources[0].shape) if self.view is not None else None
        rows, n = (stored.stored_rows, stored.stored_n) if stored is not None else as_matrix(self.sources[0], None)
        return tuple(len(self.sources) * part.nbytes(rows, n) for part in FORMATS[self.choice.format].parts)

    def placed(self, regions: tuple[Region, ...]) -> OutputTensor:
        """The output, now that its place is known; it has a source."""
        assert self.sources, "generated tensors are literals of their file"
        names = tuple(source.name for source in self.sources)
        format_, reason = self.choice.format, self.choice.reason
        return OutputTensor(names, self.name, format_, reason, self.view, regions, self.importance)


def as_matrix(tensor: SourceTensor, view: TensorView | None) -> tuple[int, int]:
    """(rows, weights in a row). A vector is one row, or, where its values change places, a column."""
    if view is None:
        return tensor.rows, tensor.row_length
    resolved = resolve(view, tensor.shape)
    return resolved.rows, resolved.n


def split(entries: list[Entry], max_bytes: int | None, max_tensors: int | None = None) -> list[list[Entry]]:
    """Fill files in order up to `max_bytes` of tensor data and `max_tensors` tensors; None: without limit.

    A tensor that is larger has a file of its own. gguf-py's GGUFWriter.add_tensor_info does the same.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        nbytes = sum(entry.part_bytes)
        is_full = (max_bytes is not None and filled + nbytes > max_bytes) or len(groups[-1]) == max_tensors
        if groups[-1] and is_full:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += nbytes
    return groups


def too_large(recipe: Recipe, entries: list[Entry], max_bytes: int | None) -> list[str]:
    """A note where a tensor alone is larger than a file should be."""
    largest = max(entries, key=lambda entry: sum(entry.part_bytes))
    nbytes = sum(largest.part_bytes)
    if max_bytes is None or nbytes <= max_bytes:
        return []
    return [
        f"{recipe.spec}: {largest.name} alone has {human_bytes(nbytes)}, more than a file should have"
        f" ({human_bytes(max_bytes)}): a tensor is not cut, so its file is larger"
    ]
