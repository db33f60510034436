"""The inner loop on a GPU: what convert/run/blocks.py does on the CPU, with the same bytes and the same errors.

A worker reads a block of rows into pinned memory; everything else is queued on a stream: the copy to the GPU, widening,
the check for NaN and infinity, all encoders, the copies back. It has two such slots, so that while the GPU copies and
computes one block, the worker reads the next and writes the last. A weight that is not finite or does not fit is seen
when the block comes back; the CPU then encodes the block again, and finds and reports the same fault. The first block
of every format is encoded by the CPU as well and compared: a GPU or compiler that rounds otherwise is found at once.

Formats without a GPU encoder are encoded by the worker, on the CPU. With the device "cpu" the same code runs on torch's
CPU tensors, without streams and pinned memory: Triton's interpreter then runs the kernels (the tests do this).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamquant.convert.architectures.tensor_view import MovedRows
from streamquant.convert.plan.records import Chunk, Matrix, Placement, Plan
from streamquant.convert.run import blocks
from streamquant.convert.run.blocks import Bytes, Descriptors, Encode, Known, Piece, Raw, Scratch
from streamquant.quant import gpu
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.format import NO_OVERFLOW
from streamquant.quant.formats import FORMATS

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
BLOCK_WEIGHTS = 4 * 1024 * 1024
"""Weights in a block: enough to fill a GPU, little enough to overlap copies with the kernels."""

_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")
_CELL = 4  # int32 between two flags: 16 bytes, the alignment that Triton compiles for


def choose_device(device: str) -> str:
    """One of DEVICES -> "cpu" or "cuda". "auto" is "cuda" where it would work.

    Raises UsageError for "cuda" on a machine that cannot, and for any other name. Imports torch only where there is a
    driver, or "cuda" was asked for.
    """
    if device not in DEVICES:
        raise UsageError("unknown device", where="--device", found=repr(device), required=", ".join(DEVICES))
    if device == "cpu" or (device == "auto" and not any(Path(path).exists() for path in _DRIVERS)):
        return "cpu"
    missing = gpu.missing()
    if missing is None:
        return "cuda"
    if device == "auto":
        return "cpu"
    raise UsageError(
        "cannot encode on a GPU",
        where="--device cuda",
        found=missing,
        required="an NVIDIA GPU, torch with CUDA, and triton",
        hint="use --device cpu: the bytes are the same",
    )


def inner_loop(device: str) -> Encode:
    """The inner loop for "cpu" or "cuda"."""
    return DeviceEncoder(device) if device == "cuda" else blocks.encode_chunk


def with_notes(plan: Plan, device: str) -> Plan:
    """The plan with notes on what the device "cuda" means for it; as it is for "cpu"."""
    if device == "cpu":
        return plan
    notes = ["on the GPU; torch, CUDA and pinned buffers come on top of the memory that is estimated"]
    if left := sorted({o.format for matrix in plan.matrices for o in matrix.outputs} - gpu.ENCODED):
        notes.append(f"without a GPU encoder, encoded by the CPU: {', '.join(left)}")
    return replace(plan, notes=(*plan.notes, *notes))


class DeviceEncoder:
    """Stands in for `blocks.encode_chunk`; every thread that calls it has slots of its own."""

    def __init__(self, device: str) -> None:
        """`device`: "cuda", or "cpu" under Triton's interpreter."""
        self._device = device
        self._local = threading.local()
        self._compared: set[tuple[str, bool]] = set()

    def __call__(
        self, known: Known, chunk: Chunk, shards: Descriptors, wanted: frozenset[int], scratch: Scratch
    ) -> Iterator[list[Piece]]:
        """Read a chunk and yield its encoded pieces, block by block, as `blocks.encode_chunk` does."""
        matrix = known.plan.matrices[chunk.matrix]
        step = matrix.rows_within(BLOCK_WEIGHTS)
        before: _Slot | None = None
        for number, first in enumerate(range(chunk.first, chunk.last, step)):
            slot = self._slots()[number % 2]
            slot.start(known, matrix, range(first, min(first + step, chunk.last)), shards, wanted)
            if before is not None:
                yield from before.finish(scratch)
            before = slot
        if before is not None:
            yield from before.finish(scratch)

    def _slots(self) -> tuple[_Slot, _Slot]:
        if not hasattr(self._local, "slots"):
            self._local.slots = (_Slot(self._device, self._compared), _Slot(self._device, self._compared))
        slots: tuple[_Slot, _Slot] = self._local.slots
        return slots


