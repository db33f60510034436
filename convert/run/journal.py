"""What is done of a conversion: a file of JSON lines that survives kill -9, and is believed only as far as it can be.

    {"journal": 3, "fingerprint": "...", "variants": {}} the plan that this journal belongs to
    {"amax": "...", "value": 0.25}                       the largest magnitude of a source tensor, before its chunks
    {"chunk": 17, "hashes": ["...", ...]}                written; a hash of each run of bytes, checked on resume
    {"file": "...", "sha256": "...", "tensors": {...}}   complete, on disk, about to get its final name
    {"source": "...", "sha256": "..."}                   a source shard, read to its end

Lines are appended with one write each; each ends with "check", a hash of the line before it and of the plan, so that a
line that was changed, or comes from another run, is refused. A line that a crash tore is dropped. A chunk whose bytes
did not reach the disk (power loss) has another hash than its line says and is converted again.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamquant.files.hashing import quick_hash
from streamquant.files.json_record import JsonRecord
from streamquant.files.strict_json import parse_json
from streamquant.files.writing import make_folder, open_own
from streamquant.quant.errors import StreamquantError

WORK_FOLDER = ".streamquant"
JOURNAL = "journal.jsonl"
VERSION = 3
READ = (2, VERSION)
"""The versions that are gone on with: in 2 there was no amax."""
_BROKEN = "cannot read the journal of an unfinished run"
_HINT = "remove the output folder and start again"
_CHECK = b',"check":"'
"""Begins the end of a line: this, the hash in hexadecimal, '"}'."""


@dataclass(frozen=True, slots=True)
class Head:
    """The plan that a journal belongs to."""

    fingerprint: str
    variants: Mapping[str, str]
    """Spec -> fingerprint of the variant."""


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """The hashes of a file that is complete and on disk."""

    sha256: str
    tensors: dict[str, str]
    """"PART:TENSOR" -> quick hash."""


@dataclass
class Progress:
    """What a journal says is done."""

    chunks: dict[int, list[str]] = field(default_factory=dict)
    """Chunk number -> hashes of the bytes written, in the order of the chunk's outputs and parts."""
    files: dict[str, FinishedFile] = field(default_factory=dict)
    """By path."""
    sources: dict[str, str] = field(default_factory=dict)
    """Source file name -> sha256."""
    amax: dict[str, float] = field(default_factory=dict)
    """Source tensor -> its largest magnitude."""

    def add(self, line: JsonRecord) -> None:
        """Take over a line of the journal. Raises StreamquantError if it is none."""
        match [key for key in ("chunk", "file", "source", "amax") if line.take(key) is not None]:
            case ["chunk"]:
                self.chunks[line.count("chunk")] = [*line.texts("hashes")]
            case ["file"]:
                self.files[line.text("file")] = FinishedFile(line.text("sha256"), line.text_map("tensors"))
            case ["source"]:
                self.sources[line.text("source")] = line.text("sha256")
            case ["amax"]:
                self.amax[line.text("amax")] = line.magnitude("value")
            case kinds:
                raise line.broken(None, kinds, "a chunk, a file, a source or an amax")


