"""What the kinds of variants share: bytes to tensors, blocks of rows, checks and their errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streamquant.convert.architectures import TensorRule
from streamquant.quant.errors import StreamquantError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 4 << 20
"""Stored bytes that are read and decoded at a time."""


def as_tensor(raw: NDArray[np.uint8], dtype: str, shape: Sequence[int]) -> "torch.Tensor":
    """Bytes of a safetensors dtype as a torch tensor of that dtype. Raises StreamquantError where torch has no such."""
    import torch

    names = {
        "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64",
    }  # fmt: skip
    if dtype not in names:
        raise StreamquantError("dtype cannot be decoded", found=dtype, required=", ".join(names))
    return torch.from_numpy(raw).view(getattr(torch, names[dtype])).reshape(tuple(shape))


def check_finite(block: "torch.Tensor", name: str, path: Path, first: int) -> None:
    """Raise StreamquantError, naming the row, if a decoded block holds NaN or infinity."""
    import torch

    if torch.isfinite(block.sum()):  # one pass; only a sum that overflows needs the second
        return
    bad = (~torch.isfinite(block)).nonzero()
    if len(bad):
        row = first + int(bad[0][0]) if block.ndim > 1 else 0
        raise StreamquantError(
            "a weight is NaN or infinite", where=f"{path}, tensor {name!r}, row {row}, column {int(bad[0][-1])}"
        )


def rows_per_block(row_bytes: int, multiple: int = 1) -> int:
    """Rows to read at a time: about BLOCK_BYTES of stored bytes, in multiples."""
    return max(1, BLOCK_BYTES // max(1, row_bytes) // multiple) * multiple


def missing_tensor(rule: TensorRule, path: Path, stored_name: str) -> StreamquantError:
    """The error for a tensor that is not there."""
    return StreamquantError(
        "a tensor is missing",
        where=f"{path}, tensor {stored_name!r}",
        found="no such tensor",
        required=f"shape {list(rule.shape)}",
        hint="is a file missing, or was it made for another architecture?",
    )


def wrong_shape(rule: TensorRule, path: Path, stored_name: str, shape: tuple[int, ...]) -> StreamquantError:
    """The error for a tensor of another shape than the hyperparameters demand."""
    return StreamquantError(
        "a tensor's shape does not fit the hyperparameters",
        where=f"{path}, tensor {stored_name!r}",
        found=list(shape),
        required=list(rule.shape),
    )
