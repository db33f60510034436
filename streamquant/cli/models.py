"""A model that a command names: a folder, or a repository of the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from streamquant.convert.source.open import open_source
from streamquant.hub.repo import hub_spec

if TYPE_CHECKING:
    from streamquant.model.variants.variant import Variant
from streamquant.cli.console import error_console


def local_weights(model: str, step: Callable[[str, int, int], None] = lambda _what, _done, _total: None) -> Path:
    """A local path of a model with all its weights; one on the Hub is fetched into the cache of the Hub's client."""
    if hub_spec(model) is None:
        return Path(model)
    from streamquant.convert.source.snapshot import fetch_snapshot

    return fetch_snapshot(open_source(model), step, lambda text: error_console.print(text, markup=False))


def without_weights(model: str) -> "Variant":
    """A model of which no weight will be read: of one on the Hub only small files and headers are fetched."""
    from streamquant.model.variants.checkpoint import CheckpointVariant
    from streamquant.model.variants.open import open_variant

    if hub_spec(model) is None:
        return open_variant(Path(model))
    return CheckpointVariant(open_source(model))
