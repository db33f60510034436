"""The model card of the original, read with suspicion: licence, languages and tags, and nothing else.

Its front matter is a stranger's YAML. It is read without types and without aliases (a licence "no" stays a text, nested
aliases cannot grow), and only values of the shape that the Hub takes come out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streamquant.files.reading import open_regular
from streamquant.quant.errors import StreamquantError

MAX_FRONT_MATTER = 256 * 1024
"""Bytes: a hundred times the usual."""
LONGEST = 128
"""Characters of a value."""
MOST_TAGS = 64
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
_SLUG = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_TAG = re.compile(r"[A-Za-z0-9][\w .+/:-]*", re.ASCII)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_LICENSE_NAME = re.compile(r"[\w .,()+/&-]+")
_LINK = re.compile(r"https?://[^\s<>\"'`\\|]+|[\w][\w./ -]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class BaseCard:
    """What a card of ours takes from the original's. Every text is one line, printable, of the shape of its kind."""

    license: tuple[str, ...] = ()
    """Ids, as the Hub has them."""
    license_name: str | None = None
    license_link: str | None = None
    """https://..., or a path in the repository of the original."""
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    base_model: str | None = None
    """ORG/NAME; of a card of ours."""
    quantized_by: str | None = None


def read_base_card(path: Path) -> BaseCard:
    """The front matter of a README.md; an empty record without any.

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
        return BaseCard()
    return base_card(_parse(match[1], path))


def base_card(record: Mapping[str, Any]) -> BaseCard:
    """A record of front matter; values of another shape are left out."""
    return BaseCard(
        license=_texts(record.get("license"), _SLUG),
        license_name=_first(record.get("license_name"), _LICENSE_NAME),
        license_link=_link(record.get("license_link")),
        language=_texts(record.get("language"), _LANGUAGE),
        tags=_texts(record.get("tags"), _TAG)[:MOST_TAGS],
        pipeline_tag=_first(record.get("pipeline_tag"), _SLUG),
        base_model=_first(record.get("base_model"), _REPO),
        quantized_by=_first(record.get("quantized_by"), _NAME),
    )


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


def _texts(value: object, shape: re.Pattern[str]) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    kept = [item for item in values if isinstance(item, str) and len(item) <= LONGEST and shape.fullmatch(item)]
    return tuple(dict.fromkeys(kept))


def _first(value: object, shape: re.Pattern[str]) -> str | None:
    return next(iter(_texts(value, shape)), None)


def _link(value: object) -> str | None:
    link = _first(value, _LINK)
    return None if link is None or ".." in link.split("/") else link
