"""What a user can choose besides the variants."""

from dataclasses import dataclass, field
from typing import Any

from streamquant.convert.recipes.imatrix import ImportanceMatrix
from streamquant.convert.recipes.overrides import NO_OVERRIDES, Overrides


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What a user can choose besides the variants."""

    name: str | None = None
    """Name of the model in file names; default: the name of the source folder."""
    split_max_size: int | None = None
    """Largest number of tensor bytes in a GGUF file; None: one file."""
    max_shard_size: int | None = None
    """Largest number of tensor bytes in an FP8 shard; None: the shards of the source."""
    pre: str | None = None
    """tokenizer.ggml.pre, where it cannot be told from tokenizer.json."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """GGUF keys that override what the model card says (llama.cpp's --metadata)."""
    imatrix: ImportanceMatrix | None = None
    """Weighs the columns of every quantized GGUF variant whose formats ask for it."""
    overrides: Overrides = NO_OVERRIDES
    """Formats of single tensors, for every GGUF variant that is not from a recipe file."""
    guard_template: bool = False
    """Put guards against known faults into chat templates (convert/metadata/guard_template.py)."""