class Journal:
    """The journal of one output folder; holding it open locks the folder against a second run."""

    def __init__(self, out: Path) -> None:
        self.folder = out / WORK_FOLDER
        self.path = self.folder / JOURNAL
        self._lock = threading.Lock()
        self._file: int | None = None
        self._fingerprint = ""
        self._guard = self._take_lock(out)

    def _take_lock(self, out: Path) -> int:
        while True:
            make_folder(self.folder, out)
            guard = open_own(self.folder / "lock")
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(guard)
                raise StreamquantError(
                    "another streamquant is writing to this folder",
                    where=str(out),
                    hint="wait for it or choose another --out",
                ) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(guard), (self.folder / "lock").stat()):
                    return guard
            os.close(guard)  # a run that has just ended removed this lock: it no longer keeps anybody out

    def head(self) -> Head | None:
        """The plan of the unfinished run in this folder, or None. Raises StreamquantError for a foreign file."""
        return self._read()[0]

    def open(self, head: Head) -> Progress:
        """Start a journal for a plan, or go on with the one that is there.

        Raises StreamquantError if an unfinished run of another plan is there.
        """
        found, progress = self._read()
        if found is not None and found.fingerprint != head.fingerprint:
            raise StreamquantError(
                "the folder holds an unfinished run of another plan",
                where=str(self.path),
                found=f"plan {found.fingerprint[:12]}: {', '.join(found.variants)}",
                required=f"plan {head.fingerprint[:12]}: the same source (unchanged), variants, options and version",
                hint="repeat the command that began it, or remove the folder and start again",
            )
        self._file = open_own(self.path, append=True)
        self._fingerprint = head.fingerprint
        if found is None:
            self._append({"journal": VERSION, "fingerprint": head.fingerprint, "variants": dict(head.variants)})
        return progress

    def chunk(self, number: int, hashes: list[str]) -> None:
        """Record that all bytes of a chunk were written."""
        self._append({"chunk": number, "hashes": hashes})

    def file(self, path: str, found: FinishedFile) -> None:
        """Record that a file is complete and on disk; the caller renames it next."""
        self._append({"file": path, "sha256": found.sha256, "tensors": found.tensors}, sync=True)

    def source(self, name: str, sha256: str) -> None:
        """Record the hash of a source file."""
        self._append({"source": name, "sha256": sha256})

    def amax(self, name: str, value: float) -> None:
        """Record the largest magnitude of a source tensor; before any chunk that was encoded by it."""
        self._append({"amax": name, "value": value})

    def remove(self) -> None:
        """The run is complete: forget it."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock and the file; what was recorded stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        with contextlib.suppress(OSError):
            if not self.path.exists():
                (self.folder / "lock").unlink()
                self.folder.rmdir()
        os.close(self._guard)

    def _append(self, line: dict[str, Any], *, sync: bool = False) -> None:
        assert self._file is not None, "open() comes first"
        data = _with_check(json.dumps(line, separators=(",", ":")).encode(), self._fingerprint) + b"\n"
        with self._lock:
            written = os.write(self._file, data)
            if written != len(data):  # a torn line must not run into the next one
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(28, os.strerror(28), str(self.path))
            if sync:
                os.fsync(self._file)

    def _read(self) -> tuple[Head | None, Progress]:
        """What the complete lines say; cuts off a torn one."""
        try:
            descriptor = open_own(self.path, make=False)
        except FileNotFoundError:
            return None, Progress()
        with open(descriptor, "r+b") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                file.truncate(whole)
        head, progress = None, Progress()
        for number, text in enumerate(data[:whole].split(b"\n")[:-1], 1):
            line = _Line(self.path, number, text)
            if head is None:
                head = line.head()
            else:
                progress.add(line.record(head.fingerprint))
        return head, progress


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a journal. Both methods raise StreamquantError if it is not as it was written."""

    path: Path
    number: int
    text: bytes

    def head(self) -> Head:
        """The first line."""
        line = self._parse(self.text)
        if (version := line.count("journal")) not in READ:
            raise StreamquantError(
                "cannot read the journal of an unfinished run",
                where=str(self.path),
                found=f"journal {version}, of another version of streamquant",
                required=f"journal {VERSION}",
                hint="finish it with the version that began it, or remove the output folder and start again",
            )
        fingerprint = line.text("fingerprint")
        self.record(fingerprint)
        return Head(fingerprint, line.text_map("variants"))

    def record(self, fingerprint: str) -> JsonRecord:
        """A line of the journal of a plan."""
        head, found, check = self.text.removesuffix(b'"}').rpartition(_CHECK)
        line = head + b"}"
        if not found or check != _check(line, fingerprint):
            raise self._broken("it is not as it was written")
        return self._parse(line)

    def _parse(self, text: bytes) -> JsonRecord:
        where = f"{self.path}, line {self.number}"
        try:
            value = parse_json(text, where)
        except StreamquantError as error:
            raise self._broken(f"{error.what}: {error.found}") from error
        return JsonRecord(value, where, _BROKEN, _HINT)

    def _broken(self, found: str) -> StreamquantError:
        return StreamquantError(
            "cannot read the journal of an unfinished run",
            where=str(self.path),
            found=f"line {self.number}: {found}",
            hint=_HINT,
        )


def _with_check(line: bytes, fingerprint: str) -> bytes:
    """A JSON object with its check as the last key."""
    return b'%s%s%s"}' % (line.removesuffix(b"}"), _CHECK, _check(line, fingerprint))


def _check(line: bytes, fingerprint: str) -> bytes:
    return str(quick_hash(fingerprint.encode(errors="backslashreplace") + line).hexdigest()).encode()
