"""A checkpoint of the Hub: planned from the headers of its shards, a few MB, and from its small files."""

import contextlib
import hashlib
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from streamquant.convert.source.checkpoint import (
    MAX_CONFIG,
    Checkpoint,
    SourceFile,
    as_source,
    check_dtypes,
    collect_tensors,
    reading_notes,
)
from streamquant.convert.source.config_as_stored import read_config
from streamquant.convert.source.passed_over import Shards, passed_over_note
from streamquant.convert.source.side_files import is_side_file
from streamquant.convert.source.weights import CONFIG, INDEX, SINGLE_FILE, Place, Weights, find_weights
from streamquant.files.folders import cache_folder
from streamquant.files.listener import SILENT
from streamquant.files.safetensors_file import SafetensorsTensor, header_length, parse_header
from streamquant.files.strict_json import MAX_BYTES, read_json_object
from streamquant.files.writing import make_folder, replacing
from streamquant.hub.repo import HubRepo
from streamquant.quant.errors import StreamquantError

FIRST_BYTES = 8 * 1024
"""Bytes of a shard that are read at first: most headers are shorter. (191 shards of Hermes 4 405B: 1.6 MB.)"""
REQUESTS = 16
"""Headers that are read at once."""
COMPARED = 8
"""Tensors, evenly spread, whose beginnings are compared where model.safetensors stands beside an index: two requests
each."""
PLANNED = frozenset((".json", ".jinja", ".model", ".txt", ".md"))
"""Suffixes of files that planning may read: config, tokenizer, templates, model card."""
TOKENIZER_CODE = "tokenization_"
"""What names of files begin with that planning may read too (convert/metadata/tiktoken.py)."""


@dataclass(frozen=True, slots=True)
class HubCheckpoint(Checkpoint):
    """A checkpoint of the Hub: shards have to be fetched, all else is in the folder when it is needed."""

    hub: HubRepo

    def check_unchanged(self) -> None:
        """See Checkpoint.check_unchanged: a commit and its hashes cannot change."""

    def where(self, shard: str) -> str:
        """See Checkpoint.where."""
        return f"{self.hub}/{shard}"

    def read_range(self, shard: str, start: int, stop: int) -> bytes:
        """See Checkpoint.read_range."""
        return self.hub.read_range(shard, start, stop)

    @property
    def source(self) -> str:
        """See Checkpoint.source."""
        return str(self.hub)


def open_hub_checkpoint(repo: HubRepo) -> HubCheckpoint:
    """Read the config, the index and the headers of all shards of a repository; no weight.

    Raises StreamquantError for everything in it that is missing or broken.
    """
    folder = side_folder(repo)
    side, ignored = _other_files(repo)
    for name, most in ((CONFIG, MAX_CONFIG), (INDEX, MAX_BYTES)):
        if name in repo.files and repo.files[name].size > most:
            raise StreamquantError(
                "JSON file too large", where=f"{repo}/{name}", found=f"{repo.files[name].size:,} bytes", required=most
            )
    place = _place(repo, folder)
    weights = _weights(repo, place)
    planned = [
        name for name in (CONFIG, *side) if PurePosixPath(name).suffix in PLANNED or name.startswith(TOKENIZER_CODE)
    ]
    _fetch(repo, planned, folder)
    config = read_config(place)
    files = []
    stored: dict[str, list[SafetensorsTensor]] = {}
    for name, data in zip(weights.shards, _read_headers(repo, weights.shards), strict=True):
        file = repo.file(name)
        stored[name] = _tensors(repo, name, data)
        files.append(SourceFile(name, file.size, 0, hashlib.sha256(data).hexdigest(), file.etag))
    tensors = collect_tensors(stored, weights, str(repo), config)
    notes = [*reading_notes(place, weights, stored, config)]
    if weights.passed_over:
        notes.append(passed_over_note(place, _shards(repo), stored[SINGLE_FILE]))
    checkpoint = as_source(
        HubCheckpoint(folder, config, tuple(files), tensors, side, ignored, repo, notes=tuple(notes))
    )
    check_dtypes(checkpoint)
    return checkpoint


def fetch_side_files(checkpoint: HubCheckpoint) -> None:
    """Fetch those side files that planning had no use for. Raises StreamquantError."""
    _fetch(checkpoint.hub, checkpoint.side_files, checkpoint.folder)


