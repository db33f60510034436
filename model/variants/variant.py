"""Any checkpoint or variant -> float tensors by Hugging Face name, read on demand by byte range.

A variant is what a runtime would see: the file's own hyperparameters, types, scales and rotary frequencies, and nothing
that is known from elsewhere. Three kinds: a BF16, F16 or F32 checkpoint folder, a compressed-tensors folder
(model/variants/compressed.py), and a GGUF file or split set (model/variants/gguf.py).
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
from numpy.typing import NDArray

from streamquant.convert.architectures import ModelDescription, TensorRule, describe
from streamquant.convert.source.checkpoint import CONFIG, INDEX, SINGLE_FILE, Checkpoint, SourceTensor, open_checkpoint
from streamquant.files.safetensors_file import DTYPE_BITS
from streamquant.model.problem import Problem
from streamquant.quant.errors import StreamquantError, UsageError

if TYPE_CHECKING:
    import torch

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"

BLOCK_BYTES = 4 << 20
"""Stored bytes that are read and decoded at a time."""
SAMPLE = 4096
"""Bytes of each of the samples of a file's content that a fingerprint covers."""

Kind = Literal["checkpoint", "compressed-tensors", "gguf"]


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
    path: Path
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    description: ModelDescription
    tensors: Mapping[str, VariantTensor]
    problems: list[Problem]

    @property
    def label(self) -> str:
        """The name of the folder, or of the file without its suffix."""
        return self.path.stem if self.path.suffix == ".gguf" else self.path.resolve().name

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

    def layer_names(self, layer: int) -> list[str]:
        """HF names of the tensors of a decoder layer, those without weights of their own (zero biases) included."""
        prefix = f"model.layers.{layer}."
        return [name for name in self.description.rules if name.startswith(prefix)]

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

    def rotary(self) -> "tuple[torch.Tensor, float] | None":
        """(float32[head_dim / 2] rotation per position in radians, factor of cos and sin), None: transformers' own."""
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


def open_variant(path: Path) -> Variant:
    """Open a checkpoint folder, a compressed-tensors folder, a GGUF file, any file of a split set, or its folder.

    Reads headers only. Raises UsageError if there is no such thing at `path`, StreamquantError for what is broken or
    unknown: a truncated or missing split, a missing tensor, a wrong shape, an architecture or type without a decoder.
    """
    if path.is_file() or path.suffix == ".gguf":
        if path.suffix != ".gguf":
            raise UsageError("not a variant", where=str(path), required="a .gguf file or a checkpoint folder")
        from streamquant.model.variants.gguf import GgufVariant

        return GgufVariant(path)
    if not path.is_dir():
        raise UsageError("no such variant", where=str(path), required="a .gguf file or a checkpoint folder")
    if any((path / name).exists() for name in (CONFIG, INDEX, SINGLE_FILE)):
        return _open_folder(path)
    return open_variant(_only_gguf(path))


def _open_folder(folder: Path) -> Variant:
    checkpoint = open_checkpoint(folder, dtypes=DTYPE_BITS)
    if checkpoint.config.get("quantization_config") is not None:
        from streamquant.model.variants.compressed import CompressedVariant

        return CompressedVariant(checkpoint)
    return CheckpointVariant(checkpoint)


def _only_gguf(folder: Path) -> Path:
    """The one GGUF file, or the first file of the one split set, of a folder."""
    from streamquant.model.variants.gguf import first_of_split

    found = sorted({first_of_split(path) for path in folder.glob("*.gguf")})
    if len(found) != 1:
        raise UsageError(
            "not one variant",
            where=str(folder),
            found=", ".join(path.name for path in found) or "neither config.json nor .gguf files",
            required="a checkpoint folder, or one .gguf file",
        )
    return found[0]


# What the kinds share


