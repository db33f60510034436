"""Shards of the Hub on their way through a folder of bounded size: fetched ahead, checked, read, deleted.

    expect(a, b, c ...)   two threads fetch them in this order, as long as they fit into the limit
    open(a)               waits until a is there and its hash is the Hub's
    done(a)               a is deleted; there is room for the next

A shard in the local cache of the Hub's client is read in place: it takes no room and is never deleted. What a killed
run left in the folder is checked and used; parts of shards are thrown away.
"""

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.files.listener import SILENT, Listener
from streamquant.files.safetensors_file import read_header
from streamquant.files.worker import Stopped, Worker
from streamquant.files.writing import make_folder
from streamquant.quant.errors import StreamquantError, UsageError

FETCHERS = 2
DEFAULT_SHARDS = 4
"""Shards that the default limit holds: one in work, one ready, two on their way."""
CLOSE_SECONDS = 2.0
"""How long `close` waits for a download to notice: on a slow line the client looks up seldom."""
GIB = 2**30


def spool_limit(checkpoint: HubCheckpoint, gib: float | None, readings: Iterable[tuple[str, ...]] | None = None) -> int:
    """Bytes that the spool of a checkpoint may hold: what was asked for, or some shards; never more than all of them.

    `readings` are the shards that a run reads together, in its order (Plan.readings); default: those of each tensor.
    Shards in the cache of the Hub's client need no room. Raises UsageError if those of the others that are needed at
    the same time do not fit.
    """
    fetched = {file.name: file.size for file in checkpoint.files if checkpoint.hub.cached(file.name) is None}
    if not fetched:
        return 0
    largest, total = max(fetched.values()), sum(fetched.values())
    if readings is None:
        readings = (tensor.files for tensor in checkpoint.tensors.values())
    sets = [frozenset((name,)) for name in fetched] + [*needed_together(readings)]
    together = max(sets, key=lambda names: sum(fetched.get(name, 0) for name in names))
    least = sum(fetched.get(name, 0) for name in together)
    if gib is None:
        return min(total, max(DEFAULT_SHARDS * largest, least + largest))
    limit = int(gib * GIB)
    if limit < least:
        raise UsageError(
            "the spool is smaller than a shard",
            where="--spool-gib",
            found=f"{limit / GIB:.3g} GiB",
            required=f"at least {least / GIB:.3f} GiB for {', '.join(sorted(together))}; twice that to fetch while"
            " converting",
        )
    return min(total, limit)


def needed_together(readings: Iterable[tuple[str, ...]]) -> Iterator[frozenset[str]]:
    """The shards that have to be there at a time, if these are read in their order.

    One, but where codes and their scales lie in different shards, or tensors that share a scale: a shard is there from
    the first tensor that needs it to the last, so a reader of the first unfinished tensor, whose shards are fetched
    before all others, never waits for room that only a later one could give.
    """
    files = [*readings]
    last = {name: number for number, names in enumerate(files) for name in names}
    here: set[str] = set()
    for number, names in enumerate(files):
        here |= set(names)
        yield frozenset(here)
        here = {name for name in here if last[name] > number}


@dataclass
class _Shard:
    """A shard that somebody expects."""

    name: str
    size: int
    state: Literal["queued", "fetching", "ready"] = "queued"
    path: Path | None = None
    """Where it is, or will be."""
    reserved: int = 0
    """Bytes of the limit that it takes; 0 for one in the client's cache."""
    descriptor: int | None = None
    place: int = -1
    """Among the shards that are expected, in the order in which they are read."""
    unwanted: bool = False
    """`done` while it was being fetched: to be deleted when it is there."""


