"""How far a variant's weights are from the original's, tensor by tensor, measured while they are decoded."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numba import njit
from numpy.typing import NDArray

from streamquant.model.errors import errors_of
from streamquant.model.problem import Problem
from streamquant.model.variants.variant import Variant, VariantTensor
from streamquant.quant.formats import stored_type
from streamquant.validate.readback.sqnr import Noise

if TYPE_CHECKING:
    import torch

BLOCK = 32
"""Weights in the blocks whose errors are looked at: ggml's smallest."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """The error of one tensor against the original's."""

    name: str
    stored_as: str
    shape: tuple[int, ...]
    nbytes: int
    sqnr_db: float | None
    """Signal to quantization noise in decibels; None where nothing was lost."""
    max_error: float
    """Largest magnitude of an error, in the unit of the weights."""
    rms_error: float
    worst_block: float
    """Largest |error| / |weights| (Euclidean) of 32 neighbours in a row, where those have at least a fifth of the
    tensor's root mean square. A wrong scale shows here, if it is that of one block."""


@dataclass(slots=True)
class _Sums:
    noise: Noise = field(default_factory=Noise)
    worst: float = 0.0


class WeightErrors:
    """Adds up the errors of a variant's tensors; `observe` is a Lane.on_weight."""

    def __init__(self, original: Variant, variant: Variant) -> None:
        self.original, self.variant = original, variant
        self._sums: dict[str, _Sums] = {}

    def observe(self, name: str, first: int, block: "torch.Tensor") -> None:
        """Add float32 rows of a tensor. The original's rows are read again: from the page cache, shortly after they
        were read for the layer."""
        if name not in self.original.tensors:
            return
        with errors_of(self.original):
            source = self.original.slice(name, first, first + len(block))
        if source.shape != block.shape:
            return
        sums = self._sums.setdefault(name, _Sums())
        n = block.shape[-1]
        size = BLOCK if n % BLOCK == 0 else n
        signal, noise = np.empty(block.numel() // size), np.empty(block.numel() // size)
        largest = block_sums(
            source.contiguous().reshape(-1).numpy(), block.contiguous().reshape(-1).numpy(), size, signal, noise
        )
        sums.noise.signal += float(signal.sum())
        sums.noise.noise += float(noise.sum())
        sums.noise.count += block.numel()
        sums.noise.max_error = max(sums.noise.max_error, float(largest))
        large = (signal >= signal.mean() * 0.04) & (signal > 0)
        if large.any():
            sums.worst = max(sums.worst, math.sqrt(float((noise[large] / signal[large]).max())))
        elif noise.any():
            sums.worst = math.inf

    def finish(self) -> tuple[TensorError, ...]:
        """Measure what was not decoded for a layer (untied embeddings, the final norm); all tensors in their order."""
        for name in self.variant.tensors:
            if name not in self._sums:
                with errors_of(self.variant):
                    for first, block in self.variant.blocks(name):
                        self.observe(name, first, block)
        return tuple(
            _tensor_error(tensor, self._sums[name])
            for name, tensor in self.variant.tensors.items()
            if name in self._sums
        )


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def block_sums(
    source: NDArray[np.float32],
    decoded: NDArray[np.float32],
    size: int,
    signal: NDArray[np.float64],
    noise: NDArray[np.float64],
) -> np.float32:
    """Fill the sums of squares of the source and of the error of each `size` values; return the largest error."""
    largest = np.float32(0)
    for block in range(signal.shape[0]):
        squares, errors = 0.0, 0.0
        for at in range(block * size, (block + 1) * size):
            error = source[at] - decoded[at]
            squares += np.float64(source[at]) * np.float64(source[at])
            errors += np.float64(error) * np.float64(error)
            largest = max(largest, abs(error))
        signal[block] = squares
        noise[block] = errors
    return largest


def _tensor_error(tensor: VariantTensor, sums: _Sums) -> TensorError:
    noise = sums.noise
    return TensorError(
        tensor.name,
        tensor.stored_as,
        tensor.shape,
        tensor.nbytes,
        noise.sqnr_db if math.isfinite(noise.sqnr_db) else None if noise.noise == 0 else -999.0,
        noise.max_error,
        noise.rms_error,
        sums.worst,
    )


def doubtful_tensors(errors: tuple[TensorError, ...]) -> list[Problem]:
    """A problem for each tensor that is further from the original than its type can explain."""
    problems = []
    for error in errors:
        limits = stored_type(error.stored_as)
        where = f"tensor {error.name!r}, {error.stored_as}"
        if error.sqnr_db is not None and error.sqnr_db < limits.least_sqnr:
            problems.append(
                Problem(
                    "tensor",
                    "error",
                    "a tensor is not the original's: wrong rows, scale or tensor",
                    where=where,
                    found=f"{error.sqnr_db:.1f} dB",
                    required=f"at least {limits.least_sqnr:g} dB",
                )
            )
        elif error.worst_block > limits.worst_block:
            problems.append(
                Problem(
                    "block",
                    "error",
                    "a block of weights is not the original's: a wrong scale, or damaged bytes",
                    where=where,
                    found=f"an error of {100 * error.worst_block:.0f}% in 32 weights",
                    required=f"at most {100 * limits.worst_block:.0f}%",
                )
            )
    return problems
