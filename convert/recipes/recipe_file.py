"""Recipe files: a file type and what differs from it, in YAML, so that a mix can be repeated and applied elsewhere.

label: Q4_K_M-attn8               # name of the variant, gguf:Q4_K_M-attn8, and in the name of its file
base: Q4_K_M                      # a file type of llama-quantize
note: attention at 8 bits         # what a reader should know; optional, as is all that follows
tensor-type:                      # --tensor-type: the first pattern found in the name of a tensor counts
  - attn_(q|k|v|output)=Q8_0
output-tensor-type: Q8_0          # and the other options of llama-quantize
token-embedding-type: Q6_K
leave-output-tensor: false
pure: false
tensors:                          # GGUF name: type; stands above everything else
  blk.0.ffn_down.weight: Q8_0
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streamquant.convert.recipes.overrides import Overrides, parse_overrides
from streamquant.files.strict_yaml import read_yaml
from streamquant.quant.errors import UsageError
from streamquant.quant.printable import visible_lines

KEYS = (
    *("label", "base", "note", "tensor-type", "output-tensor-type", "token-embedding-type"),
    *("leave-output-tensor", "pure", "tensors"),
)
"""In the order in which they are written."""


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """What a recipe file says."""

    label: str
    base: str
    overrides: Overrides
    note: str = ""

    def record(self) -> dict[str, Any]:
        """As in the file, and in the manifest; `parse_recipe` is the inverse."""
        record = {"label": self.label, "base": self.base, "note": self.note, **self.overrides.record()}
        return {key: record[key] for key in KEYS if record.get(key)}

    def yaml(self) -> str:
        """The text of the file."""
        text = yaml.safe_dump(self.record(), sort_keys=False, allow_unicode=True, width=110)
        if visible_lines(text) == text:
            return text
        return yaml.safe_dump(self.record(), sort_keys=False, allow_unicode=False, width=110)  # with escapes


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe file. Raises UsageError if it cannot be read or breaks a rule."""
    return parse_recipe(read_yaml(path), str(path))


def parse_recipe(record: object, where: str) -> RecipeFile:
    """What a recipe file or a manifest holds -> the recipe. Raises UsageError, which names `where`."""
    if not isinstance(record, Mapping):
        raise UsageError("not a recipe", where=where, found=f"{type(record).__name__}", required="a table of keys")
    if unknown := [f"{key!r:.100}" for key in record if key not in KEYS]:
        raise UsageError("unknown key", where=where, found=", ".join(unknown), required=f"of {', '.join(KEYS)}")
    label, base, note = record.get("label"), record.get("base"), record.get("note") or ""
    label = check_label(label, f"{where}, label")
    if not isinstance(base, str | int) or isinstance(base, bool):
        raise UsageError("no base", where=f"{where}, base", found=f"{base!r:.200}", required="a file type, like Q4_K_M")
    if not isinstance(note, str):
        raise UsageError("not a text", where=f"{where}, note", found=f"{note!r:.200}", required="text")
    return RecipeFile(label, str(base).upper(), parse_overrides(record, lambda key: f"{where}, {key}"), note)


def check_label(label: object, where: str) -> str:
    """A name of a variant, which is part of file names. Raises UsageError."""
    if not isinstance(label, str) or not re.fullmatch(r"\w[\w.-]{0,99}", label, re.ASCII):
        required = "letters, digits, dots, hyphens, underscores"
        raise UsageError("bad label", where=where, found=f"{label!r:.200}", required=required)
    return label
