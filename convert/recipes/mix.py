"""llama-quantize's mixes: which tensor of a file type gets which format, as tables and small functions.

The decisions are those of src/llama-quant.cpp (llama_tensor_get_type and llama_tensor_get_type_impl, llama.cpp 11434).
Tensors are visited by layer, then by name: some rules count the tensors that they have seen. The golden files of
llama.cpp's own test (tests/snapshots/*.schema) are compared in tests/convert/test_mix.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from streamquant.convert.recipes.overrides import GGML_TYPES, NO_OVERRIDES, Overrides
from streamquant.quant.formats import stored_type


@dataclass(frozen=True, slots=True)
class MixTensor:
    """A tensor as the mix sees it: its GGUF name and shape (torch order)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MixModel:
    """What the rules ask of a model."""

    arch: str
    block_count: int
    head_count: int
    head_count_kv: int
    expert_count: int = 0

    @property
    def gqa(self) -> int:
        """Query heads per key-value head; 0 for a model without attention in its first layer."""
        return self.head_count // self.head_count_kv if self.head_count_kv else 0

    @property
    def is_70b(self) -> bool:
        """llama.cpp's LLM_TYPE_70B. (405B has 126 layers.)"""
        if self.arch == "llama" and self.head_count == self.head_count_kv:
            return False
        return SEVENTY_B.get(self.arch) == self.block_count


SEVENTY_B: Mapping[str, int] = {"llama": 80, "deci": 80, "olmo": 80, "qwen2": 80, "jais2": 68}
"""Architecture -> the number of layers that makes llama.cpp take it for a 70B; llama also needs grouped queries."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a tensor stands among those of its kind: the number seen before it, how many there are, and the model."""

    index: int
    count: int
    model: MixModel
    imatrix: bool

    @property
    def more_bits(self) -> bool:
        """The first and last eighth of the layers, and every third between."""
        i, n = self.index, self.count
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

    @property
    def first_eighth(self) -> bool:
        """Among the first eighth of the layers."""
        return self.index < self.count // 8

    @property
    def middle(self) -> bool:
        """Neither in the first nor in the last eighth."""
        return self.count // 8 <= self.index < 7 * self.count // 8

    @property
    def grouped(self) -> bool:
        """Whether four query heads or more share a value."""
        return self.model.gqa >= 4

    @property
    def eight_experts(self) -> bool:
        """Mixtral's number."""
        return self.model.expert_count == 8


@dataclass(frozen=True, slots=True)
class Choice:
    """The format of a tensor in a variant, and the reason, as a user reads it in the plan."""

    format: str
    reason: str
    by_option_of_ends: bool = False
    """Whether --output-tensor-type or --token-embedding-type decided."""


Rule = Callable[[Position], str | None]
"""None: the file type's own format."""
Rules = Mapping[str, Rule]
"""By file type."""


def _always(name: str) -> Rule:
    return lambda _p: name


DEFAULTS: Mapping[str, str] = {
    **{name: name for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q6_K")},
    **{name: name for name in ("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")},
    **{name: name for name in ("IQ3_XXS", "IQ3_S")},
    "MXFP4_MOE": "MXFP4",
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
}
"""File type -> the format of tensors without a rule."""

MAIN_TYPES: Mapping[str, tuple[str, ...]] = {
    "MXFP4": ("MXFP4", "Q8_0"),
    "IQ3_XS": ("IQ3_S", "IQ3_XXS"),
    "IQ3_M": ("IQ3_S", "IQ3_XXS", "IQ4_XS"),
    "IQ2_S": ("IQ2_XS", "IQ2_S"),
    "IQ2_M": ("IQ2_S",),
    "Q2_K_S": ("Q2_K",),
}
"""Names of files that are not called after the type of most of their tensors -> types of which one must be in them."""

UNQUANTIZED = ("F32", "F16", "BF16")
"""File types, and formats, that the rules below leave alone."""

LOW_BIT = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
"""File types whose attn_v and experts have rules of their own, and no exceptions for 70B models."""

OUTPUT: Mapping[str, str] = {"MXFP4_MOE": "Q8_0", **dict.fromkeys((*LOW_BIT, "IQ3_XXS"), "Q5_K")}
"""The output matrix, where it is neither Q6_K nor of a shape that does not fit."""

TOKEN_EMBD: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "Q4_K"),
}
"""Embeddings that are not the output matrix too."""


def _low_bit_attn_v(otherwise: str) -> Rule:
    return lambda p: "Q4_K" if p.grouped or p.model.expert_count >= 4 else otherwise


