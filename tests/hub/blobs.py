"""What the Hub serves: bytes in memory, a file on disk, or a virtual file of a header and zeros.

A blob knows its size, the sha256 of its content (the oid and ETag of an LFS file) and the SHA-1 that git gives it (the
oid and ETag of a regular file). Hashes of files on disk are computed at first need and kept by path, size and mtime.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

CHUNK = 1 << 20
HONEST_HASH_LIMIT = 256 << 20  # a virtual file above this many bytes has an invented sha256
ZEROS = memoryview(bytes(CHUNK))


class Blob(ABC):
    """Immutable content of a file."""

    size: int

    @abstractmethod
    def chunks(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """The bytes start..stop, in pieces of at most CHUNK bytes."""

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the content."""
        digest = hashlib.sha256()
        for chunk in self.chunks(0, self.size):
            digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def git_sha(self) -> str:
        """SHA-1 of the content as a git blob."""
        digest = hashlib.sha1(b"blob %d\0" % self.size)
        for chunk in self.chunks(0, self.size):
            digest.update(chunk)
        return digest.hexdigest()

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes start..stop as one object."""
        return b"".join(bytes(chunk) for chunk in self.chunks(start, self.size if stop is None else stop))


class BytesBlob(Blob):
    """Content in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def chunks(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        view = memoryview(self.data)
        for at in range(start, stop, CHUNK):
            yield view[at : min(at + CHUNK, stop)]


class FileBlob(Blob):
    """Content of a file on disk, which must not change while it is served; sent by os.sendfile."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        self.path = path
        self.size = path.stat().st_size
        if sha256 is not None:
            self.__dict__["sha256"] = sha256

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the content."""
        return _file_sha256(str(self.path), self.size, self.path.stat().st_mtime_ns)

    def chunks(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        with self.path.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
                yield chunk
                start += len(chunk)


@lru_cache(maxsize=4096)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SparseFile(Blob):
    """`header`, then zeros up to `size` bytes, without disk or memory: a shard in the shape of a model of any size.

    Above HONEST_HASH_LIMIT bytes the sha256 is invented (of header and size), unless given: such a file is for reading
    headers from, not for downloading.
    """

    def __init__(self, header: bytes, size: int, sha256: str | None = None) -> None:
        if size < len(header):
            raise ValueError(f"size {size} is less than the {len(header)} bytes of the header")
        self.header = header
        self.size = size
        if sha256 is None and size > HONEST_HASH_LIMIT:
            sha256 = hashlib.sha256(b"sparse %d %b" % (size, header)).hexdigest()
        if sha256 is not None:
            self.__dict__["sha256"] = sha256

    def chunks(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        view = memoryview(self.header)
        for at in range(start, min(stop, len(view)), CHUNK):
            yield view[at : min(at + CHUNK, stop, len(view))]
        for at in range(max(start, len(view)), stop, CHUNK):
            yield ZEROS[: min(CHUNK, stop - at)]


Content = bytes | Path | Blob


def as_blob(content: Content) -> Blob:
    """A blob of bytes, of the file at a path, or the blob itself."""
    match content:
        case bytes():
            return BytesBlob(content)
        case Path():
            return FileBlob(content)
    return content
