"""The records of a model that its config.json describes."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from streamquant.convert.architectures.family import Family, TensorKind
from streamquant.convert.architectures.tensor_view import TensorView
from streamquant.quant.errors import StreamquantError

# Suffixes of tensors that old checkpoints carry and no GGUF has (llama.cpp, conversion/base.py, prepare_tensors).
IGNORED_SUFFIXES = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class ExpertSlot:
    """The place of an expert's tensor in the tensor in which GGUF stacks those of a layer, in the experts' order."""

    number: int
    count: int


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor of a model: its two names and the shape that config.json demands, in Hugging Face's order.

    view is what the converter does to it on its way, None where it stays as it is.
    A tensor that is not required may be missing from the checkpoint.
    """

    hf_name: str
    gguf_name: str
    kind: TensorKind
    shape: tuple[int, ...]
    view: TensorView | None
    required: bool
    expert: ExpertSlot | None = None
    """For a tensor of one expert; its GGUF name is that of the stacked tensor."""
    layer: int = -1
    """The number of its decoder layer; -1 outside of them."""
    is_mtp: bool = False
    """Whether its layer is one for multi-token prediction, which is not computed when a text is read."""
    merged: str | None = None
    """The matrix that runtimes make of it and its neighbours, by a name of the model's: they want one scale for all of
    it, where a format has a scale for the whole tensor. None: it stays alone."""
    parts: "tuple[TensorRule, ...]" = ()
    """Where GGUF cuts it into several tensors, the rule of each; gguf_name and view are those of the first then."""

    @property
    def stored(self) -> "tuple[TensorRule, ...]":
        """The rules of the GGUF tensors that are made of it: itself, or its parts."""
        return self.parts or (self,)

    @property
    def is_by_head(self) -> bool:
        """Whether its GGUF tensor has a matrix for each head; no linear layer of Hugging Face's has its input (MLA)."""
        return self.expert is None and self.view is not None and len(self.gguf_shape) > 2

    @property
    def has_importance(self) -> bool:
        """Whether llama-imatrix has an entry for it: the matrices of the layers that inputs are multiplied with."""
        is_read = self.layer >= 0 and not self.is_mtp and not self.is_by_head
        others = (TensorKind.ROUTER, TensorKind.STATE_INPUT, TensorKind.LATENT)
        return is_read and (self.kind.is_linear or self.kind in others)

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        """The shape of the GGUF tensor in Hugging Face's order: of a stack, experts first."""
        shape = self.shape if self.view is None else self.view.stored_shape(self.shape)
        return shape if self.expert is None else (self.expert.count, *shape)

    @property
    def quantized_shape(self) -> tuple[int, ...]:
        """gguf_shape as llama-quantize writes it: ggml does not count the first dimensions of 1 (ggml_n_dims)."""
        shape = self.gguf_shape
        first = next((at for at, size in enumerate(shape) if size != 1), len(shape) - 1)
        return shape[first:]


