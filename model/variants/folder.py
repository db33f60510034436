"""What variants that are a folder of safetensors share."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streamquant.convert.architectures import describe, family_of, text_config
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.tensor import SourceTensor
from streamquant.files.reading import read_bytes
from streamquant.model.problem import Problem
from streamquant.model.variants.decoding import BLOCK_BYTES, as_tensor, check_finite, rows_per_block
from streamquant.model.variants.variant import EMBEDDINGS, HEAD, Variant

if TYPE_CHECKING:
    import torch


QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where config.json says how the weights are quantized, the first first; the second is llm-compressor's of 2024, which
vLLM reads and transformers does not (vllm/config/model.py, _verify_quantization)."""


class FolderVariant(Variant):
    """A folder of safetensors: plain floats, or what a quantization_config explains."""

    is_folder = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.folder
        self.files = tuple(checkpoint.folder / file.name for file in checkpoint.files)
        config = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION_KEYS}
        family = family_of(config)
        self.config = config if family is None else text_config(family, config)
        self.description = describe(self.config)
        self.problems = []
        self._tied: bool | None = None

    @property
    def label(self) -> str:
        """See Variant.label: the name by which the folder was given."""
        return self.checkpoint.name

    def _ties_head(self) -> bool:
        # transformers ties them if the config says so, unless the two tensors differ; then llama.cpp's way is its way.
        if self._tied is None:
            self._tied = self.description.tied_embeddings and self._same_bytes(HEAD, EMBEDDINGS)
        return self._tied

    def _same_bytes(self, one: str, other: str) -> bool:
        a, b = (self.checkpoint.tensors.get(name) for name in (one, other))
        if a is None or b is None or (a.dtype, a.shape, a.codes, b.codes) != (b.dtype, b.shape, None, None):
            return False
        return all(
            np.array_equal(self._bytes(a, at, min(at + BLOCK_BYTES, a.stop - a.start)),
                           self._bytes(b, at, min(at + BLOCK_BYTES, a.stop - a.start)))
            for at in range(0, a.stop - a.start, BLOCK_BYTES)
        )  # fmt: skip

    def _bytes(self, tensor: SourceTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of a tensor's data."""
        return read_bytes(self.checkpoint.folder / tensor.file, tensor.start + start, tensor.start + stop)

    def _stored_rows(self, tensor: SourceTensor, first: int, last: int) -> "torch.Tensor":
        """Rows [first, last) of a tensor as they are stored; the first dimension counts, also of a vector."""
        row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
        return as_tensor(
            self._bytes(tensor, first * row_bytes, last * row_bytes), tensor.dtype, (last - first, *tensor.shape[1:])
        )

    def _float_rows(self, tensor: SourceTensor, first: int, last: int) -> "torch.Tensor":
        """float32 rows [first, last) of a tensor of weights, codes widened (quant/source_format.py)."""
        if tensor.codes is None:
            return self._stored_rows(tensor, first, last).float()
        if len(tensor.shape) == 1:
            return self._widened(tensor, 0, 1)[0][first:last]
        return self._widened(tensor, first, last)

    def _widened(self, tensor: SourceTensor, first: int, last: int) -> "torch.Tensor":
        """float32 rows of a matrix, or of a vector, which is one row, by its format."""
        import torch

        spans = tensor.spans(first, last, tensor.row_length)
        raw = tuple(read_bytes(self.checkpoint.folder / span.file, span.start, span.stop) for span in spans)
        rows = np.empty((last - first, tensor.row_length), np.float32)
        tensor.format.widen_into(raw, first, rows)
        return torch.from_numpy(rows)

    def _whole(self, tensor: SourceTensor) -> "torch.Tensor":
        return as_tensor(self._bytes(tensor, 0, tensor.stop - tensor.start), tensor.dtype, tensor.shape)

    def _float_blocks(self, tensor: SourceTensor) -> "Iterator[tuple[int, torch.Tensor]]":
        """A tensor that is stored in some float dtype, its values as they are."""
        rows = tensor.shape[0]
        by_rows = len(tensor.shape) > 1 and (tensor.codes is None or tensor.format.parts[0].rows_per_entry == 1)
        step = rows_per_block((tensor.stop - tensor.start) // rows) if by_rows else rows
        for first in range(0, rows, step):
            block = self._float_rows(tensor, first, min(first + step, rows))
            check_finite(block, tensor.name, self.path / tensor.file, first)
            yield first, block

    def _note_unexplained(self, known: set[str]) -> None:
        for name in self.checkpoint.tensors:
            if name not in known and not self.description.is_ignored(name):
                self.problems.append(
                    Problem(
                        "unknown-tensor",
                        "error",
                        "a tensor that no runtime reads",
                        where=f"{self.checkpoint.tensors[name].file}, tensor {name!r}",
                        found=f"{self.checkpoint.tensors[name].dtype} {list(self.checkpoint.tensors[name].shape)}",
                        required=f"a tensor of {self.description.hf_architecture}, or of its quantization_config",
                    )
                )
