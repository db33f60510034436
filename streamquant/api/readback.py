"""`inspect` and `verify`: what is in files, and whether it is what was written."""

from pathlib import Path

from streamquant.api.models import Model, local_weights
from streamquant.api.paths import paths_told
from streamquant.convert.recipes.calibration import Calibration
from streamquant.convert.recipes.imatrix import ImportanceMatrix
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.listener import SILENT, Listener
from streamquant.validate.readback import verify as readback
from streamquant.validate.readback.inspect import StoredFile, inspect_path
from streamquant.validate.readback.verify import VerifiedVariant


@paths_told
def inspect(path: str | Path) -> list[StoredFile]:
    """Read the headers of a GGUF or safetensors file of any publisher, or of all files in a folder.

    Returns a record for each file: tensors with shape, type and bytes, and metadata.

    Raises:
        UsageError: for a folder without such files.
        StreamquantError: for a broken file.
    """
    return inspect_path(Path(path))


@paths_told
def verify(
    folder: str | Path,
    source: Model | None = None,
    imatrix: ImportanceMatrix | None = None,
    *,
    calibration: Calibration | None = None,
    listener: Listener = SILENT,
) -> list[VerifiedVariant]:
    """Read back what `convert` wrote: hashes against the manifest and, with a source, every byte against the model.

    Args:
        folder: a folder that `convert` wrote, or the output folder that holds several.
        source: the model that was converted. Every tensor is encoded again and compared byte for byte, and decoded and
            compared with the weights, which gives the error of each variant (SQNR, in dB).
        imatrix: the importance matrix that the variants were made with; needed with a source.
        calibration: likewise the calibration.
        listener: hears of the tasks "verifying" and "fetching" in bytes.

    Returns a record for each variant. Its `problems` are empty if all is well; problems are not raised.

    Raises:
        UsageError: for a folder without a manifest, and for a missing or another importance matrix or calibration.
        StreamquantError: for a broken manifest or a source that cannot be read.
    """
    folder = Path(folder)
    total = readback.bytes_to_verify(folder, with_source=source is not None)
    checkpoint = None if source is None else open_checkpoint(local_weights(source, listener))
    listener.started(readback.VERIFYING, total, "bytes")
    return readback.verify(folder, checkpoint, imatrix, listener, calibration)
