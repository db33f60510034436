"""The kinds of files that variants are stored in, and what follows from the kind."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Container:
    """A kind of file; there are two, GGUF and SAFETENSORS."""

    name: str
    prefix: str
    """Of the variants' names on the command line and in manifests."""
    is_checkpoint: bool
    """Whether a variant is a folder of its own: a checkpoint with config.json, the tokenizer and the source's other
    side files. Otherwise its files stand beside those of other variants, and hold all of this themselves."""
    holds_vocabulary: bool
    """Whether the tokenizer is written into each file."""
    takes_importance: bool
    """Whether an importance matrix can change the bytes."""
    takes_overrides: bool
    """Whether the types of single tensors can be chosen (convert/recipes/overrides.py)."""
    split_option: str
    """The option that makes the files of a variant smaller."""

    def label(self, spec: str) -> str:
        """The name of a variant in the names of files and folders.

        >>> GGUF.label("gguf:Q8_0"), SAFETENSORS.label("fp8-dynamic"), SAFETENSORS.label("bf16")
        ('Q8_0', 'FP8-dynamic', 'BF16')
        >>> SAFETENSORS.label("fp8-static+kv"), SAFETENSORS.label("nvfp4+kv")  # the Hub allows no plus in names
        ('FP8-static-kv', 'NVFP4-kv')
        """
        if not self.is_checkpoint:
            return spec.removeprefix(self.prefix)
        kind, dash, rest = spec.replace("+", "-").partition("-")
        return kind.upper() + dash + rest


GGUF = Container(
    "gguf",
    prefix="gguf:",
    is_checkpoint=False,
    holds_vocabulary=True,
    takes_importance=True,
    takes_overrides=True,
    split_option="--split-max-size",
)
SAFETENSORS = Container(
    "safetensors",
    prefix="",
    is_checkpoint=True,
    holds_vocabulary=False,
    takes_importance=False,
    takes_overrides=False,
    split_option="--max-shard-size",
)