class Spool:
    """The shards of a checkpoint of the Hub; see convert/source/shards.py for the contract."""

    def __init__(
        self,
        checkpoint: HubCheckpoint,
        folder: Path,
        limit: int,
        listener: Listener = SILENT,
        fetchers: int = FETCHERS,
    ) -> None:
        """`limit` bytes: see `spool_limit`. `listener` hears of the bytes just fetched, and of waits. Raises OSError if
        the folder cannot be made."""
        self.repo = checkpoint.hub
        self.folder, self.limit = folder, limit
        self.most = 0
        """The most bytes that were reserved at any time."""
        self._listener = listener
        self._files = {file.name: file for file in checkpoint.files}
        self._shards: dict[str, _Shard] = {}
        self._queue: deque[_Shard] = deque()
        self._used = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        make_folder(folder, folder.parent)
        self._threads = [Worker(self._fetch_all, f"fetch-{number}") for number in range(fetchers)]

    # The contract of Shards

    def expect(self, names: Sequence[str]) -> None:
        """See Shards.expect. Call it once, first."""
        self._tidy(names)
        with self._changed:
            for place, name in enumerate(names):
                self._add(name, place)
        for thread in self._threads:
            thread.start()

    def open(self, name: str) -> int:
        """See Shards.open."""
        with self._changed:
            shard = self._shards.get(name) or self._add(name)
            shard.unwanted = False
            self._changed.notify_all()
            while shard.state != "ready":
                if self._error is not None:
                    raise self._error
                if self._stopping.is_set():
                    raise Stopped
                self._changed.wait()
            if shard.descriptor is None:
                assert shard.path is not None, "a ready shard has a path"
                shard.descriptor = os.open(shard.path, os.O_RDONLY)
            return shard.descriptor

    def done(self, name: str) -> None:
        """See Shards.done."""
        with self._changed:
            shard = self._shards.get(name)
            if shard is None:
                return
            if shard.state == "fetching":
                shard.unwanted = True
                return
            if shard.state == "queued":
                self._queue.remove(shard)
            del self._shards[name]
            self._let_go(shard)

    def sha256(self, name: str) -> str | None:
        """See Shards.sha256: what the Hub says, which `open` has checked."""
        return self.repo.file(name).sha256

    def check_unchanged(self) -> None:
        """See Shards.check_unchanged: a commit cannot change."""

    def stop(self) -> None:
        """See Shards.stop."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()

    def close(self) -> None:
        """See Shards.close. Whole shards stay in the folder, for the run that goes on."""
        self.stop()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()  # type: ignore[no-untyped-call]  # the only way to end its downloads
        with self._changed:
            for shard in self._shards.values():
                if shard.descriptor is not None:
                    os.close(shard.descriptor)
                    shard.descriptor = None

    def remove(self) -> None:
        """The run is complete: delete the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # The folder

    def _tidy(self, names: Sequence[str]) -> None:
        """Keep whole shards that are expected, as far as they fit; delete all else, the client's partial files too."""
        kept, expected = 0, set(names)
        for path in sorted(self.folder.iterdir()):
            if path.name in expected and path.is_file() and not path.is_symlink():
                size = self._files[path.name].size
                if path.stat().st_size == size and kept + size <= self.limit:
                    kept += size
                    continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def _add(self, name: str, place: int = -1) -> _Shard:
        """Queue a shard; the caller holds the lock. One that a killed run left has its room already.

        One without a place goes before all others: nobody expected it.
        """
        shard = self._shards[name] = _Shard(name, self._files[name].size, place=place)
        if place >= 0 and (self.folder / name).is_file():
            self._reserve(shard)
        if place < 0:
            self._queue.appendleft(shard)
        else:
            self._queue.append(shard)
        return shard

    def _reserve(self, shard: _Shard) -> None:
        shard.reserved = shard.size
        self._used += shard.size
        self.most = max(self.most, self._used)

    def _let_go(self, shard: _Shard) -> None:
        """Close and delete a shard; the caller holds the lock."""
        if shard.descriptor is not None:
            os.close(shard.descriptor)
        if shard.reserved:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / shard.name).unlink()
            self._used -= shard.reserved
        shard.descriptor, shard.path, shard.reserved = None, None, 0
        self._changed.notify_all()

    # Fetching

    def _fetch_all(self) -> None:
        try:
            while (shard := self._next()) is not None:
                self._fetch(shard)
                with self._changed:
                    shard.state = "ready"
                    if shard.unwanted:
                        del self._shards[shard.name]
                        self._let_go(shard)
                    self._changed.notify_all()
        except Stopped:
            return
        except BaseException as error:  # handed to those who wait for the shard, whatever it is
            with self._changed:
                if not self._stopping.is_set():
                    self._error = error
                self._stopping.set()
                self._changed.notify_all()

    def _next(self) -> _Shard | None:
        """The next shard, when there is room for it; None to stop. In order: room is not given away to a later one."""
        with self._changed:
            while not self._stopping.is_set():
                if self._queue and self._finds_place(self._queue[0]):
                    shard = self._queue.popleft()
                    shard.state = "fetching"
                    return shard
                self._changed.wait()
            return None

    def _finds_place(self, shard: _Shard) -> bool:
        """Choose the path of a shard and reserve room for it, if there is room; the caller holds the lock."""
        cached = None if shard.reserved else self.repo.cached(shard.name)
        shard.path = cached or self.folder / shard.name
        if cached is not None or shard.reserved:
            return True
        if shard.size > self.limit:
            raise StreamquantError(
                "a shard is not in the Hub client's cache any more, and has no room in the spool",
                where=f"{self.repo}/{shard.name}",
                found=f"{shard.size:,} bytes",
                required=f"at most {self.limit:,}",
                hint="run the same command again",
            )
        if self._make_room(shard):
            self._reserve(shard)
            return True
        return False

    def _make_room(self, shard: _Shard) -> bool:
        """Whether a shard fits; shards that were fetched for later are given back for one that is wanted before."""
        later = [
            other
            for other in self._shards.values()
            if other.reserved and other.state != "fetching" and other.descriptor is None and other.place > shard.place
        ]
        later.sort(key=lambda other: other.place)
        missing = self._used + shard.size - self.limit
        if missing > sum(other.size for other in later):
            return False
        while self._used + shard.size > self.limit:
            self._give_back(later.pop())
        return True

    def _give_back(self, shard: _Shard) -> None:
        """Delete a shard that nobody reads yet, to fetch it again later; the caller holds the lock."""
        self._let_go(shard)
        if shard.state == "ready":
            shard.state = "queued"
            self._queue.append(shard)
            self._queue = deque(sorted(self._queue, key=lambda waiting: waiting.place))

    def _fetch(self, shard: _Shard) -> None:
        """Bring a shard to its path, with the Hub's bytes. Raises StreamquantError, Stopped."""
        from streamquant.hub.errors import DamagedBody, Retrying, ask

        local = shard.path
        assert local is not None, "its place was chosen"
        if not shard.reserved:
            self.repo.check_cached(shard.name, local, self._stopping)
            self._check_header(shard.name, local)
            return

        def fetch() -> None:
            with contextlib.suppress(FileNotFoundError, DamagedBody):
                self.repo.check(shard.name, local, self._stopping)
                return
            local.unlink(missing_ok=True)
            self.repo.download(shard.name, self.folder, self._listener, self._stopping)
            self.repo.check(shard.name, local, self._stopping)

        what = f"fetching {shard.name}"
        ask(fetch, repo=str(self.repo), what=what, how=Retrying(self._listener, self._stopping))
        self._check_header(shard.name, local)

    def _check_header(self, name: str, local: Path) -> None:
        """The hash was made of the whole file; the plan was made of a header that came alone."""
        if hashlib.sha256(read_header(local)[2]).hexdigest() != self._files[name].header_sha256:
            raise StreamquantError(
                "a shard's header is not the one that the plan was made from",
                where=f"{self.repo}/{name}",
                hint="something between here and the Hub changes the bytes; remove the output folder and start again",
            )
