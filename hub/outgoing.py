"""Files on their way to the Hub: what is there, what is to be sent, and how far it was sent."""

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import CommitOperationAdd

from streamquant.files.hashing import sha256_of
from streamquant.files.listener import Listener
from streamquant.files.reading import check_regular, open_regular
from streamquant.files.worker import Stopped
from streamquant.hub.repo import git_blob
from streamquant.quant.errors import StreamquantError

UPLOADING = "uploading"
"""The task that a listener hears of, in bytes."""


@dataclass(frozen=True, slots=True)
class Held:
    """A file as the Hub lists it."""

    size: int
    sha256: str | None
    """None for a file that is in git itself."""
    git_sha1: str
    """Git's hash of the file, or of its pointer if there is a sha256."""

    def is_same(self, file: "Outgoing") -> bool:
        """Whether it has the bytes of a file. Reads it unless its size differs or its sha256 is known."""
        if self.size != file.size:
            return False
        if self.sha256 is not None:
            return self.sha256 == file.hash_of_content()
        return file.file is not None and self.git_sha1 == git_sha1(file.file)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file to send."""

    path: str
    """In the repository, with slashes."""
    file: Path | None
    """None: it is on the disk no more, and should be there already."""
    size: int
    sha256: str | None
    """None: not known yet."""

    def hash_of_content(self) -> str:
        """The SHA-256, read from the file if it is not known."""
        if self.sha256 is not None:
            return self.sha256
        assert self.file is not None, "a file without a known hash is there"
        return sha256_of(self.file)


def git_sha1(path: Path) -> str:
    """The hash of git of a small file, in hexadecimal."""
    with open_regular(path) as file:
        data = file.read()
    digest = git_blob(len(data))
    digest.update(data)
    return digest.hexdigest()


class Meter:
    """Counts the bytes of a file that were sent, each once, however often an upload begins again."""

    def __init__(self, size: int, listener: Listener, stop: threading.Event) -> None:
        self._size, self._listener, self._stop = size, listener, stop
        self._counted = 0

    def reached(self, position: int) -> None:
        """The bytes before `position` are on their way. Raises Stopped."""
        if self._stop.is_set():
            raise Stopped
        if position > self._counted:
            self._listener.advanced(UPLOADING, position - self._counted)
            self._counted = position

    def complete(self) -> None:
        """The file is there."""
        self._listener.advanced(UPLOADING, self._size - self._counted)
        self._counted = self._size


class MeteredFile(io.BufferedReader):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, meter: Meter) -> None:
        check_regular(path)
        super().__init__(io.FileIO(path))
        self._meter = meter

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. Raises Stopped."""
        data = super().read(size)
        self._meter.reached(self.tell())
        return data


class Addition(CommitOperationAdd):
    """The client's operation for a file whose hash is known, which tells how far its upload is."""

    _source: Path
    _meter: Meter

    @classmethod
    def of(cls, file: Outgoing, meter: Meter) -> "Addition":
        """Raises StreamquantError if the file is not as it was."""
        if file.file is None or not file.file.is_file() or file.file.stat().st_size != file.size:
            raise StreamquantError(
                "a file changed while it was being published",
                where=str(file.file or file.path),
                required=f"{file.size:,} bytes",
                hint="verify the folder, then run the same command again",
            )
        addition = cls(file.path, file.file.absolute())
        if file.sha256 is not None:
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)
        addition._source, addition._meter = file.file, meter
        return addition

    @contextlib.contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """The file; a metered one where the client would show a bar."""
        if not with_tqdm:
            with open_regular(self._source) as file:
                yield file
        else:
            with MeteredFile(self._source, self._meter) as file:
                yield file