@dataclass(frozen=True, slots=True, eq=False)
class ExtraTensor:
    """A tensor that GGUF has and the checkpoint has not; values are float32, one-dimensional. Equal by its bytes."""

    gguf_name: str
    values: NDArray[np.float32]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtraTensor):
            return NotImplemented
        return self.gguf_name == other.gguf_name and self.values.tobytes() == other.values.tobytes()

    def __hash__(self) -> int:
        return hash((self.gguf_name, self.values.tobytes()))


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as its config.json describes it, in the terms of both worlds."""

    family: Family
    layer_count: int
    """Decoder layers that a text goes through."""
    block_count: int
    """Those, and the layers for multi-token prediction behind them that a GGUF has: what it counts."""
    mtp_layer_count: int
    """Layers for multi-token prediction that the checkpoint has."""
    vocab_size: int
    hyperparameters: Mapping[str, int]
    """The sizes that every variant of the model must have, by their names in messages: "attention heads" -> 64."""
    norm_epsilon: float
    sliding_window: int | None
    """Tokens that a token sees, itself included; None where it sees all before it."""
    tied_embeddings: bool
    has_rope: bool
    """Whether queries and keys are rotated at all."""
    rules: Mapping[str, TensorRule]
    """By HF name: every tensor that this model may have, in the order of a state dict."""
    metadata: Mapping[str, GGUFValue]
    """The {arch}.* keys that all families have, in the reference converter's order."""
    added_metadata: Mapping[str, GGUFValue]
    """Those that this family adds: the converter writes general.file_type before them."""
    extra_tensors: tuple[ExtraTensor, ...]
    notes: tuple[str, ...]
    """Decisions that a user should see in the plan."""

    @property
    def hf_architecture(self) -> str:
        """The class under `architectures`."""
        return self.family.hf_architecture

    @property
    def unquantized(self) -> tuple[str, ...]:
        """The modules that compressed-tensors must leave alone beside the head and the embeddings, in its spelling."""
        mtp = self.family.mtp if self.mtp_layer_count else None
        return (*self.family.unquantized, *(mtp.unquantized if mtp is not None else ()))

    @property
    def gguf_arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.family.gguf_arch

    def is_ignored(self, name: str) -> bool:
        """Whether the HF tensor is known and not wanted in a GGUF."""
        return name.endswith(IGNORED_SUFFIXES) or self.is_left_out(name)

    def is_left_out(self, name: str) -> bool:
        """Whether the HF tensor is of what a multimodal model has beside its text model."""
        multimodal = self.family.multimodal
        return multimodal is not None and name.startswith(multimodal.left_out)

    def stored_rules(self) -> Iterator[TensorRule]:
        """The rules of everything that a GGUF may store, those of experts one by one."""
        for rule in self.rules.values():
            if self.is_in_gguf(rule):
                yield from rule.stored

    def is_in_gguf(self, rule: TensorRule) -> bool:
        """Whether a GGUF has the tensor."""
        return not rule.is_mtp or self.family.mtp is None or self.family.mtp.in_gguf

    def match(self, shapes: Mapping[str, tuple[int, ...]], where: str = "") -> tuple[TensorRule, ...]:
        """The rules of the tensors that a checkpoint has, in the checkpoint's order, ignored tensors left out.

        Raises StreamquantError on a tensor that this model does not have, a missing required one, or a wrong shape.
        `where` is the checkpoint as messages name it.
        """
        found = []
        for name, shape in shapes.items():
            rule = self.rules.get(name)
            if rule is not None:
                check_shape(rule, shape)
                found.append(rule)
            elif not self.is_ignored(name):
                count = sum(other not in self.rules and not self.is_ignored(other) for other in shapes)
                raise StreamquantError(
                    "the checkpoint has a tensor that its config.json does not explain",
                    where=_place(where, name),
                    found=f"shape {list(shape)}" + (f"; {count} such tensors" if count > 1 else ""),
                    required=f"a tensor of {self.hf_architecture}",
                    hint="check config.json (number of layers, *_bias, architectures)",
                )
        self.check_complete(shapes, where)
        return tuple(found)

    def check_complete(self, names: Collection[str], where: str = "") -> None:
        """Raise StreamquantError if a required tensor is not among the names of a checkpoint's tensors."""
        partial = self.partial_biases(names)
        missing = [
            name for name, rule in self.rules.items() if name not in names and (rule.required or name in partial)
        ]
        if missing:
            raise StreamquantError(
                "the checkpoint lacks tensors that its config.json demands",
                where=_place(where, missing[0]),
                found=f"{len(missing)} missing",
                required=f"all tensors of {self.hf_architecture} with {self.layer_count + self.mtp_layer_count} layers",
                hint="is a shard missing?",
            )

    def absent_biases(self, names: Collection[str]) -> list[str]:
        """The biases that config.json switches on and no layer has, as "self_attn.o_proj.bias"."""
        switched = self._switched_biases()
        return sorted({of_any_layer(name) for name in switched} - {of_any_layer(n) for n in switched if n in names})

    def partial_biases(self, names: Collection[str]) -> set[str]:
        """The biases that config.json switches on and that are missing although other layers have them."""
        switched = self._switched_biases()
        present = {of_any_layer(name) for name in switched if name in names}
        return {name for name in switched if name not in names and of_any_layer(name) in present}

    def _switched_biases(self) -> list[str]:
        return [name for name, rule in self.rules.items() if rule.kind is TensorKind.BIAS and not rule.required]


def _place(where: str, name: str) -> str:
    return f"{where}, tensor {name!r}" if where else f"tensor {name!r}"


def of_any_layer(name: str) -> str:
    """What a tensor of a layer is called in it.

    >>> of_any_layer("model.layers.11.self_attn.o_proj.bias")
    'self_attn.o_proj.bias'
    """
    return name.split(".", 3)[-1]


def check_shape(rule: TensorRule, shape: tuple[int, ...]) -> None:
    """Raise StreamquantError if a tensor has another shape than config.json demands."""
    if tuple(shape) != rule.shape:
        raise StreamquantError(
            "a tensor's shape does not fit config.json",
            where=f"tensor {rule.hf_name!r}",
            found=list(shape),
            required=list(rule.shape),
        )
