"""CPU kernel that widens the packed INT4 of compressed-tensors."""

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.kernels.bits import kernel


@kernel
def decode(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32],
    group: int,
    out: NDArray[np.float32],
) -> None:
    """uint8[r, n / 2], the low 4 bits first, scales and zero points float32[r, ceil(n / group)] -> float32[r, n].

    The value is (code - zero point) * scale; the difference is exact, the product is rounded once.
    """
    r, n = out.shape
    for i in range(r):
        for tile in range(scales.shape[1]):
            start, stop = tile * group, min((tile + 1) * group, n)
            scale, zero = scales[i, tile], zeros[i, tile]
            for j in range(start, stop):
                code = (packed[i, j >> 1] >> np.uint8(4 * (j & 1))) & np.uint8(15)
                out[i, j] = np.float32(np.float32(code) - zero) * scale
