"""Scales that have the dtype of the source weights: bytes of BF16, F16 or F32."""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels import rounding_cpu
from streamquant.quant.widen import SOURCE_DTYPES, widen

DTYPES = {"BF16": rounding_cpu.BF16, "F16": rounding_cpu.F16, "F32": rounding_cpu.F32}
"""As kernels call the dtype of the source weights."""


def store_scales(scales: NDArray[np.float32], dtype: str, out: NDArray[np.uint8]) -> None:
    """Narrow the scales, which are values of `dtype` already, into the bytes of `dtype`."""
    flat = np.ascontiguousarray(scales).reshape(-1)
    if dtype == "BF16":
        narrow: NDArray[np.generic] = (flat.view(np.uint32) >> 16).astype(np.uint16)
    else:
        narrow = flat.astype(np.float16 if dtype == "F16" else np.float32)
    out[:] = narrow.view(np.uint8).reshape(out.shape)


def load_scales(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """uint8[entries, bytes] -> float32[entries, scales per entry]."""
    scales = np.empty((raw.shape[0], raw.shape[1] // SOURCE_DTYPES[dtype]), np.float32)
    widen(np.ascontiguousarray(raw).reshape(-1), dtype, scales)
    return scales
