"""What a runtime that quantizes activations does to the input of a linear layer, by compressed-tensors' own code."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from streamquant.model.activations import E4M3_MULTIPLE, through_e4m3

if TYPE_CHECKING:
    import torch


def input_quantizer(
    arguments: Any, scales: "Mapping[str, torch.Tensor]", n: int
) -> "Callable[[torch.Tensor], torch.Tensor]":
    """Fake quantization of an input, float[batch, tokens, n] -> the same.

    `arguments` are QuantizationArgs; `scales` are the tensors `input_scale` and the like of a layer whose scales are
    static; one of 16 bits gets the dtype of the input, as transformers loads it. As forward_quantize
    (compressed_tensors/quantization/lifecycle/forward.py), which transformers runs; E4M3 on a CPU is computed by
    `through_e4m3`, which gives the same values.
    """
    import torch
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    holder = torch.nn.Module()
    holder.quantization_status = QuantizationStatus.COMPRESSED
    for local, scale in scales.items():
        setattr(holder, local, scale)
    fast = group_of_fast(arguments, n)
    narrow = {local: scale for local, scale in scales.items() if scale.dtype.itemsize == 2}

    def quantized(x: "torch.Tensor") -> "torch.Tensor":
        if fast is not None and x.device.type == "cpu" and x.dtype == torch.float32:
            return through_e4m3(x, fast(x.shape[-1]))
        for local, scale in narrow.items():
            setattr(holder, local, scale.to(x.dtype))
        return forward_quantize(holder.to(x.device), x, "input", arguments).to(x.dtype)

    return quantized


def described(arguments: Any) -> str:
    """The quantization of inputs, QuantizationArgs, for a person: "float8 per token, dynamic"."""
    given = arguments.model_dump(mode="json")
    when = {True: "dynamic", False: "static"}.get(given["dynamic"], given["dynamic"])
    group = f" of {given['group_size']}" if given["group_size"] else ""
    return f"{given['type']}{given['num_bits']} per {given['strategy']}{group}, {when}"


def group_of_fast(arguments: Any, n: int) -> Callable[[int], int] | None:
    """Row length -> values that share a scale, where `through_e4m3` computes as compressed-tensors does; else None."""
    plain = (
        arguments.type == "float"
        and arguments.num_bits == 8
        and arguments.symmetric
        and arguments.dynamic is True
        and arguments.scale_dtype is None
    )
    if plain and arguments.strategy == "token" and n % E4M3_MULTIPLE == 0:
        return lambda length: length
    size = int(arguments.group_size or 0) if plain and arguments.strategy == "group" else 0
    if size and n % size == 0 and size % E4M3_MULTIPLE == 0:
        return lambda _length: size
    return None
