"""The contract of a number format: rows of float32 weights -> bytes -> rows of float32 weights.

A format is data: a frozen record and two pure functions on rows. Every format has a fixed size: the number of bytes
follows from the shape alone, so the address of every row in an output file is known before a weight is read.

Most formats store a tensor as one run of bytes. FP8 stores two tensors, the codes and their scales: such a format has
two `Part`s. Rows that share a scale (the 128 rows of a block) form a *group*; groups are encoded independently of each
other, so any run of whole groups can be encoded alone, in any order, by any worker, and gives the same bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Rows = NDArray[np.float32]
"""float32[r, n]: r rows of n weights, C-contiguous."""
Encoded = tuple[NDArray[np.uint8], ...]
"""One uint8[g, bytes] array per part of the format, C-contiguous."""
Importance = NDArray[np.float32]
"""float32[n], finite and not negative: how much an error in each column of a row counts (mean square activations)."""
GpuEncoder = Callable[["Tensor", "tuple[Tensor, ...]", "Tensor", "Tensor | None"], None]
"""(rows float32[r, n], parts uint8[g, bytes], overflow int32[1], importance float32[n] or None): queues the encoding on
the rows' device, and lowers overflow to the first row whose scale or value does not fit (quant/gpu.py)."""
WHOLE = 1 << 62
"""As the rows of an entry: all rows of the tensor."""
NO_OVERFLOW = 0x7FFFFFFF
"""What a GPU encoder's cell for the first overflowing row holds while no row has overflowed."""


