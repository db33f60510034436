"""From the bytes of a checkpoint to float32: exact for the three dtypes that models are published in."""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels import floats_cpu

SOURCE_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
"""The dtypes of weights that can be converted, as safetensors spells them -> bytes per weight."""


def widen(raw: NDArray[np.uint8], dtype: str, out: NDArray[np.float32]) -> bool:
    """Widen the little-endian bytes uint8[k * size] of `dtype` into float32[k]; every value is kept exactly.

    Returns False if any value is NaN or infinite. Raises KeyError for a dtype not in SOURCE_DTYPES.
    """
    flat = out.reshape(-1)
    if dtype == "BF16":
        return bool(floats_cpu.widen_bf16(raw.view(np.uint16), flat))
    np.copyto(flat, raw.view({"F16": np.float16, "F32": np.float32}[dtype]))
    return bool(floats_cpu.all_finite(flat))
