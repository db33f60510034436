"""A whole checkpoint of the Hub on the local disk, for what reads every weight more than once: validation, imatrix."""

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from streamquant.convert.source.checkpoint import CONFIG, INDEX, Checkpoint
from streamquant.convert.source.open import model_folder
from streamquant.files.folders import nearest_folder
from streamquant.files.sizes import human_bytes
from streamquant.files.writing import explain
from streamquant.hub.repo import HubRepo
from streamquant.quant.errors import StreamquantError

DISK_RESERVE = 1 << 30
"""Bytes that are left free."""


def fetch_snapshot(
    checkpoint: Checkpoint,
    on_step: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
    on_note: Callable[[str], None] = lambda _text: None,
) -> Path:
    """A folder of the model's name with links to all files of the commit in the cache of the Hub's client.

    What is missing there is fetched, and compared with the hashes that the Hub lists. (The cache's own folder has the
    name of the commit, which would become the name of the model.) Raises StreamquantError if the disk is too small, and
    for everything that the Hub or the network says.
    """
    repo, missing = _repo(checkpoint), missing_files(checkpoint)
    total = sum(repo.files[name].size for name in missing)
    if missing:
        check_cache(checkpoint)
        on_note(
            f"{human_bytes(total)} of {repo} are fetched into the local cache, {client_cache()}: they are read whole"
        )
    done = 0
    for name in missing:
        on_step("fetching: MB", done // 10**6, total // 10**6)
        _fetch(repo, name)
        done += repo.files[name].size
    return _linked(repo, _names(checkpoint))


def missing_files(checkpoint: Checkpoint) -> list[str]:
    """The files of a checkpoint of the Hub that are not in the cache of its client."""
    return [name for name in _names(checkpoint) if _repo(checkpoint).cached(name) is None]


def missing_bytes(checkpoint: Checkpoint) -> int:
    """And their sizes."""
    return sum(_repo(checkpoint).files[name].size for name in missing_files(checkpoint))


def client_cache() -> Path:
    """The cache of the Hub's client, or the nearest folder above that exists."""
    from huggingface_hub import constants

    return nearest_folder(Path(constants.HF_HUB_CACHE))


def check_cache(checkpoint: Checkpoint) -> None:
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


def _repo(checkpoint: Checkpoint) -> HubRepo:
    assert checkpoint.hub is not None, "only a checkpoint of the Hub is fetched"
    return checkpoint.hub


def _names(checkpoint: Checkpoint) -> list[str]:
    wanted = (*(file.name for file in checkpoint.files), CONFIG, INDEX, *checkpoint.side_files)
    return [name for name in wanted if name in _repo(checkpoint).files]


def _linked(repo: HubRepo, names: Sequence[str]) -> Path:
    folder = model_folder(repo, "snapshots")
    try:
        for file in names:
            cached, link = repo.cached(file), folder / file
            assert cached is not None, "it was fetched"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(cached.resolve())
    except OSError as error:
        raise explain(error, folder) from error
    return folder


def _fetch(repo: HubRepo, name: str) -> None:
    """One file into the cache, checked; a damaged one is removed there and fetched again."""
    from huggingface_hub import hf_hub_download

    from streamquant.hub.errors import DamagedBody, ask

    def fetch() -> None:
        path = Path(hf_hub_download(repo.name, name, revision=repo.commit, library_name="streamquant"))
        try:
            repo.check(name, path, threading.Event())
        except DamagedBody:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise

    ask(fetch, repo=str(repo), what=f"fetching {name}")
