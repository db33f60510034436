"""Run a plan: read chunks in disk order, encode them for every variant, write them at their addresses.

Workers are threads; kernels, reads, writes and hashes all run without the GIL. Files are filled as *.partial, hashed
while they are filled, synced and renamed when complete. Everything done is in the journal: the same command goes on
where it was stopped, by a signal, a crash or a full disk.
"""

import bisect
import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path

from streamquant.convert.plan.records import Plan, Region, extents
from streamquant.convert.run.blocks import Encode, Known, Piece, Scratch, ShortShardError, largest_magnitude
from streamquant.convert.run.delivery import Delivery
from streamquant.convert.run.hashes import output_hashes, source_hashes
from streamquant.convert.run.journal import FinishedFile, Head, Journal, Progress
from streamquant.convert.run.output_files import OutputFiles
from streamquant.convert.run.statistics import Magnitudes
from streamquant.convert.run.workers import Workers
from streamquant.convert.source.shards import Shards
from streamquant.files.hashing import ChangedBytesError, quick_hash
from streamquant.files.listener import SILENT, Listener
from streamquant.files.worker import Stopped
from streamquant.files.writing import explain
from streamquant.quant.errors import StreamquantError

CONVERTING = "converting"
"""The task of a listener: bytes of the source."""


@dataclass(frozen=True, slots=True)
class RunResources:
    """What a run works with."""

    jobs: int
    """Threads."""
    encode: Encode
    """The inner loop, called by all threads at once."""
    shards: Shards
    """The bytes of the source."""
    delivery: Delivery | None = None
    """Takes finished files away."""
    listener: Listener = SILENT
    """Hears of the bytes of the source that were converted, from all threads."""


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


def run(plan: Plan, out: Path, journal: Journal, resources: RunResources) -> Written:
    """Write all files of the plan below `out`; returns when they have their final names and are delivered.

    Raises StreamquantError for a bad weight, a changed source, a full disk; the first error stops all workers, what was
    done stays in the journal. KeyboardInterrupt in the calling thread does the same.
    """
    progress = journal.open(head_of(plan))
    shards, delivery = resources.shards, resources.delivery
    with contextlib.closing(OutputFiles(plan, out, journal, progress, delivery)) as files:
        work = _Run(plan, files, journal, progress, resources)
        try:
            try:
                work.run()
            except OSError as error:
                raise explain(error, out) from error
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


class _RunOf:
    """Which run of bytes of a chunk a piece lies in."""

    def __init__(self, places: Iterable[tuple[int, int, Region]]) -> None:
        """The runs are those of `extents`, in its order."""
        self._runs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number, (output, part, region) in enumerate(places):
            self._runs.setdefault((output, part), []).append((region.offset, number))

    def __call__(self, piece: Piece) -> int:
        """The number of its run."""
        runs = self._runs[piece.output, piece.part]  # in the order of their addresses
        return runs[bisect.bisect_right(runs, piece.offset, key=itemgetter(0)) - 1][1]


