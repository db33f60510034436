"""Which formats have a GPU encoder, and running them; torch and Triton are imported with the first use.

The bytes are those of the CPU encoders. `encode` works on tensors of a GPU, or of the CPU under Triton's interpreter
(TRITON_INTERPRET=1), which is how the tests run the kernels on machines without a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from streamquant.quant.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

ENCODED = frozenset(name for name, format_ in FORMATS.items() if format_.encode_on_gpu is not None)
"""The formats of `FORMATS` that have a GPU encoder, with and without the importance of columns."""


def missing() -> str | None:
    """Why this machine cannot encode on a GPU, for a person; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'streamquant[gpu]')"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def encode(
    name: str, rows: Tensor, parts: tuple[Tensor, ...], overflow: Tensor, importance: Tensor | None = None
) -> None:
    """Queue the encoding of float32[r, n], contiguous and finite, on the current stream of its device.

    Fills the parts, uint8[entries, bytes] as `Format.allocate` shapes them; lowers overflow, int32[1], to the first row
    whose scale or value does not fit the format. importance: float32[n] on the same device, or None. A row that is
    reported so may differ from the CPU's in bytes that mean NaN. Raises KeyError for a format not in `ENCODED`.
    """
    encoder = FORMATS[name].encode_on_gpu
    if encoder is None:
        raise KeyError(name)
    if rows.numel():
        encoder(rows, parts, overflow, importance)
