"""Which tensor gets which format in a variant, and why.

The rules for GGUF are llama.cpp's: those of convert_hf_to_gguf.py (conversion/base.py, ModelBase.prepare_tensors) for
F32, F16, BF16 and Q8_0, those of llama-quantize (convert/mix.py) for the rest. The rule for FP8 is llm-compressor's for
`targets=["Linear"]`, by the role of the tensor in the architecture and not by its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gguf.constants import LlamaFileType

from convert.architectures.base import ModelDescription, TensorKind, TensorRule
from convert.checkpoint import SourceTensor
from convert.mix import MixModel, MixTensor, choose_mix, fallback
from quant.errors import UsageError


@dataclass(frozen=True, slots=True)
class Choice:
    """The format of a tensor in a variant, and the reason, as a user reads it in the plan."""

    format: str
    reason: str


Tensors = Sequence[tuple[SourceTensor, TensorRule]]


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
    choose: Callable[[Tensors, ModelDescription], dict[str, Choice]]
    """All tensors of the model with their rules -> the choice for each, by source name."""
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


def _converter(name: str) -> Callable[[Tensors, ModelDescription], dict[str, Choice]]:
    """The rule of convert_hf_to_gguf.py --outtype."""

    def choose(tensors: Tensors, _model: ModelDescription) -> dict[str, Choice]:
        return {
            tensor.name: _gguf_fixed(tensor, rule) or Choice(*fallback(name, "the file's type", tensor.row_length))
            for tensor, rule in tensors
        }

    return choose


def _mix(file_type: str, *, large_ends: bool) -> Callable[[Tensors, ModelDescription], dict[str, Choice]]:
    """The rule of llama-quantize for a file type; large_ends: embeddings and output at Q8_0, as the _L files have."""

    def choose(tensors: Tensors, model: ModelDescription) -> dict[str, Choice]:
        fixed = {tensor.name: _gguf_fixed(tensor, rule) for tensor, rule in tensors}
        free = [MixTensor(rule.gguf_name, tensor.shape) for tensor, rule in tensors if fixed[tensor.name] is None]
        mixed = choose_mix(file_type, free, _mix_model(model))
        choices = {}
        for tensor, rule in tensors:
            if large_ends and rule.kind in (TensorKind.EMBEDDING, TensorKind.HEAD):
                choices[tensor.name] = Choice(*fallback("Q8_0", "embeddings and output at Q8_0", tensor.row_length))
            else:
                choices[tensor.name] = fixed[tensor.name] or Choice(*mixed[rule.gguf_name])
        return choices

    return choose


def _mix_model(model: ModelDescription) -> MixModel:
    heads = {
        key: int(model.metadata[f"{model.gguf_arch}.attention.{key}"].value) for key in ("head_count", "head_count_kv")
    }
    return MixModel(model.gguf_arch, model.block_count, heads["head_count"], heads["head_count_kv"])


def _fp8_choice(prefix: str) -> Callable[[Tensors, ModelDescription], dict[str, Choice]]:
    """Linear layers to FP8; everything else as it is in the source."""

    def choose(tensors: Tensors, _model: ModelDescription) -> dict[str, Choice]:
        return {
            tensor.name: Choice(f"{prefix}_{tensor.dtype}", "linear layer")
            if rule.kind is TensorKind.LINEAR
            else Choice(tensor.dtype, f"{rule.kind.value}: kept as in the source")
            for tensor, rule in tensors
        }

    return choose


def _unquantized(name: str, file_type: LlamaFileType, description: str) -> Recipe:
    return Recipe(f"gguf:{name}", "gguf", name, description, _converter(name), file_type=int(file_type))


def _quantized(name: str, description: str) -> Recipe:
    """A file type of llama-quantize; with the ending _L or _XL the community's form with larger ends."""
    large_ends = name in LARGE_ENDS
    base = LARGE_ENDS.get(name, name)
    choose = _mix(base, large_ends=large_ends)
    file_type = LlamaFileType[f"MOSTLY_{base}"]
    return Recipe(f"gguf:{name}", "gguf", name, description, choose, file_type=int(file_type))


def _fp8(name: str, prefix: str, scheme: str, description: str) -> Recipe:
    label = name.replace("fp8", "FP8")
    return Recipe(name, "safetensors", label, description, _fp8_choice(prefix), scheme=scheme)