class _Run:
    """The chunks of a plan as tasks of workers, and the steps of hashing that follow from them."""

    def __init__(
        self, plan: Plan, files: OutputFiles, journal: Journal, progress: Progress, resources: RunResources
    ) -> None:
        self._plan, self._files, self._journal, self._resources = plan, files, journal, resources
        self._shards = resources.shards
        self._written_before = progress.chunks
        self._magnitudes = Magnitudes(plan, progress.amax, journal.amax)
        self._known = Known(plan, self._magnitudes.largest)
        self._resumed = 0
        self._lock = threading.Lock()
        self._sources = dict(progress.sources)
        names = [file.name for file in plan.checkpoint.files]
        self._sources |= {name: known for name in names if (known := self._shards.sha256(name)) is not None}
        unknown = [name for name in names if name not in self._sources]
        self._source_hashes = source_hashes(plan, unknown)
        unfinished = [index for index in range(len(plan.files)) if files.is_unfinished(index)]
        self._output_hashes = output_hashes(plan, unfinished)
        self._readers = {name: int(name in unknown) for name in names}
        """Chunks and hashes that are still to read a shard."""
        shards_of = [plan.matrices[chunk.matrix].source.files for chunk in plan.chunks]
        wanted: dict[str, None] = {}
        tasks = []
        for number, shards in enumerate(shards_of):
            visits = [other for other in plan.visits.get(number, ()) if self._magnitudes.is_wanted(other)]
            visited = [shards_of[other] for other in visits]
            for name in chain.from_iterable((*visited, shards)):
                self._readers[name] += 1
            left = visited if number in self._written_before else (*visited, shards)
            wanted.update(dict.fromkeys(chain.from_iterable(left)))
            tasks += [*(partial(self._visit, other) for other in visits), partial(self._chunk, number)]
        self._shards.expect([*wanted, *(name for name in unknown if name not in wanted)])
        self._workers = Workers(iter(tasks), self._interrupt)

    def run(self) -> None:
        """Do everything. Raises the first error of a worker."""
        self._workers.add(partial(self._check_finished, index) for index in self._files.left())
        self._add_steps(self._output_hashes.steps(), self._source_hashes.steps())
        self._workers.run(self._resources.jobs)

    def _interrupt(self) -> None:
        """Workers that wait for a shard, a visit, or for room, end as well."""
        self._magnitudes.stop()
        self._shards.stop()
        if self._resources.delivery is not None:
            self._resources.delivery.stop()

    def written(self) -> Written:
        """The hashes of everything."""
        finished = self._files.finished
        files = {path: found.sha256 for path, found in finished.items()}
        tensors = {path: found.tensors for path, found in finished.items()}
        return Written(files, tensors, dict(self._sources), self._resumed)

    # Chunks

    def _visit(self, number: int, scratch: Scratch) -> None:
        """Find the largest magnitude of a chunk, which comes later."""
        self._stop_if_asked()
        chunk = self._plan.chunks[number]
        matrix = self._plan.matrices[chunk.matrix]
        with self._reading():
            value = largest_magnitude(matrix, chunk, self._shards.open, scratch)
        self._magnitudes.add(number, value)
        for name in matrix.source.files:
            self._has_read(name)

    def _chunk(self, number: int, scratch: Scratch) -> None:
        chunk = self._plan.chunks[number]
        matrix = self._plan.matrices[chunk.matrix]
        source, (start, stop) = matrix.source.file, matrix.source_bytes(chunk.first, chunk.last)
        if self._resources.delivery is not None:
            self._resources.delivery.wait_for_room()
        regions = [region for _, _, region in extents(self._plan, chunk)]
        if self._is_on_disk(number, regions, scratch):
            with self._lock:
                self._resumed += 1
            hashes = self._written_before[number]
        else:
            hashes = self._convert(number, scratch)
            self._journal.chunk(number, hashes)
        written: dict[int, dict[int, str]] = {}
        for region, quick in zip(regions, hashes, strict=True):
            if region.nbytes:
                written.setdefault(region.file, {})[region.offset] = quick
        self._add_steps(self._output_hashes.mark(number, written), self._source_hashes.mark(number, {source: {}}))
        for name in matrix.source.files:
            self._has_read(name)
        self._resources.listener.advanced(CONVERTING, stop - start)

    def _has_read(self, name: str) -> None:
        """One reader less; without any the shard may go."""
        with self._lock:
            self._readers[name] -= 1
            last = self._readers[name] == 0
        if last:
            self._shards.done(name)

    def _is_on_disk(self, number: int, regions: list[Region], scratch: Scratch) -> bool:
        """Whether every run of bytes of a chunk that the journal lists is in its file as it was written."""
        before = self._written_before.get(number)
        if before is None or len(regions) != len(before):
            return False
        return all(self._files.hold(at, quick, scratch) for at, quick in zip(regions, before, strict=True))

    def _convert(self, number: int, scratch: Scratch) -> list[str]:
        """Encode and write a chunk; returns the hash of each run of bytes, "" for a file that was finished before."""
        files = self._files
        places = list(extents(self._plan, self._plan.chunks[number]))
        wanted = frozenset(output for output, _, to in places if files.is_unfinished(to.file))
        hashes = [quick_hash() for _ in places]
        run_of = _RunOf(places)
        if wanted:
            chunk = self._plan.chunks[number]
            with self._reading():
                for pieces in self._resources.encode(self._known, chunk, self._shards.open, wanted, scratch):
                    self._stop_if_asked()
                    for piece in pieces:
                        files.write(piece.file, piece.data, piece.offset)
                        hashes[run_of(piece)].update(piece.data)
            for output, _, to in places:
                if output in wanted:
                    files.start_writeback(to)
        done = zip(places, hashes, strict=True)
        return [quick.hexdigest() if output in wanted else "" for (output, _, _), quick in done]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """A shard that ends too soon is told in words."""
        try:
            yield
        except ShortShardError as error:
            raise StreamquantError(
                "a source file became shorter while it was being read",
                where=self._plan.checkpoint.where(error.shard),
                hint="fetch it again, remove the output folder, and convert again",
            ) from error

    # Hashes

    def _add_steps(self, outputs: Iterable[tuple[int, int]], sources: Iterable[tuple[str, int]]) -> None:
        """Hash before anything else is converted: the bytes are still in memory."""
        self._workers.add(partial(self._hash_output, index, stop) for index, stop in outputs)
        self._workers.add(partial(self._hash_source, name, stop) for name, stop in sources)

    def _hash_output(self, index: int, stop: int, _scratch: Scratch) -> None:
        try:
            complete = self._output_hashes.hash(index, stop, self._files.descriptor(index))
        except EOFError as error:
            raise self._files.changed(index, "it was cut short") from error
        except ChangedBytesError as error:
            raise self._files.changed(index, str(error)) from error
        if complete is not None:
            self._files.sync(index)
            self._shards.check_unchanged()
            self._files.finish(index, FinishedFile(complete.sha256(), complete.tensor_hashes()))
        self._add_steps(self._output_hashes.steps((index,)), ())

    def _check_finished(self, index: int, scratch: Scratch) -> None:
        self._files.check_finished(index, scratch, self._stop_if_asked)

    def _stop_if_asked(self) -> None:
        if self._workers.is_stopping:
            raise Stopped

    def _hash_source(self, name: str, stop: int, _scratch: Scratch) -> None:
        with self._reading():
            try:
                complete = self._source_hashes.hash(name, stop, self._shards.open(name))
            except EOFError as error:
                raise ShortShardError(name) from error
        if complete is not None:
            self._sources[name] = complete.sha256()
            self._journal.source(name, self._sources[name])
            self._has_read(name)
        self._add_steps((), self._source_hashes.steps((name,)))
