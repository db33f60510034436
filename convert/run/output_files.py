"""The output files of a run: filled as *.partial, synced and renamed when they are complete, then delivered.

A file gets its final name only if the name of its partial file is still that of the file that was filled, and what was
read back from it is what was written. What an earlier run finished is read again and compared with the journal.
"""

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from streamquant.convert.plan.records import OutputFile, Plan, Region, fixed_bytes
from streamquant.convert.run.blocks import Bytes, Scratch
from streamquant.convert.run.delivery import Delivery
from streamquant.convert.run.journal import FinishedFile, Journal, Progress
from streamquant.files.hashing import READ_BYTES, quick_hash
from streamquant.files.reading import read_blocks
from streamquant.files.writing import create, give_name, is_same_file, make_folder, partial_of, reopen, write_all
from streamquant.quant.errors import StreamquantError


class OutputFiles:
    """All files of a plan below `out`, open from the start. Methods may be called from any thread.

    What the journal calls finished is believed if the file was delivered, or is there with its size, under either name;
    `check_finished` reads it.
    """

    def __init__(self, plan: Plan, out: Path, journal: Journal, progress: Progress, delivery: Delivery | None) -> None:
        """Raises StreamquantError for a file that is not of this run, OSError. Whoever makes it calls `close`."""
        self.finished: dict[str, FinishedFile] = dict(progress.files)
        self._plan, self._out, self._journal, self._delivery = plan, out, journal, delivery
        self._resumes = bool(progress.chunks)
        self._fixed = fixed_bytes(plan)
        self._descriptors: list[int | None] = []
        self._left: list[int] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for index in range(len(plan.files)):
                self._descriptors.append(self._open(index))
            stack.pop_all()

    def close(self) -> None:
        """Close all descriptors."""
        for descriptor in self._descriptors:
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors.clear()

    def _open(self, index: int) -> int | None:
        """A descriptor of the partial file with its literals in place; None if the file was finished."""
        file = self._plan.files[index]
        final = self._out / file.path
        partial = partial_of(final)
        make_folder(final.parent, self._out)
        if (found := self.finished.get(file.path)) is not None:
            if _has_size(final if os.path.lexists(final) else partial, file.size):
                self._left.append(index)
                return None
            delivery = self._delivery
            if not final.exists() and delivery is not None and delivery.has(file.path, file.size, found.sha256):
                return None
            del self.finished[file.path]
        if os.path.lexists(final):
            raise StreamquantError(
                "an output file exists already and this run did not write it",
                where=str(final),
                hint="choose another --out, or move the file away",
            )
        # Without a journal, whatever is there is not ours: its bytes must not stay.
        descriptor = reopen(partial) if self._resumes else create(partial)
        try:
            os.ftruncate(descriptor, file.size)
            for offset, data in self._fixed[index]:
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
        """Record a synced file, give it its final name, deliver it.

        Raises OSError, and StreamquantError as `take`, and if somebody put another file in its place.
        """
        entry = self._plan.files[file]
        final = self._out / entry.path
        if not is_same_file(partial_of(final), self.descriptor(file), entry.size):
            raise self.changed(file, "it was replaced, cut short or made longer, or has a second name (hard link)")
        self._journal.file(entry.path, hashes)
        give_name(partial_of(final), final)
        self.finished[entry.path] = hashes
        self._deliver(entry, hashes.sha256)

    def left(self) -> list[int]:
        """The files that an earlier run finished and left here: to be checked."""
        return list(self._left)

    def check_finished(self, file: int, scratch: Scratch, between: Callable[[], None]) -> None:
        """Read a file that an earlier run finished, and deliver it if its hash is that of the journal.

        `between` is called between reads; it may raise. Raises StreamquantError if the hash is another, OSError, and as
        `take`.
        """
        entry = self._plan.files[file]
        final = self._out / entry.path
        partial = partial_of(final)
        found = final if os.path.lexists(final) else partial  # stopped between the journal and the rename
        digest = hashlib.sha256()
        with contextlib.suppress(EOFError), found.open("rb", buffering=0) as stream:
            for block in read_blocks(stream.fileno(), 0, entry.size, scratch.take("verify", READ_BYTES).data):
                between()
                digest.update(block)
        if digest.hexdigest() != (expected := self.finished[entry.path].sha256):
            raise StreamquantError(
                "a finished file is not as it was written",
                where=str(found),
                required=f"sha256 {expected}",
                hint="remove it and run the same command again: it is made again",
            )
        if found == partial:
            give_name(partial, final)
        self._deliver(entry, expected)

    def changed(self, file: int, found: str) -> StreamquantError:
        """The error of an unfinished file that somebody changed."""
        return StreamquantError(
            "an output file was changed while it was being written",
            where=str(partial_of(self._out / self._plan.files[file].path)),
            found=found,
            required="the bytes that this run wrote",
            hint="see what else writes to this folder; then run the same command again: what differs is made again",
        )

    def _deliver(self, file: OutputFile, sha256: str) -> None:
        if self._delivery is not None:
            self._delivery.take(file.path, self._out / file.path, file.size, sha256)


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
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def _libc_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range, which Python does not offer; None elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_SYNC_FILE_RANGE = _libc_sync_file_range()
_SYNC_FILE_RANGE_WRITE = 2