def model_folder(repo: HubRepo, kind: str) -> Path:
    """A folder in the user's cache for a commit. Its last part is the model's name, which goes into file names."""
    organization, name = repo.name.split("/")
    return cache_folder() / kind / f"{organization}--{name}" / repo.commit / name


def side_folder(repo: HubRepo) -> Path:
    """Where the small files of a repository are kept. Raises StreamquantError if it cannot be made."""
    folder = model_folder(repo, "hub")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StreamquantError(
            "cannot write to the cache", where=str(folder), found=error.strerror, hint="set XDG_CACHE_HOME"
        ) from error
    return folder


def _fetch(repo: HubRepo, names: Sequence[str], folder: Path) -> None:
    """Fetch files into the folder unless they are there already as the Hub lists them."""
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="files") as pool:
        list(pool.map(lambda name: _fetch_one(repo, name, folder), names))


def _fetch_one(repo: HubRepo, name: str, folder: Path) -> None:
    from streamquant.hub.errors import DamagedBody, Retrying, ask

    never = threading.Event()
    local = folder / name

    def fetch() -> None:
        with contextlib.suppress(FileNotFoundError, DamagedBody):
            repo.check(name, local, never)
            return
        if (cached := repo.cached(name)) is not None:
            repo.check_cached(name, cached, never)
            make_folder(local.parent, folder)
            with cached.open("rb") as source, replacing(local, shared=True) as copy:
                shutil.copyfileobj(source, copy)
            return
        local.unlink(missing_ok=True)  # the client would take its own word for a file that is there
        repo.download(name, folder, SILENT, never)
        repo.check(name, local, never)

    ask(fetch, repo=str(repo), what=f"fetching {name}", how=Retrying(repo.listener))


def _place(repo: HubRepo, folder: Path) -> Place:
    def read(name: str) -> dict[str, Any]:
        _fetch(repo, [name], folder)
        return read_json_object(folder / name, MAX_CONFIG if name == CONFIG else MAX_BYTES)

    return Place(str(repo), frozenset(name for name in repo.files if "/" not in name), read)


def _weights(repo: HubRepo, place: Place) -> Weights:
    """The files of the weights; all of them are in the repository."""
    from huggingface_hub import is_offline_mode

    weights = find_weights(place)
    if missing := [name for name in weights.shards if name not in repo.files]:
        raise StreamquantError(
            "missing shard",
            where=f"{repo}/{missing[0]}",
            found=f"{len(missing)} of {len(weights.shards)} shards of the index are not in the repository"
            + (", as far as it is in the local cache" if is_offline_mode() else ""),
        )
    return weights


def _shards(repo: HubRepo) -> Shards:
    def headers(names: Sequence[str]) -> list[list[SafetensorsTensor]]:
        return [_tensors(repo, name, data) for name, data in zip(names, _read_headers(repo, names), strict=True)]

    return Shards(repo.files.__contains__, headers, repo.read_range, COMPARED)


def _tensors(repo: HubRepo, name: str, header: bytes) -> list[SafetensorsTensor]:
    return list(parse_header(header, repo.file(name).size, f"{repo}/{name}")[0].values())


def _read_headers(repo: HubRepo, names: Sequence[str]) -> list[bytes]:
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="headers") as pool:
        return list(pool.map(lambda name: _read_header(repo, name), names))


def _read_header(repo: HubRepo, name: str) -> bytes:
    """The header of a shard with its length prefix, by one or two range requests."""
    file, where = repo.file(name), f"{repo}/{name}"
    data = repo.read_range(name, 0, FIRST_BYTES)
    stop = 8 + header_length(data[:8], file.size, where)
    return data[:stop] if stop <= len(data) else data + repo.read_range(name, len(data), stop)


def _other_files(repo: HubRepo) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As of a folder: (side files that come along, files and folders that do not)."""
    side: list[str] = []
    ignored: set[str] = set()
    for name, file in sorted(repo.files.items()):
        top, _, rest = name.partition("/")
        if name in (CONFIG, INDEX) or top.startswith(".") or name.endswith(".safetensors"):
            continue
        if is_side_file(name, file.size):
            side.append(name)
        else:
            ignored.add(f"{top}/" if rest else name)
    return tuple(side), tuple(sorted(ignored - {f"{name.partition('/')[0]}/" for name in side if "/" in name}))
