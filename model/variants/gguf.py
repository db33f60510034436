"""A GGUF file or split set as a variant: decoded by the package gguf, names and row order of llama.cpp undone.

Hyperparameters and rotary frequencies are those that llama.cpp would take from the file (model/variants/gguf_model.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from streamquant.convert.architectures import ROPE_FREQS, TensorRule, describe
from streamquant.convert.architectures.tensor_view import IDENTITY, ResolvedView, resolve
from streamquant.convert.metadata.embedding import CLASSIFIER
from streamquant.files.gguf_file import SPLIT_NAME, GgufTensor, first_of_split, read_split_set
from streamquant.files.reading import read_bytes
from streamquant.model.activations import QUANTIZERS
from streamquant.model.problem import Problem
from streamquant.model.variants.decoding import check_finite, missing_tensor, rows_per_block, wrong_shape
from streamquant.model.variants.gguf_model import GgufModel, check_file_type, read_model
from streamquant.model.variants.variant import Variant, VariantTensor
from streamquant.quant.errors import StreamquantError
from streamquant.quant.formats import stored_type

if TYPE_CHECKING:
    import torch

NOT_DECODED = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0", "Q2_0"})
"""Types that gguf.quants has no decoder for, found by asking it at the first tensor; these are known beforehand."""


class GgufVariant(Variant):
    """A model in GGUF. `path` is the file, or the first file of its split set."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = first_of_split(path)
        self.problems = []
        headers = read_split_set(self.path)
        self.files = tuple(headers)
        self.metadata: dict[str, Any] = next(iter(headers.values())).metadata
        self._stored: dict[str, tuple[Path, GgufTensor]] = {}
        for file, header in headers.items():
            for tensor in header.tensors:
                if tensor.name in self._stored:
                    raise StreamquantError(
                        "tensor occurs twice",
                        where=f"{file}, tensor {tensor.name!r}",
                        found=f"also in {self._stored[tensor.name][0].name}",
                    )
                self._stored[tensor.name] = file, tensor
        stored = {name: tensor for name, (_, tensor) in self._stored.items()}
        model: GgufModel = read_model(self.path, self.metadata, stored)
        self.config = model.config
        self._rope = model.rope
        self.problems += model.problems
        self.description = describe(self.config)
        self.tensors = {}
        for rule in self.description.rules.values():
            self._add(rule)
        self._note_unread()
        self.problems += check_file_type(self.path, self.metadata, stored.values())

    @property
    def label(self) -> str:
        """The name of the file, without suffix and split number."""
        match = SPLIT_NAME.fullmatch(self.path.name)
        return match["stem"] if match else self.path.stem

    def _add(self, rule: TensorRule) -> None:
        if rule.gguf_name not in self._stored:
            if rule.required and not rule.hf_name.endswith(".bias"):
                raise missing_tensor(rule, self.path, rule.gguf_name)
            return
        file, tensor = self._stored[rule.gguf_name]
        if tensor.shape not in (rule.gguf_shape, rule.quantized_shape):
            raise wrong_shape(rule, file, rule.gguf_name, tensor.shape)
        if tensor.stored_as in NOT_DECODED:
            raise StreamquantError(
                "a type that the package gguf cannot decode",
                where=f"{file}, tensor {tensor.name!r}",
                found=tensor.stored_as,
                required="a float type, or a quantized type with a decoder in gguf.quants",
            )
        part = part_of(rule, tensor)
        self.tensors[rule.hf_name] = VariantTensor(  # type: ignore[index] # filled here, read-only outside
            rule.hf_name, part.stored_as, rule.shape, part.stop - part.start
        )

    def _find(self, name: str) -> tuple[TensorRule, Path, GgufTensor]:
        """The rule of an HF name, and where its values are: a whole tensor, or one expert's part of it."""
        rule = self.description.rules[name]
        file, tensor = self._stored[rule.gguf_name]
        return rule, file, part_of(rule, tensor)

    def _note_unread(self) -> None:
        known = {rule.gguf_name for rule in self.description.rules.values()}
        known |= {ROPE_FREQS} if self.description.family.llama_cpp.rope_freqs else set()
        if self.description.family.llama_cpp.pooling and CLASSIFIER in self._stored:
            known.add(CLASSIFIER)
            what = f"a reranker: its scores, by {CLASSIFIER}, are not measured; logits are those of the file's head,"
            self.problems.append(Problem("reranker", "warning", f"{what} or of the embeddings where it has none"))
        for name, (file, tensor) in self._stored.items():
            if name not in known:
                self.problems.append(
                    Problem(
                        "unknown-tensor",
                        "error",
                        "a tensor that llama.cpp does not read: it refuses the file",
                        where=f"{file.name}, tensor {name!r}",
                        found=f"{tensor.stored_as} {list(tensor.shape)}",
                        required=f"a tensor of arch {self.description.gguf_arch}",
                    )
                )

    # Reading

    def blocks(self, name: str) -> "Iterator[tuple[int, torch.Tensor]]":
        """See Variant.blocks."""
        import torch

        rule, file, tensor = self._find(name)
        view = view_of(rule)
        is_vector = 1 in (len(rule.shape), len(tensor.shape))
        # Rows that change places among each other are read together.
        step = view.rows if is_vector else rows_per_block((tensor.stop - tensor.start) // view.rows, view.row_step)
        for first in range(0, view.rows, step):
            last = min(first + step, view.rows)
            block = torch.from_numpy(self._source_rows(file, tensor, view, range(first, last)))
            block = block.reshape(rule.shape) if is_vector else block.reshape(last - first, *rule.shape[1:])
            check_finite(block, name, file, first)
            yield first, block

    def _source_rows(self, file: Path, tensor: GgufTensor, view: ResolvedView, rows: range) -> NDArray[np.float32]:
        """float32[rows, n]: rows of the source's tensor, decoded and put back."""
        moved = view.moved(rows.start, rows.stop, view.row_step)
        runs = [self._decode(file, tensor, view, range(at, at + count)) for at, count in moved.runs]
        stored = view.undo(runs[0] if len(runs) == 1 else np.concatenate(runs))
        if moved.rows is None:
            return stored
        found = np.empty_like(stored)
        found[moved.rows] = stored
        return found

    def _decode(self, file: Path, tensor: GgufTensor, view: ResolvedView, rows: range) -> NDArray[np.float32]:
        """float32[rows, n]: rows as they lie in the file."""
        if len(tensor.shape) == 1:
            whole = decode_rows(read_bytes(file, tensor.start, tensor.stop).reshape(1, -1), tensor.stored_as)
            return whole.reshape(view.stored_rows, view.n)[rows.start : rows.stop]
        row_bytes = (tensor.stop - tensor.start) // view.stored_rows
        raw = read_bytes(file, tensor.start + rows.start * row_bytes, tensor.start + rows.stop * row_bytes)
        return decode_rows(raw.reshape(len(rows), row_bytes), tensor.stored_as)

    def rows(self, name: str, ids: Sequence[int]) -> "torch.Tensor":
        """See Variant.rows."""
        import torch

        rule, file, tensor = self._find(name)
        assert rule.view is None, "only rows that stay are read one by one"
        row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
        raw = np.empty((len(ids), row_bytes), np.uint8)
        for at, number in enumerate(ids):
            raw[at] = read_bytes(file, tensor.start + number * row_bytes, tensor.start + (number + 1) * row_bytes)
        return torch.from_numpy(decode_rows(raw, tensor.stored_as))

    def rotary(self) -> "tuple[torch.Tensor, float] | None":
        """See Variant.rotary: llama.cpp's frequencies for this file, its rope_freqs.weight included."""
        import torch

        freqs = self._stored.get(ROPE_FREQS) if self.description.family.llama_cpp.rope_freqs else None
        divisors = None if freqs is None else self._decode(*freqs, resolve(IDENTITY, freqs[1].shape), range(1))[0]
        frequencies, factor = self._rope.frequencies(divisors)
        return torch.from_numpy(frequencies), factor

    # Activations

    def input_quantizer(self, module: str) -> "Callable[[torch.Tensor], torch.Tensor] | None":
        """See Variant.input_quantizer: what llama.cpp's CPU backend does (model/activations.py)."""
        tensor = self.tensors.get(f"{module}.weight")
        dot_type = None if tensor is None else stored_type(tensor.stored_as).dot_type
        if dot_type is None:
            return None
        columns, quantize = view_of(self.description.rules[f"{module}.weight"]).columns, QUANTIZERS[dot_type]
        return quantize if columns is None else _in_order_of(columns, quantize)

    def activations(self) -> str | None:
        """See Variant.activations."""
        kinds = {stored_type(tensor.stored_as).dot_type for tensor in self.tensors.values() if len(tensor.shape) > 1}
        names = sorted(kind for kind in kinds if kind is not None)
        return f"{', '.join(names)}, as llama.cpp's CPU backend" if names else None


def _in_order_of(
    columns: NDArray[np.int64], quantize: "Callable[[torch.Tensor], torch.Tensor]"
) -> "Callable[[torch.Tensor], torch.Tensor]":
    """Quantize inputs in the order of the file's columns: those that share a scale are others there."""
    import torch

    order, back = torch.from_numpy(columns.copy()), torch.from_numpy(np.argsort(columns))
    return lambda x: quantize(x[..., order.to(x.device)])[..., back.to(x.device)]


def part_of(rule: TensorRule, tensor: GgufTensor) -> GgufTensor:
    """The part of a stored tensor that a rule is about: all of it, or the rows of one expert."""
    if rule.expert is None:
        return tensor
    nbytes = (tensor.stop - tensor.start) // rule.expert.count
    start = tensor.start + rule.expert.number * nbytes
    return replace(tensor, shape=rule.gguf_shape[1:], start=start, stop=start + nbytes)


def view_of(rule: TensorRule) -> ResolvedView:
    """What the converter did to a tensor."""
    return resolve(rule.view or IDENTITY, rule.shape)


def decode_rows(raw: NDArray[np.uint8], stored_as: str) -> NDArray[np.float32]:
    """uint8[r, bytes] of a ggml type -> float32[r, n], by gguf.quants.dequantize."""
    kind = GGMLQuantizationType[stored_as]
    if stored_as == "F32":
        return raw.view(np.float32)
    if stored_as == "F16":
        return raw.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):  # NaN and infinity are looked for afterwards
        return np.ascontiguousarray(dequantize(raw, kind), dtype=np.float32)