@dataclass(frozen=True, slots=True)
class StoredType:
    """What is known of a type of weights in a file, whoever wrote it. Some are read that are not made here."""

    name: str
    """As the container spells it: a GGML type ("Q8_0") or a safetensors dtype ("F8_E4M3")."""
    dot_type: str | None = None
    """The type that llama.cpp's CPU backend quantizes the other factor of a dot product to (vec_dot_type of
    ggml/src/ggml-cpu/ggml-cpu.c; Q8_1 is Q8_0 and a sum); None: it takes that as it is."""
    least_sqnr: float = 0.0
    """Decibels: a tensor with less is not the original's. Normal weights have 8 to 15 more; rows in another order have
    -3 in all."""
    worst_block: float = math.inf
    """The largest relative error of 32 neighbouring weights that the type can explain."""
    needs_importance: bool = False
    """Whether weights are garbage in it without an importance matrix (tensor_requires_imatrix of llama-quantize)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor that a format makes of a tensor of weights.

    The tensor is stored as `ceil(rows / rows_per_entry)` entries of `bytes_per_entry(n)` bytes, one after another.
    """

    suffix: str
    """Appended to the tensor's name: "" for the weights, "_scale" for their scales."""
    stored_as: str
    """The dtype as the container spells it: a GGML type name ("Q8_0") or a safetensors dtype ("F8_E4M3")."""
    rows_per_entry: int
    """Rows of weights that one entry covers; WHOLE: all."""
    bytes_per_entry: Callable[[int], int]
    """Row length n in weights -> bytes of one entry."""
    stored_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Shape of the weights (torch order) -> shape of this part as the container states it (torch order)."""
    content: Callable[[tuple[int, ...]], bytes] | None = None
    """Shape of the weights -> the bytes of a part that follows from it; None: they follow from the weights."""

    def entries(self, rows: int) -> int:
        """How many entries `rows` rows of weights take."""
        return 1 if self.rows_per_entry == WHOLE else -(-rows // self.rows_per_entry)

    def nbytes(self, rows: int, n: int) -> int:
        """Bytes that this part of a tensor of `rows` rows of `n` weights takes."""
        return self.entries(rows) * self.bytes_per_entry(n)


@dataclass(frozen=True, slots=True)
class Format:
    """A number format. Instances live in `quant.formats.FORMATS`; the shared checks of tests/quant run on each."""

    name: str
    stored: StoredType
    """The type of its weights; its name is that of the first part's `stored_as`."""
    weights_per_block: int
    """Weights that share a scale along a row; the row length must be a multiple of it unless `pads_rows`."""
    rows_per_group: int
    """Rows that share a scale: 1, or 128 for the 128x128 blocks of FP8."""
    parts: tuple[Part, ...]
    encode_into: Callable[[Rows, Encoded, Importance | None], int]
    """The encoder: fills the arrays of the parts; returns the first row whose scale or value does not fit in the
    format (it is stored as infinity, as the reference does), or -1. Assumes finite rows. Without importance some
    formats run another search than with importances that are all equal, as their reference does."""
    decode_from: Callable[[Encoded, int], Rows]
    """Encoded parts and the row length n -> float32[r, n]."""
    pads_rows: bool = False
    """True where a row may end in an incomplete block."""
    uses_importance: bool = False
    """Whether the importance of columns changes the bytes; other formats ignore it."""
    source_dtype: str | None = None
    """The dtype of the weights' source that the format is for (its scales have it); None: any."""
    copies: str | None = None
    """The dtype of a source whose bytes are those of this format, so that they can be copied."""
    encode_on_gpu: GpuEncoder | None = None
    """The same encoder on a GPU, where there is one: the bytes are those of `encode_into`."""
    encode_from_amax: Callable[[Rows, Encoded, float], int] | None = None
    """The encoder of a format with a scale for the whole tensor: as `encode_into`, and given the largest magnitude of
    the tensor, or of those that share its scale. `encode_into` takes that of its rows, as if they were all."""
    shares_amax: bool = False
    """Whether tensors that runtimes merge into one share that scale; else each has its own."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of the weights in whole blocks, without scales that are a tensor of their own."""
        return 8 * self.parts[0].bytes_per_entry(self.weights_per_block) / self.weights_per_block

    def fits(self, n: int) -> bool:
        """Whether rows of `n` weights can be stored in this format."""
        return self.pads_rows or n % self.weights_per_block == 0

    def nbytes(self, rows: int, n: int) -> int:
        """Bytes of all parts of a tensor of `rows` rows of `n` weights."""
        return sum(part.nbytes(rows, n) for part in self.parts)

    def allocate(self, rows: int, n: int) -> Encoded:
        """Uninitialised arrays for `encode_into`: one uint8[entries, bytes] per part.

        Raises ValueError if rows of `n` weights do not fit the format.
        """
        if not self.fits(n):
            raise ValueError(f"row length {n} is not a multiple of the {self.name} block size {self.weights_per_block}")
        return tuple(np.empty((part.entries(rows), part.bytes_per_entry(n)), np.uint8) for part in self.parts)

    def encode(self, rows: Rows, importance: Importance | None = None) -> Encoded:
        """float32[r, n], float32[n] or None -> one uint8[entries, bytes] per part. Both must be finite.

        A format with a scale for the whole tensor takes the rows for all that there are.

        Raises ValueError for another dtype or shape, or a row length that does not fit the format.
        """
        if rows.ndim != 2 or rows.dtype != np.float32:
            raise ValueError(f"{self.name} encodes float32[rows, n], not {rows.dtype}{list(rows.shape)}")
        if importance is not None:
            if importance.shape != rows.shape[1:] or importance.dtype != np.float32:
                found = f"{importance.dtype}{list(importance.shape)}"
                raise ValueError(f"the importance of {rows.shape[1]} columns is float32[{rows.shape[1]}], not {found}")
            importance = np.ascontiguousarray(importance)
        out = self.allocate(*rows.shape)
        self.encode_into(np.ascontiguousarray(rows), out, importance)
        return out

    def decode(self, encoded: Encoded, n: int) -> Rows:
        """The inverse of `encode`: the parts of r rows of `n` weights -> float32[r, n]."""
        return self.decode_from(encoded, n)


def same_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of a part that keeps the shape of the weights."""
    return shape
