"""What llama.cpp's CPU backend does to the input of a matrix: it is quantized to the type that the dot product wants.

The type is ggml's vec_dot_type of the weight's type, `StoredType.dot_type` in quant/format.py: Q8_0 (blocks of 32, an
FP16 scale) beside the legacy types, Q8_K (blocks of 256, an FP32 scale) beside K- and IQ-quants, BF16 and F16 beside
themselves. CUDA does much the same with blocks of 32. For an 8-bit file this is most of what is lost.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streamquant.model.row_slices import for_each_slice
from streamquant.quant.kernels import activations_cpu
from streamquant.quant.kernels.vectors import LANES

if TYPE_CHECKING:
    import torch

E4M3_MULTIPLE = LANES
"""Of values that share a scale in `through_e4m3`."""
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
        return _by_kernel(x, 32, activations_cpu.q8_0)
    blocks = x.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((blocks * inverse).round() * scale.half().float()).flatten(-2).to(x.dtype)


def through_q8_k(x: "torch.Tensor") -> "torch.Tensor":
    """Quantize to Q8_K and back, float[..., n], n a multiple of 256 (quantize_row_q8_K of ggml)."""
    import torch

    if _on_cpu(x):
        return _by_kernel(x, 256, activations_cpu.q8_k)
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
"""By the type of the inputs."""


def _on_cpu(x: "torch.Tensor") -> bool:
    return bool(x.device.type == "cpu")


def _by_kernel(x: "torch.Tensor", group: int, kernel: Any, *arguments: int) -> "torch.Tensor":
    """kernel(values, room for the result, *arguments) on all threads; values come in whole groups of 16 and more."""
    import torch

    flat = x.float().contiguous().reshape(-1)
    out = torch.empty_like(flat)
    values, results = flat.numpy(), out.numpy()
    for_each_slice(len(values), lambda part: kernel(values[part], results[part], *arguments), group)
    return out.reshape(x.shape).to(x.dtype)


def through_e4m3(x: "torch.Tensor", group: int) -> "torch.Tensor":
    """Quantize float32[..., n] on the CPU to E4M3 and back, with a scale for each `group` values, a multiple of
    E4M3_MULTIPLE; n is a multiple of it.

    The operations of compressed-tensors' dynamic, symmetric quantization in float32, in their order, at 20 times the
    speed of torch's conversion to float8: scale = amax / 448 (or eps), clamp(x / scale, -448, 448) to the nearest even
    code, times scale (calculate_qparams and _quantize_dequantize there).
    """
    return _by_kernel(x, group, activations_cpu.e4m3, group)
