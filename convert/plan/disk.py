"""What a conversion takes on the disk at most."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from streamquant.convert.plan.records import CHUNK_BYTES, Plan, extents
from streamquant.files.sizes import human_bytes


@dataclass(frozen=True, slots=True)
class Disk:
    """The most bytes that a run takes on the disk."""

    peak: int
    """Files, and shards on their way."""
    spool: int = 0
    """Of these, room for shards of the Hub."""
    delivered: bool = False
    """Whether finished files go away while the rest is made."""

    def __str__(self) -> str:
        parts = [f"{human_bytes(self.spool)} of it for shards on their way"] if self.spool else []
        parts += ["files go as they are uploaded"] if self.delivered else []
        return human_bytes(self.peak) + (f" ({', '.join(parts)})" if parts else "")


def peak_disk(plan: Plan, room: int, spool_bytes: int, *, delete: bool, jobs: int = 1) -> int:
    """The most bytes that a conversion has on the disk at any time: shards of the source in the spool, and outputs.

    Without `delete` everything stays. With it:

    - files fill as chunks are done, in the order of the source; `jobs` chunks are under way at once. Headers, and
      tensors that have no source, are in their files from the beginning;
    - a file is complete with its last chunk, and is handed over when it was hashed: what could not be hashed before
      that chunk is read at the speed of the source, while the conversion goes on;
    - uploads may be as slow as they like: the conversion begins no chunk while more than `room` bytes wait
      (`Delivery.wait_for_room`), so that at most `room` bytes wait, and the files handed over at last.

    What is not in it: side files, manifests, cards and the journal, for which DISK_RESERVE stands
    (convert/conversion.py).
    """
    if not delete:
        return plan.nbytes + spool_bytes
    written, ends = _growth(plan)
    handed_over: dict[int, int] = {}  # chunk -> bytes of files that wait from then on
    partial = [sum(len(data) for _, data in file.literals) for file in plan.files]
    unfinished, complete, recent, peak = sum(partial), 0, 0, 0
    for chunk, growth in enumerate(written):
        recent -= handed_over.get(chunk, 0)
        for file, nbytes in growth:
            partial[file] += nbytes
            unfinished += nbytes
        peak = max(peak, unfinished + min(complete, room + recent))
        for file, unhashed in ends.get(chunk, ()):
            size = plan.files[file].size
            unfinished -= partial[file]
            complete += size
            recent += size
            later = chunk + jobs + math.ceil(unhashed / CHUNK_BYTES)
            handed_over[later] = handed_over.get(later, 0) + size
        peak = max(peak, unfinished + min(complete, room + recent))
    return peak + _ahead(written, jobs) + spool_bytes


def _growth(plan: Plan) -> tuple[list[list[tuple[int, int]]], dict[int, list[tuple[int, int]]]]:
    """Chunk -> (file, bytes) that it writes; and chunk -> (file, bytes not hashable before) that it completes."""
    written: list[list[tuple[int, int]]] = []
    last = [(0, 0)] * len(plan.files)  # chunk, and the first byte that it writes
    for number, chunk in enumerate(plan.chunks):
        growth = []
        for _, _, region in extents(plan, chunk):
            growth.append((region.file, region.nbytes))
            before, first = last[region.file]
            last[region.file] = (number, min(region.offset, first) if before == number else region.offset)
        written.append(growth)
    ends: dict[int, list[tuple[int, int]]] = {}
    for file, (number, first) in enumerate(last):
        ends.setdefault(number, []).append((file, plan.files[file].size - first))
    return written, ends


def _ahead(written: Iterable[list[tuple[int, int]]], jobs: int) -> int:
    """Bytes that the other workers may have written beyond the chunk that is looked at."""
    return (jobs - 1) * max((sum(nbytes for _, nbytes in growth) for growth in written), default=0)
