"""Run a plan: read chunks in disk order, encode them for every variant, write them at their addresses.

Workers are threads; kernels, reads, writes and hashes all run without the GIL. Files are filled as *.partial, hashed
while they are filled, synced and renamed when complete. Everything done is in the journal: the same command goes on
where it was stopped, by a signal, a crash or a full disk.
"""

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamquant.convert.plan.records import Chunk, OutputFile, Plan, extents
from streamquant.convert.run.blocks import Piece, Scratch, encode_chunk
from streamquant.convert.run.delivery import Delivery
from streamquant.convert.run.journal import Head, Journal, Progress
from streamquant.convert.source.shards import LocalShards, Shards
from streamquant.files.hashing import READ_BYTES, Extent, FileHash, quick_hash
from streamquant.files.worker import Worker
from streamquant.files.writing import explain
from streamquant.quant.errors import StreamquantError

PARTIAL = ".partial"
Task = Callable[[Scratch], None]
Encode = Callable[[Plan, Chunk, int, frozenset[int], Scratch], Iterator[list[Piece]]]
"""The inner loop: `encode_chunk` of convert/run/blocks.py, or what does the same on a GPU."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a finished run knows about its files: hashes for the manifest."""

    files: dict[str, str]
    """Path -> sha256."""
    tensors: dict[str, dict[str, str]]
    """Path -> "PART:TENSOR" -> quick hash."""
    sources: dict[str, str]
    """Source file name -> sha256."""
    resumed_chunks: int
    """Chunks that an earlier run had done."""


def head_of(plan: Plan) -> Head:
    """The head of the journal of a plan."""
    return Head(plan.fingerprint, {v.recipe.spec: plan.variant_fingerprint(v) for v in plan.variants})


def run(
    plan: Plan,
    out: Path,
    journal: Journal,
    *,
    jobs: int,
    on_progress: Callable[[int], None],
    encode: Encode = encode_chunk,
    shards: Shards | None = None,
    delivery: Delivery | None = None,
) -> Written:
    """Write all files of the plan below `out`; returns when they have their final names and are delivered.

    `encode` is called from `jobs` threads at once; `on_progress` too, with the number of source bytes just done.
    `shards` gives the bytes of the source (default: those of a local folder), `delivery` takes finished files away.
    Raises StreamquantError for a bad weight, a changed source, a full disk; the first error stops all workers, what was
    done stays in the journal. KeyboardInterrupt in the calling thread does the same.
    """
    progress = journal.open(head_of(plan))
    with contextlib.ExitStack() as stack:
        if shards is None:
            shards = stack.enter_context(contextlib.closing(LocalShards(plan.checkpoint)))
        work = _Run(plan, out, journal, progress, on_progress, encode, shards, delivery, stack)
        try:
            work.run(jobs)
            if delivery is not None:
                delivery.finish()
        except BaseException as error:
            if delivery is not None:
                delivery.stop()
            if isinstance(error, StreamquantError):
                shards.check_unchanged()  # what looks like a bad weight may be a file that is being replaced
            raise
        shards.check_unchanged()
    return work.written()


