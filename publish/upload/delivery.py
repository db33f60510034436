"""Upload while converting: a finished file is sent at once, and its place on the disk is free again if that is wanted.

    delivery = deliver(plan, out, EarlyPush("ORG/MODEL", PushOptions(private=True), delete=True))
    convert(..., delivery=delivery)

What is at its destination is decided by the Hub's own list, by SHA-256: a process that is killed at any moment is
repeated, and a file that arrived is neither made nor sent again. A local file is deleted only after the Hub has named
its hash.

A file is uploaded as soon as it is finished; commits join files, since the Hub allows about 128 of them an hour. One is
made every COMMIT_SECONDS, and earlier when it would free half of the room that files may wait in. A limit is waited out
while the conversion goes on. Contents that were uploaded and not committed are not sent again by the next run.
OUT/.streamquant/uploads.jsonl records what was sent where, for people and for a later look.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from streamquant.convert.plan.records import Plan
from streamquant.convert.run.journal import WORK_FOLDER
from streamquant.files.listener import SILENT, Listener
from streamquant.files.worker import Stopped, Worker
from streamquant.files.writing import make_folder, open_own
from streamquant.hub.background import STOP_SECONDS, abort_xet
from streamquant.hub.client import connect
from streamquant.hub.outgoing import Held, Outgoing
from streamquant.hub.target import Destination, Target
from streamquant.publish.upload.limits import FILES_IN_COMMIT, check_plan
from streamquant.publish.upload.options import ROOM, EarlyPush
from streamquant.publish.upload.push import check_arrived
from streamquant.publish.upload.selection import name_repositories
from streamquant.quant.errors import StreamquantError

UPLOADERS = 2
"""Files that are sent at once."""
COMMIT_SECONDS = 300.0
"""The longest that an uploaded file waits for the commit that names it."""
UPLOADS = "uploads.jsonl"
_TAIL = 65536
"""Bytes that are looked through at once for the end of the last whole line."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    path: str
    file: Path
    size: int
    sha256: str

    @property
    def folder(self) -> str:
        """The folder of the plan, which has a repository."""
        return self.path.partition("/")[0]

    @property
    def outgoing(self) -> Outgoing:
        """The file as it is sent."""
        return Outgoing(self.path.partition("/")[2], self.file, self.size, self.sha256)


@dataclass(slots=True)
class _Uploaded:
    """Files of a folder that no commit names yet."""

    since: float
    """time.monotonic() of the first."""
    files: list[_Waiting]

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return sum(file.size for file in self.files)


