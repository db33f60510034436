"""From headers and recipes to addresses: every byte of every output has its place before the first weight is read.

    Checkpoint + recipes -> Plan: files (exact size, header bytes), tensors (format, reason, address), chunks

A chunk is a run of rows of one source tensor. It is read once and encoded for every variant; where its bytes go follows
from the address of the tensor and the fixed size of a row. Chunks can be done in any order, by any worker, again.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from streamquant.convert.architectures import ModelDescription, describe
from streamquant.convert.metadata.gguf_metadata import GgufMetadata, gguf_metadata
from streamquant.convert.options import ConversionOptions
from streamquant.convert.recipes.mix import UNQUANTIZED, needs_importance
from streamquant.convert.recipes.overrides import NO_OVERRIDES
from streamquant.convert.recipes.recipe import Choice, Recipe, Wishes
from streamquant.convert.source.checkpoint import Checkpoint, SourceTensor
from streamquant.files import gguf_file, safetensors_file
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.format import Importance
from streamquant.quant.formats import FORMATS
from streamquant.quant.widen import SOURCE_DTYPES

CHUNK_BYTES = 32 * 1024 * 1024
"""Source bytes in a chunk, the unit of the journal and of resumption."""
BLOCK_WEIGHTS = 256 * 1024
"""Weights that a worker holds at a time: their float32 fit into the cache of a core."""
LIBRARY_MEMORY = 200 * 2**20
"""Resident bytes of Python and its libraries: 169 MiB were measured (docs/benchmarks.md), mapped files included."""
VOCABULARY_MEMORY = 160 * 2**20
"""And of a vocabulary of 128,000 tokens while it becomes metadata: 145 MiB more were measured."""
CONVERTERS_OWN = (*UNQUANTIZED, "Q8_0")
"""File types that the converter writes itself: they say nothing of an importance matrix they have no use for."""
LAYOUT_VERSION = 1
"""Raise it when the same plan would give other bytes; an unfinished run of another version is not resumed."""


@dataclass(frozen=True, slots=True)
class Region:
    """One part of a tensor: `nbytes` bytes at `offset` of file `file` (an index into Plan.files)."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A source tensor as one variant stores it; one region per part of its format."""

    source: str
    name: str
    format: str
    reason: str
    rope_heads: int | None
    regions: tuple[Region, ...]
    importance: str | None = None
    """The entry of the importance matrix that its encoder is given."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(region.nbytes for region in self.regions)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of known size. `literals` are (offset, bytes) known now: headers, and tensors that have no source."""

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """One variant: its files and tensors."""

    recipe: Recipe
    folder: str
    files: tuple[int, ...]
    tensors: tuple[OutputTensor, ...]
    generated: tuple[str, ...]
    """Tensors without a source, "rope_freqs.weight"."""
    dropped: tuple[str, ...]
    """Source tensors that this variant does not hold."""
    uses_imatrix: bool = False
    """Whether the importance matrix had a say in it: its keys are in the file, its record in the manifest."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A source tensor as rows, and every variant's use of it."""

    source: SourceTensor
    rows: int
    n: int
    row_step: int
    """Rows that have to stay together: those of an attention head, of a 128x128 block."""
    outputs: tuple[OutputTensor, ...]

    def rows_within(self, weights: int) -> int:
        """The largest run of rows, a multiple of row_step, with at most `weights` weights; at least row_step."""
        return max(self.row_step, weights // self.n // self.row_step * self.row_step)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [first, last) of a matrix."""

    matrix: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """What will be written, and where. Nothing has been read but headers, config and tokenizer."""

    checkpoint: Checkpoint
    model: ModelDescription
    options: ConversionOptions
    files: tuple[OutputFile, ...]
    variants: tuple[VariantPlan, ...]
    matrices: tuple[Matrix, ...]
    notes: tuple[str, ...]

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks in the order of the source on disk."""
        return tuple(_chunks(self.matrices))

    @property
    def name(self) -> str:
        """The model's name in file names."""
        return self.options.name or self.checkpoint.name

    @property
    def nbytes(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)

    def variant_bytes(self, variant: VariantPlan) -> int:
        """Bytes of the files of one variant."""
        return sum(self.files[index].size for index in variant.files)

    def bits_per_weight(self, variant: VariantPlan) -> float:
        """Bits of tensor data per weight of the source."""
        return 8 * sum(tensor.nbytes for tensor in variant.tensors) / self.checkpoint.parameter_count

    def memory_bytes(self, jobs: int) -> int:
        """Upper estimate of resident memory: what the libraries take, plus what each worker holds."""
        worker = max((_worker_bytes(matrix) for matrix in self.matrices), default=0)
        headers = sum(len(data) for file in self.files for _, data in file.literals)
        vocabulary = VOCABULARY_MEMORY if self.has_gguf else 0
        imatrix = self.options.imatrix.nbytes if self.options.imatrix is not None else 0
        return LIBRARY_MEMORY + vocabulary + imatrix + 2 * headers + jobs * worker

    @property
    def has_gguf(self) -> bool:
        """Whether a GGUF file is among the outputs, so that the vocabulary is in memory."""
        return any(variant.recipe.container == "gguf" for variant in self.variants)

    def importance(self, output: OutputTensor) -> Importance | None:
        """What an encoder is given beside the rows of a tensor: float32[n], or None."""
        if output.importance is None or self.options.imatrix is None:
            return None
        return self.options.imatrix.entries[output.importance]

    def imatrix_of(self, variant: VariantPlan) -> dict[str, Any] | None:
        """The record of the importance matrix that a variant was made with."""
        imatrix = self.options.imatrix
        return imatrix.record() if variant.uses_imatrix and imatrix is not None else None

    def overrides_of(self, variant: VariantPlan) -> dict[str, Any]:
        """The record of the command line's overrides of a variant."""
        takes = variant.recipe.container == "gguf" and variant.recipe.file is None
        return self.options.overrides.record() if takes else {}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of source, layout and chunks: runs with the same fingerprint write the same bytes."""
        variants = [self.variant_fingerprint(variant) for variant in self.variants]
        return _hash([variants, [[chunk.matrix, chunk.first, chunk.last] for chunk in self.chunks]])

    def variant_fingerprint(self, variant: VariantPlan) -> str:
        """A hash of the source and of every address of one variant, whatever else the plan makes."""
        source = [file.identity for file in self.checkpoint.files]
        files = []
        for index in variant.files:
            file = self.files[index]
            literals = [[offset, hashlib.sha256(data).hexdigest()] for offset, data in file.literals]
            files.append([file.path, file.size, literals])
        first = min(variant.files)
        tensors = [
            [t.source, t.name, t.format, t.rope_heads, [[r.file - first, r.offset] for r in t.regions]]
            for t in variant.tensors
        ]
        imatrix = self.imatrix_of(variant)
        more = [imatrix] if imatrix else []
        if self.options.guard_template:  # side files of FP8 checkpoints are not among the addresses
            more.append({"guard_template": True})
        return _hash([LAYOUT_VERSION, variant.recipe.spec, source, files, tensors, *more])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def make_plan(checkpoint: Checkpoint, recipes: Sequence[Recipe], options: ConversionOptions | None = None) -> Plan:
    """Lay out every variant. Reads config.json and the tokenizer, no weight.

    Raises StreamquantError for a model that cannot be converted, UsageError for options that cannot work.
    """
    options = options or ConversionOptions()
    if options.name is not None and (not options.name or options.name.startswith(".") or "/" in options.name):
        raise UsageError("name not allowed", found=repr(options.name), required="a plain file name")
    model = describe(checkpoint.config)
    model.match({name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    builder = _Builder(checkpoint, model, options)
    variants = tuple(builder.variant(recipe) for recipe in recipes)
    notes = [*model.notes, *builder.notes, *builder.overrides_notes(), *builder.imatrix_notes()]
    if checkpoint.ignored_files:
        notes.append(f"not part of the checkpoint, left alone: {', '.join(checkpoint.ignored_files)}")
    matrices = tuple(_matrices(checkpoint, variants))
    return Plan(checkpoint, model, options, tuple(builder.files), variants, matrices, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor to lay out: a source tensor with its choice, or a generated one with its bytes."""

    name: str
    source: SourceTensor | None
    format: str
    reason: str
    rope_heads: int | None
    shape: tuple[int, ...]
    data: bytes = b""
    importance: str | None = None

    @property
    def rows_and_length(self) -> tuple[int, int]:
        if self.source is None:
            return 1, self.shape[0]
        return _as_matrix(self.source, self.rope_heads)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        rows, n = self.rows_and_length
        return tuple(part.nbytes(rows, n) for part in FORMATS[self.format].parts)


class _Builder:
    """Collects the files of all variants."""

    def __init__(self, checkpoint: Checkpoint, model: ModelDescription, options: ConversionOptions) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.options = options
        self.name = options.name or checkpoint.name
        self.files: list[OutputFile] = []
        self.notes: list[str] = []
        self._metadata: GgufMetadata | None = None
        self._without_importance: set[str] = set()
        self._gguf_recipes: list[Recipe] = []

    def variant(self, recipe: Recipe) -> VariantPlan:
        if recipe.container == "gguf":
            return self._gguf_variant(recipe)
        return self._fp8_variant(recipe)

    def _choices(self, recipe: Recipe) -> dict[str, Choice]:
        """The format of every tensor of the model, by source name."""
        rules = self.model.rules
        known = [(tensor, rules[name]) for name, tensor in self.checkpoint.tensors.items() if name in rules]
        overrides = self.options.overrides if recipe.file is None else NO_OVERRIDES
        return recipe.choose(known, self.model, Wishes(self.options.imatrix is not None, overrides))

    # GGUF

    def _gguf_variant(self, recipe: Recipe) -> VariantPlan:
        self._gguf_recipes.append(recipe)
        entries = list(self._gguf_entries(recipe))
        self._check_importance(recipe, entries)
        dropped = tuple(name for name in self.checkpoint.tensors if name not in self.model.rules)
        metadata = self._gguf_metadata(entries).for_file_type(recipe.file_type)
        imatrix = self.options.imatrix
        uses_imatrix = imatrix is not None and (
            recipe.base not in CONVERTERS_OWN or any(entry.importance is not None for entry in entries)
        )
        if imatrix is not None and uses_imatrix:
            metadata |= imatrix.keys()
        folder, stem = f"{self.name}-GGUF", f"{self.name}-{recipe.label}"
        groups = _split(entries, self.options.split_max_size)
        files: list[int] = []
        tensors: list[OutputTensor] = []
        for number, group in enumerate(groups):
            keys = dict(metadata) if number == 0 else {}
            path = f"{folder}/{stem}.gguf"
            if len(groups) > 1:
                keys |= GgufMetadata.split_keys(number, len(groups), len(entries))
                path = f"{folder}/{stem}/{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf"
            header = gguf_file.pack_header(
                keys, [(e.name, e.shape, FORMATS[e.format].parts[0].stored_as, sum(e.part_bytes)) for e in group]
            )
            files.append(len(self.files))
            tensors += self._gguf_place(path, header, group)
        generated = tuple(entry.name for entry in entries if entry.source is None)
        return VariantPlan(recipe, folder, tuple(files), tuple(tensors), generated, dropped, uses_imatrix)

    def _gguf_entries(self, recipe: Recipe) -> Iterator[_Entry]:
        for extra in self.model.extra_tensors:
            data = extra.values.astype("<f4").tobytes()
            yield _Entry(extra.gguf_name, None, "F32", "made from config.json", None, extra.values.shape, data)
        for name, choice in self._choices(recipe).items():
            tensor, rule = self.checkpoint.tensors[name], self.model.rules[name]
            importance = self._importance(rule.gguf_name, tensor, choice.format)
            yield _Entry(
                rule.gguf_name, tensor, choice.format, choice.reason, rule.rope_heads, tensor.shape, b"", importance
            )

    def _importance(self, name: str, tensor: SourceTensor, format_name: str) -> str | None:
        """The entry of the importance matrix for a tensor, if there is one and the format asks for it."""
        imatrix = self.options.imatrix
        if imatrix is None or len(tensor.shape) < 2 or format_name == tensor.dtype or name.endswith("_norm.weight"):
            return None
        found = imatrix.find(name, tensor.shape)  # of every quantized tensor: another length is another model's
        if not FORMATS[format_name].uses_importance:
            return None
        if found is None:
            self._without_importance.add(name)
        return name if found is not None else None

    def _check_importance(self, recipe: Recipe, entries: list[_Entry]) -> None:
        """Refuse formats that are garbage without importance."""
        base = recipe.base or ""
        missing = [e.name for e in entries if e.importance is None and needs_importance(base, e.name, e.format)]
        if not missing:
            return
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        if self.options.imatrix is None:
            raise UsageError(
                f"{recipe.spec} needs an importance matrix",
                found=f"none, for {named}",
                required="--imatrix FILE",
                hint="llama-imatrix makes one",
            )
        raise StreamquantError(
            f"{recipe.spec} needs an importance matrix, and this one has no entry for some tensors",
            where=self.options.imatrix.name,
            found=f"none for {named}",
            hint="use the importance matrix of this model, or leave this variant out",
        )

    def imatrix_notes(self) -> list[str]:
        """What of the importance matrix is missing or left over. Raises StreamquantError if nothing of it fits."""
        imatrix = self.options.imatrix
        if imatrix is None or not self._gguf_recipes:
            return ["the importance matrix has no use: no GGUF variant"] if imatrix is not None else []
        names = {rule.gguf_name for rule in self.model.rules.values()}
        if not names & imatrix.entries.keys():
            raise StreamquantError(
                "importance matrix of another model",
                where=imatrix.name,
                found=f"{len(imatrix.entries)} entries, the first {next(iter(imatrix.entries))!r:.100}",
                required="entries with the GGUF names of this model's tensors",
            )
        notes = []
        if self._without_importance:
            missing = sorted(self._without_importance)
            notes.append(f"not in the importance matrix, encoded without: {_shortened(missing)}")
        if unknown := sorted(imatrix.entries.keys() - names):
            notes.append(f"in the importance matrix, but not in this model: {_shortened(unknown)}")
        return notes

    def overrides_notes(self) -> list[str]:
        """Which overrides have no effect."""
        names = [rule.gguf_name for rule in self.model.rules.values()]
        notes = []
        overrides = self.options.overrides
        if overrides:
            takers = [recipe for recipe in self._gguf_recipes if recipe.file is None]
            notes += [f"--tensor-type {pattern}: in the name of no tensor" for pattern in overrides.unmatched(names)]
            ignoring = [recipe.spec for recipe in takers if recipe.base in UNQUANTIZED]
            if ignoring and (overrides.tensor_types or overrides.pure):
                notes.append(f"{', '.join(ignoring)}: --tensor-type and --pure are for quantized file types only")
        for recipe in self._gguf_recipes:
            if recipe.file is not None:
                missing = recipe.file.overrides.unmatched(names)
                notes += [f"{recipe.spec}: {text}: in the name of no tensor" for text in missing]
        return notes

    def _gguf_metadata(self, entries: list[_Entry]) -> GgufMetadata:
        """The keys that all GGUF variants share; tokenizers are large, so they are read once."""
        if self._metadata is None:
            count = sum(math.prod(entry.shape) for entry in entries)
            self._metadata = gguf_metadata(
                self.checkpoint,
                self.model,
                parameter_count=count,
                guard_template=self.options.guard_template,
                pre=self.options.pre,
                overrides=self.options.metadata,
            )
            self.notes += self._metadata.notes
        return self._metadata

    def _gguf_place(self, path: str, header: bytes, group: list[_Entry]) -> Iterator[OutputTensor]:
        """Place the tensors of one file one after another, each padded; register the file."""
        at = len(header)
        literals = [(0, header)]
        placed = []
        for entry in group:
            nbytes = sum(entry.part_bytes)
            if entry.source is None:
                literals.append((at, entry.data))
            else:
                region = Region(len(self.files), at, nbytes)
                names = entry.source.name, entry.name, entry.format, entry.reason
                placed.append(OutputTensor(*names, entry.rope_heads, (region,), entry.importance))
            at += gguf_file.pad(nbytes)
        self.files.append(OutputFile(path, at, tuple(literals)))
        return iter(placed)

    # FP8 in safetensors

    def _fp8_variant(self, recipe: Recipe) -> VariantPlan:
        folder = f"{self.name}-{recipe.label}"
        groups = self._fp8_groups(recipe)
        files: list[int] = []
        tensors: list[OutputTensor] = []
        for path, group in groups:
            files.append(len(self.files))
            tensors += self._fp8_place(f"{folder}/{path}", group)
        self._note_ragged_blocks(recipe, tensors)
        return VariantPlan(recipe, folder, tuple(files), tuple(tensors), (), ())

    def _note_ragged_blocks(self, recipe: Recipe, tensors: list[OutputTensor]) -> None:
        """Say so where a runtime cannot group the activations: compressed-tensors refuses, vLLM pads or refuses."""
        ragged = [
            t for t in tensors if FORMATS[t.format].pads_rows and self.checkpoint.tensors[t.source].row_length % 128
        ]
        if ragged:
            width = self.checkpoint.tensors[ragged[0].source].row_length
            self.notes.append(
                f"{recipe.spec}: rows of {len(ragged)} tensors are not a multiple of 128 ({width}); the weights are"
                " stored as defined, but transformers cannot quantize activations in groups of 128 there"
            )

    def _fp8_groups(self, recipe: Recipe) -> list[tuple[str, list[_Entry]]]:
        """(file name, tensors) of each shard: those of the source, or filled up to --max-shard-size."""
        entries = []
        choices = self._choices(recipe)
        for tensor in self.checkpoint.tensors.values():
            kept = Choice(tensor.dtype, "not a weight of the model: kept as in the source")
            choice = choices.get(tensor.name, kept)
            entries.append(_Entry(tensor.name, tensor, choice.format, choice.reason, None, tensor.shape))
        if self.options.max_shard_size is None:
            return [
                (file.name, [e for e in entries if e.source is not None and e.source.file == file.name])
                for file in self.checkpoint.files
            ]
        groups = _split(entries, self.options.max_shard_size)
        if len(groups) == 1:
            return [("model.safetensors", groups[0])]
        return [(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups)]

    def _fp8_place(self, path: str, group: list[_Entry]) -> Iterator[OutputTensor]:
        """Place all parts of the tensors of one shard without gaps, aligned; register the file."""
        stored: list[tuple[str, str, tuple[int, ...], int]] = []
        owners: list[tuple[int, int]] = []
        for index, entry in enumerate(group):
            for number, (part, nbytes) in enumerate(zip(FORMATS[entry.format].parts, entry.part_bytes, strict=True)):
                stored.append((entry.name + part.suffix, part.stored_as, part.stored_shape(entry.shape), nbytes))
                owners.append((index, number))
        order = _aligned_order([(safetensors_file.DTYPE_BITS[dtype] // 8, nbytes) for _, dtype, _, nbytes in stored])
        header = safetensors_file.write_header([stored[i] for i in order], {"format": "pt"})
        at = len(header)
        regions: dict[tuple[int, int], Region] = {}
        for i in order:
            regions[owners[i]] = Region(len(self.files), at, stored[i][3])
            at += stored[i][3]
        self.files.append(OutputFile(path, at, ((0, header),)))
        for index, entry in enumerate(group):
            assert entry.source is not None  # FP8 checkpoints hold no generated tensors
            parts = tuple(regions[index, number] for number in range(len(entry.part_bytes)))
            yield OutputTensor(entry.source.name, entry.name, entry.format, entry.reason, None, parts)


def _as_matrix(tensor: SourceTensor, rope_heads: int | None) -> tuple[int, int]:
    """(rows, weights in a row). A vector is one row, or, where llama.cpp reorders it, a column."""
    if rope_heads is not None and len(tensor.shape) == 1:
        return tensor.count, 1
    return tensor.rows, tensor.row_length


def _split(entries: list[_Entry], max_bytes: int | None) -> list[list[_Entry]]:
    """Fill files in order up to `max_bytes` of tensor data (gguf-py's GGUFWriter.add_tensor_info does the same)."""
    if max_bytes is None:
        return [entries]
    groups: list[list[_Entry]] = [[]]
    filled = 0
    for entry in entries:
        nbytes = sum(entry.part_bytes)
        if nbytes > max_bytes:
            raise UsageError(
                "a tensor is larger than a file may be",
                where=f"tensor {entry.name!r}",
                found=f"{nbytes:,} bytes",
                required=f"at most {max_bytes:,}",
                hint="allow larger files",
            )
        if groups[-1] and filled + nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += nbytes
    return groups


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _aligned_order(stored: list[tuple[int, int]]) -> list[int]:
    """An order of (element size, nbytes) in which every tensor is aligned to its element size.

    The bytes of the codes first, in the order in which they will be written, so that a file is filled from its front;
    where that would misalign what follows, largest elements first, as the safetensors library does.
    """
    codes = [i for i, (size, _) in enumerate(stored) if size == 1]
    rest = sorted((i for i, (size, _) in enumerate(stored) if size > 1), key=lambda i: -stored[i][0])
    aligned = sum(stored[i][1] for i in codes) % 4 == 0
    return codes + rest if aligned else rest + codes


def _matrices(checkpoint: Checkpoint, variants: tuple[VariantPlan, ...]) -> Iterator[Matrix]:
    uses: dict[str, list[OutputTensor]] = {}
    for variant in variants:
        for output in variant.tensors:
            uses.setdefault(output.source, []).append(output)
    for tensor in checkpoint.tensors.values():
        outputs = tuple(uses.get(tensor.name, ()))
        if outputs:
            heads = next((output.rope_heads for output in outputs if output.rope_heads is not None), None)
            rows, n = _as_matrix(tensor, heads)
            step = math.lcm(rows // heads if heads else 1, *(FORMATS[o.format].rows_per_group for o in outputs))
            yield Matrix(tensor, rows, n, step, outputs)


def _chunks(matrices: tuple[Matrix, ...]) -> Iterator[Chunk]:
    for index, matrix in enumerate(matrices):
        step = matrix.rows_within(CHUNK_BYTES // SOURCE_DTYPES[matrix.source.dtype])
        for first in range(0, matrix.rows, step):
            yield Chunk(index, first, min(first + step, matrix.rows))


def _worker_bytes(matrix: Matrix) -> int:
    """Bytes that a worker holds for one block: the source, float32, and the encoded rows of one output at a time."""
    rows = min(matrix.rows, matrix.rows_within(BLOCK_WEIGHTS))
    encoded = max(FORMATS[output.format].nbytes(rows, matrix.n) for output in matrix.outputs)
    return rows * matrix.n * (4 + 4) + 2 * encoded
