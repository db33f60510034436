"""A tensor of a checkpoint: where its bytes are, and how they become weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from streamquant.quant.source_format import SourceFormat, plain


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A stored tensor: bytes [start, stop) of a shard."""

    name: str
    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Codes:
    """What makes weights of the codes of a tensor: a format, and the stored tensors beside the codes, in its order.

    Floats that do not lie row by row are codes too.
    """

    format: SourceFormat
    beside: tuple[StoredPart, ...]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the checkpoint: bytes [start, stop) of `file`, little endian, row-major."""

    name: str
    """In the state dict of XForCausalLM: the file may call it otherwise (convert/architectures/names.py)."""
    dtype: str
    """Of the weights: as stored, or for codes that which they have where they are stored as plain floats."""
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int
    codes: Codes | None = None
    """None: plain floats."""
    stored_name: str | None = None
    """Of the codes, where it is not that of the weights: X.weight_packed."""
    published: str | None = None
    """What FP8 folders call it, where that is not `name`: they keep the names of a multimodal model."""
    fused: str | None = None
    """The tensor of all experts of a layer that it is a part of, as `name` would be."""

    @property
    def format(self) -> SourceFormat:
        """How its bytes become weights. Raises KeyError for a dtype that holds no weights."""
        return plain(self.dtype) if self.codes is None else self.codes.format

    @property
    def module(self) -> str:
        """What a checkpoint calls the module that has it.

        >>> SourceTensor("model.layers.0.mlp.up_proj.weight", "BF16", (1, 8), "a.safetensors", 0, 16).module
        'model.layers.0.mlp.up_proj'
        """
        return (self.published or self.name).rpartition(".")[0]

    @property
    def parts(self) -> Iterator[StoredPart]:
        """What is stored for it, in the order of its format's parts: the weights or their codes first."""
        yield StoredPart(self.stored_name or self.name, self.file, self.start, self.stop)
        if self.codes is not None:
            yield from self.codes.beside

    @property
    def files(self) -> tuple[str, ...]:
        """The shards that it is read from, that of the first part first."""
        return tuple(dict.fromkeys(part.file for part in self.parts))

    def spans(self, first: int, last: int, n: int) -> Iterator[StoredPart]:
        """The bytes of every part that rows [first, last) of `n` weights need."""
        for part, stored in zip(self.format.parts, self.parts, strict=True):
            start, stop = part.span(first, last, n)
            yield StoredPart(stored.name, stored.file, stored.start + start, stored.start + stop)

    @property
    def rows(self) -> int:
        """Rows of the matrix; 1 for a vector or scalar."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_length(self) -> int:
        """Weights in a row: all of them for a vector."""
        return self.count // self.rows

    @property
    def count(self) -> int:
        """Weights in the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored for it; of what it shares with others, its share."""
        sharing = 1 if self.codes is None else self.codes.format.shared_by
        return sum(part.stop - part.start for part in self.parts) // sharing
