"""A model repository of the Hugging Face Hub at one commit: its files, parts of them by range requests, whole ones.

Everything goes through huggingface_hub's client: HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean
there, shards come by xet where the Hub offers it. The token is sent to the endpoint's own host alone: the client and
httpx drop it when they follow a redirect to another.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamquant.files.folders import real_path
from streamquant.files.listener import SILENT, Listener
from streamquant.files.worker import Stopped
from streamquant.files.writing import check_folder
from streamquant.hub.reference import MAIN, ModelReference, parse_reference
from streamquant.quant.errors import StreamquantError

COMMIT = re.compile(r"[0-9a-f]{40}")
READ_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 256 * 1024
"""What the client gathers from a connection before it writes it. Its own 10 MiB are fresh pages each time, which cost
more CPU seconds than all else in a download, and it looks up only between two of them."""
FETCHING = "fetching"
"""The task of a listener: bytes of files of the Hub."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the Hub lists it."""

    path: str
    size: int
    sha256: str | None
    """None for small files, which are in git itself."""
    git_sha1: str | None
    """The hash of git: of the file itself if there is no sha256, of a pointer otherwise."""

    @property
    def etag(self) -> str | None:
        """The hash of the file's bytes: SHA-256, or git's where there is none."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository at one commit."""

    name: str
    """ORG/NAME as the Hub spells it."""
    revision: str
    """As it was asked for: a branch, a tag or a commit."""
    commit: str
    files: Mapping[str, HubFile]
    endpoint: str
    """The address of the Hub."""
    asked: str = ""
    """ORG/NAME as it was asked for: another one if the repository was renamed."""
    listener: Listener = field(default=SILENT, compare=False, repr=False)
    """Hears of waits while headers and small files are read."""

    def __str__(self) -> str:
        return f"{self.name}@{self.commit[:12]}"

    def file(self, path: str) -> HubFile:
        """A file by its path. Raises StreamquantError if the repository does not have it."""
        if path not in self.files:
            raise StreamquantError("no such file in the repository", where=f"{self}/{path}")
        return self.files[path]

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer if it ends before. Raises StreamquantError."""
        from streamquant.hub.errors import Retrying, ask

        stop = min(stop, self.file(path).size)
        if (local := self.cached(path)) is not None:
            return self._read_cached(path, local, start, stop)
        what, how = f"reading the beginning of {path}", Retrying(self.listener)
        return ask(lambda: self._range(path, start, stop), repo=str(self), what=what, how=how)

    def _range(self, path: str, start: int, stop: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import get_session, hf_raise_for_status

        from streamquant.hub.errors import DamagedBody

        if start >= stop:
            return b""
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        url = hf_hub_url(self.name, path, revision=self.commit, endpoint=self.endpoint)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start
            data = bytearray()
            for part in response.iter_bytes():
                data += part
                if len(data) >= skip + stop - start:
                    break
        if len(data) < skip + stop - start:
            raise DamagedBody(f"{len(data)} bytes of {path} in place of {skip + stop - start}")
        return bytes(data[skip : skip + stop - start])

    def cached(self, path: str) -> Path | None:
        """The file in the local cache of the Hub's client, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, path, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def _read_cached(self, path: str, local: Path, start: int, stop: int) -> bytes:
        size = self.file(path).size
        try:
            with local.open("rb") as file:
                if (found := os.fstat(file.fileno()).st_size) != size:
                    raise _damaged(local, f"{found} bytes in place of {size}")
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise StreamquantError("cannot read a file", where=str(local), found=error.strerror) from error

    def check_cached(self, path: str, local: Path, stop: threading.Event) -> None:
        """As `check`, of a file in the client's cache. Raises StreamquantError if it differs: the cache is not ours."""
        from streamquant.hub.errors import DamagedBody

        try:
            self.check(path, local, stop)
        except DamagedBody as error:
            raise _damaged(local, str(error)) from None

    def download(self, path: str, folder: Path, listener: Listener, stop: threading.Event) -> Path:
        """Fetch a file into a folder with the Hub's client, once: (folder / path). Its bytes are not checked.

        Raises what the client raises, Stopped soon after `stop` is set, and DamagedBody for a file that does not end
        where it should: nobody fills the disk.
        """
        from huggingface_hub import hf_hub_download

        from streamquant.hub.errors import DamagedBody

        for written in (path, ".cache/huggingface/download/" + path):  # where the client has its partial files
            check_folder((folder / written).parent, folder)
        size, arrived = self.file(path).size, 0

        def count(nbytes: int) -> None:
            nonlocal arrived
            arrived += nbytes
            if arrived > size:
                raise DamagedBody(f"{path}: more than {size} bytes")
            listener.advanced(FETCHING, nbytes)

        return Path(
            hf_hub_download(
                self.name,
                path,
                revision=self.commit,
                local_dir=folder,
                tqdm_class=_meter(count, stop),
                endpoint=self.endpoint,
            )
        )

    def check(self, path: str, local: Path, stop: threading.Event) -> None:
        """Compare a local file with what the Hub says of it: size, and SHA-256 or git's hash.

        Raises DamagedBody if it differs, Stopped soon after `stop` is set, OSError.
        """
        from streamquant.hub.errors import DamagedBody

        file = self.file(path)
        size = local.stat().st_size
        if size != file.size:
            raise DamagedBody(f"{path}: {size} bytes in place of {file.size}")
        expected = file.etag
        if expected is None:
            return
        found = _hash(local, file, stop)
        if found != expected:
            raise DamagedBody(f"{path}: a hash of {found[:12]}... in place of {expected[:12]}...")