def _if_grouped(name: str) -> Rule:
    return lambda p: name if p.grouped else None


def _more_bits(name: str) -> Rule:
    return lambda p: name if p.more_bits else None


def _first_eighth(name: str) -> Rule:
    return lambda p: name if p.first_eighth else None


ATTN_V: Rules = {
    "Q2_K": lambda p: "Q4_K" if p.grouped else "Q3_K",
    "Q2_K_S": _if_grouped("Q4_K"),
    "Q3_K_M": lambda p: "Q5_K" if p.index < 2 else "Q4_K",
    "Q3_K_L": _always("Q5_K"),
    "Q4_K_S": lambda p: "Q5_K" if p.index < 4 else None,
    "Q4_K_M": _more_bits("Q6_K"),
    "Q5_K_M": _more_bits("Q6_K"),
    "IQ4_NL": _if_grouped("Q5_K"),
    "IQ4_XS": _if_grouped("Q5_K"),
    "IQ3_XXS": lambda p: "Q4_K" if p.grouped else "IQ3_XXS" if p.imatrix else "IQ3_S",
    "IQ3_XS": _if_grouped("Q4_K"),
    "IQ3_S": _if_grouped("Q4_K"),
    "IQ3_M": _always("Q4_K"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), _low_bit_attn_v("Q2_K")),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), _low_bit_attn_v("IQ3_S")),
}
"""attn_v, attn_qkv and attn_kv_b: the tensors that suffer most."""

ATTN_K: Rules = {"IQ3_XS": _always("IQ3_XXS"), "IQ3_XXS": _always("IQ2_S")}
"""attn_k, and attn_q."""

FFN_DOWN: Rules = {
    "Q2_K": _always("Q3_K"),
    "Q2_K_S": _first_eighth("Q4_K"),
    "Q3_K_M": lambda p: "Q5_K" if p.index < p.count // 16 else "Q4_K",
    "Q3_K_L": _always("Q5_K"),
    "Q4_K_S": _first_eighth("Q5_K"),
    "Q4_K_M": _more_bits("Q6_K"),
    "Q5_K_M": _more_bits("Q6_K"),
    "IQ4_NL": lambda p: "Q5_K" if p.first_eighth and not p.imatrix else None,
    "IQ4_XS": lambda p: "Q5_K" if p.first_eighth and not p.imatrix else None,
    "Q4_0": lambda p: "Q4_1" if p.first_eighth and p.imatrix else None,
    "Q5_0": lambda p: "Q5_1" if p.first_eighth and p.imatrix else None,
    "IQ3_XXS": lambda p: None if p.imatrix else "Q4_K" if p.first_eighth else "Q3_K",
    "IQ3_M": lambda p: "Q4_K" if p.first_eighth or (p.eight_experts and p.more_bits) else None,
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), _first_eighth("Q2_K")),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), _first_eighth("IQ3_S")),
}
"""ffn_down, of experts too."""

ATTN_OUTPUT: Rules = {
    "Q2_K": _always("Q3_K"),
    "Q3_K_M": _always("Q4_K"),
    "Q3_K_L": _always("Q5_K"),
    "IQ3_XXS": _always("IQ3_S"),
    "IQ3_M": _always("Q4_K"),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), _always("IQ2_XXS")),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), _always("IQ3_S")),
}
"""attn_output."""

FFN_GATE: Rules = {"IQ3_XS": lambda p: "IQ3_XXS" if p.middle else None}
"""ffn_gate, and ffn_up."""

EIGHT_EXPERTS: Mapping[str, Rules] = {
    "attn_v": {name: _always("Q8_0") for name in DEFAULTS if name not in LOW_BIT},
    "attn_k": {name: _always("Q4_K" if name in LOW_BIT else "Q8_0") for name in DEFAULTS},
    "attn_output": dict.fromkeys(
        (
            *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS"),
            *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", *LOW_BIT),
        ),
        _always("Q5_K"),
    ),
}
"""What models of eight experts have instead: there these tensors are small beside the experts."""

FALCON: Mapping[str, Rules] = {
    "attn_output": {"Q3_K_L": _always("Q4_K")},
    "ffn_down": {
        **{name: rule for name, rule in FFN_DOWN.items() if name != "Q4_K_S"},
        "Q3_K_M": lambda p: "Q5_K" if p.index < p.count // 16 else "Q4_K" if p.more_bits else "Q3_K",
        "Q3_K_L": _always("Q4_K"),
        "Q4_K_M": lambda p: "Q6_K" if p.index < p.count // 16 else "Q5_K" if p.more_bits else "Q4_K",
    },
}
"""What Falcon has instead."""

