"""Which formats have a GPU encoder, and running them; torch and Triton are imported with the first use.

The bytes are those of the CPU encoders. `encode` works on tensors of a GPU, or of the CPU under Triton's interpreter
(TRITON_INTERPRET=1), which is how the tests run the kernels on machines without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from streamquant.quant.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

NO_OVERFLOW = 0x7FFFFFFF
"""What the cell for the first overflowing row holds while no row has overflowed."""
KQUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
LEGACY = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
IQ4 = ("IQ4_NL", "IQ4_XS")
FLOATS = ("F32", "F16", "BF16")
FP8 = tuple(name for name in FORMATS if name.startswith("FP8_"))
ENCODED = frozenset((*KQUANTS, *LEGACY, *IQ4, *FLOATS, *FP8))
"""The formats of `FORMATS` that have a GPU encoder, with and without the importance of columns."""

Encoder = Callable[["Tensor", "tuple[Tensor, ...]", "Tensor", "Tensor | None"], None]
"""As `encode` without the name."""


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
    if rows.numel():
        _encoders()[name](rows, parts, overflow, importance)


@functools.cache
def _encoders() -> dict[str, Encoder]:
    from streamquant.quant.kernels import fp8_cpu, fp8_gpu, iq4_gpu, kquants_gpu, legacy_gpu

    def block_encoder(module: ModuleType, name: str) -> Encoder:
        function = getattr(module, f"encode_{name.lower()}")
        return lambda rows, parts, overflow, importance: function(rows, parts[0], overflow, importance)

    def fp8_encoder(name: str) -> Encoder:
        _, kind, dtype = name.split("_")
        function = fp8_gpu.encode_channel if kind == "CHANNEL" else fp8_gpu.encode_tiles
        number = {"BF16": fp8_cpu.BF16, "F16": fp8_cpu.F16, "F32": fp8_cpu.F32}[dtype]
        return lambda rows, parts, _overflow, _importance: function(rows, parts[0], parts[1], number)

    families = ((kquants_gpu, KQUANTS), (legacy_gpu, LEGACY), (iq4_gpu, IQ4))
    encoders = {name: block_encoder(module, name) for module, names in families for name in names}
    encoders |= {name: fp8_encoder(name) for name in FP8}
    return encoders | {name: functools.partial(_encode_float, name) for name in FLOATS}


def _encode_float(
    name: str, rows: Tensor, parts: tuple[Tensor, ...], overflow: Tensor, _importance: Tensor | None
) -> None:
    """F32, F16, BF16: torch rounds to nearest, ties to even, and overflows to infinity."""
    import torch

    narrow = rows.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name])
    parts[0].copy_(narrow.view(torch.uint8))
    if name != "F32":
        lost = torch.isinf(narrow).any(dim=1)
        row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        torch.minimum(overflow, torch.where(lost, row, NO_OVERFLOW).min(), out=overflow)
