"""The layout of GGUF: tensors one after another, each padded; metadata in the first file of a split set."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from streamquant.convert.architectures import ModelDescription, TensorRule
from streamquant.convert.metadata.embedding import CLASSIFIER
from streamquant.convert.metadata.gguf_metadata import GgufMetadata, gguf_metadata
from streamquant.convert.metadata.model_metadata import ParameterCounts
from streamquant.convert.plan.classifier import Classifier, find_classifier
from streamquant.convert.plan.importance import CONVERTERS_OWN
from streamquant.convert.plan.layout import Draft, Entry, Layout, split, too_large
from streamquant.convert.plan.records import OutputFile, OutputTensor, Region, VariantPlan
from streamquant.convert.recipes.mix import Choice
from streamquant.convert.recipes.recipe import Recipe
from streamquant.files import gguf_file
from streamquant.quant.formats import FORMATS


class GgufLayout(Layout):
    """See Layout. All variants of a model share one folder, and the metadata, which are made once."""

    def __init__(self, draft: Draft) -> None:
        super().__init__(draft)
        self._metadata: GgufMetadata | None = None
        self._classifier = find_classifier(draft.checkpoint, draft.model)

    def lay_out(self, recipe: Recipe) -> VariantPlan:
        """See Layout.lay_out."""
        draft, importance = self.draft, self.draft.importance
        entries = repacked_first(list(self._entries(recipe)))
        importance.check(recipe, ((entry.name, entry.choice.format) for entry in entries if entry.importance is None))
        stored = {source.name for entry in entries for source in entry.sources}
        dropped = tuple(name for name in draft.checkpoint.tensors if name not in stored)
        file_type = recipe.file_type_of({entry.choice.format for entry in entries})
        metadata = self._shared_metadata(entries).for_file_type(file_type)
        imatrix = importance.uses(recipe, (entry.importance for entry in entries))
        if imatrix is not None:
            metadata |= imatrix.keys()
        folder, stem = f"{draft.name}-GGUF", f"{draft.name}-{recipe.label}"
        draft.notes += too_large(recipe, entries, draft.options.split_max_size)
        if file_type != recipe.file_type:
            draft.notes.append(
                f"{recipe.spec}: the experts stay in MXFP4, as the source has them: floats would take four times the"
                " bytes and hold no more. llama.cpp's converter does the same, and calls the file MXFP4_MOE"
            )
        groups = split(entries, draft.options.split_max_size, draft.options.split_max_tensors)
        first = len(draft.files)
        tensors: list[OutputTensor] = []
        for number, group in enumerate(groups):
            keys = dict(metadata) if number == 0 else {}
            path = f"{folder}/{stem}.gguf"
            if len(groups) > 1:
                keys |= GgufMetadata.split_keys(number, len(groups), len(entries))
                path = f"{folder}/{stem}/{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf"
            infos = [(e.name, e.shape, FORMATS[e.choice.format].parts[0].stored_as, sum(e.part_bytes)) for e in group]
            tensors += self._place(path, gguf_file.pack_header(keys, infos), group)
        files = tuple(range(first, len(draft.files)))
        generated = tuple(entry.name for entry in entries if not entry.sources)
        return VariantPlan(recipe, folder, files, tuple(tensors), generated, dropped, imatrix is not None)

    def _entries(self, recipe: Recipe) -> Iterator[Entry]:
        draft = self.draft
        for extra in draft.model.extra_tensors:
            data = extra.values.astype("<f4").tobytes()
            made = Choice("F32", "made from config.json")
            yield Entry(extra.gguf_name, (), made, extra.values.shape, data=data)
        classifier = self._classifier
        choices = draft.choices(recipe, classifier)
        made_of_rows = choices.pop(CLASSIFIER, None)
        place = {name: number for number, name in enumerate(draft.checkpoint.tensors)}
        fused = {name: tensor.fused for name, tensor in draft.checkpoint.tensors.items() if tensor.fused is not None}
        left = classifier.head.name if classifier is not None and classifier.replaces_head else None
        rules_of = draft.model.rules
        known = [name for name in draft.checkpoint.tensors if name in rules_of and name != left]
        names = [name for name in known if draft.model.is_in_gguf(rules_of[name])]
        for rules in stored_order(draft.model, names, fused):
            first, choice = rules[0], choices[rules[0].gguf_name]
            if (
                classifier is not None
                and made_of_rows is not None
                and place[first.hf_name] >= place[classifier.head.name]
            ):
                yield self._classifier_entry(classifier, made_of_rows)  # where the converter has it
                made_of_rows = None
            sources = tuple(draft.checkpoint.tensors[rule.hf_name] for rule in rules)
            importance = draft.importance.entry(first, sources, choice.format)
            shape = first.gguf_shape if recipe.base in CONVERTERS_OWN else first.quantized_shape
            yield Entry(first.gguf_name, sources, choice, shape, first.view, importance=importance)
        if classifier is not None and made_of_rows is not None:
            yield self._classifier_entry(classifier, made_of_rows)

    def _classifier_entry(self, classifier: Classifier, choice: Choice) -> Entry:
        tensor, importance = classifier.tensor, self.draft.importance
        entry = importance.entry(classifier.rule, (tensor,), choice.format)
        weights = importance.matrix.entries[entry] if importance.matrix is not None and entry is not None else None
        data = classifier.encode(choice.format, weights)
        return Entry(tensor.name, (), choice, tensor.shape, data=data, importance=entry)

    def _shared_metadata(self, entries: list[Entry]) -> GgufMetadata:
        """The keys that all variants share; tokenizers are large, so they are read once."""
        if self._metadata is None:
            draft = self.draft
            self._metadata = gguf_metadata(
                draft.checkpoint,
                draft.model,
                counts=count_parameters(entries),
                guard_template=draft.options.guard_template,
                pre=draft.options.pre,
                overrides=draft.options.metadata,
            )
            draft.notes += self._metadata.notes
        return self._metadata

    def _place(self, path: str, header: bytes, group: list[Entry]) -> list[OutputTensor]:
        """Place the tensors of one file; register the file."""
        at = len(header)
        literals = [(0, header)]
        placed = []
        for entry in group:
            nbytes = sum(entry.part_bytes)
            if not entry.sources:
                literals.append((at, entry.data))
            else:
                placed.append(entry.placed((Region(len(self.draft.files), at, nbytes),)))
            at += gguf_file.pad(nbytes)
        self.draft.files.append(OutputFile(path, at, tuple(literals)))
        return placed


def repacked_first(entries: list[Entry]) -> list[Entry]:
    """Experts of a source in MXFP4 before all others, where the converter has them (its generate_extra_tensors)."""
    return sorted(entries, key=lambda entry: not entry.sources or entry.sources[0].format.repack is None)


def count_parameters(entries: Iterable[Entry]) -> ParameterCounts:
    """The weights of a file, those of stacked experts apart, without their biases (gguf: get_total_parameter_count)."""
    total = shared = expert = experts = 0
    for entry in entries:
        size = math.prod(entry.shape)
        total += size
        if len(entry.sources) > 1 and len(entry.shape) > 2:
            experts = len(entry.sources)
            expert += size // experts
        else:
            shared += size
    return ParameterCounts(total, shared, expert, experts)


def stored_order(
    model: ModelDescription, names: Iterable[str], fused: Mapping[str, str] | None = None
) -> Iterator[tuple[TensorRule, ...]]:
    """Source tensors in the order of the source -> the tensors of a GGUF in its order, each with its sources' rules.

    The experts of a layer stand where the last of them was read, stacked, in the order of the family's table
    (modify_tensors of the converter's classes for mixtures of experts); those that the checkpoint stores in one tensor,
    `fused`, where that was read.
    """
    listed, fused = list(names), fused or {}
    together = {name: (model.rules[name].layer, fused.get(name)) for name in listed}
    wanted = Counter(together[name] for name in listed if model.rules[name].expert is not None)
    waiting: dict[tuple[int, str | None], list[TensorRule]] = {}
    order = {name: number for number, name in enumerate(model.rules)}
    for name in listed:
        rule = model.rules[name]
        if rule.expert is None:
            yield from ((stored,) for stored in rule.stored)
            continue
        found = waiting.setdefault(together[name], [])
        found.append(rule)
        if len(found) == wanted[together[name]]:
            found.sort(key=lambda rule: order[rule.hf_name])
            stacks = [list(of) for _, of in groupby(found, key=lambda rule: rule.gguf_name)]
            stored = [[of.stored[part] for of in stack] for stack in stacks for part in range(len(stack[0].stored))]
            yield from map(tuple, stored)
