"""A whole checkpoint of the Hub on the local disk, for what reads every weight more than once: validation, imatrix."""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.hub_checkpoint import HubCheckpoint, model_folder
from streamquant.convert.source.side_files import SNAPSHOTS
from streamquant.convert.source.weights import CONFIG, INDEX
from streamquant.files.folders import nearest_folder, real_path
from streamquant.files.listener import SILENT, Listener
from streamquant.files.sizes import human_bytes
from streamquant.files.writing import explain, make_folder
from streamquant.hub.repo import FETCHING, HubRepo
from streamquant.quant.errors import StreamquantError

DISK_RESERVE = 1 << 30
"""Bytes that are left free."""


def whole_folder(checkpoint: Checkpoint, listener: Listener = SILENT) -> Path:
    """A local folder with all files of a checkpoint: its own, or for one of the Hub `fetch_snapshot`."""
    return fetch_snapshot(checkpoint, listener) if isinstance(checkpoint, HubCheckpoint) else checkpoint.folder


def fetch_snapshot(checkpoint: HubCheckpoint, listener: Listener = SILENT) -> Path:
    """A folder of the model's name with links to all files of the commit in the cache of the Hub's client.

    What is missing there is fetched, and compared with the hashes that the Hub lists. (The cache's own folder has the
    name of the commit, which would become the name of the model.) Raises StreamquantError if the disk is too small, and
    for everything that the Hub or the network says.
    """
    repo, missing = checkpoint.hub, missing_files(checkpoint)
    total = sum(repo.files[name].size for name in missing)
    if missing:
        check_cache(checkpoint)
        listener.note(
            f"{human_bytes(total)} of {repo} are fetched into the local cache, {client_cache()}: they are read whole"
        )
        listener.started(FETCHING, total, "bytes")
    for name in missing:
        _fetch(repo, name, listener)
        listener.advanced(FETCHING, repo.files[name].size)
    return _linked(repo, _names(checkpoint))


def missing_files(checkpoint: HubCheckpoint) -> list[str]:
    """The files of a checkpoint of the Hub that are not in the cache of its client."""
    return [name for name in _names(checkpoint) if checkpoint.hub.cached(name) is None]


def missing_bytes(checkpoint: HubCheckpoint) -> int:
    """And their sizes."""
    return sum(checkpoint.hub.files[name].size for name in missing_files(checkpoint))


def client_cache() -> Path:
    """The cache of the Hub's client, or the nearest folder above that exists."""
    from huggingface_hub import constants

    return nearest_folder(Path(constants.HF_HUB_CACHE))


def check_cache(checkpoint: HubCheckpoint) -> None:
    """Raise StreamquantError if the disk of the cache cannot hold what is missing."""
    required = missing_bytes(checkpoint) + DISK_RESERVE
    free = shutil.disk_usage(client_cache()).free
    if free < required:
        raise StreamquantError(
            "not enough disk space for the whole source",
            where=str(client_cache()),
            found=f"{free:,} bytes free",
            required=f"{required:,} bytes: importance matrices and validation read {checkpoint.hub} as a whole",
            hint="set HF_HOME to a larger disk, or leave `imatrix` and `validate` out and convert alone",
        )


def _names(checkpoint: HubCheckpoint) -> list[str]:
    wanted = (*(file.name for file in checkpoint.files), CONFIG, INDEX, *checkpoint.side_files)
    return [name for name in wanted if name in checkpoint.hub.files]


def _linked(repo: HubRepo, names: Sequence[str]) -> Path:
    folder = model_folder(repo, SNAPSHOTS)
    try:
        for file in names:
            cached, link = repo.cached(file), folder / file
            assert cached is not None, "it was fetched"
            make_folder(link.parent, folder)
            link.unlink(missing_ok=True)
            link.symlink_to(real_path(cached))
    except OSError as error:
        raise explain(error, folder) from error
    return folder


def _fetch(repo: HubRepo, name: str, listener: Listener) -> None:
    """One file into the cache, checked; a damaged one is removed there and fetched again."""
    from huggingface_hub import hf_hub_download

    from streamquant.hub.errors import DamagedBody, Retrying, ask

    def fetch() -> None:
        path = Path(hf_hub_download(repo.name, name, revision=repo.commit, library_name="streamquant"))
        try:
            repo.check(name, path, threading.Event())
        except DamagedBody:
            real_path(path).unlink()
            path.unlink(missing_ok=True)
            raise

    ask(fetch, repo=str(repo), what=f"fetching {name}", how=Retrying(listener))
