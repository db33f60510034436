"""SHA-256 of a file, also while it is being filled, and a quick hash of every tensor in it.

Chunks are finished in any order; SHA-256 wants bytes in order. A `FileHash` knows which bytes of its file are final,
and reads them back as soon as they are, usually from the page cache: what is hashed is what was written.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streamquant.files.reading import open_regular, read_blocks
from streamquant.quant.errors import StreamquantError

READ_BYTES = 2 * 1024 * 1024
STEP_BYTES = 64 * 1024 * 1024
"""A step of hashing is worth a task when this many bytes are ready."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, stop) that become final together, with the number of the chunk that writes them."""

    start: int
    stop: int
    chunk: int


def sha256_of(path: Path) -> str:
    """SHA-256 of a finished file, in hexadecimal. Raises StreamquantError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error


def quick_hash(data: bytes = b"") -> Any:
    """The hash of chunks and tensors: XXH3, 128 bits. It finds damage, it does not resist an attacker."""
    return xxhash.xxh3_128(data)


class ChangedBytesError(Exception):
    """Bytes [start, stop) that are read back are not those that were written."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        super().__init__(f"bytes {start:,} to {stop:,} are not those that were written")


class FileHash:
    """The hash of one file of `size` bytes, whose `extents` are final once their chunks are.

    Bytes outside the extents (headers, padding) are final from the beginning; `fixed` are (start, bytes) of them.
    `tensors` are (key, start, stop). What is read back is compared with the fixed bytes, and with the hashes that
    `mark` was given.
    Not thread-safe: the caller marks chunks and takes steps under one lock, and hashes one step at a time.
    """

    def __init__(
        self,
        size: int,
        extents: Iterable[Extent],
        tensors: Iterable[tuple[str, int, int]] = (),
        fixed: Iterable[tuple[int, bytes]] = (),
    ) -> None:
        self.size = size
        self._extents = sorted(extents, key=lambda extent: extent.start)
        self._next = 0
        self._done: set[int] = set()
        self._position = 0
        self._sha256 = hashlib.sha256()
        self._tensors = sorted(tensors, key=lambda tensor: tensor[1])
        self._tensor_hashes: dict[str, Any] = {key: quick_hash() for key, _, _ in self._tensors}
        self._first_tensor = 0
        self._expected: dict[int, str] = {}
        """Start of an extent, or of fixed bytes, -> its quick hash."""
        runs = [(extent.start, extent.stop) for extent in self._extents]
        for start, data in fixed:
            self._expected[start] = quick_hash(data).hexdigest()
            runs.append((start, start + len(data)))
        self._runs = sorted(run for run in runs if run[0] < run[1])
        self._first_run = 0
        self._run_hash = quick_hash()
        self.busy = False

    def mark(self, chunk: int, written: Mapping[int, str] | None = None) -> None:
        """The bytes of `chunk` are final; `written` has the quick hashes of its extents, by where they start."""
        self._expected.update(written or {})
        self._done.add(chunk)

    def step(self) -> tuple[int, int] | None:
        """The next bytes [start, stop) worth hashing, or None. Marks the hash busy."""
        while self._next < len(self._extents) and self._extents[self._next].chunk in self._done:
            self._next += 1
        ready = self._extents[self._next].start if self._next < len(self._extents) else self.size
        if self.busy or (ready - self._position < STEP_BYTES and ready < self.size):
            return None
        self.busy = True
        return self._position, min(ready, self._position + 4 * STEP_BYTES)

    def hash(self, descriptor: int, stop: int) -> None:
        """Read on to `stop` and hash. Raises EOFError if the file ends before, ChangedBytesError, OSError."""
        for block in read_blocks(descriptor, self._position, stop, memoryview(bytearray(READ_BYTES))):
            self._sha256.update(block)
            self._hash_tensors(block)
            self._compare(block)
            self._position += len(block)

    @property
    def complete(self) -> bool:
        """Whether every byte was hashed."""
        return self._position == self.size

    def sha256(self) -> str:
        """The SHA-256 of the complete file, in hexadecimal."""
        return self._sha256.hexdigest()

    def tensor_hashes(self) -> dict[str, str]:
        """The quick hash of each tensor, in hexadecimal."""
        return {key: value.hexdigest() for key, value in self._tensor_hashes.items()}

    def _hash_tensors(self, data: memoryview) -> None:
        """Give the bytes at the current position to the tensors that they belong to."""
        start, stop = self._position, self._position + len(data)
        index = self._first_tensor
        while index < len(self._tensors) and self._tensors[index][1] < stop:
            key, first, last = self._tensors[index]
            if last > start:
                self._tensor_hashes[key].update(data[max(first, start) - start : min(last, stop) - start])
            if last <= stop:
                self._first_tensor = index + 1
            index += 1

    def _compare(self, data: memoryview) -> None:
        """Hash the extents and fixed bytes at the current position, and compare those that end here."""
        start, stop = self._position, self._position + len(data)
        while self._first_run < len(self._runs) and self._runs[self._first_run][0] < stop:
            first, last = self._runs[self._first_run]
            expected = self._expected.get(first)
            if expected is not None:
                self._run_hash.update(data[max(first, start) - start : min(last, stop) - start])
            if last > stop:
                return
            if expected is not None and self._run_hash.hexdigest() != expected:
                raise ChangedBytesError(first, last)
            self._first_run += 1
            self._run_hash = quick_hash()