RULES: Mapping[str, Rules] = {
    "attn_v": ATTN_V,
    "attn_k": ATTN_K,
    "attn_q": ATTN_K,
    "attn_output": ATTN_OUTPUT,
    "ffn_up": FFN_GATE,
    "ffn_gate": FFN_GATE,
    "ffn_down": FFN_DOWN,
}
"""By kind of tensor."""

KINDS = {
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q",
    "attn_output.weight": "attn_output",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}
"""What a tensor's name contains -> its kind; the first hit counts."""

SHAPE_FALLBACK: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What a format becomes where the row length is not a multiple of its super-block."""

NEEDS_IMPORTANCE = ("Q2_K_S",)
"""File types whose own format llama-quantize refuses without an importance matrix, which it takes in other files."""

ENDS = ("output.weight", "token_embd.weight", "per_layer_token_embd.weight")
"""The tensors at the two ends of a model: they need no importance."""

NEVER = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(
        f"time_mix_{name}.weight"
        for name in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    *(f"time_mix_{name}.weight" for name in ("decay_w1", "decay_w2", "lerp_fused")),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("a.rvq.codebook", "mm.a.code_embd"),
)
"""What the names of tensors contain that are never quantized."""


def is_quantized(tensor: MixTensor) -> bool:
    """Whether llama-quantize quantizes a tensor at all: weights of two dimensions or more, but for some small ones."""
    name = tensor.name
    if len(tensor.shape) - _leading_ones(tensor.shape) < 2 or not name.endswith("weight"):
        return False
    return name not in ("position_embd.weight", "token_types.weight") and not any(text in name for text in NEVER)


def _leading_ones(shape: tuple[int, ...]) -> int:
    """ggml does not count dimensions of 1 that only repeat."""
    return next((i for i, size in enumerate(shape) if size != 1), len(shape))


def needs_importance(file_type: str, name: str, format_name: str) -> bool:
    """Whether llama-quantize refuses to make a tensor of this name in this format without an importance matrix."""
    return name not in ENDS and (
        stored_type(format_name).needs_importance
        or (file_type in NEEDS_IMPORTANCE and format_name == DEFAULTS[file_type])
    )


def choose_mix(
    file_type: str,
    tensors: Iterable[MixTensor],
    model: MixModel,
    *,
    imatrix: bool = False,
    overrides: Overrides = NO_OVERRIDES,
) -> dict[str, Choice]:
    """The format of every tensor that a file type quantizes, by GGUF name.

    `tensors` are all of the model; those that stay as they are (norms, vectors, an output.weight that is left) are not
    in the result. Raises KeyError for a file type without a mix.
    """
    ordered = sorted(tensors, key=lambda tensor: (layer_of(tensor.name), tensor.name))
    choice = _Mix(file_type, model, ordered, imatrix, overrides)
    left = {"output.weight"} if overrides.leave_output_tensor else set()
    free = [tensor for tensor in ordered if is_quantized(tensor) and tensor.name not in left - set(overrides.tensors)]
    return {tensor.name: choice.of(tensor) for tensor in free}


class _Mix:
    """Decides about tensor after tensor; `seen` counts those of a kind that the rules were asked about."""

    def __init__(
        self, file_type: str, model: MixModel, tensors: list[MixTensor], imatrix: bool, overrides: Overrides
    ) -> None:
        self.file_type, self.model, self.imatrix, self.overrides = file_type, model, imatrix, overrides
        self.default = DEFAULTS[file_type]
        self.tied = all(tensor.name != "output.weight" for tensor in tensors)
        self.counts = dict.fromkeys(RULES, model.block_count)
        self.counts["attn_v"] = sum(kind_of(tensor.name) == "attn_v" for tensor in tensors)
        self.seen = dict.fromkeys(RULES, 0)

    def of(self, tensor: MixTensor) -> Choice:
        """The order is llama-quantize's, but that an explicit type also falls back."""
        return fallback(self._explicit(tensor) or self._by_file_type(tensor), tensor.shape[-1])

    def _explicit(self, tensor: MixTensor) -> Choice | None:
        overrides, name = self.overrides, tensor.name
        if name in overrides.tensors:
            return Choice(overrides.tensors[name], "named in the recipe")
        if overrides.token_embedding_type is not None and name in ENDS[1:]:
            return Choice(overrides.token_embedding_type, "--token-embedding-type", by_option_of_ends=True)
        if overrides.output_tensor_type is not None and name == "output.weight":
            return Choice(overrides.output_tensor_type, "--output-tensor-type", by_option_of_ends=True)
        if self.default not in UNQUANTIZED and (rule := overrides.match(name)) is not None:
            return Choice(rule[1], f"--tensor-type {rule[0]}={rule[1]}")
        return None

    def _by_file_type(self, tensor: MixTensor) -> Choice:
        default = Choice(self.default, "the file's type")
        if self.default in UNQUANTIZED:
            return default
        if self.overrides.pure:
            return Choice(self.default, "--pure: the file's type")
        if tensor.name == "output.weight" or (self.tied and tensor.name in ENDS):
            return self._output(tensor)
        if self.file_type == "MXFP4_MOE":
            return default if len(tensor.shape) > 2 else Choice("Q8_0", "not experts")
        if tensor.name in ENDS:
            name = TOKEN_EMBD.get(self.file_type)
            return Choice(name, f"token_embd rule of {self.file_type}") if name is not None else default
        kind = kind_of(tensor.name)
        return self._by_kind(kind, tensor) if kind is not None else default

    def _output(self, tensor: MixTensor) -> Choice:
        if self.overrides.output_tensor_type is not None:
            reason = "--output-tensor-type: embeddings are the output matrix too"
            return Choice(self.overrides.output_tensor_type, reason, by_option_of_ends=True)
        if self.default == "Q8_0":
            return Choice(self.default, "the file's type")
        if self.file_type != "MXFP4_MOE" and (self.model.arch == "falcon" or not fits(self.default, tensor.shape[-1])):
            return Choice("Q8_0", "output matrix")
        return Choice(OUTPUT.get(self.file_type, "Q6_K"), "output matrix")

    def _by_kind(self, kind: str, tensor: MixTensor) -> Choice:
        position = Position(self._index(kind, tensor), self.counts[kind], self.model, self.imatrix)
        self.seen[kind] += 1
        rules, of = RULES[kind], self.file_type
        if self.model.arch == "falcon" and kind in FALCON:
            rules = FALCON[kind]
        elif position.eight_experts and self.file_type in EIGHT_EXPERTS.get(kind, {}):
            rules, of = EIGHT_EXPERTS[kind], "models of eight experts"
        elif position.eight_experts and kind == "attn_output":
            rules = {}
        rule = rules.get(self.file_type)
        name = rule(position) if rule is not None else None
        large = kind == "attn_v" and self.model.is_70b and self.file_type not in LOW_BIT
        if large and (name or self.default) in ("Q3_K", "Q4_K"):
            # 8 query heads share each value there, so it costs little
            return Choice("Q5_K", "attn_v rule of 70B models")
        if name is None:
            return Choice(self.default, "the file's type")
        return Choice(name, f"{kind} rule of {of}")

    def _index(self, kind: str, tensor: MixTensor) -> int:
        """Experts do not come in the order of the layers, so that theirs is read from the name."""
        if self.model.expert_count > 1 and kind.startswith("ffn_") and self.file_type not in LOW_BIT:
            return layer_of(tensor.name)
        return self.seen[kind]


def fits(name: str, columns: int) -> bool:
    """Whether rows of this many weights can be stored in a GGML type."""
    return columns % GGML_TYPES[name] == 0


def fallback(choice: Choice, columns: int) -> Choice:
    """The choice itself, or what llama-quantize takes where the row length does not fit: another type, or F16.

    F16 also stands in for types without another (Q8_0 and those of 32 weights), where llama-quantize gives up.
    """
    name = choice.format
    if fits(name, columns):
        return choice
    other = SHAPE_FALLBACK.get(name, "F16")
    if not fits(other, columns):
        other = "F16"
    return Choice(other, f"fallback: {columns} columns are not a multiple of {name}'s {GGML_TYPES[name]}")


def layer_of(name: str) -> int:
    """The layer that a tensor's name says, or -1.

    >>> layer_of("blk.12.ffn_up.weight"), layer_of("output.weight")
    (12, -1)
    """
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def kind_of(name: str) -> str | None:
    """The kind of tensor that the rules tell apart by its name, or None; tensors of a kind are counted together."""
    if name in ENDS:
        return None
    return next((kind for text, kind in KINDS.items() if text in name), None)
