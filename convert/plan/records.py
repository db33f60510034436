"""The records of a plan: every output file with its size, every tensor with its address, every chunk of work.

A chunk is a run of rows of one source tensor. It is read once and encoded for every variant; where its bytes go follows
from the address of the tensor and the fixed size of a row (`extents`). Chunks can be done in any order, by any worker,
again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from streamquant.convert.architectures import ModelDescription
from streamquant.convert.architectures.tensor_view import MovedRows, ResolvedView, TensorView, resolve
from streamquant.convert.options import ConversionOptions
from streamquant.convert.recipes.block_runtimes import BlockRuntimes
from streamquant.convert.recipes.overrides import NO_OVERRIDES
from streamquant.convert.recipes.recipe import Recipe
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.tensor import SourceTensor
from streamquant.files.sizes import human_bytes
from streamquant.quant.format import WHOLE, Importance, Part
from streamquant.quant.formats import FORMATS

CHUNK_BYTES = 32 * 1024 * 1024
"""Source bytes in a chunk, the unit of the journal and of resumption."""
BLOCK_WEIGHTS = 256 * 1024
"""Weights that a worker holds at a time: their float32 fit into the cache of a core."""
LIBRARY_MEMORY = 200 * 2**20
"""Resident bytes of Python and its libraries: 169 MiB were measured (docs/benchmarks.md), mapped files included."""
VOCABULARY_MEMORY = 160 * 2**20
"""And of a vocabulary of 128,000 tokens while it becomes metadata: 145 MiB more were measured."""
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
    """A tensor as one variant stores it; one region per part of its format.

    Its rows are those of its sources, one source after another: GGUF stacks the experts of a layer. All sources have
    the same shape, and so the same share of every region. The view says what becomes of a source in its share.
    """

    sources: tuple[str, ...]
    name: str
    format: str
    reason: str
    view: TensorView | None
    regions: tuple[Region, ...]
    importance: str | None = None
    """The entry of the importance matrix that its encoder is given: float32[sources * n]."""
    amax_of: tuple[str, ...] = ()
    """The source tensors whose largest magnitude its encoder is given, itself among them, where its format has a scale
    for the whole tensor: those that runtimes merge with it share one."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(region.nbytes for region in self.regions)

    def placements(self) -> "Iterator[Placement]":
        """Where each source goes, in their order."""
        count = len(self.sources)
        if count == 1:
            yield Placement(self, 0, self.regions)
            return
        for number in range(count):
            regions = []
            for whole in self.regions:
                share = whole.nbytes // count
                regions.append(Region(whole.file, whole.offset + number * share, share))
            yield Placement(self, number, tuple(regions))