class HubDelivery:
    """Takes finished files to the Hub (convert/run/delivery.py, Delivery). Safe to use from several threads.

    `targets` are the repositories by name of folder; they are there already. `delete` removes a file when the Hub
    holds it, and then at most `room` bytes wait.
    """

    def __init__(
        self,
        out: Path,
        targets: Mapping[str, Target],
        *,
        room: int = ROOM,
        delete: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        self.room = room if delete else sys.maxsize  # what stays on the disk anyway need not be waited for
        self.delete = delete
        self._targets = dict(targets)
        self._stop = stop or threading.Event()
        self._record = UploadRecord(out)
        self._state = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._uploading = 0
        self._uploaded: dict[str, _Uploaded] = {}
        self._waiting = 0
        self._finishing = False
        self._error: BaseException | None = None
        self._threads: list[Worker] = []
        self._held: dict[str, dict[str, Held]] = {}
        self._listing = threading.Lock()

    # Delivery

    def has(self, path: str, size: int, sha256: str) -> bool:
        """Whether the Hub holds a file: asked of the Hub, not of the record. Raises StreamquantError."""
        target, name = self._place(path)
        held = self._holds(target).get(name)
        return held is not None and held.size == size and held.sha256 == sha256

    def take(self, path: str, file: Path, size: int, sha256: str) -> None:
        """Queue a finished file for upload; waits while more than `room` bytes are queued.

        Raises StreamquantError if an earlier upload failed, Stopped after `stop`.
        """
        self._place(path)
        with self._state:
            self._raise()
            self._start()
            self._queue.append(_Waiting(path, file, size, sha256))
            self._waiting += size
            self._state.notify_all()
        self.wait_for_room()

    def wait_for_room(self) -> None:
        """Wait while more than `room` bytes wait for their upload. A conversion that calls it before each chunk keeps
        to the figure of `peak_disk`. Raises StreamquantError if an upload failed, Stopped after `stop`.
        """
        if self._waiting <= self.room and self._error is None:  # the usual case, without the lock
            return
        with self._state:
            while self._waiting > self.room:
                self._raise()
                self._state.wait(0.2)
            self._raise()

    def finish(self) -> None:
        """Wait until everything is at the Hub. Raises StreamquantError if an upload failed, Stopped after `stop`."""
        with self._state:
            self._finishing = True
            self._state.notify_all()
            while self._waiting > 0:
                self._raise()
                self._state.wait(0.2)
            self._raise()
        self._end()

    def stop(self) -> None:
        """End uploads soon. Whatever arrived counts for the next run."""
        if self._stop.is_set():
            return
        self._stop.set()
        if any(thread.is_alive() for thread in self._threads):
            abort_xet()
        self._end()

    def _end(self) -> None:
        self._stop.set()
        with self._state:
            self._state.notify_all()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:  # one that waits for an answer is left behind: it makes no commit any more
            thread.join(max(0.0, deadline - time.monotonic()))
        self._record.close()

    def _raise(self) -> None:
        """Raise what went wrong; the caller holds the lock."""
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise Stopped

    def _place(self, path: str) -> tuple[Target, str]:
        """The repository of a path of the plan, and the path in it."""
        folder, _, name = path.partition("/")
        return self._targets[folder], name

    def _holds(self, target: Target) -> dict[str, Held]:
        """What a repository held when it was first asked for, and what was added since."""
        with self._listing:
            if target.repo not in self._held:
                self._held[target.repo] = target.holds()
            return self._held[target.repo]

    # Uploading

    def _start(self) -> None:
        if not self._threads:
            self._threads = [Worker(self._upload_all, f"upload-{number}") for number in range(UPLOADERS)]
            self._threads.append(Worker(self._commit_all, "upload-commits"))
            for thread in self._threads:
                thread.start()

    def _ended(self) -> bool:
        return self._stop.is_set() or self._error is not None

    def _fail(self, error: BaseException) -> None:
        """Hand an error to those who wait, whatever it is."""
        with self._state:
            self._error = self._error or error
            self._state.notify_all()

    def _next(self) -> _Waiting | None:
        with self._state:
            while not self._queue and not self._ended():
                self._state.wait()
            if self._ended():
                return None
            self._uploading += 1
            return self._queue.popleft()

    def _upload_all(self) -> None:
        try:
            while (item := self._next()) is not None:
                there = self.has(item.path, item.size, item.sha256)
                if there:
                    self._arrived([item])
                else:
                    self._targets[item.folder].upload(item.outgoing)
                with self._state:
                    self._uploading -= 1
                    if not there:
                        now = time.monotonic()
                        self._uploaded.setdefault(item.folder, _Uploaded(now, [])).files.append(item)
                    self._state.notify_all()
        except BaseException as error:
            self._fail(error)

    def _commit_all(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                self._commit(batch)
        except BaseException as error:
            self._fail(error)

    def _next_batch(self) -> list[_Waiting] | None:
        """Files of one folder that are committed now, when it is time; None to stop."""
        with self._state:
            while not self._ended():
                folder = self._due()
                if folder is not None:
                    uploaded = self._uploaded.pop(folder)
                    batch, rest = uploaded.files[:FILES_IN_COMMIT], uploaded.files[FILES_IN_COMMIT:]
                    if rest:
                        self._uploaded[folder] = _Uploaded(uploaded.since, rest)
                    return batch
                self._state.wait(0.2)
            return None

    def _due(self) -> str | None:
        """The folder that a commit is made of now, if there is one; the caller holds the lock."""
        if not self._uploaded:
            return None
        oldest, first = min(self._uploaded.items(), key=lambda entry: entry[1].since)
        largest, _ = max(self._uploaded.items(), key=lambda entry: entry[1].nbytes)
        if time.monotonic() - first.since >= COMMIT_SECONDS:
            return oldest
        if not self._queue and not self._uploading and (self._finishing or self._waiting > self.room):
            return oldest
        if 2 * sum(uploaded.nbytes for uploaded in self._uploaded.values()) >= self.room:
            return largest
        return next((name for name, found in self._uploaded.items() if len(found.files) >= FILES_IN_COMMIT), None)

    def _commit(self, batch: list[_Waiting]) -> None:
        """Uploaded files of one folder as a commit, looked for there and recorded."""
        target, files = self._targets[batch[0].folder], [item.outgoing for item in batch]
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        commit = target.send(files, f"Upload {files[0].path}{others} with streamquant")
        check_arrived(target, files)
        for item, file in zip(batch, files, strict=True):
            with self._listing:
                self._held[target.repo][file.path] = Held(item.size, item.sha256, "")
            self._record.add(target.repo, commit, item.path, item.size, item.sha256)
        self._arrived(batch)

    def _arrived(self, batch: list[_Waiting]) -> None:
        """The Hub has named these files: delete them here, if wanted, and count them no more."""
        for item in batch:
            if self.delete:
                try:
                    item.file.unlink(missing_ok=True)
                except OSError as error:
                    raise StreamquantError(
                        "cannot delete a file that was uploaded", where=str(item.file), found=error.strerror
                    ) from error
        with self._state:
            self._waiting -= sum(item.size for item in batch)
            self._state.notify_all()


class UploadRecord:
    """OUT/.streamquant/uploads.jsonl: a line for each file that the Hub confirmed. A torn last line is dropped."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.path = out / WORK_FOLDER / UPLOADS
        self._lock = threading.Lock()
        self._file: int | None = None

    def add(self, repo: str, commit: str, path: str, size: int, sha256: str) -> None:
        """Append a line, and sync it. Raises OSError; StreamquantError if the record is no plain file."""
        line = {"repo": repo, "commit": commit, "path": path, "size": size, "sha256": sha256}
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._file is None:
                self._open()
            assert self._file is not None, "just opened"
            os.write(self._file, data)
            os.fsync(self._file)

    def _open(self) -> None:
        make_folder(self.path.parent, self._out)
        self._file = open_own(self.path, append=True)
        end = size = os.fstat(self._file).st_size
        whole = 0
        while end and not whole:  # a line may be of any length: what lies here is not believed to be ours
            tail = os.pread(self._file, min(end, _TAIL), max(0, end - _TAIL))
            end -= len(tail)
            if at := tail.rfind(b"\n") + 1:
                whole = end + at
        if whole != size:  # a crash tore the last line
            os.ftruncate(self._file, whole)

    def read(self) -> list[dict[str, object]]:
        """The lines that are whole."""
        with contextlib.suppress(FileNotFoundError):
            data = self.path.read_bytes()
            return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        return []

    def close(self) -> None:
        """Close the file; its lines stay."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


# Before a conversion


def plan_repositories(plan: Plan, repo: str) -> dict[str, str]:
    """Name of folder -> ORG/NAME for the folders of a plan; `repo` is the stem, or the one name that is needed."""
    folders = dict.fromkeys(variant.folder for variant in plan.variants)
    return name_repositories({name: name.removeprefix(plan.name) for name in folders}, repo, is_stem=True)


def deliver(
    plan: Plan, out: Path, where: EarlyPush, listener: Listener = SILENT, api: HfApi | None = None
) -> HubDelivery:
    """Check that a plan can be published, make its repositories, and return what `convert` gives its files to.

    Raises UsageError, and StreamquantError: no token, a public repository with `private`, a file too large.
    """
    check_plan(plan)
    stop = threading.Event()
    api = api or connect()
    targets = {
        folder: Target(api, Destination(name, where.options.revision), listener, stop)
        for folder, name in plan_repositories(plan, where.repo).items()
    }
    for target in targets.values():
        target.open(private=where.options.private)
    return HubDelivery(out, targets, room=where.room, delete=where.delete, stop=stop)
