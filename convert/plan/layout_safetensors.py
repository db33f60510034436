"""The layout of a checkpoint of safetensors: shards of safetensors, without gaps, every tensor aligned."""

from collections.abc import Iterator
from dataclasses import replace

from streamquant.convert.plan.layout import Entry, Layout, split, too_large
from streamquant.convert.plan.records import OutputFile, OutputTensor, Region, VariantPlan
from streamquant.convert.plan.static_scales import StaticScales
from streamquant.convert.recipes.block_runtimes import BlockRuntimes, block_runtimes
from streamquant.convert.recipes.mix import Choice
from streamquant.convert.recipes.recipe import Recipe
from streamquant.convert.recipes.targets import Targets
from streamquant.convert.source.fused_experts import WholeExperts, whole_experts
from streamquant.files import safetensors_file
from streamquant.quant.errors import UsageError
from streamquant.quant.formats import FORMATS, copy_of


class SafetensorsLayout(Layout):
    """See Layout. A variant is a whole checkpoint in a folder of its own, with all tensors of the source."""

    def lay_out(self, recipe: Recipe) -> VariantPlan:
        """See Layout.lay_out."""
        experts = self.draft.model.family.experts
        if recipe.scheme is not None and experts is not None and experts.by_turns:
            raise UsageError(
                f"{recipe.spec} cannot be made of this family yet",
                where=self.draft.checkpoint.source,
                found=f"{self.draft.model.hf_architecture}, whose experts have gate and up by turns",
                required="bf16, or a GGUF variant",
            )
        folder = f"{self.draft.name}-{recipe.label}"
        first = len(self.draft.files)
        tensors: list[OutputTensor] = []
        generated: dict[str, Region] = {}
        for path, group in self._shards(recipe):
            placed, made = self._place(f"{folder}/{path}", group)
            tensors += placed
            generated |= made
        tensors = self._with_shared_scales(tensors)
        self.draft.notes += self._ignore_notes(recipe, tensors)
        source = {**self.draft.checkpoint.tensors, **self.draft.wholes}
        if recipe.scheme is None and all(t.format == source[t.sources[0]].format.encoded_as for t in tensors):
            self.draft.notes.append(f"{recipe.spec}: the source is in BF16 already: this is a copy of it")
        blocks = self._block_runtimes(tensors)
        if blocks is not None:
            self.draft.notes.append(blocks.note(recipe.spec))
        paths = tuple(range(first, len(self.draft.files)))
        names = tuple(generated)
        return VariantPlan(recipe, folder, paths, tuple(tensors), names, (), blocks=blocks, generated_at=generated)

    def _ignore_notes(self, recipe: Recipe, tensors: list[OutputTensor]) -> Iterator[str]:
        """Where --ignore means nothing, and where it means a part of what runtimes merge."""
        ignore, rules = self.draft.options.ignore, self.draft.model.rules
        if not ignore or not recipe.takes_ignore:
            return
        source = self.draft.checkpoint.tensors
        linear = [tensor for tensor in tensors if (rule := rules.get(tensor.sources[0])) and rule.kind.is_linear]
        modules = {tensor.name: source[tensor.sources[0]].module for tensor in linear}
        for target in Targets(ignore, "--ignore").unmatched(modules.values()):
            yield f"{recipe.spec}: --ignore {target}: means no linear layer of this model"
        merged: dict[str, dict[bool, str]] = {}
        for tensor in linear:
            is_kept = FORMATS[tensor.format].copies is not None
            merged.setdefault(self._merged(tensor.sources[0]), {})[is_kept] = modules[tensor.name]
        parted = [by_kind for by_kind in merged.values() if len(by_kind) > 1]
        if parted:
            yield (
                f"WARNING: {recipe.spec}: --ignore leaves {parted[0][True]} alone and not {parted[0][False]}, which"
                f" vLLM and SGLang merge with it: they refuse such a folder; {len(parted)} such layers"
            )

    def _sets_together(self, shards: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
        """The shards, layers that share a scale in that of the first of them: q, or gate.

        model_free_ptq of llm-compressor does the same (get_dependencies of ModelFreePtqConverter).
        """
        first: dict[str, str] = {}
        place = {name: number for number, name in enumerate(self.draft.model.rules)}
        sharing = [
            (place[entry.sources[0].name], entry.sources[0].name, path)
            for path, group in shards.items()
            for entry in group
            if FORMATS[entry.choice.format].shares_amax
        ]
        for _, name, path in sorted(sharing):
            first.setdefault(self._merged(name), path)
        moved: dict[str, list[Entry]] = {path: [] for path in shards}
        for path, group in shards.items():
            for entry in group:
                is_shared = FORMATS[entry.choice.format].shares_amax
                moved[first[self._merged(entry.sources[0].name)] if is_shared else path].append(entry)
        return moved

    def _with_shared_scales(self, tensors: list[OutputTensor]) -> list[OutputTensor]:
        """The tensors, those with a scale for the whole tensor told whose largest magnitude it is of: of all that
        runtimes merge into one matrix, in whatever shards they lie."""
        merged: dict[str, list[str]] = {}
        for tensor in tensors:
            if FORMATS[tensor.format].encode_from_amax is not None:
                merged.setdefault(self._sharing(tensor), []).append(tensor.sources[0])
        return [
            replace(tensor, amax_of=tuple(sorted(merged[self._sharing(tensor)])))
            if FORMATS[tensor.format].encode_from_amax is not None
            else tensor
            for tensor in tensors
        ]

    def _sharing(self, tensor: OutputTensor) -> str:
        """Whose largest magnitude the scale of a whole tensor is of: its own, or that of what it becomes a part of."""
        name = tensor.sources[0]
        return self._merged(name) if FORMATS[tensor.format].shares_amax else name

    def _merged(self, name: str) -> str:
        """What a source tensor becomes a part of; itself where it stays alone."""
        return self.draft.model.rules[name].merged or name

    def _block_runtimes(self, tensors: list[OutputTensor]) -> BlockRuntimes | None:
        """Which programs run the variant, where tensors have a scale for each block; None where none has."""
        source = self.draft.checkpoint.tensors
        blocks = {t.name: source[t.sources[0]].shape for t in tensors if FORMATS[t.format].pads_rows}
        return block_runtimes(self.draft.model, blocks) if blocks else None

    def _shards(self, recipe: Recipe) -> list[tuple[str, list[Entry]]]:
        """(file name, tensors) of each shard: those of the source, or filled up to --max-shard-size."""
        checkpoint, max_shard_size = self.draft.checkpoint, self.draft.options.max_shard_size
        choices = self.draft.choices(recipe)
        shards: dict[str, list[Entry]] = {file.name: [] for file in checkpoint.files}
        wholes = list(whole_experts(checkpoint.tensors.values()))
        self.draft.wholes.update((whole.tensor.name, whole.tensor) for whole in wholes)
        starts, within = _by_single(wholes)
        for tensor in checkpoint.tensors.values():
            if (whole := starts.get(tensor.name)) is not None:
                choice = choices[tensor.name]
                shards[tensor.file].append(Entry(whole.tensor.name, (whole.tensor,), choice, whole.shape))
            if tensor.name in within:
                continue
            kept = Choice(copy_of(tensor.dtype).name, "not a weight of the model: kept as in the source")
            name = tensor.published or tensor.name
            entry = Entry(name, (tensor,), choices.get(tensor.name, kept), tensor.shape)
            shards[tensor.file].append(entry)
        if recipe.needs_calibration:
            shards = StaticScales(self.draft, recipe).with_scales(shards)
        if max_shard_size is None:
            together = self._sets_together(shards)
            return [(path, group) for path, group in together.items() if group]  # one may have had scales alone
        entries = [entry for shard in shards.values() for entry in shard]
        self.draft.notes += too_large(recipe, entries, max_shard_size)
        groups = split(entries, max_shard_size)
        if len(groups) == 1:
            return [("model.safetensors", groups[0])]
        return [(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups)]

    def _place(self, path: str, group: list[Entry]) -> tuple[list[OutputTensor], dict[str, Region]]:
        """Place all parts of the tensors of one shard, those without a source by name; register the file."""
        stored: list[tuple[str, str, tuple[int, ...], int]] = []
        owners: list[tuple[int, int]] = []
        contents: list[bytes | None] = []
        for index, entry in enumerate(group):
            parts = FORMATS[entry.choice.format].parts
            for number, (part, nbytes) in enumerate(zip(parts, entry.part_bytes, strict=True)):
                stored.append((entry.name + part.suffix, part.stored_as, part.stored_shape(entry.shape), nbytes))
                owners.append((index, number))
                of_shape = part.content(entry.shape) if part.content is not None else None
                contents.append(of_shape if entry.sources else entry.data)
        order = _aligned_order([(safetensors_file.DTYPE_BITS[dtype] // 8, nbytes) for _, dtype, _, nbytes in stored])
        header = safetensors_file.write_header([stored[i] for i in order], {"format": "pt"})
        at = len(header)
        regions: dict[tuple[int, int], Region] = {}
        literals = [(0, header)]
        for i in order:
            regions[owners[i]] = Region(len(self.draft.files), at, stored[i][3])
            if (content := contents[i]) is not None:
                literals.append((at, content))
            at += stored[i][3]
        self.draft.files.append(OutputFile(path, at, tuple(literals)))
        placed = [
            entry.placed(tuple(regions[index, number] for number in range(len(entry.part_bytes))))
            for index, entry in enumerate(group)
            if entry.sources
        ]
        return placed, {entry.name: regions[at, 0] for at, entry in enumerate(group) if not entry.sources}


def _by_single(wholes: list[WholeExperts]) -> tuple[dict[str, WholeExperts], set[str]]:
    """(the first single expert of each -> it, the names of all)."""
    return {whole.singles[0]: whole for whole in wholes}, {name for whole in wholes for name in whole.singles}


def _aligned_order(stored: list[tuple[int, int]]) -> list[int]:
    """An order of (element size, nbytes) in which every tensor is aligned to its element size.

    The bytes of the codes first, in the order in which they will be written, so that a file is filled from its front;
    where that would misalign what follows, largest elements first, as the safetensors library does.
    """
    codes = [i for i, (size, _) in enumerate(stored) if size == 1]
    rest = sorted((i for i, (size, _) in enumerate(stored) if size > 1), key=lambda i: -stored[i][0])
    aligned = sum(stored[i][1] for i in codes) % max((stored[i][0] for i in rest), default=1) == 0
    return codes + rest if aligned else rest + codes