def read_bytes(path: Path, start: int, stop: int) -> NDArray[np.uint8]:
    """Bytes [start, stop) of a file. Raises StreamquantError if the file has become shorter."""
    data = np.empty(stop - start, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(data), 0  # type: ignore[arg-type] # numpy's arrays are buffers
            while done < len(data):
                step = file.readinto(view[done:])
                if not step:
                    break
                done += step
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error
    if done < len(data):
        raise StreamquantError(
            "a file became shorter while it was read",
            where=str(path),
            found=f"{start + done:,} bytes",
            required=f"{stop:,} bytes",
        )
    return data


def as_tensor(raw: NDArray[np.uint8], dtype: str, shape: Sequence[int]) -> "torch.Tensor":
    """Bytes of a safetensors dtype as a torch tensor of that dtype. Raises StreamquantError where torch has no such."""
    import torch

    names = {
        "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64",
    }  # fmt: skip
    if dtype not in names:
        raise StreamquantError("dtype cannot be decoded", found=dtype, required=", ".join(names))
    return torch.from_numpy(raw).view(getattr(torch, names[dtype])).reshape(tuple(shape))


def check_finite(block: "torch.Tensor", name: str, path: Path, first: int) -> None:
    """Raise StreamquantError, naming the row, if a decoded block holds NaN or infinity."""
    import torch

    if torch.isfinite(block.sum()):  # one pass; only a sum that overflows needs the second
        return
    bad = (~torch.isfinite(block)).nonzero()
    if len(bad):
        row = first + int(bad[0][0]) if block.ndim > 1 else 0
        raise StreamquantError(
            "a weight is NaN or infinite", where=f"{path}, tensor {name!r}, row {row}, column {int(bad[0][-1])}"
        )


def rows_per_block(row_bytes: int, multiple: int = 1) -> int:
    """Rows to read at a time: about BLOCK_BYTES of stored bytes, in multiples."""
    return max(1, BLOCK_BYTES // max(1, row_bytes) // multiple) * multiple


def missing_tensor(rule: TensorRule, path: Path, stored_name: str) -> StreamquantError:
    """The error for a tensor that is not there."""
    return StreamquantError(
        "a tensor is missing",
        where=f"{path}, tensor {stored_name!r}",
        found="no such tensor",
        required=f"shape {list(rule.shape)}",
        hint="is a file missing, or was it made for another architecture?",
    )


def wrong_shape(rule: TensorRule, path: Path, stored_name: str, shape: tuple[int, ...]) -> StreamquantError:
    """The error for a tensor of another shape than the hyperparameters demand."""
    return StreamquantError(
        "a tensor's shape does not fit the hyperparameters",
        where=f"{path}, tensor {stored_name!r}",
        found=list(shape),
        required=list(rule.shape),
    )


class FolderVariant(Variant):
    """What checkpoints and compressed-tensors folders share."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.folder
        self.files = tuple(checkpoint.folder / file.name for file in checkpoint.files)
        self.config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        self.description = describe(self.config)
        self.problems = []
        self._tied: bool | None = None

    def _ties_head(self) -> bool:
        # transformers ties them if the config says so, unless the two tensors differ; then llama.cpp's way is its way.
        if self._tied is None:
            self._tied = self.description.tied_embeddings and self._same_bytes(HEAD, EMBEDDINGS)
        return self._tied

    def _same_bytes(self, one: str, other: str) -> bool:
        a, b = (self.checkpoint.tensors.get(name) for name in (one, other))
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return all(
            np.array_equal(self._bytes(a, at, min(at + BLOCK_BYTES, a.stop - a.start)),
                           self._bytes(b, at, min(at + BLOCK_BYTES, a.stop - a.start)))
            for at in range(0, a.stop - a.start, BLOCK_BYTES)
        )  # fmt: skip

    def _bytes(self, tensor: SourceTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of a tensor's data."""
        return read_bytes(self.checkpoint.folder / tensor.file, tensor.start + start, tensor.start + stop)

    def _stored_rows(self, tensor: SourceTensor, first: int, last: int) -> "torch.Tensor":
        """Rows [first, last) of a tensor as they are stored; the first dimension counts, also of a vector."""
        row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
        return as_tensor(
            self._bytes(tensor, first * row_bytes, last * row_bytes), tensor.dtype, (last - first, *tensor.shape[1:])
        )

    def _whole(self, tensor: SourceTensor) -> "torch.Tensor":
        return as_tensor(self._bytes(tensor, 0, tensor.stop - tensor.start), tensor.dtype, tensor.shape)

    def _float_blocks(self, tensor: SourceTensor) -> "Iterator[tuple[int, torch.Tensor]]":
        """A tensor that is stored in some float dtype, its values as they are."""
        rows = tensor.shape[0]
        step = rows_per_block((tensor.stop - tensor.start) // rows) if len(tensor.shape) > 1 else rows
        for first in range(0, rows, step):
            block = self._stored_rows(tensor, first, min(first + step, rows)).float()
            check_finite(block, tensor.name, self.path / tensor.file, first)
            yield first, block

    def _note_unexplained(self, known: set[str]) -> None:
        for name in self.checkpoint.tensors:
            if name not in known and not self.description.is_ignored(name):
                self.problems.append(
                    Problem(
                        "unknown-tensor",
                        "error",
                        "a tensor that no runtime reads",
                        where=f"{self.checkpoint.tensors[name].file}, tensor {name!r}",
                        found=f"{self.checkpoint.tensors[name].dtype} {list(self.checkpoint.tensors[name].shape)}",
                        required=f"a tensor of {self.description.hf_architecture}, or of its quantization_config",
                    )
                )


class CheckpointVariant(FolderVariant):
    """A folder of BF16, F16 or F32 safetensors."""

    kind = "checkpoint"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.tensors = {}
        for rule in self.description.rules.values():
            tensor = checkpoint.tensors.get(rule.hf_name)
            if tensor is None and rule.required:
                raise missing_tensor(rule, self.path, rule.hf_name)
            if tensor is not None:
                if tensor.shape != rule.shape:
                    raise wrong_shape(rule, self.path / tensor.file, rule.hf_name, tensor.shape)
                if tensor.dtype not in ("BF16", "F16", "F32"):
                    raise StreamquantError(
                        "a quantized tensor in a checkpoint without quantization_config",
                        where=f"{self.path / tensor.file}, tensor {tensor.name!r}",
                        found=tensor.dtype,
                        required="BF16, F16 or F32",
                    )
                self.tensors[rule.hf_name] = VariantTensor(
                    rule.hf_name, tensor.dtype, tensor.shape, tensor.stop - tensor.start
                )
        self._note_unexplained(set(self.tensors))

    def blocks(self, name: str) -> "Iterator[tuple[int, torch.Tensor]]":
        """See Variant.blocks."""
        return self._float_blocks(self.checkpoint.tensors[name])

    def slice(self, name: str, first: int, last: int) -> "torch.Tensor":
        """See Variant.slice."""
        return self._stored_rows(self.checkpoint.tensors[name], first, last).float()

    def read(
        self, name: str, dtype: "torch.dtype", on_block: "Callable[[int, torch.Tensor], None] | None" = None
    ) -> "torch.Tensor":
        """See Variant.read; without a detour over float32."""
        import torch

        if on_block is not None:
            return super().read(name, dtype, on_block)
        tensor = self.checkpoint.tensors[name]
        whole = torch.empty(tensor.shape, dtype=dtype)
        step = rows_per_block((tensor.stop - tensor.start) // tensor.shape[0])
        for first in range(0, tensor.shape[0], step):
            last = min(first + step, tensor.shape[0])
            whole[first:last] = self._stored_rows(tensor, first, last)
            check_finite(whole[first:last], name, self.path / tensor.file, first)
        return whole

    def rows(self, name: str, ids: Sequence[int]) -> "torch.Tensor":
        """See Variant.rows."""
        import torch

        tensor = self.checkpoint.tensors[name]
        return torch.cat([self._stored_rows(tensor, number, number + 1).float() for number in ids])
