"""A GGUF file or split set as a variant: decoded by the package gguf, names and row order of llama.cpp undone.

Hyperparameters and rotary frequencies are those that llama.cpp would take from the file (model/variants/gguf_model.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
        self._rope, self._sliding_rope = model.rope, model.sliding_rope
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
        parts = [self._part(stored) for stored in rule.stored]
        found = [part for part in parts if part is not None]
        if not found:
            return
        if len(found) < len(parts):
            raise missing_tensor(rule, self.path, rule.stored[parts.index(None)].gguf_name)
        coarsest = min(found, key=lambda part: (part.stop - part.start) / math.prod(part.shape))
        nbytes = sum(part.stop - part.start for part in found)
        self.tensors[rule.hf_name] = VariantTensor(  # type: ignore[index] # filled here, read-only outside
            rule.hf_name, coarsest.stored_as, rule.shape, nbytes
        )

    def _part(self, rule: TensorRule) -> GgufTensor | None:
        """What the file has of a stored tensor, checked; None where it may lack it."""
        if rule.gguf_name not in self._stored:
            if rule.required and not rule.hf_name.endswith(".bias"):
                raise missing_tensor(rule, self.path, rule.gguf_name)
            return None
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
        return part_of(rule, tensor)

    def _find(self, rule: TensorRule) -> "_Stored":
        """Where the values of a stored tensor's rule are: a whole tensor, or one expert's part of it."""
        file, tensor = self._stored[rule.gguf_name]
        return _Stored(view_of(rule), file, part_of(rule, tensor))

    def _note_unread(self) -> None:
        known = {rule.gguf_name for rule in self.description.stored_rules()}
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

        rule = self.description.rules[name]
        parts = [self._find(stored) for stored in rule.stored]
        rows, is_vector = parts[0].view.rows, any(1 in (len(rule.shape), len(part.tensor.shape)) for part in parts)
        # Rows that change places among each other are read together.
        nbytes = sum(part.tensor.stop - part.tensor.start for part in parts) // rows
        row_step = math.lcm(*(part.view.row_step for part in parts))
        step = rows if is_vector else rows_per_block(nbytes, row_step)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            block = torch.from_numpy(self._source_rows(parts, range(first, last), row_step))
            block = block.reshape(rule.shape) if is_vector else block.reshape(last - first, *rule.shape[1:])
            check_finite(block, name, parts[0].file, first)
            yield first, block

    def _source_rows(self, parts: "Sequence[_Stored]", rows: range, row_step: int) -> NDArray[np.float32]:
        """float32[rows, n]: rows of the source's tensor, decoded and put back."""
        found = np.empty((len(rows), parts[0].view.n), np.float32)
        for part in parts:
            moved = part.view.moved(rows.start, rows.stop, row_step)
            if not moved.runs:
                continue
            runs = [self._decode(part.file, part.tensor, part.view, range(at, at + count)) for at, count in moved.runs]
            part.view.put_back(runs[0] if len(runs) == 1 else np.concatenate(runs), moved, found)
        return found

    def _decode(self, file: Path, tensor: GgufTensor, view: ResolvedView, rows: range) -> NDArray[np.float32]:
        """float32[rows, n]: rows as they lie in the file."""
        if len(tensor.shape) == 1:
            whole = decode_rows(read_bytes(file, tensor.start, tensor.stop).reshape(1, -1), tensor.stored_as)
            return whole.reshape(view.stored_rows, view.stored_n)[rows.start : rows.stop]
        row_bytes = (tensor.stop - tensor.start) // view.stored_rows
        raw = read_bytes(file, tensor.start + rows.start * row_bytes, tensor.start + rows.stop * row_bytes)
        return decode_rows(raw.reshape(len(rows), row_bytes), tensor.stored_as)

    def rows(self, name: str, ids: Sequence[int]) -> "torch.Tensor":
        """See Variant.rows."""
        import torch

        rule = self.description.rules[name]
        assert rule.view is None, "only rows that stay are read one by one"
        stored = self._find(rule)
        file, tensor = stored.file, stored.tensor
        row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
        raw = np.empty((len(ids), row_bytes), np.uint8)
        for at, number in enumerate(ids):
            raw[at] = read_bytes(file, tensor.start + number * row_bytes, tensor.start + (number + 1) * row_bytes)
        return torch.from_numpy(decode_rows(raw, tensor.stored_as))

    def rotary(self, *, sliding: bool = False) -> "tuple[torch.Tensor, float] | None":
        """See Variant.rotary: llama.cpp's frequencies for this file, its rope_freqs.weight included."""
        import torch

        freqs = self._stored.get(ROPE_FREQS) if self.description.family.llama_cpp.rope_freqs else None
        divisors = None if freqs is None else self._decode(*freqs, resolve(IDENTITY, freqs[1].shape), range(1))[0]
        rope = self._sliding_rope if sliding and self._sliding_rope is not None else self._rope
        frequencies, factor = rope.frequencies(divisors)
        return torch.from_numpy(frequencies), factor

    # Activations

    def input_quantizer(self, module: str) -> "Callable[[torch.Tensor], torch.Tensor] | None":
        """See Variant.input_quantizer: what llama.cpp's CPU backend does (model/activations.py)."""
        if f"{module}.weight" not in self.tensors:
            return None
        rules = self.description.rules[f"{module}.weight"].stored
        types = {stored_type(self._stored[rule.gguf_name][1].stored_as).dot_type for rule in rules}
        dot_type = types.pop()
        if dot_type is None or types or any(rule.is_by_head for rule in rules):
            return None  # by head: llama.cpp multiplies other inputs with it
        columns, quantize = view_of(rules[0]).columns, QUANTIZERS[dot_type]
        return quantize if columns is None else _in_order_of(columns, quantize)

    def activations(self) -> str | None:
        """See Variant.activations."""
        types = {
            self._stored[stored.gguf_name][1].stored_as
            for name in self.tensors
            if len((rule := self.description.rules[name]).shape) > 1
            for stored in rule.stored
        }
        kinds = {stored_type(kind).dot_type for kind in types}
        names = sorted(kind for kind in kinds if kind is not None)
        return f"{', '.join(names)}, as llama.cpp's CPU backend" if names else None


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a stored tensor is, or one expert's part of it, and its view."""

    view: ResolvedView
    file: Path
    tensor: GgufTensor


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
