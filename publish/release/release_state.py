"""What a release has done, so that a repeat does only the rest: one small JSON file in the --out folder.

    {"release": 1, "stages": {"imatrix": {"begun": KEY, "done": KEY, "outputs": {PATH: SHA256}, "made": {...}}, ...}}

KEY is a hash of all that a stage's outputs depend on. It is written as `begun` before the stage starts, so that what a
killed run left behind is known to be of it, and as `done` when the outputs lie there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamquant.files.hashing import sha256_of
from streamquant.files.strict_json import read_json_object
from streamquant.files.writing import explain, write_atomically
from streamquant.publish.release.release_file import STAGES, StageName
from streamquant.quant.errors import StreamquantError

VERSION = 1


@dataclass(slots=True)
class StageState:
    """What is known of one stage."""

    begun: str | None = None
    done: str | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    """Path, from the --out folder, -> SHA-256; of small files."""
    made: dict[str, Any] = field(default_factory=dict)
    """What else the stage has to remember, JSON."""


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
        return bool(outputs) and all(path.is_file() and sha256_of(path) == known for path, known in outputs.items())

    def write(self) -> None:
        """Write the file. Raises StreamquantError."""
        stages = {name: asdict(entry) for name, entry in self._stages.items() if entry != StageState()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({"release": VERSION, "stages": stages}, indent=1).encode() + b"\n")
        except OSError as error:
            raise explain(error, self.path) from error

    def _read(self) -> None:
        record = read_json_object(self.path)
        match record:
            case {"release": int(version), "stages": dict(stages)} if version == VERSION and stages.keys() <= {*STAGES}:
                with contextlib.suppress(TypeError, ValueError):
                    self._stages |= {name: _entry(value) for name, value in stages.items()}
                    return
        raise StreamquantError(
            "not the state of a release",
            where=str(self.path),
            hint="remove the file: what is complete is found again, the rest is done again",
        )


def _entry(value: Mapping[str, Any]) -> StageState:
    found = StageState(**value)
    texts = [text for text in (found.begun, found.done, *found.outputs.values()) if text is not None]
    if not isinstance(found.made, dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError("not an entry")
    return found


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
