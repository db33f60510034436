"""What can be made of which models, as records: `streamquant formats` and the table of the docs are made from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from streamquant.convert.architectures import ARCHITECTURES, ModelDescription, describe
from streamquant.convert.recipes.mix import ENDS
from streamquant.convert.recipes.recipe import RECIPES, ChoiceOptions, Recipe, Tensors
from streamquant.convert.source.tensor import SourceTensor
from streamquant.quant.formats import FORMATS
from streamquant.quant.widen import SOURCE_DTYPES

STANDARD_MODEL: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""config.json of Llama 2 7B, in BF16, over whose tensors the bits per weight are counted."""


@dataclass(frozen=True, slots=True)
class CatalogueVariant:
    """A variant that can be asked for."""

    spec: str
    """As for --to."""
    container: str
    """gguf or safetensors."""
    about: str
    bits_per_weight: float
    """Of all tensors of STANDARD_MODEL; models of other proportions differ by a few tenths."""
    runtimes: tuple[str, ...]
    """The programs that run its files."""
    uses_importance: bool
    """Whether an importance matrix changes its bytes."""
    needs_importance: bool
    """Whether it is refused without one."""
    needs_calibration: bool = False
    """Whether it is refused without a file of `streamquant calibrate`."""

    @property
    def size(self) -> str:
        """The bits per weight as text, "8.5" or "16"."""
        return f"{self.bits_per_weight:.1f}".removesuffix(".0")

    @property
    def measured(self) -> str:
        """What it needs of text, in a table: a calibration, or what an importance matrix is to it."""
        return "calibration required" if self.needs_calibration else self.importance

    @property
    def importance(self) -> str:
        """What an importance matrix is to it: required, optional or unused."""
        return "required" if self.needs_importance else "optional" if self.uses_importance else "unused"


@dataclass(frozen=True, slots=True)
class CatalogueFamily:
    """A family of models that can be converted."""

    hf_architecture: str
    """The class that config.json names under `architectures`."""
    gguf_arch: str
    """general.architecture of its GGUF files."""


def families() -> tuple[CatalogueFamily, ...]:
    """All model families.

    >>> families()[0]
    CatalogueFamily(hf_architecture='LlamaForCausalLM', gguf_arch='llama')
    """
    return tuple(CatalogueFamily(name, family.gguf_arch) for name, family in ARCHITECTURES.items())


def variants() -> tuple[CatalogueVariant, ...]:
    """All variants, in the order in which RECIPES has them.

    >>> [(variant.spec, variant.size, variant.importance) for variant in variants()][:3]
    [('fp8-dynamic', '8.3', 'unused'), ('fp8-block', '8.3', 'unused'), ('fp8-static', '8.3', 'unused')]
    """
    model = describe(STANDARD_MODEL)
    tensors = []
    for rule in model.rules.values():
        nbytes = math.prod(rule.shape) * SOURCE_DTYPES["BF16"]
        tensors.append((SourceTensor(rule.hf_name, "BF16", rule.shape, "model.safetensors", 0, nbytes), rule))
    return tuple(_variant(recipe, model, tensors) for recipe in RECIPES.values())


def _variant(recipe: Recipe, model: ModelDescription, tensors: Tensors) -> CatalogueVariant:
    choices = recipe.choose(tensors, model, ChoiceOptions())
    is_checkpoint = recipe.container.is_checkpoint
    chosen = [choices[rule.hf_name if is_checkpoint else rule.gguf_name] for _, rule in tensors]
    stored = [(tensor, rule, FORMATS[choice.format]) for (tensor, rule), choice in zip(tensors, chosen, strict=True)]
    bits = 8 * sum(format_.nbytes(tensor.rows, tensor.row_length) for tensor, _, format_ in stored)
    weighed = any(format_.uses_importance for _, rule, format_ in stored if rule.gguf_name not in ENDS)
    return CatalogueVariant(
        recipe.spec,
        recipe.container.name,
        recipe.about,
        round(bits / sum(tensor.count for tensor, _ in tensors), 2),
        recipe.runtimes,
        uses_importance=recipe.container.takes_importance and weighed,
        needs_importance=recipe.needs_importance,
        needs_calibration=recipe.needs_calibration,
    )
