"""Which tensor gets which format in a variant, and why.

The rules for GGUF are llama.cpp's: those of convert_hf_to_gguf.py (conversion/base.py, ModelBase.prepare_tensors) for
F32, F16, BF16 and Q8_0, those of llama-quantize (src/llama-quant.cpp, llama_tensor_get_type) for the rest. The rule for
FP8 is llm-compressor's for `targets=["Linear"]`, by the role of the tensor in the architecture and not by its name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gguf.constants import LlamaFileType

from convert.architectures.base import TensorKind, TensorRule
from convert.checkpoint import SourceTensor
from quant.errors import UsageError
from quant.formats import FORMATS


@dataclass(frozen=True, slots=True)
class Choice:
    """The format of a tensor in a variant, and the reason, as a user reads it in the plan."""

    format: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """One variant: how it is called on the command line and in file names, and how it chooses."""

    spec: str
    """As on the command line: "fp8-dynamic", "gguf:Q8_0"."""
    container: str
    """"gguf" or "safetensors"."""
    label: str
    """As in names of files and folders: "Q8_0", "FP8-dynamic"."""
    description: str
    choose: Callable[[SourceTensor, TensorRule, bool], Choice]
    """(tensor, its rule, whether the model has an output head of its own) -> Choice."""
    scheme: str | None = None
    """The preset of compressed-tensors, for safetensors."""
    file_type: int | None = None
    """general.file_type, for GGUF."""


def _gguf_fixed(tensor: SourceTensor, rule: TensorRule) -> Choice | None:
    """The tensors that every GGUF stores as F32."""
    if len(tensor.shape) <= 1:
        return Choice("F32", "one-dimensional tensors are F32")
    if rule.gguf_name.endswith("_norm.weight"):
        return Choice("F32", "norms are F32")
    if not rule.gguf_name.endswith(".weight"):
        return Choice("F32", "only weights are quantized")
    return None


def _fitting(name: str, tensor: SourceTensor, reason: str) -> Choice:
    """`name`, or F16 where the row length is not a multiple of its block size, as llama.cpp falls back."""
    format_ = FORMATS[name]
    if format_.fits(tensor.row_length):
        return Choice(name, reason)
    return Choice(
        "F16", f"fallback: {tensor.row_length} columns are not a multiple of {name}'s {format_.weights_per_block}"
    )


def _converter_choice(name: str) -> Callable[[SourceTensor, TensorRule, bool], Choice]:
    """The rule of convert_hf_to_gguf.py --outtype."""

    def choose(tensor: SourceTensor, rule: TensorRule, _has_head: bool) -> Choice:
        return _gguf_fixed(tensor, rule) or _fitting(name, tensor, "the file's type")

    return choose


def _quantize_choice(name: str) -> Callable[[SourceTensor, TensorRule, bool], Choice]:
    """The rule of llama-quantize for a legacy type: the output matrix gets Q6_K, everything else the type itself."""

    def choose(tensor: SourceTensor, rule: TensorRule, has_head: bool) -> Choice:
        fixed = _gguf_fixed(tensor, rule)
        if fixed is not None:
            return fixed
        is_output = rule.kind is TensorKind.HEAD or (rule.kind is TensorKind.EMBEDDING and not has_head)
        if is_output:
            what = "output matrix" if rule.kind is TensorKind.HEAD else "embedding shared with the output"
            return _fitting("Q8_0", tensor, f"{what}: llama-quantize uses Q6_K; Q8_0 until K-quants land")
        return _fitting(name, tensor, "the file's type")

    return choose


def _fp8_choice(prefix: str) -> Callable[[SourceTensor, TensorRule, bool], Choice]:
    """Linear layers to FP8; everything else as it is in the source."""

    def choose(tensor: SourceTensor, rule: TensorRule, _has_head: bool) -> Choice:
        if rule.kind is TensorKind.LINEAR:
            return Choice(f"{prefix}_{tensor.dtype}", "linear layer")
        return Choice(tensor.dtype, f"{rule.kind.value}: kept as in the source")

    return choose


def _gguf(name: str, file_type: LlamaFileType, description: str, *, converter: bool) -> Recipe:
    choose = _converter_choice(name) if converter else _quantize_choice(name)
    return Recipe(f"gguf:{name}", "gguf", name, description, choose, file_type=int(file_type))


def _fp8(name: str, prefix: str, scheme: str, description: str) -> Recipe:
    label = name.replace("fp8", "FP8")
    return Recipe(name, "safetensors", label, description, _fp8_choice(prefix), scheme=scheme)


RECIPES: dict[str, Recipe] = {
    recipe.spec: recipe
    for recipe in (
        _fp8("fp8-dynamic", "FP8_CHANNEL", "FP8_DYNAMIC", "E4M3, a scale per output channel; activations per token"),
        _fp8("fp8-block", "FP8_BLOCK", "FP8_BLOCK", "E4M3, a scale per 128x128 block; activations per group of 128"),
        _gguf("F32", LlamaFileType.ALL_F32, "32-bit float", converter=True),
        _gguf("F16", LlamaFileType.MOSTLY_F16, "16-bit float", converter=True),
        _gguf("BF16", LlamaFileType.MOSTLY_BF16, "bfloat16, lossless from BF16", converter=True),
        _gguf("Q8_0", LlamaFileType.MOSTLY_Q8_0, "8.5 bits, practically lossless", converter=True),
        _gguf("Q5_1", LlamaFileType.MOSTLY_Q5_1, "6.0 bits, legacy", converter=False),
        _gguf("Q5_0", LlamaFileType.MOSTLY_Q5_0, "5.5 bits, legacy", converter=False),
        _gguf("Q4_1", LlamaFileType.MOSTLY_Q4_1, "5.0 bits, legacy", converter=False),
        _gguf("Q4_0", LlamaFileType.MOSTLY_Q4_0, "4.5 bits, legacy, fast on CPUs", converter=False),
    )
}
"""Every variant that can be asked for, by its spelling on the command line."""


def parse_variants(specs: list[str]) -> list[Recipe]:
    """["fp8-dynamic", "gguf:Q8_0,Q4_0"] -> recipes, in order, without repetitions.

    Raises UsageError for a variant that does not exist.

    >>> [recipe.spec for recipe in parse_variants(["gguf:q8_0,Q4_0", "fp8-block"])]
    ['gguf:Q8_0', 'gguf:Q4_0', 'fp8-block']
    """
    recipes: dict[str, Recipe] = {}
    for spec in specs:
        family, colon, types = spec.strip().partition(":")
        names = [f"{family.lower()}:{name.strip().upper()}" for name in types.split(",")] if colon else [family.lower()]
        for name in names:
            if name not in RECIPES:
                raise UsageError("unknown variant", found=name, required=", ".join(RECIPES))
            recipes[name] = RECIPES[name]
    if not recipes:
        raise UsageError("no variant asked for", required=f"--to with one of {', '.join(RECIPES)}")
    return list(recipes.values())
