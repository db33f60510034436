"""Read back what was written: against the manifest, and against the source.

Without a source: sizes, SHA-256 of every file, the hash of every tensor (so that damage has a name), and containers
whose headers say what the manifest says. With the source: every tensor is encoded again and compared byte for byte, and
decoded and compared with the weights, which gives the error of the variant (SQNR).
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamquant.convert.manifest import (
    MANIFEST,
    Manifest,
    ManifestFile,
    ManifestPart,
    ManifestVariant,
    read_manifest,
)
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import BLOCK_WEIGHTS, Chunk, Matrix, Plan
from streamquant.convert.recipes.calibration import Calibration
from streamquant.convert.recipes.imatrix import ImportanceMatrix
from streamquant.convert.run.blocks import (
    Bytes,
    Known,
    Piece,
    Scratch,
    encode_block,
    largest_magnitude,
    read_rows,
    widen_rows,
)
from streamquant.convert.run.statistics import Magnitudes
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.files.hashing import FileHash
from streamquant.files.listener import SILENT, Listener
from streamquant.files.machine import allow_open_files
from streamquant.files.reading import read_into
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.format import WHOLE
from streamquant.quant.formats import FORMATS
from streamquant.validate.readback.inspect import StoredFile, inspect_file
from streamquant.validate.readback.sqnr import Noise

VERIFYING = "verifying"
"""The task that listeners hear of."""


@dataclass(slots=True)
class VerifiedVariant:
    """What was found of one variant; `problems` is empty if all is well."""

    folder: Path
    spec: str
    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    noise: dict[str, Noise] = field(default_factory=dict, repr=False)
    """By source tensor; empty without a source."""

    @property
    def total(self) -> Noise:
        """The noise of the whole variant."""
        total = Noise()
        for noise in self.noise.values():
            total.merge(noise)
        return total

    @property
    def quantized(self) -> Noise:
        """The noise of the tensors that lost something."""
        total = Noise()
        for noise in self.noise.values():
            if noise.noise > 0:
                total.merge(noise)
        return total


def find_manifests(folder: Path) -> list[Path]:
    """The folders with a manifest: `folder` itself, or those directly below it. Raises UsageError if there is none."""
    candidates = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())] if folder.is_dir() else []
    found = [candidate for candidate in candidates if (candidate / MANIFEST).is_file()]
    if not found:
        raise UsageError(
            "nothing to verify",
            where=str(folder),
            required=f"a folder that `streamquant convert` wrote, with {MANIFEST}",
        )
    return found


def verify(
    folder: Path,
    source: Checkpoint | None = None,
    imatrix: ImportanceMatrix | None = None,
    listener: Listener = SILENT,
    calibration: Calibration | None = None,
) -> list[VerifiedVariant]:
    """Verify every variant of every manifest in `folder`; `listener` hears of the bytes of the task VERIFYING.

    `imatrix` and `calibration` are what the variants were made with, needed to encode them again. Problems are
    collected, not raised. Raises UsageError without a manifest or with a missing or another of these, StreamquantError
    for a broken manifest or a source that cannot be read.
    """
    results = []
    manifests = [(child, _manifest(child)) for child in find_manifests(folder)]
    if source is not None:
        for child, manifest in manifests:
            for spec, variant in manifest.variants.items():
                where = f"{child / MANIFEST}, variant {spec!r}"
                _ = _same_imatrix(variant, imatrix, where), _same_calibration(variant, calibration, where)
    for child, manifest in manifests:
        for spec, variant in manifest.variants.items():
            result = VerifiedVariant(child, spec)
            results.append(result)
            _verify_files(result, variant, listener)
            if source is None or result.problems:
                continue
            if {(file.name, file.size) for file in source.files} != {(f.path, f.size) for f in manifest.source.files}:
                result.problems.append(
                    f"made of another source than {source.folder}: names or sizes of its files differ"
                )
                continue
            found = _same_imatrix(variant, imatrix, str(child))
            measured = _same_calibration(variant, calibration, str(child))
            options = replace(variant.options, imatrix=found, calibration=measured)
            plan = make_plan(source, [variant.recipe], options)
            _compare(plan, result, listener)
    return results


def bytes_to_verify(folder: Path, *, with_source: bool) -> int:
    """The number of bytes that `verify` will report, for a progress bar."""
    manifests = [_manifest(child) for child in find_manifests(folder)]
    total = sum(variant.nbytes for manifest in manifests for variant in manifest.variants.values())
    return 2 * total if with_source else total


def _manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None, "find_manifests returns folders with one"
    return manifest


def _same_imatrix(variant: ManifestVariant, imatrix: ImportanceMatrix | None, where: str) -> ImportanceMatrix | None:
    """The importance matrix that a variant was made with, under its name then. Raises UsageError if it is another."""
    record = variant.imatrix
    if record is None:
        return None
    if imatrix is None or imatrix.sha256 != record.sha256:
        raise UsageError(
            "made with an importance matrix, and so can only be encoded again with it",
            where=where,
            found="none" if imatrix is None else f"{imatrix.name}, SHA-256 {imatrix.sha256}",
            required=f"--imatrix with {record.file}, SHA-256 {record.sha256}",
        )
    return replace(imatrix, name=record.file).select(record.include_weights, record.exclude_weights)


def _same_calibration(variant: ManifestVariant, calibration: Calibration | None, where: str) -> Calibration | None:
    """The calibration that a variant was made with. Raises UsageError if it is another."""
    record = variant.calibration
    if record is None:
        return None
    if calibration is None or calibration.record.sha256 != record.sha256:
        raise UsageError(
            "made with a calibration, and so can only be encoded again with it",
            where=where,
            found="none" if calibration is None else f"{calibration.record.file}, SHA-256 {calibration.record.sha256}",
            required=f"--calibration with {record.file}, SHA-256 {record.sha256}",
        )
    return calibration


# Against the manifest


def _verify_files(result: VerifiedVariant, variant: ManifestVariant, listener: Listener) -> None:
    for file in variant.files:
        path = result.folder / file.path
        parts = [part for tensor in variant.tensors for part in tensor.parts if part.file == file.path]
        result.files += 1
        result.tensors += len(parts)
        if not path.is_file():
            result.problems.append(f"{file.path}: missing")
            continue
        result.nbytes += path.stat().st_size
        if path.stat().st_size != file.size:
            result.problems.append(f"{file.path}: {path.stat().st_size:,} bytes, should be {file.size:,}")
            continue
        result.problems += _verify_hashes(path, file, parts, listener)
        result.problems += _verify_header(path, file.path, parts)


def _verify_hashes(path: Path, file: ManifestFile, parts: list[ManifestPart], listener: Listener) -> list[str]:
    found = FileHash(file.size, [], [(part.name, part.offset, part.offset + part.size) for part in parts])
    with path.open("rb") as opened:
        at = 0
        while (step := found.step()) is not None and at < file.size:
            found.hash(opened.fileno(), step[1])
            found.busy = False
            listener.advanced(VERIFYING, step[1] - at)
            at = step[1]
    hashes = found.tensor_hashes()
    damaged = [part.name for part in parts if hashes[part.name] != part.xxh3_128]
    if found.sha256() == file.sha256:
        return [f"{file.path}: tensor {name} has another hash in the manifest; the file is whole" for name in damaged]
    if not damaged:
        return [f"{file.path}: header or padding damaged (SHA-256 differs, all tensors are whole)"]
    return [f"{file.path}: tensor {name} is damaged" for name in damaged]


def _verify_header(path: Path, name: str, parts: list[ManifestPart]) -> list[str]:
    """Whether the container says of each tensor what the manifest says."""
    try:
        stored: StoredFile = inspect_file(path)
    except StreamquantError as error:
        return [f"{name}: {error}"]
    present = {tensor.name: tensor for tensor in stored.tensors}
    problems = []
    for part in parts:
        tensor = present.get(part.name)
        if tensor is None:
            problems.append(f"{name}: no tensor {part.name} in the file's header")
        elif (tensor.offset, tensor.nbytes, tensor.stored_as) != (part.offset, part.size, part.stored_as):
            problems.append(f"{name}: tensor {part.name} has another place or type in the file's header")
    return problems


# Against the source


def _compare(plan: Plan, result: VerifiedVariant, listener: Listener) -> None:
    """Make the plan's one variant again, block by block, and compare it with the files of the result's folder."""
    checkpoint = plan.checkpoint
    allow_open_files(len(plan.files) + len(checkpoint.files))
    with ExitStack() as stack:
        outputs = []
        for file in plan.files:
            # the folder may have been renamed since
            path = result.folder / file.path.removeprefix(f"{plan.variants[0].folder}/")
            if path.stat().st_size != file.size:  # then all addresses are others
                result.problems.append(
                    f"{file.path}: {path.stat().st_size:,} bytes, of {checkpoint.folder} it would be {file.size:,}: "
                    f"the header is another (model card, tokenizer, config, or the folder's name, which is the model's)"
                )
                return
            opened = stack.enter_context(path.open("rb"))
            outputs.append(opened.fileno())
            for offset, data in file.literals:
                if os.pread(opened.fileno(), len(data), offset) != data:
                    result.problems.append(f"{file.path}: header or generated tensor at byte {offset} differs")
        sources = {
            file.name: stack.enter_context((checkpoint.folder / file.name).open("rb")).fileno()
            for file in checkpoint.files
        }
        magnitudes = Magnitudes(plan)
        comparison = _Comparison(Known(plan, magnitudes.largest), result, listener, sources, outputs)
        for number, chunk in enumerate(plan.chunks):
            for visit in plan.visits.get(number, ()):
                magnitudes.add(visit, comparison.largest(plan.chunks[visit]))
            comparison.compare(chunk)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What is compared, and the open files of both sides."""

    known: Known
    result: VerifiedVariant
    listener: Listener
    sources: Mapping[str, int]
    """Name of a source file -> descriptor."""
    outputs: Sequence[int]
    """A descriptor for each file of the plan."""
    encoding: Scratch = field(default_factory=Scratch)

    @property
    def plan(self) -> Plan:
        """The plan of the variant."""
        return self.known.plan

    def largest(self, chunk: Chunk) -> float:
        """The largest magnitude in a chunk."""
        return largest_magnitude(self.plan.matrices[chunk.matrix], chunk, self.sources.__getitem__, self.encoding)

    def compare(self, chunk: Chunk) -> None:
        """Encode a chunk again, compare it with the file, and add up the error of what the file holds."""
        matrix = self.plan.matrices[chunk.matrix]
        shards = self.sources.__getitem__
        step = matrix.row_step if matrix.is_encoded_by_matrix else matrix.rows_within(BLOCK_WEIGHTS)
        noise = self.result.noise.setdefault(matrix.source.name, Noise())
        wanted = frozenset(range(len(matrix.outputs)))
        for first in range(chunk.first, chunk.last, step):
            rows = range(first, min(first + step, chunk.last))
            raw = read_rows(matrix, rows, shards, self.encoding)
            for pieces in encode_block(self.known, matrix, rows, raw, wanted, self.encoding):
                stored = [self._stored(piece) for piece in pieces]
                for piece, found in zip(pieces, stored, strict=True):
                    if not np.array_equal(piece.data, found):
                        self._differs(matrix, piece, first)
                    self.listener.advanced(VERIFYING, found.size)
                moved = matrix.moved(matrix.outputs[pieces[0].output], rows.start, rows.stop)
                values = widen_rows(matrix, rows, raw, self.encoding)
                taken = values if moved.rows is None else values[moved.rows]
                resolved = matrix.resolved(matrix.outputs[pieces[0].output])
                noise.add(resolved.arrange(taken), self._decode(matrix, pieces, stored))

    def _differs(self, matrix: Matrix, piece: Piece, first: int) -> None:
        file, name = self.plan.files[piece.file].path, matrix.outputs[piece.output].name
        problem = f"{file}: tensor {name}, rows from {first}: not what the source gives"
        if problem not in self.result.problems[-1:]:  # once for the runs of a block
            self.result.problems.append(problem)

    def _stored(self, piece: Piece) -> Bytes:
        return self._read(piece.file, piece.offset, piece.data.size)

    def _read(self, file: int, offset: int, nbytes: int) -> Bytes:
        buffer = np.empty(nbytes, np.uint8)
        read_into(self.outputs[file], buffer, offset)
        return buffer

    def _decode(self, matrix: Matrix, pieces: list[Piece], stored: list[Bytes]) -> NDArray[np.float32]:
        """The weights of the source that the stored bytes stand for, in the order of the output."""
        output = matrix.outputs[pieces[0].output]
        format_, resolved = FORMATS[output.format], matrix.resolved(output)
        parts = []
        for number, (part, region) in enumerate(zip(format_.parts, output.regions, strict=True)):
            if part.rows_per_entry == WHOLE:
                runs = [self._read(region.file, region.offset, region.nbytes)]
            else:
                runs = [found for piece, found in zip(pieces, stored, strict=True) if piece.part == number]
            parts.append(np.concatenate(runs).reshape(-1, part.bytes_per_entry(resolved.stored_n)))
        values = format_.decode(tuple(parts), resolved.stored_n)
        return values if resolved.value is None else resolved.value.undo(values)
