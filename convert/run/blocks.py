"""The inner loop: read a block of rows, widen it once, encode it for every variant, write it at its addresses.

A block is small enough for the cache of a core: between the read and the writes its weights do not go back to memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamquant.convert.architectures.tensor_view import MovedRows, TensorView
from streamquant.convert.plan.records import BLOCK_WEIGHTS, Chunk, Matrix, Placement, Plan, place_rows
from streamquant.convert.source.tensor import StoredPart
from streamquant.files.reading import read_into
from streamquant.quant.errors import StreamquantError
from streamquant.quant.format import Encoded
from streamquant.quant.formats import FORMATS
from streamquant.quant.kernels import floats_cpu

Bytes = NDArray[np.uint8]
Raw = tuple[Bytes, ...]
"""The source bytes of some rows: of each part of the source's format uint8[k]."""
Descriptors = Callable[[str], int]
"""The name of a shard -> its descriptor; waits until the shard is there."""


class ShortShardError(EOFError):
    """A shard ended before its header says."""

    def __init__(self, shard: str) -> None:
        super().__init__(shard)
        self.shard = shard


@dataclass(frozen=True, slots=True)
class Piece:
    """Encoded bytes of one part of one output, and where they belong."""

    output: int
    """Index into Matrix.outputs."""
    part: int
    file: int
    offset: int
    data: Bytes


