"""The output files of a run: filled as *.partial, synced and renamed when they are complete, then delivered."""

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from streamquant.convert.plan.records import OutputFile, Plan, Region
from streamquant.convert.run.blocks import Bytes, Scratch
from streamquant.convert.run.delivery import Delivery
from streamquant.convert.run.journal import FinishedFile, Journal, Progress
from streamquant.files.hashing import READ_BYTES, quick_hash
from streamquant.files.reading import read_blocks
from streamquant.quant.errors import StreamquantError

PARTIAL = ".partial"


class OutputFiles:
    """All files of a plan below `out`, open from the start. Methods may be called from any thread.

    What the journal calls finished is believed if the file has its size, under either name, or was delivered.
    """

    def __init__(self, plan: Plan, out: Path, journal: Journal, progress: Progress, delivery: Delivery | None) -> None:
        """Raises StreamquantError for a file that is not of this run, OSError. Whoever makes it calls `close`."""
        self.finished: dict[str, FinishedFile] = dict(progress.files)
        self._plan, self._out, self._journal, self._delivery = plan, out, journal, delivery
        self._resumes = bool(progress.chunks)
        self._descriptors: list[int | None] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for file in plan.files:
                self._descriptors.append(self._open(file))
            stack.pop_all()

    def close(self) -> None:
        """Close all descriptors."""
        for descriptor in self._descriptors:
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors.clear()

    def _open(self, file: OutputFile) -> int | None:
        """A descriptor of the partial file with its literals in place; None if the file has its final name."""
        final = self._out / file.path
        partial = partial_of(final)
        if (found := self.finished.get(file.path)) is not None:
            if not final.exists() and _has_size(partial, file.size):  # stopped between the journal and the rename
                _rename(partial, final)
            if _has_size(final, file.size):
                self._deliver(file, found.sha256)
                return None
            delivery = self._delivery
            if not final.exists() and delivery is not None and delivery.has(file.path, file.size, found.sha256):
                return None
            del self.finished[file.path]
        if final.exists():
            raise StreamquantError(
                "an output file exists already and this run did not write it",
                where=str(final),
                hint="choose another --out, or move the file away",
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not self._resumes:  # whatever is there is not ours: its bytes must not stay in the padding
                os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, file.size)
            for offset, data in file.literals:
                write_all(descriptor, memoryview(data), offset)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def is_unfinished(self, file: int) -> bool:
        """Whether a file (an index into Plan.files) is still to be filled."""
        return self._descriptors[file] is not None

    def descriptor(self, file: int) -> int:
        """The descriptor of an unfinished file."""
        found = self._descriptors[file]
        assert found is not None, "finished files are neither written nor hashed"
        return found

    def write(self, file: int, data: Bytes, offset: int) -> None:
        """Write bytes of an unfinished file. Raises OSError."""
        write_all(self.descriptor(file), data.data, offset)

    def start_writeback(self, region: Region) -> None:
        """Let the disk begin with these bytes, so that the fsync at the end of a file has little left to wait for.

        Only a hint: where it is not supported nothing happens, and fsync alone decides what is on disk.
        """
        if _SYNC_FILE_RANGE is not None:
            _SYNC_FILE_RANGE(self.descriptor(region.file), region.offset, region.nbytes, _SYNC_FILE_RANGE_WRITE)

    def hold(self, region: Region, quick: str, scratch: Scratch) -> bool:
        """Whether bytes that an earlier run wrote are on the disk: by their quick hash, or as the file is finished."""
        descriptor = self._descriptors[region.file]
        return descriptor is None or _hash_region(descriptor, region, scratch) == quick

    def sync(self, file: int) -> None:
        """All bytes of a file are written: bring them to the disk. Raises OSError."""
        os.fsync(self.descriptor(file))

    def finish(self, file: int, hashes: FinishedFile) -> None:
        """Record a synced file, give it its final name, deliver it. Raises OSError, and StreamquantError as `take`."""
        entry = self._plan.files[file]
        self._journal.file(entry.path, hashes)
        final = self._out / entry.path
        _rename(partial_of(final), final)
        self.finished[entry.path] = hashes
        self._deliver(entry, hashes.sha256)

    def _deliver(self, file: OutputFile, sha256: str) -> None:
        if self._delivery is not None:
            self._delivery.take(file.path, self._out / file.path, file.size, sha256)


def partial_of(final: Path) -> Path:
    """The name of a file while it is being filled."""
    return final.with_name(final.name + PARTIAL)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite until all of `data` is written. Raises OSError."""
    data = data.cast("B")
    at = 0
    while at < len(data):
        at += os.pwrite(descriptor, data[at:], offset + at)


def _hash_region(descriptor: int, region: Region, scratch: Scratch) -> str | None:
    """The quick hash of bytes of a file; None if it ends before."""
    result = quick_hash()
    buffer = scratch.take("verify", READ_BYTES).data
    try:
        for block in read_blocks(descriptor, region.offset, region.offset + region.nbytes, buffer):
            result.update(block)
    except EOFError:
        return None
    return str(result.hexdigest())


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _rename(partial: Path, final: Path) -> None:
    """Give a synced file its final name, and make the name itself survive a power loss."""
    partial.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _libc_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range, which Python does not offer; None elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_SYNC_FILE_RANGE = _libc_sync_file_range()
_SYNC_FILE_RANGE_WRITE = 2
