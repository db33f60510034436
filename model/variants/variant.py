"""Any checkpoint or variant -> float tensors by Hugging Face name, read on demand by byte range.

A variant is what a runtime would see: the file's own hyperparameters, types, scales and rotary frequencies, and nothing
that is known from elsewhere. Four kinds: a BF16, F16 or F32 checkpoint folder (checkpoint.py), a compressed-tensors
folder (compressed.py), one that another tool quantized (quantized.py), and a GGUF file or split set (gguf.py). open.py
finds out which of them a path is.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from streamquant.convert.architectures import ModelDescription, TensorRule
from streamquant.convert.source.model_folder import name_of
from streamquant.model.problem import Problem

if TYPE_CHECKING:
    import torch

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

SAMPLE = 4096
"""Bytes of each of the samples of a file's content that a fingerprint covers."""

Kind = Literal["checkpoint", "compressed-tensors", "quantized", "gguf"]


@dataclass(frozen=True, slots=True)
class VariantTensor:
    """A tensor of a variant: its HF name, how it is stored ("BF16", "F8_E4M3", "Q4_K"), the shape of its weights in
    HF's order, and its bytes in the file, scales included."""

    name: str
    stored_as: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def count(self) -> int:
        """Weights."""
        return math.prod(self.shape)


class Variant(ABC):
    """A model on disk that gives float tensors by HF name. Thread-safe; nothing is open between calls.

    config is the config.json that transformers needs to compute what this file computes, without quantization_config.
    problems holds what was found while opening, and what is found while reading.
    """

    kind: Kind
    is_folder: bool = False
    """Whether it is a checkpoint folder, with tokenizer and config as transformers reads them; a GGUF has its own."""
    path: Path
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    description: ModelDescription
    tensors: Mapping[str, VariantTensor]
    problems: list[Problem]

    @property
    def label(self) -> str:
        """The name of the folder, or of the file without its suffix."""
        return self.path.stem if self.path.suffix == ".gguf" else name_of(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameter_count(self) -> int:
        """Weights in all tensors."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, over all tensors."""
        return 8 * self.nbytes / self.parameter_count

    @property
    def head_name(self) -> str:
        """The tensor that makes logits of hidden states."""
        return HEAD if HEAD in self.tensors and not self._ties_head() else EMBEDDINGS

    def _ties_head(self) -> bool:
        """Whether the embeddings are the head although the file has an lm_head of its own."""
        return False

    def layer_rules(self, layer: int) -> Sequence[TensorRule]:
        """The tensors of a decoder layer, those without weights of their own (zero biases) included."""
        by_layer: dict[int, list[TensorRule]] | None = getattr(self, "_by_layer", None)
        if by_layer is None:  # a mixture of experts has tens of thousands
            by_layer = {}
            for rule in self.description.rules.values():
                by_layer.setdefault(rule.layer, []).append(rule)
            self._by_layer = by_layer
        return by_layer.get(layer, [])

    @abstractmethod
    def blocks(self, name: str) -> "Iterator[tuple[int, torch.Tensor]]":
        """The tensor in pieces: (first row, float32 of some whole rows), rows in HF's order, exactly as decoded.

        A vector comes whole. Raises StreamquantError if the file changed or holds NaN or infinity.
        """

    @abstractmethod
    def rows(self, name: str, ids: Sequence[int]) -> "torch.Tensor":
        """float32[len(ids), n]: some rows of a matrix, read one by one."""

    def read(
        self, name: str, dtype: "torch.dtype", on_block: "Callable[[int, torch.Tensor], None] | None" = None
    ) -> "torch.Tensor":
        """The whole tensor, rounded to `dtype`; `on_block` sees the float32 blocks that it is made of."""
        import torch

        shape = self.description.rules[name].shape
        if name not in self.tensors:
            return torch.zeros(shape, dtype=dtype)  # a bias that GGUF may leave out
        whole = torch.empty(shape, dtype=dtype)
        for first, block in self.blocks(name):
            whole[first : first + len(block)] = block
            if on_block is not None:
                on_block(first, block)
        return whole

    def slice(self, name: str, first: int, last: int) -> "torch.Tensor":
        """float32 rows [first, last) of a tensor (weights, of a vector). Made for reading a tensor from front to back:
        a kind that cannot read single rows keeps the last tensor."""
        import torch

        kept: tuple[str, torch.Tensor] | None = getattr(self, "_kept", None)
        if kept is None or kept[0] != name:
            kept = name, torch.cat([block for _, block in self.blocks(name)])
            self._kept = kept
        return kept[1][first:last]

    def rotary(self, *, sliding: bool = False) -> "tuple[torch.Tensor, float] | None":
        """(float32[head_dim / 2] rotation per position in radians, factor of cos and sin), None: transformers' own.

        Of the layers with a window, if `sliding` and they have a rope of their own.
        """
        del sliding
        return None

    def input_quantizer(self, module: str) -> "Callable[[torch.Tensor], torch.Tensor] | None":
        """What the runtime does to the input of a linear layer, e.g. FP8 per token; None where it does nothing."""
        del module
        return None

    def activations(self) -> str | None:
        """One line about quantized activations, or None."""
        return None

    def fingerprint(self) -> str:
        """SHA-256 over config, and the name, size, time of change and samples of the content of every file.

        It costs milliseconds and tells two checkpoints apart unless someone means to deceive it.
        """
        found = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for path in self.files:
            state = path.stat()
            found.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
            with path.open("rb") as file:
                for at in np.linspace(0, max(0, state.st_size - SAMPLE), 64).astype(int).tolist():
                    file.seek(at)
                    found.update(file.read(SAMPLE))
        return found.hexdigest()
