"""A model that a caller names: a folder, a file, or a repository of the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from streamquant.convert.source.checkpoint import Checkpoint, open_checkpoint
from streamquant.convert.source.open import open_source
from streamquant.files.listener import SILENT, Listener
from streamquant.hub.reference import hub_reference

if TYPE_CHECKING:
    from streamquant.model.variants.variant import Variant

Model = str | Path
"""A Path is a local file or folder. A str is one too if it exists, else ORG/NAME[@REVISION] on the Hugging Face Hub."""


def open_model(model: Model, out: Path | None = None, listener: Listener = SILENT) -> Checkpoint:
    """The checkpoint of a model; of one on the Hub only small files and headers are fetched.

    A conversion into `out` that was interrupted goes on with the commit that it began with. `listener` hears of waits
    for the Hub. Raises UsageError and StreamquantError.
    """
    return open_checkpoint(model) if isinstance(model, Path) else open_source(model, out=out, listener=listener)


def local_weights(model: Model, listener: Listener = SILENT) -> Path:
    """A local path of a model with all its weights; one on the Hub is fetched into the cache of the Hub's client."""
    if isinstance(model, Path) or hub_reference(model) is None:
        return Path(model)
    from streamquant.convert.source.snapshot import whole_folder

    return whole_folder(open_source(model, listener=listener), listener)


def without_weights(model: Model, listener: Listener = SILENT) -> "Variant":
    """A model of which no weight will be read: of one on the Hub only small files and headers are fetched."""
    from streamquant.model.variants.checkpoint import CheckpointVariant
    from streamquant.model.variants.open import open_original

    if isinstance(model, Path) or hub_reference(model) is None:
        return open_original(Path(model))
    original = CheckpointVariant(open_source(model, listener=listener))
    original.check_explained()
    return original