LARGE_ENDS = {"Q3_K_XL": "Q3_K_L", "Q4_K_L": "Q4_K_M", "Q5_K_L": "Q5_K_M", "Q6_K_L": "Q6_K"}
"""The community's names for a file type with embeddings and output at Q8_0 -> the file type."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""llama-quantize's other names."""

NOT_YET = {
    "Q2_K_S": "needs an importance matrix",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"), "an IQ type"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"), "an IQ type"),
    "TQ1_0": "a ternary type",
    "TQ2_0": "a ternary type",
    "MXFP4_MOE": "for mixtures of experts",
}
"""File types of llama.cpp that cannot be made yet, and what they are."""

RECIPES: dict[str, Recipe] = {
    recipe.spec: recipe
    for recipe in (
        _fp8("fp8-dynamic", "FP8_CHANNEL", "FP8_DYNAMIC", "E4M3, a scale per output channel; activations per token"),
        _fp8("fp8-block", "FP8_BLOCK", "FP8_BLOCK", "E4M3, a scale per 128x128 block; activations per group of 128"),
        _unquantized("F32", LlamaFileType.ALL_F32, "32-bit float"),
        _unquantized("F16", LlamaFileType.MOSTLY_F16, "16-bit float"),
        _unquantized("BF16", LlamaFileType.MOSTLY_BF16, "bfloat16, lossless from BF16"),
        _unquantized("Q8_0", LlamaFileType.MOSTLY_Q8_0, "8.5 bits, practically lossless"),
        _quantized("Q6_K_L", "Q6_K with embeddings and output at Q8_0"),
        _quantized("Q6_K", "6.6 bits, very high quality"),
        _quantized("Q5_K_L", "Q5_K_M with embeddings and output at Q8_0"),
        _quantized("Q5_K_M", "5.7 bits, high quality"),
        _quantized("Q5_K_S", "5.5 bits, high quality"),
        _quantized("Q4_K_L", "Q4_K_M with embeddings and output at Q8_0"),
        _quantized("Q4_K_M", "4.8 bits, good quality, what most people run"),
        _quantized("Q4_K_S", "4.6 bits, slightly lower quality"),
        _quantized("Q3_K_XL", "Q3_K_L with embeddings and output at Q8_0"),
        _quantized("Q3_K_L", "4.3 bits, lower quality"),
        _quantized("Q3_K_M", "3.9 bits, low quality"),
        _quantized("Q3_K_S", "3.5 bits, low quality"),
        _quantized("Q2_K", "3.0 bits, very low quality"),
        _quantized("Q5_1", "6.0 bits, legacy"),
        _quantized("Q5_0", "5.5 bits, legacy"),
        _quantized("Q4_1", "5.0 bits, legacy"),
        _quantized("Q4_0", "4.5 bits, legacy, fast on CPUs"),
    )
}
"""Every variant that can be asked for, by its spelling on the command line."""


def parse_variants(specs: list[str]) -> list[Recipe]:
    """["fp8-dynamic", "gguf:Q8_0,Q4_K_M"] -> recipes, in order, without repetitions.

    Raises UsageError for a variant that does not exist or cannot be made yet.

    >>> [recipe.spec for recipe in parse_variants(["gguf:q8_0,Q4_K", "fp8-block"])]
    ['gguf:Q8_0', 'gguf:Q4_K_M', 'fp8-block']
    """
    recipes: dict[str, Recipe] = {}
    for spec in specs:
        family, colon, types = spec.strip().partition(":")
        family = family.lower()
        names = [_gguf_name(family, name) for name in types.split(",")] if colon else [family]
        for name in names:
            if name not in RECIPES:
                raise UsageError("unknown variant", found=name, required=", ".join(RECIPES))
            recipes[name] = RECIPES[name]
    if not recipes:
        raise UsageError("no variant asked for", required=f"--to with one of {', '.join(RECIPES)}")
    return list(recipes.values())


def _gguf_name(family: str, name: str) -> str:
    name = name.strip().upper()
    name = ALIASES.get(name, name)
    if name in NOT_YET:
        raise UsageError(
            "variant cannot be made yet",
            found=f"{family}:{name}, {NOT_YET[name]}",
            required=", ".join(RECIPES),
        )
    return f"{family}:{name}"
