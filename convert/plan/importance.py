"""What an importance matrix says to a plan: which tensors it weighs, whether a variant can do without, what to tell."""

from collections.abc import Iterable, Sequence

from streamquant.convert.architectures import ModelDescription, TensorRule
from streamquant.convert.recipes.imatrix import ImportanceMatrix, unreached_notes
from streamquant.convert.recipes.mix import UNQUANTIZED, needs_importance
from streamquant.convert.recipes.recipe import Recipe
from streamquant.convert.source.tensor import SourceTensor
from streamquant.files.sizes import shortened
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.formats import FORMATS

CONVERTERS_OWN = (*UNQUANTIZED, "Q8_0")
"""File types that the converter writes itself: they say nothing of an importance matrix they have no use for."""


class PlannedImportance:
    """The importance matrix of a plan, or none, and what was looked for in it."""

    def __init__(self, matrix: ImportanceMatrix | None, model: ModelDescription) -> None:
        self.matrix = matrix
        self._names = {rule.gguf_name for rule in model.stored_rules()}
        self._missing: set[str] = set()

    def entry(self, rule: TensorRule, sources: Sequence[SourceTensor], format_name: str) -> str | None:
        """The entry for a stored tensor, if there is one and the format asks for it; `rule` is that of a source.

        Raises StreamquantError for an entry of another length.
        """
        format_, name, shape = FORMATS[format_name], rule.gguf_name, rule.gguf_shape
        is_copied = all(source.format.encoded_as == format_name for source in sources)
        if self.matrix is None or is_copied or len(shape) < 2 or name.endswith("_norm.weight"):
            return None
        found = self.matrix.find(name, shape)  # of every quantized tensor: another length is another model's
        if not format_.uses_importance:
            return None
        if found is None:
            self._missing.add(name)
        return name if found is not None else None

    def uses(self, recipe: Recipe, entries: Iterable[str | None]) -> ImportanceMatrix | None:
        """The matrix if it had a say in a variant, whose tensors were given these entries."""
        has_say = recipe.base not in CONVERTERS_OWN or any(entry is not None for entry in entries)
        return self.matrix if has_say else None

    def check(self, recipe: Recipe, without: Iterable[tuple[str, str]]) -> None:
        """Refuse formats that are garbage without importance; `without` are the (name, format) that have no entry."""
        missing = [name for name, format_ in without if needs_importance(recipe.base or "", name, format_)]
        if not missing:
            return
        named = shortened(missing, 5)
        if self.matrix is None:
            raise UsageError(
                f"{recipe.spec} needs an importance matrix",
                found=f"none, for {named}",
                required="--imatrix FILE",
                hint="llama-imatrix makes one",
            )
        raise StreamquantError(
            f"{recipe.spec} needs an importance matrix, and this one has no entry for some tensors",
            where=self.matrix.name,
            found=f"none for {named}",
            hint="use the importance matrix of this model, or leave this variant out",
        )

    def notes(self, *, is_asked: bool) -> list[str]:
        """What of the matrix is missing or left over; `is_asked` tells whether there is a variant that it can serve.

        Raises StreamquantError if nothing of it fits the model.
        """
        if self.matrix is None:
            return []
        if not is_asked:
            return ["the importance matrix has no use: no GGUF variant"]
        entries = self.matrix.entries
        if not self._names & entries.keys():
            raise StreamquantError(
                "importance matrix of another model",
                where=self.matrix.name,
                found=f"{len(entries)} entries, the first {next(iter(entries))!r:.100}",
                required="entries with the GGUF names of this model's tensors",
            )
        notes = []
        if self._missing:
            notes.append(f"not in the importance matrix, encoded without: {shortened(sorted(self._missing), 8)}")
        if unknown := sorted(entries.keys() - self._names):
            notes.append(f"in the importance matrix, but not in this model: {shortened(unknown, 8)}")
        unreached = {name: self.matrix.unreached[name] for name in self._names & self.matrix.unreached.keys()}
        return [*notes, *unreached_notes(unreached)]
