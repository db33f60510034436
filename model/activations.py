"""What llama.cpp's CPU backend does to the input of a matrix: it is quantized to the type that the dot product wants.

The type is ggml's vec_dot_type of the weight's type (ggml/src/ggml-cpu/ggml-cpu.c): Q8_0 (blocks of 32, an FP16
scale) beside the legacy types, Q8_K (blocks of 256, an FP32 scale) beside K- and IQ-quants, BF16 and F16 beside
themselves. CUDA does much the same with blocks of 32. For an 8-bit file this is most of what is lost.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamquant.model.row_slices import in_parts
from streamquant.quant.kernels.bits import bits_float, helper, kernel
from streamquant.quant.kernels.legacy_cpu import amax, magnitudes
from streamquant.quant.kernels.vectors import LANES, absolute, any_lane, fill, fill_int, largest, load, select, store

if TYPE_CHECKING:
    import torch

DOT_TYPES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "Q4_1", "Q5_1"), "Q8_0"),  # Q8_1 is Q8_0 and a sum
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "IQ4_XS"), "Q8_K"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "Q8_K"),
    "BF16": "BF16", "F16": "F16",
}  # fmt: skip
"""Type of the weights -> type of the inputs; F32 weights take them as they are."""

E4M3_MULTIPLE = LANES
"""Of values that share a scale in `through_e4m3`."""
MAGIC = 12582912
"""Adding and subtracting 1.5 * 2^23 rounds a float32 to the nearest even integer."""
Floats = NDArray[np.float32]
Lanes = Any
Quantizer = Callable[["torch.Tensor"], "torch.Tensor"]


def through_bf16(x: "torch.Tensor") -> "torch.Tensor":
    """Round to BF16."""
    return x.bfloat16().to(x.dtype)


def through_f16(x: "torch.Tensor") -> "torch.Tensor":
    """Round to FP16."""
    return x.half().to(x.dtype)


def through_q8_0(x: "torch.Tensor") -> "torch.Tensor":
    """Quantize to Q8_0 and back, float[..., n], n a multiple of 32 (quantize_row_q8_0 of ggml)."""
    import torch

    if _on_cpu(x):
        return _by_kernel(x, 32, _q8_0)
    blocks = x.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((blocks * inverse).round() * scale.half().float()).flatten(-2).to(x.dtype)


def through_q8_k(x: "torch.Tensor") -> "torch.Tensor":
    """Quantize to Q8_K and back, float[..., n], n a multiple of 256 (quantize_row_q8_K of ggml)."""
    import torch

    if _on_cpu(x):
        return _by_kernel(x, 256, _q8_k)
    blocks = x.float().unflatten(-1, (-1, 256))
    most = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(most != 0, -127 / most, 0)
    codes = (blocks * inverse).round().clamp_max(127)
    return torch.where(most != 0, codes / inverse, 0).flatten(-2).to(x.dtype)


QUANTIZERS: dict[str, Quantizer] = {
    "BF16": through_bf16,
    "F16": through_f16,
    "Q8_0": through_q8_0,
    "Q8_K": through_q8_k,
}


def _on_cpu(x: "torch.Tensor") -> bool:
    return bool(x.device.type == "cpu")


def _by_kernel(x: "torch.Tensor", group: int, kernel: Any, *arguments: int) -> "torch.Tensor":
    """kernel(values, room for the result, *arguments) on all threads; values come in whole groups of 16 and more."""
    import torch

    flat = x.float().contiguous().reshape(-1)
    out = torch.empty_like(flat)
    values, results = flat.numpy(), out.numpy()
    in_parts(len(values), lambda part: kernel(values[part], results[part], *arguments), group)
    return out.reshape(x.shape).to(x.dtype)


@helper
def _largest(x: Floats, at: int, count: int) -> np.float32:
    """The largest magnitude of x[at : at + count], a multiple of 16; NaN is above all."""
    most = fill_int(np.int32(0))
    for i in range(at, at + count, LANES):
        found = magnitudes(load(x, i))
        most = select(found > most, found, most)
    return np.float32(bits_float(np.uint32(largest(most))))


@kernel
def _q8_0(x: Floats, out: Floats) -> None:
    magic = fill(np.float32(MAGIC))
    for at in range(0, x.shape[0], 32):
        a, b = load(x, at), load(x, at + LANES)
        scale = np.float32(amax(a, b) / np.float32(127))
        inverse = fill(np.float32(1) / scale if scale > 0 else np.float32(0))
        half = fill(_through_half(scale))
        store(out, at, ((a * inverse + magic) - magic) * half)
        store(out, at + LANES, ((b * inverse + magic) - magic) * half)


@kernel
def _q8_k(x: Floats, out: Floats) -> None:
    magic, top = fill(np.float32(MAGIC)), fill(np.float32(127))
    for at in range(0, x.shape[0], 256):
        most = _largest(x, at, 256)
        signed = _first_of(x, at, 256, most)
        inverse = np.float32(-127) / signed if most > 0 else np.float32(0)
        scale = fill(np.float32(1) / inverse if most > 0 else np.float32(0))
        for i in range(at, at + 256, LANES):
            code = (load(x, i) * fill(inverse) + magic) - magic
            store(out, i, select(code > top, top, code) * scale)


@helper
def _first_of(x: Floats, at: int, count: int, magnitude: np.float32) -> np.float32:
    """The first value of a magnitude, with its sign."""
    for i in range(at, at + count, LANES):
        if any_lane(absolute(load(x, i)) == fill(magnitude)):
            for lane in range(LANES):
                if abs(x[i + lane]) == magnitude:
                    return np.float32(x[i + lane])
    return np.float32(0)


@helper
def _through_half(x: np.float32) -> np.float32:
    """A number of at least 0, rounded to FP16's 11 bits; below 2^-14 to multiples of 2^-24."""
    if x < np.float32(6.103515625e-05):
        step = np.float32(16777216)
        return np.float32(np.rint(x * step)) / step
    split = np.float32(8193) * x  # Dekker's splitting keeps the upper 24 - 13 bits
    return split - (split - x)


def through_e4m3(x: "torch.Tensor", group: int) -> "torch.Tensor":
    """Quantize float32[..., n] on the CPU to E4M3 and back, with a scale for each `group` values, a multiple of
    E4M3_MULTIPLE; n is a multiple of it.

    The operations of compressed-tensors' dynamic, symmetric quantization in float32, in their order, at 20 times the
    speed of torch's conversion to float8: scale = amax / 448 (or eps), clamp(x / scale, -448, 448) to the nearest even
    code, times scale (calculate_qparams and _quantize_dequantize there).
    """
    return _by_kernel(x, group, _e4m3, group)


@kernel
def _e4m3(x: Floats, out: Floats, group: int) -> None:
    most, least, smallest = np.float32(448), np.float32(-448), fill(np.float32(2.0**-6))
    # adding and subtracting 1.5 * 2^23 units of the last place of a subnormal, 2^-9, rounds to multiples of it
    magic = fill(np.float32(1.5 * 2.0**14))
    for at in range(0, x.shape[0], group):
        quotient = np.float32(_largest(x, at, group) / most)
        scale = fill(quotient if quotient > 0 else np.float32(2.0**-23))
        for i in range(at, at + group, LANES):
            value = load(x, i) / scale
            value = select(value < fill(least), fill(least), value)
            value = select(value > fill(most), fill(most), value)
            # Dekker's splitting keeps the upper 24 - 20 bits, ties to even
            split = fill(np.float32(1048577)) * value
            normal, subnormal = split - (split - value), (value + magic) - magic
            store(out, i, select(absolute(value) < smallest, subnormal, normal) * scale)
