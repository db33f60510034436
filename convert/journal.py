"""What is done of a conversion: a file of JSON lines that survives kill -9, and is believed only as far as it can be.

    {"journal": 1, "fingerprint": "..."}                 the plan that this journal belongs to
    {"chunk": 17, "hashes": ["...", ...]}                written; a hash of each run of bytes, checked on resume
    {"file": "...", "sha256": "...", "tensors": {...}}   complete, on disk, about to get its final name
    {"source": "...", "sha256": "..."}                   a source shard, read to its end

Lines are appended with one write each. A line that a crash tore is dropped. A chunk whose bytes did not reach the disk
(power loss) has another hash than its line says and is converted again.
"""

import contextlib
import fcntl
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.errors import StreamquantError

WORK_FOLDER = ".streamquant"
VERSION = 1


@dataclass
class Progress:
    """What a journal says is done."""

    chunks: dict[int, list[str]] = field(default_factory=dict)
    """Chunk number -> hashes of the bytes written, in the order of the chunk's outputs and parts."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path -> {"sha256": ..., "tensors": {"PART:TENSOR": hash}}."""
    sources: dict[str, str] = field(default_factory=dict)
    """Source file name -> sha256."""


class Journal:
    """The journal of one output folder; holding it open locks the folder against a second run."""

    def __init__(self, out: Path) -> None:
        self.folder = out / WORK_FOLDER
        self.path = self.folder / "journal.jsonl"
        self._lock = threading.Lock()
        self._file: int | None = None
        self.folder.mkdir(exist_ok=True)
        self._guard = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._guard)
            raise StreamquantError(
                "another streamquant is writing to this folder",
                where=str(out),
                hint="wait for it or choose another --out",
            ) from error

    def fingerprint(self) -> str | None:
        """The fingerprint of the unfinished run in this folder, or None. Raises StreamquantError for a foreign file."""
        lines = self._read_lines()
        return None if not lines else str(lines[0]["fingerprint"])

    def open(self, fingerprint: str) -> Progress:
        """Start a journal for the plan with `fingerprint`, or go on with the one that is there.

        Raises StreamquantError if an unfinished run of another plan is there.
        """
        lines = self._read_lines()
        if lines and lines[0]["fingerprint"] != fingerprint:
            raise StreamquantError(
                "the folder holds an unfinished run of another plan",
                where=str(self.path),
                found=f"plan {lines[0]['fingerprint'][:12]}",
                required=f"plan {fingerprint[:12]}: the same source (unchanged), variants, options and version",
                hint="repeat the command that began it, or remove the folder and start again",
            )
        progress = Progress()
        for line in lines[1:]:
            if "chunk" in line:
                progress.chunks[line["chunk"]] = line["hashes"]
            elif "file" in line:
                progress.files[line["file"]] = {"sha256": line["sha256"], "tensors": line["tensors"]}
            else:
                progress.sources[line["source"]] = line["sha256"]
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if not lines:
            self._append({"journal": VERSION, "fingerprint": fingerprint})
        return progress

    def chunk(self, number: int, hashes: list[str]) -> None:
        """Record that all bytes of a chunk were written."""
        self._append({"chunk": number, "hashes": hashes})

    def file(self, path: str, sha256: str, tensors: dict[str, str]) -> None:
        """Record that a file is complete and on disk; the caller renames it next."""
        self._append({"file": path, "sha256": sha256, "tensors": tensors}, sync=True)

    def source(self, name: str, sha256: str) -> None:
        """Record the hash of a source file."""
        self._append({"source": name, "sha256": sha256})

    def remove(self, *, finished: bool) -> None:
        """Forget the run if it is finished; a journal of another, unfinished run stays."""
        if finished:
            self.path.unlink(missing_ok=True)
        if not self.path.exists():
            (self.folder / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Release the lock and the file; what was recorded stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        os.close(self._guard)

    def _append(self, line: dict[str, Any], *, sync: bool = False) -> None:
        assert self._file is not None, "open() comes first"
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            written = os.write(self._file, data)
            if written != len(data):  # a torn line must not run into the next one
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(28, os.strerror(28), str(self.path))
            if sync:
                os.fsync(self._file)

    def _read_lines(self) -> list[dict[str, Any]]:
        """The complete lines; cuts off a torn one."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.truncate(self.path, whole)
        try:
            lines = [json.loads(line) for line in data[:whole].splitlines()]
            if lines and (lines[0]["journal"] != VERSION or not isinstance(lines[0]["fingerprint"], str)):
                raise ValueError("another version")
        except (ValueError, KeyError, TypeError) as error:
            raise StreamquantError(
                "cannot read the journal of an unfinished run",
                where=str(self.path),
                found=str(error),
                hint="remove the output folder and start again",
            ) from error
        return lines
