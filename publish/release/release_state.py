"""What a release has done, so that a repeat does only the rest: one small JSON file in the --out folder.

    {"release": 1, "stages": {"imatrix": {"begun": KEY, "done": KEY, "outputs": {PATH: SHA256}, "made": {}}, ...}}

KEY is a hash of all that a stage's outputs depend on. It is written as `begun` before the stage starts, so that what a
killed run left behind is known to be of it, and as `done` when the outputs lie there.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from streamquant.files.hashing import sha256_of
from streamquant.files.json_record import JsonRecord
from streamquant.files.strict_json import read_record
from streamquant.files.writing import explain, write_atomically
from streamquant.publish.release.release_file import STAGES, StageName
from streamquant.quant.errors import StreamquantError

VERSION = 1
_BROKEN = "not the state of a release"
_HINT = "remove the file: what is complete is found again, the rest is done again"


@dataclass(slots=True)
class Made:
    """What the stage convert made."""

    folders: tuple[str, ...] = ()
    """Names of the release's folders, below --out."""
    ours: tuple[str, ...] = ()
    """Fingerprints of variants that are ours to replace."""

    def json(self) -> dict[str, list[str]]:
        """As in the file."""
        return {key: list(value) for key, value in (("folders", self.folders), ("ours", self.ours)) if value}


@dataclass(slots=True)
class StageState:
    """What is known of one stage."""

    begun: str | None = None
    done: str | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    """Path, from the --out folder, -> SHA-256; of small files."""
    made: Made = field(default_factory=Made)
    """What the stage convert has to remember."""

    def json(self) -> dict[str, object]:
        """As in the file."""
        return {"begun": self.begun, "done": self.done, "outputs": self.outputs, "made": self.made.json()}


class ReleaseState:
    """The state file of one release."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stages: dict[StageName, StageState] = {name: StageState() for name in STAGES}
        if path.exists():
            self._read()

    def __getitem__(self, stage: StageName) -> StageState:
        return self._stages[stage]

    def begin(self, stage: StageName, key: str) -> None:
        """The stage starts: what it had done is not done any more."""
        entry = self._stages[stage]
        entry.begun, entry.done = key, None
        self.write()

    def finish(self, stage: StageName, key: str, outputs: Iterable[Path]) -> None:
        """The outputs of the stage lie there."""
        entry = self._stages[stage]
        entry.begun = entry.done = key
        entry.outputs = {os.path.relpath(path, self.path.parent): sha256_of(path) for path in outputs}
        self.write()

    def is_intact(self, stage: StageName) -> bool:
        """Whether the outputs of a stage are there with the hashes that they had."""
        outputs = {self.path.parent / path: sha256 for path, sha256 in self._stages[stage].outputs.items()}
        try:
            return bool(outputs) and all(path.is_file() and sha256_of(path) == known for path, known in outputs.items())
        except OSError:  # a name that no file can have
            return False

    def write(self) -> None:
        """Write the file. Raises StreamquantError."""
        stages = {name: entry.json() for name, entry in self._stages.items() if entry != StageState()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({"release": VERSION, "stages": stages}, indent=1).encode() + b"\n")
        except OSError as error:
            raise explain(error, self.path) from error

    def _read(self) -> None:
        record = JsonRecord(read_record(self.path, _HINT), str(self.path), _BROKEN, _HINT)
        if (version := record.count("release")) != VERSION:
            raise record.broken("release", version, f"{VERSION}, of this version of streamquant")
        stages = record.object("stages")
        if other := next((name for name in stages if name not in STAGES), None):
            raise stages.broken(None, other, f"stages of {', '.join(STAGES)}")
        self._stages |= {name: _entry(stages.object(name)) for name in STAGES if stages.take(name) is not None}


def _entry(record: JsonRecord) -> StageState:
    made = JsonRecord({}, "", _BROKEN) if record.take("made") is None else record.object("made")
    folders = made.texts("folders")
    if outside := [name for name in folders if name in ("", ".", "..") or "/" in name or not name.isprintable()]:
        raise made.broken("folders", outside, "names of folders below --out")
    return StageState(
        begun=record.optional_text("begun"),
        done=record.optional_text("done"),
        outputs=record.text_map("outputs"),
        made=Made(folders, made.texts("ours")),
    )


def key_of(value: object) -> str:
    """A hash of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on the file of a release. Raises StreamquantError if another run of it is in progress."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StreamquantError(
                "another run of this release is in progress", where=str(path), hint="wait until it has ended"
            ) from error
        yield
    finally:
        os.close(descriptor)
