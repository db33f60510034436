"""Signal to quantization noise: how far a variant's weights are from the source's."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Noise:
    """Sums over weights, added up block by block in float64.

    >>> noise = Noise()
    >>> noise.add(np.array([[3.0, 4.0]], np.float32), np.array([[3.0, 3.5]], np.float32))
    >>> round(noise.sqnr_db, 2), noise.max_error
    (20.0, 0.5)
    """

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0
    max_error: float = 0.0

    def add(self, source: NDArray[np.float32], decoded: NDArray[np.float32]) -> None:
        """Add float32[r, n] of the source and what the variant holds in its place."""
        error = (source - decoded).reshape(-1)
        flat = source.reshape(-1)
        self.signal += float(np.dot(flat.astype(np.float64), flat))
        self.noise += float(np.dot(error.astype(np.float64), error))
        self.max_error = max(self.max_error, float(abs(error).max(initial=0)))
        self.count += flat.size

    def merge(self, other: "Noise") -> None:
        """Add the sums of another part of the model."""
        self.signal += other.signal
        self.noise += other.noise
        self.count += other.count
        self.max_error = max(self.max_error, other.max_error)

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal power / noise power) in decibels; infinite where nothing was lost."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    @property
    def rms_error(self) -> float:
        """Root mean square of the error, in the unit of the weights."""
        return math.sqrt(self.noise / self.count) if self.count else 0.0
