"""The model card of the original, read with suspicion: licence, languages and tags, and nothing else.

Only values of the shape that the Hub takes come out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamquant.convert.metadata.front_matter import read_front_matter

LONGEST = 128
"""Characters of a value."""
MOST_TAGS = 64
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
    """What the front matter of a README.md says; an empty record without any.

    Raises StreamquantError as `read_front_matter` does.
    """
    return base_card(read_front_matter(path))


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


def _texts(value: object, shape: re.Pattern[str]) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    kept = [item for item in values if isinstance(item, str) and len(item) <= LONGEST and shape.fullmatch(item)]
    return tuple(dict.fromkeys(kept))


def _first(value: object, shape: re.Pattern[str]) -> str | None:
    return next(iter(_texts(value, shape)), None)


def _link(value: object) -> str | None:
    link = _first(value, _LINK)
    return None if link is None or ".." in link.split("/") else link