def _damaged(local: Path, found: str) -> StreamquantError:
    return StreamquantError(
        "a file in the Hub client's cache is damaged",
        where=str(local),
        found=found,
        hint="delete it; then it is fetched again",
    )


def git_blob(size: int) -> "hashlib._Hash":
    """Git's hash of a file of `size` bytes, which are still to come."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _hash(local: Path, file: HubFile, stop: threading.Event) -> str:
    """The SHA-256 of a file, or git's SHA-1 of it as a blob."""
    digest = hashlib.sha256() if file.sha256 else git_blob(file.size)
    buffer = bytearray(READ_BYTES)
    with local.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            if stop.is_set():
                raise Stopped
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _meter(on_bytes: Callable[[int], None], stop: threading.Event) -> Any:
    """A class in place of tqdm's, as the client wants it: counts bytes, and ends a download of this thread.

    hf_xet calls it from a thread of its own and would print what it raises there; such a download runs on.
    """
    from huggingface_hub.utils.tqdm import silent_tqdm

    downloading = threading.get_ident()

    class Meter(silent_tqdm):
        def update(self, n: float | None = 1) -> None:
            own = threading.get_ident() == downloading
            if stop.is_set() and own:
                raise Stopped
            try:
                on_bytes(int(n or 0))
            except Exception:
                if own:
                    raise

        def close(self) -> None:
            pass

        def set_description(self, *_arguments: object, **_more: object) -> None:
            pass

        set_description_str = set_postfix_str = refresh = set_description
        # with these xet has one bar for what arrives and for what is on the disk, and `update` gets the latter
        update_transfer = set_transfer_postfix_str = set_description

    return Meter


def open_repo(name: str, revision: str = MAIN, commit: str | None = None, listener: Listener = SILENT) -> HubRepo:
    """Resolve a revision to its commit, once, and list the files there; in offline mode by the local cache.

    `commit` is what the revision is known to have stood for; `listener` hears of waits.

    Raises UsageError for a name that cannot be one, StreamquantError for everything that the Hub or the network says.
    """
    from huggingface_hub import HfApi, constants

    from streamquant.hub.client import set_up_client
    from streamquant.hub.errors import Retrying, ask

    set_up_client()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    if constants.is_offline_mode():
        return _cached_repo(name, revision, commit)
    api = HfApi(library_name="streamquant")
    info = ask(
        lambda: api.model_info(name, revision=commit or revision, files_metadata=True),
        repo=f"{name}@{revision}",
        what="no such folder here; listing the files",
        how=Retrying(listener),
    )
    if not isinstance(info.sha, str) or COMMIT.fullmatch(info.sha) is None:
        raise StreamquantError("the Hub names no commit", where=f"{name}@{revision}", found=repr(info.sha)[:100])
    if not isinstance(info.id, str) or parse_reference(info.id) != ModelReference(info.id):
        raise StreamquantError(
            "the Hub calls the repository by a name that cannot be one", where=name, found=repr(info.id)[:100]
        )
    return HubRepo(info.id, revision, info.sha, _files(name, info.siblings or []), api.endpoint, name, listener)


def _files(name: str, siblings: Iterable[Any]) -> dict[str, HubFile]:
    """The files that the Hub lists (huggingface_hub.hf_api.RepoSibling), by path. It may say anything."""
    files: dict[str, HubFile] = {}
    for entry in siblings:
        path, size = entry.rfilename, entry.size
        where = f"{name}/{path!r:.200}"
        if not isinstance(path, str) or path in files:
            raise StreamquantError("the Hub's list of files is broken", where=where, found="not a name, or twice")
        if type(size) is not int or size < 0:
            raise StreamquantError(
                "the Hub's list of files is broken", where=where, found=f"a size of {size!r:.100}", required="bytes"
            )
        sha256 = _hex(entry.lfs.sha256 if entry.lfs else None, 64)
        files[path] = HubFile(path, size, sha256, _hex(entry.blob_id, 40))
    return files


def _hex(text: object, length: int) -> str | None:
    return text if isinstance(text, str) and len(text) == length and re.fullmatch("[0-9a-f]*", text) else None


def _cached_repo(name: str, revision: str, commit: str | None) -> HubRepo:
    """What the client's cache holds of a repository: the snapshot that a revision stood for when it was fetched."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=commit or revision)
    if not isinstance(config, str):
        raise StreamquantError(
            "not in the local cache, and the Hub is switched off",
            where=f"{name}@{revision}",
            found="HF_HUB_OFFLINE=1",
            hint="unset HF_HUB_OFFLINE, or fetch it first: hf download " + name,
        )
    snapshot = Path(config).parent
    files = {}
    for path in sorted(snapshot.rglob("*")):
        if path.is_file():
            blob = real_path(path).name  # in the cache a file is a link to a blob, which is named by its hash
            relative = path.relative_to(snapshot).as_posix()
            files[relative] = HubFile(relative, path.stat().st_size, _hex(blob, 64), _hex(blob, 40))
    return HubRepo(name, revision, snapshot.name, files, constants.ENDPOINT, name)
