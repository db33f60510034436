"""The hashes of a run's files, made while their bytes become final."""

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Generic, TypeVar

from streamquant.convert.plan.records import Plan, extents, fixed_bytes
from streamquant.files.hashing import Extent, FileHash

K = TypeVar("K")


class FileHashes(Generic[K]):
    """The hashes of several files by a key of theirs, until they are complete. Safe to use from any thread.

    A step (key, stop) is handed out once; `hash` does it, and then says whether the hash is complete.
    """

    def __init__(self, hashes: Mapping[K, FileHash]) -> None:
        self._hashes = dict(hashes)
        self._lock = threading.Lock()

    def mark(self, chunk: int, written: Mapping[K, Mapping[int, str]]) -> list[tuple[K, int]]:
        """The bytes of a chunk are final in these files; the steps that are worth doing now.

        `written` has the quick hashes of the runs of bytes, by file and by where they start; none for what was read.
        """
        with self._lock:
            for key, hashes in written.items():
                if key in self._hashes:
                    self._hashes[key].mark(chunk, hashes)
        return self.steps(written)

    def steps(self, keys: Iterable[K] | None = None) -> list[tuple[K, int]]:
        """The steps that are worth doing now, of some files or of all."""
        with self._lock:
            wanted = list(self._hashes) if keys is None else [key for key in keys if key in self._hashes]
            found = ((key, self._hashes[key].step()) for key in wanted)
            return [(key, step[1]) for key, step in found if step is not None]

    def hash(self, key: K, stop: int, descriptor: int) -> FileHash | None:
        """Do a step of a file; its hash if that was the last one. Raises EOFError, ChangedBytesError, OSError."""
        file_hash = self._hashes[key]
        file_hash.hash(descriptor, stop)
        with self._lock:
            file_hash.busy = False
            return self._hashes.pop(key) if file_hash.complete else None


def output_hashes(plan: Plan, wanted: Collection[int]) -> FileHashes[int]:
    """For output files, by their indices into Plan.files."""
    runs: dict[int, list[Extent]] = {index: [] for index in wanted}
    tensors: dict[int, list[tuple[str, int, int]]] = {index: [] for index in wanted}
    for number, chunk in enumerate(plan.chunks):
        for _, _, to in extents(plan, chunk):
            if to.file in runs:
                runs[to.file].append(Extent(to.offset, to.offset + to.nbytes, number))
    for variant in plan.variants:
        for tensor in variant.tensors:
            for part, region in enumerate(tensor.regions):
                if region.file in tensors:
                    stored = f"{part}:{tensor.name}", region.offset, region.offset + region.nbytes
                    tensors[region.file].append(stored)
    fixed = fixed_bytes(plan)
    return FileHashes(
        {index: FileHash(plan.files[index].size, runs[index], tensors[index], fixed[index]) for index in wanted}
    )


def source_hashes(plan: Plan, wanted: Collection[str]) -> FileHashes[str]:
    """For shards of the source, by their names; a chunk that was converted has been read, which is as good as final."""
    runs: dict[str, list[Extent]] = {name: [] for name in wanted}
    for number, chunk in enumerate(plan.chunks):
        matrix = plan.matrices[chunk.matrix]
        if matrix.source.file in runs:
            runs[matrix.source.file].append(Extent(*matrix.source_bytes(chunk.first, chunk.last), number))
    sizes = {file.name: file.size for file in plan.checkpoint.files}
    return FileHashes({name: FileHash(sizes[name], runs[name]) for name in wanted})