@dataclass(frozen=True, slots=True)
class Placement:
    """A source tensor in a tensor of a variant: the whole of it, or one of its experts."""

    tensor: OutputTensor
    number: int
    """Which of the tensor's sources it is."""
    regions: tuple[Region, ...]

    @property
    def source(self) -> str:
        """The source tensor's name."""
        return self.tensor.sources[self.number]

    @property
    def name(self) -> str:
        """The stored tensor's name."""
        return self.tensor.name

    @property
    def format(self) -> str:
        """The name of its format."""
        return self.tensor.format

    @property
    def view(self) -> TensorView | None:
        """What becomes of the source in it; None where it stays as it is."""
        return self.tensor.view

    @property
    def amax_of(self) -> tuple[str, ...]:
        """The source tensors whose largest magnitude its encoder is given; most formats need none."""
        return self.tensor.amax_of

    @property
    def importance(self) -> tuple[str, int, int] | None:
        """(entry of the importance matrix, number of the share of this source, number of shares)."""
        entry = self.tensor.importance
        return None if entry is None else (entry, self.number, len(self.tensor.sources))


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
    blocks: BlockRuntimes | None = None
    """Which programs run it, where its weights have a scale for each block."""
    generated_at: Mapping[str, Region] = field(default_factory=dict)
    """Where tensors without a source are, for the index of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A source tensor as rows, and every variant's use of it."""

    source: SourceTensor
    rows: int
    n: int
    row_step: int
    """Rows that have to stay together: those of an attention head, of a 128x128 block."""
    outputs: tuple[Placement, ...]

    def resolved(self, output: Placement) -> ResolvedView:
        """The map of its rows to those of an output's share."""
        if output.view is None:
            return ResolvedView(self.rows, self.n, self.rows, self.source.shape, None, None, None, 1)
        return resolve(output.view, self.source.shape)

    def encodes_by_matrix(self, output: Placement) -> bool:
        """Whether the matrices of an output (of heads) have an importance each: they are encoded one by one."""
        return output.importance is not None and self.resolved(output).matrices > 1

    @property
    def is_encoded_by_matrix(self) -> bool:
        """Whether one of its outputs is; row_step is that of a matrix then."""
        return any(map(self.encodes_by_matrix, self.outputs))

    def moved(self, output: Placement, first: int, last: int) -> MovedRows:
        """Where an output has rows [first, last), which are those of a block or of a chunk."""
        return self.resolved(output).moved(first, last, self.row_step)

    def rows_within(self, weights: int) -> int:
        """The largest run of rows, a multiple of row_step, with at most `weights` weights; at least row_step."""
        return max(self.row_step, weights // self.n // self.row_step * self.row_step)

    def source_bytes(self, first: int, last: int) -> tuple[int, int]:
        """Rows [first, last) -> bytes [start, stop) of the source file."""
        row = (self.source.stop - self.source.start) // self.rows
        return self.source.start + first * row, self.source.start + last * row


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [first, last) of a matrix."""

    matrix: int
    first: int
    last: int


@dataclass(frozen=True, repr=False)
class Plan:
    """What will be written, and where. Nothing has been read but headers, config and tokenizer."""

    checkpoint: Checkpoint
    model: ModelDescription
    options: ConversionOptions
    files: tuple[OutputFile, ...]
    variants: tuple[VariantPlan, ...]
    matrices: tuple[Matrix, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """In few words: every tensor would be megabytes of text in a notebook."""
        variants = ", ".join(variant.recipe.spec for variant in self.variants)
        return f"<Plan of {self.name}: {variants}; {len(self.files)} files, {human_bytes(self.nbytes)}>"

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks in the order of the source on disk."""
        return tuple(_chunks(self.matrices))

    @cached_property
    def visits(self) -> Mapping[int, tuple[int, ...]]:
        """Number of a chunk -> the chunks whose largest magnitude has to be found before it is encoded, itself among
        them; nothing for a chunk that needs none, or comes after another of those that share a scale."""
        return _visits(self.matrices, self.chunks)

    @property
    def visited_bytes(self) -> int:
        """Bytes of the source that are read once more for their largest magnitude."""
        visited = {self.chunks[number].matrix for numbers in self.visits.values() for number in numbers}
        return sum(self.matrices[number].source.nbytes for number in visited)

    @property
    def readings(self) -> Iterator[tuple[str, ...]]:
        """The shards that are read together, in the order in which they are: of each visit, and of each chunk."""
        for number in range(len(self.chunks)):
            for other in (*self.visits.get(number, ()), number):
                yield self.matrices[self.chunks[other].matrix].source.files

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
        has_metadata = any(variant.recipe.container.holds_vocabulary for variant in self.variants)
        vocabulary = VOCABULARY_MEMORY if has_metadata else 0
        imatrix = self.options.imatrix.nbytes if self.options.imatrix is not None else 0
        return LIBRARY_MEMORY + vocabulary + imatrix + 2 * headers + jobs * worker

    def importance(self, output: Placement, matrix: int = 0) -> Importance | None:
        """What an encoder is given beside the rows of a tensor: float32[n], or None; `matrix` is one of its view's."""
        if output.importance is None or self.options.imatrix is None:
            return None
        entry, number, count = output.importance
        values = self.options.imatrix.entries[entry]
        if output.view is not None and count == 1:
            source = self.checkpoint.tensors[output.source]
            number, count = matrix, resolve(output.view, source.shape).matrices
        n = values.size // count
        return values[number * n : (number + 1) * n]

    def options_of(self, variant: VariantPlan) -> ConversionOptions:
        """The options as they count for one variant, with the model's name."""
        return replace(
            self.options,
            name=self.name,
            imatrix=self.options.imatrix if variant.uses_imatrix else None,
            overrides=self.options.overrides if variant.recipe.takes_overrides else NO_OVERRIDES,
            ignore=self.options.ignore if variant.recipe.takes_ignore else (),
            calibration=self.options.calibration if variant.recipe.needs_calibration else None,
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of source, layout and chunks: runs with the same fingerprint write the same bytes."""
        variants = [self.variant_fingerprint(variant) for variant in self.variants]
        return _hash([variants, [[chunk.matrix, chunk.first, chunk.last] for chunk in self.chunks]])

    def variant_fingerprint(self, variant: VariantPlan) -> str:
        """A hash of the source and of every address of one variant, whatever else the plan makes."""
        source: list[list[object]] = [[*file.identity] for file in self.checkpoint.files]
        source += [
            [tensor.name, tensor.codes.format.name, *(part.name for part in tensor.codes.beside)]
            for tensor in self.checkpoint.tensors.values()
            if tensor.codes is not None
        ]
        files = []
        for index in variant.files:
            file = self.files[index]
            literals = [[offset, hashlib.sha256(data).hexdigest()] for offset, data in file.literals]
            files.append([file.path, file.size, literals])
        first = min(variant.files)
        tensors = [
            [
                *t.sources,
                t.name,
                t.format,
                t.view and t.view.json(),
                [[r.file - first, r.offset] for r in t.regions],
                *([[*t.amax_of]] if t.amax_of else ()),
            ]
            for t in variant.tensors
        ]
        more = self.options_of(variant).fingerprint()
        return _hash([LAYOUT_VERSION, variant.recipe.spec, source, files, tensors, *more])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def extents(plan: Plan, chunk: Chunk) -> Iterator[tuple[int, int, Region]]:
    """(output, part, region) of every run of bytes that a chunk writes; `output` is an index into Matrix.outputs."""
    matrix = plan.matrices[chunk.matrix]
    for number, output in enumerate(matrix.outputs):
        runs = matrix.moved(output, chunk.first, chunk.last).runs
        for part_number, part in enumerate(FORMATS[output.format].parts):
            region = output.regions[part_number]
            for first, count in runs:
                start, nbytes = place_rows(part, matrix.resolved(output).stored_n, first, first + count)
                if nbytes:
                    yield number, part_number, Region(region.file, region.offset + start, nbytes)


def fixed_bytes(plan: Plan) -> list[list[tuple[int, bytes]]]:
    """What each file holds where no chunk writes, as (offset, bytes): its literals, and zeros between tensors."""
    taken = [[(start, start + len(data)) for start, data in file.literals] for file in plan.files]
    for variant in plan.variants:
        for tensor in variant.tensors:
            for region in tensor.regions:
                taken[region.file].append((region.offset, region.offset + region.nbytes))
    found = []
    for file, runs in zip(plan.files, taken, strict=True):
        fixed, position = list(file.literals), 0
        for start, stop in sorted([*runs, (file.size, file.size)]):
            if position < start:
                fixed.append((position, bytes(start - position)))
            position = max(position, stop)
        found.append(fixed)
    return found


def place_rows(part: Part, n: int, first: int, last: int) -> tuple[int, int]:
    """Rows [first, last) of a part -> (offset in its region, nbytes). `first` begins an entry.

    What is there once for all rows comes with the first of them; what follows from the shape is a literal of its file.
    """
    entry = part.bytes_per_entry(n)
    if part.rows_per_entry == WHOLE:
        return 0, entry if first == 0 and part.content is None else 0
    return first // part.rows_per_entry * entry, part.entries(last - first) * entry


def _chunks(matrices: tuple[Matrix, ...]) -> Iterator[Chunk]:
    for index, matrix in enumerate(matrices):
        part = matrix.source.format.parts[0]
        step = matrix.rows_within(CHUNK_BYTES * matrix.n * part.rows_per_entry // part.bytes_per_entry(matrix.n))
        for first in range(0, matrix.rows, step):
            yield Chunk(index, first, min(first + step, matrix.rows))


def _visits(matrices: tuple[Matrix, ...], chunks: Sequence[Chunk]) -> dict[int, tuple[int, ...]]:
    """See Plan.visits."""
    of_source: dict[str, list[int]] = {}
    for number, chunk in enumerate(chunks):
        of_source.setdefault(matrices[chunk.matrix].source.name, []).append(number)
    visits: dict[int, tuple[int, ...]] = {}
    seen: set[str] = set()
    for number, chunk in enumerate(chunks):
        wanted = dict.fromkeys(name for output in matrices[chunk.matrix].outputs for name in output.amax_of)
        found = [other for name in wanted if name not in seen for other in of_source[name]]
        seen |= wanted.keys()
        if found:
            visits[number] = tuple(found)
    return visits


def _worker_bytes(matrix: Matrix) -> int:
    """Bytes that a worker holds for one block: the source, float32, and the encoded rows of one output at a time."""
    rows = min(matrix.rows, matrix.rows_within(BLOCK_WEIGHTS))
    encoded = max(_encoded_bytes(matrix, output, rows) for output in matrix.outputs)
    prepared = 4 * max(_copies(matrix, output) for output in matrix.outputs)
    raw = sum(span.stop - span.start for span in matrix.source.spans(0, rows, matrix.n))
    return max(rows * matrix.n * 4, raw) + rows * matrix.n * (4 + prepared) + 2 * encoded


def _encoded_bytes(matrix: Matrix, output: Placement, rows: int) -> int:
    """Bytes of the encoded rows of a block of so many rows of the source."""
    resolved, format_ = matrix.resolved(output), FORMATS[output.format]
    if resolved.transposed is None:
        return format_.nbytes(rows, resolved.stored_n)
    return format_.nbytes(resolved.stored_rows * rows // resolved.rows, resolved.stored_n)


def _copies(matrix: Matrix, output: Placement) -> int:
    """How often the rows of a block are copied before an encoder is given them, in another order or as other values."""
    resolved = matrix.resolved(output)
    if resolved.transposed is not None:
        return 3  # those that are taken, their columns, the transposed ones
    return int(resolved.columns is not None or resolved.value is not None or resolved.stored_rows != resolved.rows)