class _PinnedScratch(Scratch):
    """Buffers that a GPU can copy from and to while the CPU does something else."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._pinned = device == "cuda"
        self._tensors: dict[str, torch.Tensor] = {}

    def tensor(self, purpose: str, nbytes: int) -> torch.Tensor:
        """torch.uint8[nbytes] in host memory, uninitialised; valid until the next `take` for the same purpose."""
        import torch

        buffer = self._tensors.get(purpose)
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
            self._tensors[purpose] = buffer
        return buffer[:nbytes]

    def take(self, purpose: str, nbytes: int) -> Bytes:
        """The same as an array."""
        taken: Bytes = self.tensor(purpose, nbytes).numpy()
        return taken


@dataclass(frozen=True, slots=True)
class _Encoding:
    """Outputs of a block that share their bytes."""

    outputs: list[int]
    parts: tuple[torch.Tensor, ...] | None
    """uint8[entries, bytes] in host memory, filled when the stream gets there; None: the CPU's work."""


class _Slot:
    """One block on its way: read, copied, widened, encoded, copied back."""

    def __init__(self, device: str, compared: set[tuple[str, bool]]) -> None:
        """`compared`: the (format, with importance) whose bytes were compared with the CPU's; shared and added to."""
        import torch

        self._compared = compared
        self._host = _PinnedScratch(device)
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._known: Known
        self._matrix: Matrix
        self._rows = range(0)
        self._raw: Raw
        self._flags: torch.Tensor
        self._encodings: list[_Encoding] = []

    def start(self, known: Known, matrix: Matrix, rows: range, shards: Descriptors, wanted: frozenset[int]) -> None:
        """Read the rows and queue everything else. Raises ShortShardError, StreamquantError as `read_rows` does."""
        import torch

        self._wait()
        self._known, self._matrix, self._rows = known, matrix, rows
        self._raw = blocks.read_rows(matrix, rows, shards, self._host)
        groups = list(blocks.shared_encodings(matrix, wanted))
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            widened = self._widened(matrix)
            flags = torch.full((_CELL * (len(groups) + 1),), NO_OVERFLOW, dtype=torch.int32, device=self._device)
            flags[0] = torch.isfinite(widened).all()
            self._encodings = []
            for number, (output, outputs) in enumerate(groups):
                parts = self._encode(number, output, widened, flags[_CELL * (number + 1) :][:1])
                self._encodings.append(_Encoding(outputs, parts))
            self._flags = self._to_host("flags", flags)

    def _widened(self, matrix: Matrix) -> torch.Tensor:
        """float32[r, n] on the device. Codes are widened by the CPU, which finds those that are not finite."""
        import torch

        if matrix.source.codes is not None:
            rows = blocks.widen_rows(matrix, self._rows, self._raw, self._host)
            return torch.from_numpy(rows).to(self._device, non_blocking=True)
        raw = torch.from_numpy(self._raw[0]).to(self._device, non_blocking=True)
        return _widen(raw, matrix.source.dtype).view(-1, matrix.n)

    def _encode(
        self, number: int, output: Placement, rows: torch.Tensor, overflow: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | None:
        """Queue one encoder and the copies back. None if it is the CPU's work."""
        import torch

        is_copied, resolved = blocks.is_copied(self._matrix, output), self._matrix.resolved(output)
        if is_copied and resolved.to is None:
            return tuple(map(torch.from_numpy, blocks.copied(self._matrix, rows.shape[0], self._raw)))
        if is_copied or resolved.value is not None or output.format not in gpu.ENCODED:
            return None
        if resolved.transposed is not None or self._matrix.encodes_by_matrix(output):
            return None
        rows = self._in_order(output, rows)
        if not rows.shape[0]:
            return None
        if blocks.rounds_first(self._matrix, output.format):
            rows = rows.to(torch.bfloat16).to(torch.float32)
        r, n = rows.shape
        sizes = [(part.entries(r), part.bytes_per_entry(n)) for part in FORMATS[output.format].parts]
        parts = tuple(torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes)
        importance = self._known.plan.importance(output)
        weights = None if importance is None else torch.tensor(importance).to(self._device)
        gpu.encode(output.format, rows, parts, overflow, weights)
        return tuple(self._to_host(f"encoded {number} {index}", part) for index, part in enumerate(parts))

    def _in_order(self, output: Placement, rows: torch.Tensor) -> torch.Tensor:
        """The rows and columns of an output, in its order."""
        import torch

        resolved = self._matrix.resolved(output)
        if resolved.to is not None:
            moved = self._matrix.moved(output, self._rows.start, self._rows.stop)
            rows = rows if moved.rows is None else rows[torch.from_numpy(moved.rows).to(rows.device)]
        return rows if resolved.columns is None else rows[:, torch.tensor(resolved.columns).to(rows.device)]

    def _to_host(self, purpose: str, tensor: torch.Tensor) -> torch.Tensor:
        """Queue the copy of a tensor into host memory."""
        host = self._host.tensor(purpose, tensor.numel() * tensor.element_size())
        return host.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def finish(self, scratch: Scratch) -> Iterator[list[Piece]]:
        """Wait for the block; yield the pieces of one encoding after another. Raises what the CPU's inner loop does."""
        self._wait()
        flags = self._flags[::_CELL].tolist()
        if flags[0] == 0 or min(flags[1:], default=NO_OVERFLOW) != NO_OVERFLOW:
            self._report(scratch)
        for encoding in self._encodings:
            if encoding.parts is None:
                yield from self._on_cpu(encoding.outputs, scratch)
            else:
                encoded = tuple(part.numpy() for part in encoding.parts)
                pieces = blocks.pieces(self._matrix, encoding.outputs, self._moved(encoding.outputs[0]), encoded)
                self._compare(encoding.outputs, pieces, scratch)
                yield pieces

    def _moved(self, output: int) -> MovedRows:
        """Where the rows of the block go in an output, an index into Matrix.outputs."""
        return self._matrix.moved(self._matrix.outputs[output], self._rows.start, self._rows.stop)

    def _on_cpu(self, outputs: Iterable[int], scratch: Scratch) -> Iterator[list[Piece]]:
        return blocks.encode_block(self._known, self._matrix, self._rows, self._raw, frozenset(outputs), scratch)

    def _compare(self, outputs: list[int], pieces: list[Piece], scratch: Scratch) -> None:
        """Raise StreamquantError if the first bytes of a format are not the CPU's."""
        output = self._matrix.outputs[outputs[0]]
        key = (output.format, output.importance is not None)
        if key in self._compared:
            return
        expected = [piece for some in self._on_cpu(outputs, scratch) for piece in some]
        if any(not np.array_equal(a.data, b.data) for a, b in zip(pieces, expected, strict=True)):
            raise StreamquantError(
                f"the GPU's bytes of {output.format} are not the CPU's",
                where=f"{self._matrix.source.file}, tensor {output.source!r}, rows from {self._rows.start}",
                found="another rounding on this GPU, or a fault of it",
                hint="please report it, and use --device cpu",
            )
        self._compared.add(key)

    def _report(self, scratch: Scratch) -> None:
        """Raise the error of the CPU's inner loop for this block."""
        outputs = [number for encoding in self._encodings for number in encoding.outputs]
        for _ in self._on_cpu(outputs, scratch):
            pass
        source = self._matrix.source
        raise StreamquantError(
            "the GPU refused a weight that the CPU takes",
            where=f"{source.file}, tensor {source.name!r}, rows from {self._rows.start}",
            hint="this is a fault of the GPU or of streamquant: please report it, and use --device cpu",
        )


def _widen(raw: torch.Tensor, dtype: str) -> torch.Tensor:
    """uint8[k * size] -> float32[k]; exact."""
    import torch

    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    return raw.view(kind).to(torch.float32)
