"""Xet without its storage service: hf_xet itself keeps the chunks in a folder, with `local://FOLDER` for a URL.

The Hub gives out that URL with its tokens, so the client chunks, deduplicates, uploads and downloads by hf_xet as ever,
but no bytes pass through the Hub: the record does not show them and faults do not reach them. What has been uploaded is
found in the shards (.mdb) of that folder: 48-byte records, of which a file's first holds its xet hash, flags and number
of segments, each segment's its bytes, and the last the sha256. Checked with hf_xet 1.8.0. One process at a time can
have the folder open; the Hub waits for its turn.
"""

import contextlib
import struct
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.hub.blobs import Blob, BytesBlob, FileBlob, SparseFile
from tests.hub.protocol import KIND, REPO, REVISION, Answer, Call, HubError, json_answer, route
from tests.hub.reading import find_commit, find_repo
from tests.hub.writing import require_write

RECORD = 48
VERIFICATION, METADATA = 1 << 31, 1 << 30  # flags: what follows a file's segments
END = b"\xff" * 32
TURN_SECONDS = 20.0
TOKEN_SECONDS = 3600


class XetStore:
    """The folder of chunks and what is known of the files in it."""

    def __init__(self, root: Path) -> None:
        self.chunks = root / "chunks"
        self._files = root / "files"
        self._hashes: dict[str, str] = {}  # sha256 -> xet hash
        self._shards: set[Path] = set()
        self._sizes: dict[str, int] = {}
        self._lock = threading.RLock()
        for folder in (self.chunks, self._files):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """What stands for the URL of the storage service."""
        return f"local://{self.chunks}"

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunks: what uploads have added, after deduplication and compression."""
        return sum(path.stat().st_size for path in self.chunks.rglob("xorbs/default.*") if path.suffix != ".tagset")

    def find(self, sha256: str) -> Blob | None:
        """The file with that sha256, when it has been uploaded."""
        with self._lock:
            for path in set(self.chunks.rglob("shards/*.mdb")) - self._shards:
                with contextlib.suppress(struct.error):  # a shard that is being written: it is read the next time
                    for xet_hash, digest, size in read_shard(path.read_bytes()):
                        self._hashes[digest], self._sizes[digest] = xet_hash, size
                    self._shards.add(path)
            return XetBlob(self, sha256, self._sizes[sha256]) if sha256 in self._hashes else None

    def hash_of(self, blob: Blob) -> str | None:
        """The xet hash of a file, which is put in at first need; None for virtual files, which go by HTTP."""
        if isinstance(blob, SparseFile):
            return None
        with self._lock:
            if self.find(blob.sha256) is None:
                self._put(blob)
                self.find(blob.sha256)
            return self._hashes[blob.sha256]

    def fetch(self, sha256: str) -> FileBlob:
        """A file put together from its chunks."""
        path = self._files / sha256
        with self._lock:
            if not path.exists():
                with self._turn() as session, session.new_file_download_group(endpoint=self.url) as group:
                    info = import_module("hf_xet").XetFileInfo(self._hashes[sha256], self._sizes[sha256])
                    group.start_download_file(info, str(path))
            return FileBlob(path)

    def _put(self, blob: Blob) -> None:
        with self._turn() as session, session.new_upload_commit(endpoint=self.url) as commit:
            if isinstance(blob, FileBlob):
                commit.start_upload_file(str(blob.path), sha256=blob.sha256)
            elif isinstance(blob, BytesBlob):
                commit.start_upload_bytes(blob.data, sha256=blob.sha256)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[Any]:
        """A session once no other process has the folder open."""
        end = time.monotonic() + TURN_SECONDS
        while True:
            session = import_module("hf_xet").XetSession()
            try:
                with session.new_upload_commit(endpoint=self.url):
                    break
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield session


class XetBlob(Blob):
    """A file in the folder of chunks."""

    def __init__(self, store: XetStore, sha256: str, size: int) -> None:
        self._store = store
        self.size = size
        self.__dict__["sha256"] = sha256

    def chunks(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        yield from self._store.fetch(self.sha256).chunks(start, stop)


def read_shard(data: bytes) -> Iterator[tuple[str, str, int]]:
    """Xet hash, sha256 and bytes of every file of a shard whose sha256 is told."""
    at = RECORD
    while data[at : at + 32] != END:
        xet_hash, flags, segments, _ = struct.unpack_from("<32sIIQ", data, at)
        at += RECORD
        size = sum(struct.unpack_from("<I", data, at + RECORD * i + 36)[0] for i in range(segments))
        at += RECORD * segments * (2 if flags & VERIFICATION else 1)
        if flags & METADATA:
            yield _hex(xet_hash), _hex(data[at : at + 32]), size
            at += RECORD


def _hex(digest: bytes) -> str:
    # hf_xet holds a hash as four little-endian 64-bit numbers and writes it as their hexadecimal digits.
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


@route("GET", rf"/api/{KIND}/{REPO}/xet-(?P<right>read|write)-token/{REVISION}")
def xet_token(call: Call) -> Answer:
    """The URL of the folder and a token of an hour, for whoever may read or write."""
    repo = find_repo(call)
    if call.hub.xet is None:
        raise HubError(404, "this Hub has no xet")
    if call.groups["right"] == "write":
        require_write(call, repo, pull=True)
    elif call.groups["revision"] != "None":
        find_commit(call, repo)
    expires = int(time.time()) + TOKEN_SECONDS
    headers = {
        "X-Xet-Cas-Url": call.hub.xet.url,
        "X-Xet-Access-Token": "xet",
        "X-Xet-Token-Expiration": str(expires),
    }
    return json_answer({"casUrl": call.hub.xet.url, "accessToken": "xet", "exp": expires}, headers=headers)
