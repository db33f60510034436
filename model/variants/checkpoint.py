"""A checkpoint folder as a variant: plain floats, or codes with scales that are no more than a way to store floats."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.model.variants.decoding import check_finite, rows_per_block, wrong_shape
from streamquant.model.variants.folder import FolderVariant
from streamquant.model.variants.variant import Kind, VariantTensor
from streamquant.quant.errors import StreamquantError

if TYPE_CHECKING:
    import torch


class CheckpointVariant(FolderVariant):
    """A folder of BF16, F16 or F32 safetensors, or a quantized source of `convert` (convert/source/quantized.py)."""

    kind: Kind = "checkpoint"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.tensors = {}
        self.description.check_complete(checkpoint.tensors, str(self.path))
        for rule in self.description.rules.values():
            tensor = checkpoint.tensors.get(rule.hf_name)
            if tensor is not None:
                if tensor.shape != rule.shape:
                    raise wrong_shape(rule, self.path / tensor.file, rule.hf_name, tensor.shape)
                if tensor.dtype not in ("BF16", "F16", "F32"):
                    raise StreamquantError(
                        "a quantized tensor in a checkpoint without quantization_config",
                        where=f"{self.path / tensor.file}, tensor {tensor.name!r}",
                        found=tensor.dtype,
                        required="BF16, F16 or F32",
                        hint="quantized folders need quant_method compressed-tensors, fp8, modelopt (FP8) or mxfp4",
                    )
                self.tensors[rule.hf_name] = VariantTensor(
                    rule.hf_name, tensor.format.parts[0].dtype, tensor.shape, tensor.nbytes
                )
        self._note_unexplained(set(self.tensors))

    def check_explained(self) -> None:
        """Raise StreamquantError for a tensor that config.json does not explain, as a plan of the checkpoint does."""
        shapes = {name: tensor.shape for name, tensor in self.checkpoint.tensors.items()}
        self.description.match(shapes, str(self.path))

    def blocks(self, name: str) -> "Iterator[tuple[int, torch.Tensor]]":
        """See Variant.blocks."""
        return self._float_blocks(self.checkpoint.tensors[name])

    def slice(self, name: str, first: int, last: int) -> "torch.Tensor":
        """See Variant.slice."""
        return self._float_rows(self.checkpoint.tensors[name], first, last)

    def read(
        self, name: str, dtype: "torch.dtype", on_block: "Callable[[int, torch.Tensor], None] | None" = None
    ) -> "torch.Tensor":
        """See Variant.read; without a detour over float32."""
        import torch

        tensor = self.checkpoint.tensors[name]
        if on_block is not None or tensor.codes is not None:
            return super().read(name, dtype, on_block)
        whole = torch.empty(tensor.shape, dtype=dtype)
        step = rows_per_block((tensor.stop - tensor.start) // tensor.shape[0])
        for first in range(0, tensor.shape[0], step):
            last = min(first + step, tensor.shape[0])
            whole[first:last] = self._stored_rows(tensor, first, last)
            check_finite(whole[first:last], name, self.path / tensor.file, first)
        return whole

    def rows(self, name: str, ids: Sequence[int]) -> "torch.Tensor":
        """See Variant.rows."""
        import torch

        tensor = self.checkpoint.tensors[name]
        return torch.cat([self._float_rows(tensor, number, number + 1) for number in ids])
