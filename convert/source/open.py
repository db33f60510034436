"""A checkpoint by the name that a user gives it, and the commit that an unfinished run has begun with."""

import json
from pathlib import Path

from streamquant.convert.run.journal import JOURNAL, WORK_FOLDER
from streamquant.convert.source.checkpoint import Checkpoint, open_checkpoint
from streamquant.convert.source.hub_checkpoint import open_hub_checkpoint
from streamquant.files.json_record import JsonRecord
from streamquant.files.listener import SILENT, Listener
from streamquant.files.strict_json import read_record
from streamquant.files.writing import write_atomically
from streamquant.hub.reference import hub_reference
from streamquant.hub.repo import COMMIT, HubRepo, open_repo

PIN = "source.json"


def open_source(model: str, *, out: Path | None = None, listener: Listener = SILENT) -> Checkpoint:
    """A checkpoint by what the user calls it: a folder, or ORG/NAME[@REVISION] on the Hub if there is no such folder.

    An unfinished run in `out` has its commit pinned: the same revision is the same commit again. `listener` hears of
    waits for the Hub. Raises UsageError and StreamquantError.
    """
    on_hub = hub_reference(model)
    if on_hub is None:
        return open_checkpoint(Path(model))
    name, revision = on_hub.name, on_hub.revision
    commit = pinned_commit(out, name, revision) if out is not None else None
    return open_hub_checkpoint(open_repo(name, revision, commit, listener))


def pin(out: Path, repo: HubRepo) -> None:
    """Remember in the work folder of a run that begins which commit it converts. Raises OSError."""
    record = {"repo": repo.name, "asked": repo.asked, "revision": repo.revision, "commit": repo.commit}
    write_atomically(out / WORK_FOLDER / PIN, json.dumps(record).encode())


def unpin(out: Path) -> None:
    """The run is complete: forget its commit."""
    (out / WORK_FOLDER / PIN).unlink(missing_ok=True)


def pinned_commit(out: Path, name: str, revision: str) -> str | None:
    """The commit that the unfinished run in `out` began with, if it is of the same repository and revision.

    Raises StreamquantError if the record of it is broken: another commit would be another plan.
    """
    folder = out / WORK_FOLDER
    if not (folder / JOURNAL).is_file():
        return None
    path = folder / PIN
    if not path.is_file():
        return None
    hint = f"write ORG/NAME@COMMIT with that commit and remove {PIN}, or remove the output folder and start again"
    what = "cannot read which commit an unfinished run began with"
    record = JsonRecord(read_record(path, hint), str(path), what, hint)
    commit = record.text("commit")
    if COMMIT.fullmatch(commit) is None:
        raise record.broken("commit", commit, "40 hexadecimal digits")
    names = record.text("repo").lower(), record.text("asked").lower()
    return commit if name.lower() in names and record.text("revision") == revision else None
