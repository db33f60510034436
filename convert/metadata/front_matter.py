"""The front matter of a model card: a stranger's YAML, read with suspicion.

It is read without types and without aliases: a licence "no" stays a text, nested aliases cannot grow.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from streamquant.files.reading import open_regular
from streamquant.quant.errors import StreamquantError

CARD = "README.md"
MAX_FRONT_MATTER = 256 * 1024
"""Bytes: a hundred times the usual."""
DEEPEST = 16
"""Levels of lists and mappings: deep ones take a parser forever."""
_OPENS = (
    yaml.FlowSequenceStartToken
    | yaml.FlowMappingStartToken
    | yaml.BlockSequenceStartToken
    | yaml.BlockMappingStartToken
)
_CLOSES = yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken | yaml.BlockEndToken
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\r|\n|\Z)", re.DOTALL)


def read_front_matter(path: Path) -> Mapping[str, Any]:
    """The front matter of a README.md, every scalar a text; an empty record without any.

    Raises StreamquantError for YAML that is broken, has aliases or tags of types, or does not end within
    MAX_FRONT_MATTER bytes.
    """
    try:
        with open_regular(path) as file:
            text = file.read(MAX_FRONT_MATTER).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error
    text = text.replace("\t", "  ")  # YAML has no tabs; gguf-py's reader of model cards does the same
    match = _FRONT_MATTER.match(text)
    if match is None:
        if re.match(r"\s*---[ \t]*[\r\n]", text):
            raise _broken(path, "the front matter does not end", f"a line --- within {MAX_FRONT_MATTER:,} bytes")
        return {}
    return _parse(match[1], path)


def front_matter_notes(folder: Path) -> list[str]:
    """What a plan says of a card from which `streamquant card` can take neither licence nor languages."""
    if not (folder / CARD).is_file():
        return []
    try:
        read_front_matter(folder / CARD)
    except StreamquantError as error:
        return [
            f"WARNING: {CARD}: {error.what} ({error.found}): `streamquant card` will refuse it. Correct or remove the"
            " front matter before the conversion: the copy in an FP8 folder has the same fault"
        ]
    return []


class _Loader(yaml.BaseLoader):
    """Every scalar is a text."""


def _parse(text: str, path: Path) -> Mapping[str, Any]:
    try:
        depth = 0
        for token in yaml.scan(text, _Loader):
            depth += isinstance(token, _OPENS) - isinstance(token, _CLOSES)
            if depth > DEEPEST:
                raise _broken(path, "nested too deeply", f"at most {DEEPEST} levels")
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken):
                line = token.start_mark.line + 2
                raise _broken(path, f"an alias, an anchor or a tag in line {line}", "plain values")
        record = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _broken(path, " ".join(f"{error}".split())[:300] or "nested too deeply", "YAML") from error
    if record in (None, ""):
        return {}
    if not isinstance(record, dict):
        raise _broken(path, type(record).__name__, "keys and values")
    return record


def _broken(path: Path, found: str, required: str) -> StreamquantError:
    return StreamquantError(
        "broken model card",
        where=f"{path}, front matter between the lines ---",
        found=found,
        required=required,
        hint="correct or remove the front matter",
    )
