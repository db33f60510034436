"""llama-quantize's mixes: which tensor of a file type gets which format, as tables and small functions.

The decisions are those of src/llama-quant.cpp (llama_tensor_get_type, llama.cpp 11434), for models without experts.
Tensors are visited by layer, then by name: some rules count the tensors that they have seen. The golden files of
llama.cpp's own test (tests/snapshots/*.schema) are compared in tests/convert/test_mix.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from quant.formats import FORMATS


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

    @property
    def gqa(self) -> int:
        """Query heads per key-value head."""
        return self.head_count // self.head_count_kv

    @property
    def is_70b(self) -> bool:
        """llama.cpp's LLM_TYPE_70B: 80 layers with grouped queries, of llama or qwen2. (405B has 126.)"""
        return self.arch in ("llama", "qwen2") and self.block_count == 80 and self.head_count != self.head_count_kv


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


Rule = Callable[[Position], str | None]


def _always(name: str) -> Rule:
    return lambda _p: name


DEFAULTS: Mapping[str, str] = {
    **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS", "Q2_K")},
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
}
"""File type -> the format of tensors without a rule."""

ATTN_V: Mapping[str, Rule] = {
    "Q2_K": lambda p: "Q4_K" if p.model.gqa >= 4 else "Q3_K",
    "Q2_K_S": lambda p: "Q4_K" if p.model.gqa >= 4 else None,
    "Q3_K_M": lambda p: "Q5_K" if p.index < 2 else "Q4_K",
    "Q3_K_L": _always("Q5_K"),
    "IQ4_NL": lambda p: "Q5_K" if p.model.gqa >= 4 else None,
    "IQ4_XS": lambda p: "Q5_K" if p.model.gqa >= 4 else None,
    "Q4_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q5_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q4_K_S": lambda p: "Q5_K" if p.index < 4 else None,
}
"""attn_v: the tensor that suffers most."""

FFN_DOWN: Mapping[str, Rule] = {
    "Q2_K": _always("Q3_K"),
    "Q2_K_S": lambda p: "Q4_K" if p.first_eighth else None,
    "Q3_K_M": lambda p: "Q5_K" if p.index < p.count // 16 else "Q4_K",
    "Q3_K_L": _always("Q5_K"),
    "Q4_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q5_K_M": lambda p: "Q6_K" if p.more_bits else None,
    "Q4_K_S": lambda p: "Q5_K" if p.first_eighth else None,
    "IQ4_NL": lambda p: "Q5_K" if p.first_eighth and not p.imatrix else None,
    "IQ4_XS": lambda p: "Q5_K" if p.first_eighth and not p.imatrix else None,
    "Q4_0": lambda p: "Q4_1" if p.first_eighth and p.imatrix else None,
    "Q5_0": lambda p: "Q5_1" if p.first_eighth and p.imatrix else None,
}
"""ffn_down."""

ATTN_OUTPUT: Mapping[str, Rule] = {
    "Q2_K": _always("Q3_K"),
    "Q3_K_M": _always("Q4_K"),
    "Q3_K_L": _always("Q5_K"),
}
"""attn_output."""

SHAPE_FALLBACK: Mapping[str, str] = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What a format becomes where the row length is not a multiple of its super-block."""


def choose_mix(
    file_type: str, tensors: Iterable[MixTensor], model: MixModel, *, imatrix: bool = False
) -> dict[str, tuple[str, str]]:
    """The (format, reason) of every tensor that a file type quantizes, by GGUF name.

    `tensors` are those that are quantized at all (two-dimensional weights that are not norms). Raises KeyError for a
    file type without a mix.
    """
    default = DEFAULTS[file_type]
    ordered = sorted(tensors, key=lambda tensor: (_layer(tensor.name), tensor.name))
    has_output = any(tensor.name == "output.weight" for tensor in ordered)
    attn_v_count = sum("attn_v.weight" in tensor.name for tensor in ordered)
    seen = {"attn_v": 0, "ffn_down": 0}
    chosen = {}
    for tensor in ordered:
        name, reason = default, "the file's type"
        if tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and not has_output):
            name, reason = _output(default, tensor), "output matrix"
        elif "attn_v.weight" in tensor.name:
            position = Position(seen["attn_v"], attn_v_count, model, imatrix)
            name, reason = _attn_v(file_type, default, position)
            seen["attn_v"] += 1
        elif "attn_output.weight" in tensor.name:
            position = Position(0, model.block_count, model, imatrix)
            name, reason = _apply(ATTN_OUTPUT, file_type, default, position, "attn_output")
        elif "ffn_down" in tensor.name:
            position = Position(seen["ffn_down"], model.block_count, model, imatrix)
            name, reason = _apply(FFN_DOWN, file_type, default, position, "ffn_down")
            seen["ffn_down"] += 1
        chosen[tensor.name] = fallback(name, reason, tensor.shape[-1])
    return chosen


def fallback(name: str, reason: str, columns: int) -> tuple[str, str]:
    """The format itself, or what llama-quantize takes where the row length does not fit: another type, or F16."""
    if FORMATS[name].fits(columns):
        return name, reason
    other = SHAPE_FALLBACK.get(name, "F16")
    if not FORMATS[other].fits(columns):
        other = "F16"
    return other, f"fallback: {columns} columns are not a multiple of {name}'s {FORMATS[name].weights_per_block}"


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _output(default: str, tensor: MixTensor) -> str:
    if tensor.shape[-1] % FORMATS[default].weights_per_block or default == "Q8_0":
        return "Q8_0"
    return "Q6_K"


def _apply(rules: Mapping[str, Rule], file_type: str, default: str, position: Position, kind: str) -> tuple[str, str]:
    rule = rules.get(file_type)
    name = rule(position) if rule is not None else None
    return (name, f"{kind} rule of {file_type}") if name is not None else (default, "the file's type")


def _attn_v(file_type: str, default: str, position: Position) -> tuple[str, str]:
    name, reason = _apply(ATTN_V, file_type, default, position, "attn_v")
    if position.model.is_70b and name in ("Q3_K", "Q4_K"):
        # 8 query heads share each value there, so it costs little
        return "Q5_K", "attn_v rule of 70B models"
    return name, reason
