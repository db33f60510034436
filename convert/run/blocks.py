"""The inner loop: read a block of rows, widen it once, encode it for every variant, write it at its addresses.

A block is small enough for the cache of a core: between the read and the writes its weights do not go back to memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamquant.convert.plan.records import BLOCK_WEIGHTS, Chunk, Matrix, Placement, Plan, place_rows
from streamquant.files.reading import read_into
from streamquant.quant.errors import StreamquantError
from streamquant.quant.format import Encoded, Importance
from streamquant.quant.formats import FORMATS
from streamquant.quant.widen import SOURCE_DTYPES, widen

Bytes = NDArray[np.uint8]


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

    def take(self, purpose: str, nbytes: int) -> Bytes:
        """uint8[nbytes], uninitialised; valid until the next `take` for the same purpose."""
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.size < nbytes:
            buffer = np.empty(nbytes, np.uint8)
            self._buffers[purpose] = buffer
        return buffer[:nbytes]


Encode = Callable[[Plan, Chunk, int, frozenset[int], Scratch], Iterator[list[Piece]]]
"""An inner loop: `encode_chunk`, or what does the same on a GPU."""


def encode_chunk(
    plan: Plan, chunk: Chunk, source: int, wanted: frozenset[int], scratch: Scratch
) -> Iterator[list[Piece]]:
    """Read a chunk from the descriptor `source` and yield its encoded pieces, block by block.

    `wanted` are the outputs (indices into Matrix.outputs) to encode. The pieces of a block are valid until the next
    is asked for. Raises StreamquantError for a NaN, an infinity, or a weight too large for a format; EOFError if the
    source is shorter than its header says.
    """
    matrix = plan.matrices[chunk.matrix]
    step = matrix.rows_within(BLOCK_WEIGHTS)
    for first in range(chunk.first, chunk.last, step):
        last = min(first + step, chunk.last)
        raw = read_rows(matrix, first, last, source, scratch)
        yield from encode_block(plan, matrix, first, raw, wanted, scratch)


def read_rows(matrix: Matrix, first: int, last: int, descriptor: int, scratch: Scratch) -> Bytes:
    """The source bytes of rows [first, last). Raises EOFError if the file ends before."""
    row_bytes = matrix.n * SOURCE_DTYPES[matrix.source.dtype]
    raw = scratch.take("raw", (last - first) * row_bytes)
    try:
        read_into(descriptor, raw, matrix.source.start + first * row_bytes)
    except OSError as error:
        raise StreamquantError(
            "cannot read a shard", where=f"{matrix.source.file}, tensor {matrix.source.name!r}", found=error.strerror
        ) from error
    return raw


def widen_rows(matrix: Matrix, first: int, raw: Bytes, scratch: Scratch) -> NDArray[np.float32]:
    """Source bytes of rows from `first` -> float32[r, n]. Raises StreamquantError for a NaN or an infinity."""
    count = raw.size // SOURCE_DTYPES[matrix.source.dtype]
    rows = scratch.take("rows", count * 4).view(np.float32).reshape(-1, matrix.n)
    if not widen(raw, matrix.source.dtype, rows):
        raise _not_finite(matrix, first, rows)
    return rows


def shared_encodings(matrix: Matrix, wanted: frozenset[int]) -> Iterator[tuple[Placement, list[int]]]:
    """Outputs that store the matrix in the same way share one encoding: the first of each, and the numbers of all."""
    groups: dict[tuple[str, int | None, tuple[str, int, int] | None], list[int]] = {}
    for number, output in enumerate(matrix.outputs):
        if number in wanted:
            groups.setdefault((output.format, output.rope_heads, output.importance), []).append(number)
    for numbers in groups.values():
        yield matrix.outputs[numbers[0]], numbers


def encode_block(
    plan: Plan, matrix: Matrix, first: int, raw: Bytes, wanted: frozenset[int], scratch: Scratch
) -> Iterator[list[Piece]]:
    """Encode the rows from `first` whose source bytes are `raw`; as `encode_chunk`."""
    rows = widen_rows(matrix, first, raw, scratch)
    for output, numbers in shared_encodings(matrix, wanted):
        if is_copied(matrix, output):
            encoded: Encoded = (raw.reshape(rows.shape[0], -1),)
        else:
            # Rows may change places, columns never do: importance fits whatever the order of the rows.
            encoded = _encode(matrix, output.format, first, rows, plan.importance(output), scratch)
            if output.rope_heads is not None:
                encoded = (_interleave(encoded[0], matrix.rows // output.rope_heads, scratch),)
        yield pieces(matrix, numbers, first, encoded)


def is_copied(matrix: Matrix, output: Placement) -> bool:
    """Whether the bytes of the source are those of the output."""
    return FORMATS[output.format].copies == matrix.source.dtype and output.rope_heads is None


def _encode(
    matrix: Matrix,
    name: str,
    first: int,
    rows: NDArray[np.float32],
    importance: Importance | None,
    scratch: Scratch,
) -> Encoded:
    """Encode into scratch. Raises StreamquantError if a weight or scale does not fit the format."""
    format_ = FORMATS[name]
    encoded = []
    for number, part in enumerate(format_.parts):
        entries, size = part.entries(rows.shape[0]), part.bytes_per_entry(matrix.n)
        encoded.append(scratch.take(f"encoded {number}", entries * size).reshape(entries, size))
    overflow = format_.encode_into(rows, tuple(encoded), importance)
    if overflow >= 0:
        column = int(abs(rows[overflow]).argmax())
        raise StreamquantError(
            f"weight too large for {name}",
            where=f"{matrix.source.file}, tensor {matrix.source.name!r}, row {first + overflow}, column {column}",
            found=f"{rows[overflow, column]:g}",
            required="a magnitude whose scale or value fits into 16-bit floating point",
            hint="leave this variant out, or use gguf:BF16 or gguf:F32",
        )
    return tuple(encoded)


def _interleave(encoded: Bytes, head_dim: int, scratch: Scratch) -> Bytes:
    """Rows of each head from Hugging Face's halves to llama.cpp's pairs: (2, d / 2) -> (d / 2, 2).

    (conversion/llama.py, LlamaModel.permute; whole rows move, so it works on encoded bytes)
    """
    rows, size = encoded.shape
    out = scratch.take("interleaved", encoded.size).reshape(rows, size)
    pairs = encoded.reshape(rows // head_dim, 2, head_dim // 2, size).swapaxes(1, 2)
    np.copyto(out.reshape(rows // head_dim, head_dim // 2, 2, size), pairs)
    return out


def pieces(matrix: Matrix, numbers: list[int], first: int, encoded: Encoded) -> list[Piece]:
    """Where the encoded rows from `first` belong in the outputs that share them."""
    return [piece for number in numbers for piece in _pieces(number, matrix.outputs[number], matrix.n, first, encoded)]


def _pieces(number: int, output: Placement, n: int, first: int, encoded: Encoded) -> Iterator[Piece]:
    for part_number, part in enumerate(FORMATS[output.format].parts):
        region = output.regions[part_number]
        start, _ = place_rows(part, n, first, first)
        yield Piece(number, part_number, region.file, region.offset + start, encoded[part_number].reshape(-1))


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