class _Run:
    """The state that workers share; `_lock` guards all of it but the files themselves."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        journal: Journal,
        progress: Progress,
        on_progress: Callable[[int], None],
        encode: Encode,
        shards: Shards,
        delivery: Delivery | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.plan, self.out, self.journal, self.on_progress = plan, out, journal, on_progress
        self._encode = encode
        self.shards, self.delivery = shards, delivery
        self.known = progress.chunks
        self.resumed = 0
        self._lock = threading.Condition()
        self._chunks = iter(range(len(plan.chunks)))
        self._urgent: deque[Task] = deque()
        self._running = 0
        self._stop = False
        self._error: BaseException | None = None
        self.finished = dict(progress.files)
        self.source_hashes = dict(progress.sources)
        for file in plan.checkpoint.files:
            if (sha256 := shards.sha256(file.name)) is not None:
                self.source_hashes[file.name] = sha256
        self.outputs = [self._open_output(file, stack) for file in plan.files]
        self._make_hashes()
        self._readers = self._count_readers()
        wanted = {self._shard(number) for number in range(len(plan.chunks)) if number not in self.known}
        shards.expect([f.name for f in plan.checkpoint.files if f.name in wanted or f.name not in self.source_hashes])

    # Opening

    def _shard(self, number: int) -> str:
        """The source file of a chunk."""
        return self.plan.matrices[self.plan.chunks[number].matrix].source.file

    def _count_readers(self) -> dict[str, int]:
        """Source file -> chunks, and a hash, that are still to read it."""
        readers = {file.name: int(file.name not in self.source_hashes) for file in self.plan.checkpoint.files}
        for number in range(len(self.plan.chunks)):
            readers[self._shard(number)] += 1
        return readers

    def _open_output(self, file: OutputFile, stack: contextlib.ExitStack) -> int | None:
        """A descriptor of the partial file with its literals in place; None if the file has its final name."""
        final = self.out / file.path
        partial = final.with_name(final.name + PARTIAL)
        if file.path in self.finished:
            sha256 = self.finished[file.path]["sha256"]
            if not final.exists() and _has_size(partial, file.size):  # stopped between the journal and the rename
                _rename(partial, final)
            if _has_size(final, file.size):
                self._deliver(file, sha256)
                return None
            if not final.exists() and self.delivery is not None and self.delivery.has(file.path, file.size, sha256):
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
        stack.callback(os.close, descriptor)
        if not self.known:  # whatever is there is not ours: its bytes must not stay in the padding
            os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, file.size)
        for offset, data in file.literals:
            write_all(descriptor, memoryview(data), offset)
        return descriptor

    def _make_hashes(self) -> None:
        plan = self.plan
        file_extents: list[list[Extent]] = [[] for _ in plan.files]
        source_extents: dict[str, list[Extent]] = {file.name: [] for file in plan.checkpoint.files}
        for number, chunk in enumerate(plan.chunks):
            for _, _, to in extents(plan, chunk):
                file_extents[to.file].append(Extent(to.offset, to.offset + to.nbytes, number))
            source = plan.matrices[chunk.matrix].source
            row = (source.stop - source.start) // plan.matrices[chunk.matrix].rows
            start = source.start + chunk.first * row
            source_extents[source.file].append(Extent(start, source.start + chunk.last * row, number))
        self.hashes = [
            FileHash(file.size, file_extents[index], self._tensor_ranges(index))
            for index, file in enumerate(plan.files)
        ]
        self.source_hash = {file.name: FileHash(file.size, source_extents[file.name]) for file in plan.checkpoint.files}

    def _tensor_ranges(self, file: int) -> Iterator[tuple[str, int, int]]:
        for variant in self.plan.variants:
            for tensor in variant.tensors:
                for part, region in enumerate(tensor.regions):
                    if region.file == file:
                        yield f"{part}:{tensor.name}", region.offset, region.offset + region.nbytes

    # Workers

    def run(self, jobs: int) -> None:
        """Start the workers and wait for them."""
        with self._lock:
            self._queue_hashes(range(len(self.plan.files)), self.source_hash)
        threads = [Worker(self._work, f"streamquant-{i}") for i in range(jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            self._stop_delivery()
            raise
        finally:
            with self._lock:
                self._stop = True
                self._lock.notify_all()
            self.shards.stop()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        scratch = Scratch()
        try:
            while (task := self._next_task()) is not None:
                task(scratch)
                with self._lock:
                    self._running -= 1
                    self._lock.notify_all()
        except OSError as error:
            self._fail(explain(error, self.out))
        except BaseException as error:  # handed to the calling thread, whatever it is
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._stop = True
            self._lock.notify_all()
        self.shards.stop()
        self._stop_delivery()

    def _stop_delivery(self) -> None:
        """Workers that wait for room end as well."""
        if self.delivery is not None:
            self.delivery.stop()

    def _next_task(self) -> Task | None:
        """Hashes first, while their bytes are in memory; then the next chunk; None when there is nothing left."""
        with self._lock:
            while not self._stop:
                task = self._urgent.popleft() if self._urgent else None
                if task is None:
                    number = next(self._chunks, None)
                    if number is not None:
                        task = self._chunk_task(number)
                if task is not None:
                    self._running += 1
                    return task
                if self._running == 0:
                    self._stop = True
                    self._lock.notify_all()
                    break
                self._lock.wait()
            return None

    def _chunk_task(self, number: int) -> Task:
        return lambda scratch: self._do_chunk(number, scratch)

    # Chunks

    def _do_chunk(self, number: int, scratch: Scratch) -> None:
        chunk = self.plan.chunks[number]
        matrix = self.plan.matrices[chunk.matrix]
        nbytes = (chunk.last - chunk.first) * ((matrix.source.stop - matrix.source.start) // matrix.rows)
        if self.delivery is not None:
            self.delivery.wait_for_room()
        if number in self.known and self._is_on_disk(number, scratch):
            self.resumed += 1
        else:
            self.journal.chunk(number, self._convert(number, scratch))
        files = {region.file for _, _, region in extents(self.plan, chunk)}
        with self._lock:
            for file in files:
                self.hashes[file].mark(number)
            self.source_hash[matrix.source.file].mark(number)
            self._queue_hashes(files, (matrix.source.file,))
        self._has_read(matrix.source.file)
        self.on_progress(nbytes)

    def _has_read(self, name: str) -> None:
        """One reader less; without any the shard may go."""
        with self._lock:
            self._readers[name] -= 1
            last = self._readers[name] == 0
        if last:
            self.shards.done(name)

    def _convert(self, number: int, scratch: Scratch) -> list[str]:
        """Encode and write a chunk; returns the hash of each run of bytes, "" for a file that was finished before."""
        chunk = self.plan.chunks[number]
        places = list(extents(self.plan, chunk))
        wanted = frozenset(output for output, _, to in places if self.outputs[to.file] is not None)
        hashes = {(output, part): quick_hash() for output, part, _ in places}
        if wanted:
            self._encode_and_write(number, wanted, hashes, scratch)
            for output, _, to in places:
                if output in wanted:
                    start_writeback(self.outputs[to.file], to.offset, to.nbytes)
        return [hashes[output, part].hexdigest() if output in wanted else "" for output, part, _ in places]

    def _encode_and_write(self, number: int, wanted: frozenset[int], hashes: dict, scratch: Scratch) -> None:  # type: ignore[type-arg]
        chunk = self.plan.chunks[number]
        source = self.plan.matrices[chunk.matrix].source
        try:
            for pieces in self._encode(self.plan, chunk, self.shards.open(source.file), wanted, scratch):
                if self._stop:
                    raise _Stopped
                for piece in pieces:
                    descriptor = self.outputs[piece.file]
                    assert descriptor is not None, "only unfinished files are wanted"
                    write_all(descriptor, piece.data.data, piece.offset)
                    hashes[piece.output, piece.part].update(piece.data)
        except EOFError as error:
            raise self._shrank(source.file) from error

    def _is_on_disk(self, number: int, scratch: Scratch) -> bool:
        """Whether every run of bytes of a chunk that the journal lists is in its file as it was written."""
        places = list(extents(self.plan, self.plan.chunks[number]))
        if len(places) != len(self.known[number]):
            return False
        for (_, _, at), expected in zip(places, self.known[number], strict=True):
            descriptor = self.outputs[at.file]
            if descriptor is not None and _hash_range(descriptor, at.offset, at.nbytes, scratch) != expected:
                return False
        return True

    # Hashes

    def _queue_hashes(self, files: Iterable[int], sources: Iterable[str]) -> None:
        """Queue the steps of hashing that are ready for these outputs and sources; the caller holds the lock."""
        for index in files:
            if self.plan.files[index].path not in self.finished and (step := self.hashes[index].step()) is not None:
                self._urgent.append(self._output_hash_task(index, step[1]))
        for name in sources:
            if name not in self.source_hashes and (step := self.source_hash[name].step()) is not None:
                self._urgent.append(self._source_hash_task(name, step[1]))
        if self._urgent:
            self._lock.notify_all()

    def _output_hash_task(self, index: int, stop: int) -> Task:
        def task(_scratch: Scratch) -> None:
            file_hash, descriptor = self.hashes[index], self.outputs[index]
            assert descriptor is not None, "finished files are not hashed"
            file_hash.hash(descriptor, stop)
            if file_hash.complete:
                self._finish(index, descriptor)
            with self._lock:
                file_hash.busy = False
                self._queue_hashes((index,), ())

        return task

    def _source_hash_task(self, name: str, stop: int) -> Task:
        def task(_scratch: Scratch) -> None:
            file_hash = self.source_hash[name]
            try:
                file_hash.hash(self.shards.open(name), stop)
            except EOFError as error:
                raise self._shrank(name) from error
            if file_hash.complete:
                self.source_hashes[name] = file_hash.sha256()
                self.journal.source(name, self.source_hashes[name])
                self._has_read(name)
            with self._lock:
                file_hash.busy = False
                self._queue_hashes((), (name,))

        return task

    def _finish(self, index: int, descriptor: int) -> None:
        """All bytes are written and hashed: sync, record, rename, unless the source changed meanwhile."""
        path = self.plan.files[index].path
        os.fsync(descriptor)
        self.shards.check_unchanged()
        hashes = self.hashes[index].tensor_hashes()
        record: dict[str, Any] = {"sha256": self.hashes[index].sha256(), "tensors": hashes}
        self.journal.file(path, self.hashes[index].sha256(), hashes)
        final = self.out / path
        _rename(final.with_name(final.name + PARTIAL), final)
        self.finished[path] = record
        self._deliver(self.plan.files[index], record["sha256"])

    def _deliver(self, file: OutputFile, sha256: str) -> None:
        if self.delivery is not None:
            self.delivery.take(file.path, self.out / file.path, file.size, sha256)

    def _shrank(self, name: str) -> StreamquantError:
        return StreamquantError(
            "a source file became shorter while it was being read",
            where=self.plan.checkpoint.where(name),
            hint="fetch it again, remove the output folder, and convert again",
        )

    def written(self) -> Written:
        """The hashes of everything."""
        return Written(
            {path: record["sha256"] for path, record in self.finished.items()},
            {path: record["tensors"] for path, record in self.finished.items()},
            dict(self.source_hashes),
            self.resumed,
        )


class _Stopped(Exception):  # noqa: N818 - not an error: another worker failed first, or the user stopped the run
    pass


def _libc_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range, which Python does not offer; None elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_SYNC_FILE_RANGE = _libc_sync_file_range()
_SYNC_FILE_RANGE_WRITE = 2


def start_writeback(descriptor: int | None, offset: int, nbytes: int) -> None:
    """Let the disk begin with these bytes, so that the fsync at the end of a file has little left to wait for.

    Only a hint: where it is not supported nothing happens, and fsync alone decides what is on disk.
    """
    if _SYNC_FILE_RANGE is not None and descriptor is not None:
        _SYNC_FILE_RANGE(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite until all of `data` is written. Raises OSError."""
    data = data.cast("B")
    at = 0
    while at < len(data):
        at += os.pwrite(descriptor, data[at:], offset + at)


def _hash_range(descriptor: int, offset: int, nbytes: int, scratch: Scratch) -> str | None:
    """The quick hash of bytes of a file; None if it ends before."""
    result = quick_hash()
    buffer = scratch.take("verify", READ_BYTES).data
    while nbytes > 0:
        count = os.preadv(descriptor, [buffer[: min(nbytes, READ_BYTES)]], offset)
        if count == 0:
            return None
        result.update(buffer[:count])
        offset, nbytes = offset + count, nbytes - count
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