class Scratch:
    """Buffers of one worker, reused from block to block."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}
        self._held: dict[str, StoredPart] = {}

    def take(self, purpose: str, nbytes: int) -> Bytes:
        """uint8[nbytes], uninitialised; valid until the next `take` for the same purpose."""
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.size < nbytes:
            buffer = np.empty(nbytes, np.uint8)
            self._buffers[purpose] = buffer
        return buffer[:nbytes]

    def changes(self, purpose: str, span: StoredPart) -> bool:
        """Whether these bytes of the source, that are about to be read for a purpose, are others than before."""
        before, self._held[purpose] = self._held.get(purpose), span
        return before != span


@dataclass(frozen=True, slots=True)
class Known:
    """What an inner loop knows beside the rows of a block."""

    plan: Plan
    largest: Callable[[tuple[str, ...]], float]
    """The largest magnitude in some source tensors, of those that the plan visits (convert/run/statistics.py)."""


Encode = Callable[[Known, Chunk, Descriptors, frozenset[int], Scratch], Iterator[list[Piece]]]
"""An inner loop: `encode_chunk`, or what does the same on a GPU."""


def encode_chunk(
    known: Known, chunk: Chunk, shards: Descriptors, wanted: frozenset[int], scratch: Scratch
) -> Iterator[list[Piece]]:
    """Read a chunk and yield its encoded pieces, block by block.

    `wanted` are the outputs (indices into Matrix.outputs) to encode. The pieces of a block are valid until the next
    is asked for. Raises StreamquantError for a NaN, an infinity, or a weight too large for a format; ShortShardError.
    """
    matrix = known.plan.matrices[chunk.matrix]
    for rows in _blocks(matrix, chunk):
        raw = read_rows(matrix, rows, shards, scratch)
        yield from encode_block(known, matrix, rows, raw, wanted, scratch)


def _blocks(matrix: Matrix, chunk: Chunk) -> Iterator[range]:
    step = matrix.rows_within(BLOCK_WEIGHTS)
    for first in range(chunk.first, chunk.last, step):
        yield range(first, min(first + step, chunk.last))


def largest_magnitude(matrix: Matrix, chunk: Chunk, shards: Descriptors, scratch: Scratch) -> float:
    """The largest magnitude in a chunk, as its encoder is given the weights.

    Raises StreamquantError for a NaN or an infinity; ShortShardError.
    """
    found = np.float32(0)
    for rows in _blocks(matrix, chunk):
        values = widen_rows(matrix, rows, read_rows(matrix, rows, shards, scratch), scratch)
        found = max(found, np.float32(floats_cpu.largest_magnitude(values.reshape(-1))))
    if any(output.amax_of and rounds_first(matrix, output.format) for output in matrix.outputs):
        found = _rounded(np.full((1, 1), found), scratch)[0, 0]
    return float(found)


def read_rows(matrix: Matrix, rows: range, shards: Descriptors, scratch: Scratch) -> Raw:
    """The source bytes of some rows. Raises ShortShardError, StreamquantError."""
    raw = []
    for number, span in enumerate(matrix.source.spans(rows.start, rows.stop, matrix.n)):
        purpose = f"raw {number}"
        raw.append(scratch.take(purpose, span.stop - span.start))
        if not scratch.changes(purpose, span):
            continue  # what all rows of a matrix need is read once
        try:
            read_into(shards(span.file), raw[-1], span.start)
        except EOFError as error:
            raise ShortShardError(span.file) from error
        except OSError as error:
            raise StreamquantError(
                "cannot read a shard", where=f"{span.file}, tensor {span.name!r}", found=error.strerror
            ) from error
    return tuple(raw)


def widen_rows(matrix: Matrix, rows: range, raw: Raw, scratch: Scratch) -> NDArray[np.float32]:
    """Source bytes of some rows -> float32[r, n]. Raises StreamquantError for a NaN or an infinity."""
    values = scratch.take("rows", len(rows) * matrix.n * 4).view(np.float32).reshape(len(rows), matrix.n)
    if not matrix.source.format.widen_into(raw, rows.start, values):
        raise _not_finite(matrix, rows.start, values)
    return values


def shared_encodings(matrix: Matrix, wanted: frozenset[int]) -> Iterator[tuple[Placement, list[int]]]:
    """Outputs that store the matrix in the same way share one encoding: the first of each, and the numbers of all."""
    groups: dict[tuple[str, TensorView | None, tuple[str, int, int] | None, tuple[str, ...]], list[int]] = {}
    for number, output in enumerate(matrix.outputs):
        if number in wanted:
            way = (output.format, output.view, output.importance, output.amax_of)
            groups.setdefault(way, []).append(number)
    for numbers in groups.values():
        yield matrix.outputs[numbers[0]], numbers


def encode_block(
    known: Known, matrix: Matrix, rows: range, raw: Raw, wanted: frozenset[int], scratch: Scratch
) -> Iterator[list[Piece]]:
    """Encode the rows whose source bytes are `raw`; as `encode_chunk`."""
    values = widen_rows(matrix, rows, raw, scratch)
    for output, numbers in shared_encodings(matrix, wanted):
        if matrix.encodes_by_matrix(output):
            yield from _by_matrix(known, matrix, rows.start, values, numbers, scratch)
            continue
        moved = matrix.moved(output, rows.start, rows.stop)
        if not moved.runs:
            continue  # a part of the tensor that this output leaves out
        if is_copied(matrix, output):
            parts = copied(matrix, len(rows), raw)
            encoded: Encoded = tuple(_in_order(part, moved, scratch) for part in parts)
        elif _is_picked(matrix, output, moved, values):
            encoded = _encode(known, matrix, output, _picked(values, rows.start, moved, scratch), scratch)
        else:
            # Formats look at one row at a time, so that encoded rows may change places: they are the shorter ones.
            encoded = _encode(known, matrix, output, _Rows(values, rows), scratch)
            if moved.rows is not None:
                encoded = tuple(_in_order(part, moved, scratch) for part in encoded)
        yield pieces(matrix, numbers, moved, encoded)


def _is_picked(matrix: Matrix, output: Placement, moved: MovedRows, rows: NDArray[np.float32]) -> bool:
    """Whether rows take their places before they are encoded: where some are left out, and in a transpose."""
    is_transposed = matrix.resolved(output).transposed is not None
    return is_transposed or (moved.rows is not None and moved.rows.size < rows.shape[0])


def _picked(rows: NDArray[np.float32], first: int, moved: MovedRows, scratch: Scratch) -> "_Rows":
    """The rows that an output takes of those from `first`, in its order."""
    if moved.rows is None:
        return _Rows(rows, range(first, first + rows.shape[0]))
    n = rows.shape[1]
    picked = scratch.take("picked", moved.rows.size * n * 4).view(np.float32).reshape(-1, n)
    np.take(rows, moved.rows, axis=0, out=picked, mode="clip")
    return _Rows(picked, first + moved.rows)


def _by_matrix(
    known: Known, matrix: Matrix, first: int, rows: NDArray[np.float32], numbers: list[int], scratch: Scratch
) -> Iterator[list[Piece]]:
    """As encode_block, for one output of a tensor whose matrices (those of heads) have an importance each."""
    output = matrix.outputs[numbers[0]]
    step = matrix.rows // matrix.resolved(output).matrices
    for at in range(0, rows.shape[0], step):
        moved = matrix.moved(output, first + at, first + at + step)
        taken = _picked(rows[at : at + step], first + at, moved, scratch)
        encoded = _encode(known, matrix, output, taken, scratch, (first + at) // step)
        yield pieces(matrix, numbers, moved, encoded)


def is_copied(matrix: Matrix, output: Placement) -> bool:
    """Whether the bytes of a row of the source are those of the output."""
    if output.format != matrix.source.format.encoded_as:
        return False
    resolved = matrix.resolved(output)
    moves = resolved.to is None or FORMATS[output.format].rows_per_group == 1
    stays = resolved.transposed is None and resolved.columns is None and resolved.value is None
    return moves and stays


def copied(matrix: Matrix, rows: int, raw: Raw) -> Encoded:
    """The source bytes of whole entries as encoded rows."""
    format_ = matrix.source.format
    if format_.repack is not None:
        return format_.repack(raw, rows, matrix.n)
    parts = format_.parts
    return tuple(some.reshape(-(-rows // part.rows_per_entry), -1) for part, some in zip(parts, raw, strict=True))


def rounds_first(matrix: Matrix, name: str) -> bool:
    """Whether a format takes the weights rounded to the dtype that it is for: those of codes have more places.

    llm-compressor does it in this order: FP8BlockDequantizer makes BF16, which is quantized then.
    """
    return matrix.source.format.is_coded and FORMATS[name].source_dtype == "BF16"


def _rounded(values: NDArray[np.float32], scratch: Scratch) -> NDArray[np.float32]:
    """The values rounded to BF16; one that is too large becomes infinite."""
    narrow = scratch.take("narrow", values.size * 2).view(np.uint16).reshape(values.shape)
    rounded = scratch.take("rounded", values.size * 4).view(np.float32).reshape(values.shape)
    floats_cpu.encode_bf16(values, narrow)
    floats_cpu.widen_bf16(narrow.reshape(-1), rounded.reshape(-1))
    return rounded


@dataclass(frozen=True, slots=True)
class _Rows:
    """float32[r, n] of the source, and the numbers that they have there."""

    values: NDArray[np.float32]
    numbers: Sequence[int] | NDArray[np.int64]


def _encode(
    known: Known, matrix: Matrix, output: Placement, rows: _Rows, scratch: Scratch, number_of_matrix: int = 0
) -> Encoded:
    """Encode into scratch. Raises StreamquantError if a weight or scale does not fit the format."""
    format_ = FORMATS[output.format]
    values = _prepared(matrix, output, rows, scratch)
    encoded = []
    for number, part in enumerate(format_.parts):
        entries, size = part.entries(values.shape[0]), part.bytes_per_entry(values.shape[1])
        encoded.append(scratch.take(f"encoded {number}", entries * size).reshape(entries, size))
    if format_.encode_from_amax is not None:
        overflow = format_.encode_from_amax(values, tuple(encoded), known.largest(output.amax_of))
    else:
        importance = known.plan.importance(output, number_of_matrix)
        overflow = format_.encode_into(values, tuple(encoded), importance)
    if overflow >= 0:
        column = int(abs(values[overflow]).argmax())
        raise _too_large(matrix, output, rows, (overflow, column), values[overflow, column])
    return tuple(encoded)


def _prepared(matrix: Matrix, output: Placement, rows: _Rows, scratch: Scratch) -> NDArray[np.float32]:
    """The rows as an output has them before they are encoded: other columns, other values."""
    values, resolved = rows.values, matrix.resolved(output)
    if resolved.transposed is not None:
        values = resolved.arrange(values)
    elif resolved.columns is not None:
        values = scratch.take("columns", values.nbytes).view(np.float32).reshape(values.shape)
        np.take(rows.values, resolved.columns, axis=1, out=values, mode="clip")
    if resolved.value is not None:
        values = resolved.value.apply(values)
    if rounds_first(matrix, output.format):
        values = _rounded(values, scratch)
    if values is not rows.values and not floats_cpu.all_finite(values.reshape(-1)):
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise _too_large(matrix, output, rows, (int(row), int(column)), values[row, column])
    return values


def _too_large(
    matrix: Matrix, output: Placement, rows: _Rows, at: tuple[int, int], value: np.float32
) -> StreamquantError:
    """The error for a value that its format cannot hold, at a place (row, column) of the output's rows."""
    row, column = at
    resolved = matrix.resolved(output)
    if resolved.transposed is not None:
        taken = matrix.n if resolved.columns is None else len(resolved.columns)
        unit, stored_row = divmod(row, taken)
        row, column = unit * resolved.transposed + column, stored_row
    row, column = rows.numbers[row], column if resolved.columns is None else int(resolved.columns[column])
    return StreamquantError(
        f"weight too large for {output.format}",
        where=f"{matrix.source.file}, tensor {matrix.source.name!r}, row {row}, column {column}",
        found=f"{value:g}",
        required="a magnitude whose scale or value fits into 16-bit floating point",
        hint="leave this variant out, or use gguf:BF16 or gguf:F32",
    )


