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

from streamquant.convert.recipes.overrides import MAX_BYTES, Overrides, parse_overrides
from streamquant.quant.errors import UsageError

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
        return yaml.safe_dump(self.record(), sort_keys=False, allow_unicode=True, width=110)


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe file. Raises UsageError if it cannot be read or breaks a rule."""
    return parse_recipe(read_yaml(path), str(path))


def read_yaml(path: Path) -> object:
    """What a YAML file of bounded size holds, without repeated keys, anchors and tags. Raises UsageError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UsageError("file too large", where=str(path), required=f"at most {MAX_BYTES:,} bytes")
        return yaml.load(content.decode(), _Loader)
    except OSError as error:
        raise UsageError("cannot read a file", where=str(path), found=error.strerror) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError("broken YAML", where=str(path), found=f"{error}"[:500] or "nested too deeply") from error


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
    return RecipeFile(label, str(base).upper(), parse_overrides(record, where), note)


def check_label(label: object, where: str) -> str:
    """A name of a variant, which is part of file names. Raises UsageError."""
    if not isinstance(label, str) or not re.fullmatch(r"\w[\w.-]{0,99}", label, re.ASCII):
        required = "letters, digits, dots, hyphens, underscores"
        raise UsageError("bad label", where=where, found=f"{label!r:.200}", required=required)
    return label


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML would take the last, and anchors, which no recipe needs."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"key {', '.join(sorted(twice))[:100]!r} occurs twice")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not allowed")
        return super().compose_node(parent, index)
