"""A model that a command names: a folder, or a repository of the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from streamquant.convert.source.open import open_source
from streamquant.files.listener import Listener
from streamquant.hub.repo import hub_spec

if TYPE_CHECKING:
    from streamquant.model.variants.variant import Variant


def local_weights(model: str, listener: Listener) -> Path:
    """A local path of a model with all its weights; one on the Hub is fetched into the cache of the Hub's client."""
    if hub_spec(model) is None:
        return Path(model)
    from streamquant.convert.source.snapshot import whole_folder

    return whole_folder(open_source(model), listener)


def without_weights(model: str) -> "Variant":
    """A model of which no weight will be read: of one on the Hub only small files and headers are fetched."""
    from streamquant.model.variants.checkpoint import CheckpointVariant
    from streamquant.model.variants.open import open_variant

    if hub_spec(model) is None:
        return open_variant(Path(model))
    return CheckpointVariant(open_source(model))