def _in_order(encoded: Bytes, moved: MovedRows, scratch: Scratch) -> Bytes:
    """Encoded rows in the order of the output: whole rows move."""
    if moved.rows is None:
        return encoded
    out = scratch.take("in order", moved.rows.size * encoded.shape[1]).reshape(-1, encoded.shape[1])
    np.take(encoded, moved.rows, axis=0, out=out, mode="clip")
    return out


def pieces(matrix: Matrix, numbers: list[int], moved: MovedRows, encoded: Encoded) -> list[Piece]:
    """Where the encoded rows, in the order of the outputs that share them, belong."""
    return [piece for number in numbers for piece in _pieces(number, matrix, moved, encoded)]


def _pieces(number: int, matrix: Matrix, moved: MovedRows, encoded: Encoded) -> Iterator[Piece]:
    output = matrix.outputs[number]
    for part_number, part in enumerate(FORMATS[output.format].parts):
        region, at = output.regions[part_number], 0
        data = encoded[part_number].reshape(-1)
        for first, count in moved.runs:
            start, nbytes = place_rows(part, matrix.resolved(output).stored_n, first, first + count)
            if nbytes:
                yield Piece(number, part_number, region.file, region.offset + start, data[at : at + nbytes])
            at += nbytes


def _not_finite(matrix: Matrix, first: int, rows: NDArray[np.float32]) -> StreamquantError:
    row, column = np.argwhere(~np.isfinite(rows))[0]
    value = rows[row, column]
    source = matrix.source
    row, column = divmod((first + int(row)) * matrix.n + int(column), source.row_length)
    return StreamquantError(
        "weight is not a number" if np.isnan(value) else "weight is infinite",
        where=f"{source.file}, tensor {source.name!r}, row {row}, column {column}",
        found=str(value),
        required="finite weights",
        hint="the checkpoint is damaged; fetch this shard again or tell its publisher",
    )
