"""SHA-256 of a file, also while it is being filled, and a quick hash of every tensor in it.

Chunks are finished in any order; SHA-256 wants bytes in order. A `FileHash` knows which bytes of its file are final,
and reads them back as soon as they are, usually from the page cache: what is hashed is what was written.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streamquant.files.reading import read_blocks
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
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error


def quick_hash() -> Any:
    """The hash of chunks and tensors: XXH3, 128 bits. It finds damage, it does not resist an attacker."""
    return xxhash.xxh3_128()


class FileHash:
    """The hash of one file of `size` bytes, whose `extents` are final once their chunks are.

    Bytes outside the extents (headers, padding) are final from the beginning. `tensors` are (key, start, stop).
    Not thread-safe: the caller marks chunks and takes steps under one lock, and hashes one step at a time.
    """

    def __init__(self, size: int, extents: Iterable[Extent], tensors: Iterable[tuple[str, int, int]] = ()) -> None:
        self.size = size
        self._extents = sorted(extents, key=lambda extent: extent.start)
        self._next = 0
        self._done: set[int] = set()
        self._position = 0
        self._sha256 = hashlib.sha256()
        self._tensors = sorted(tensors, key=lambda tensor: tensor[1])
        self._tensor_hashes: dict[str, Any] = {key: quick_hash() for key, _, _ in self._tensors}
        self._first_tensor = 0
        self.busy = False

    def mark(self, chunk: int) -> None:
        """The bytes of `chunk` are final."""
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
        """Read on to `stop` and hash. Raises EOFError if the file ends before."""
        for block in read_blocks(descriptor, self._position, stop, memoryview(bytearray(READ_BYTES))):
            self._sha256.update(block)
            self._hash_tensors(block)
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
