"""Variant folders to the Hub: check, make the repositories, send what is not there yet.

    push(DIR, "ORG/MODEL-GGUF")     one variant folder to the repository of that name
    push(OUT, "ORG/MODEL")          every variant folder of OUT: ORG/MODEL-GGUF, ORG/MODEL-FP8-dynamic

Everything is checked before the first byte is sent: variants finished and passed, sizes within the Hub's limits, files
as their manifest says. A push that was interrupted is repeated; a second one sends nothing and makes no commit.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from streamquant.convert.manifest import MANIFEST
from streamquant.hub.repo import MAIN, OnBytes, OnWait
from streamquant.hub.target import Held, Outgoing, Target, check_name, connect, in_background
from streamquant.publish.cards.origin import BASE_CARD, is_ours
from streamquant.publish.results import CARD, PublishedVariant, VariantFolder, read_folders
from streamquant.publish.upload.limits import FILES_IN_COMMIT, GB, SizedFile, check_limits, check_number
from streamquant.publish.upload.selection import (
    Selection,
    check_content,
    check_finished,
    is_settled,
    repositories,
    select,
)
from streamquant.quant.errors import GateFailedError, StreamquantError, UsageError
from streamquant.validate.report.data import REPORT

COMMIT_BYTES = 20 * GB
"""Bytes after which a commit is made: what was committed needs no second look after an interruption."""
Action = Literal["upload", "skip", "leave"]


@dataclass(frozen=True, slots=True)
class Wish:
    """How to publish."""

    private: bool = False
    """The repositories are private; an existing public one is refused."""
    revision: str | None = None
    """A branch, which is made if it is not there."""
    create_pr: bool = False
    """Into a pull request in place of the branch."""
    without_report: bool = False
    """Also variants that were not measured or failed a gate; the card says so."""
    message: str | None = None
    """Title of the commits."""

    def __post_init__(self) -> None:
        if self.create_pr and self.revision not in (None, MAIN):
            raise UsageError(
                "a pull request is made against main", found=f"--revision {self.revision}", required="one of the two"
            )
        if self.message is not None and not self.message.strip():
            raise UsageError("an empty commit message", where="--commit-message")


@dataclass(frozen=True, slots=True)
class FileAction:
    """What becomes of one file."""

    path: str
    size: int
    action: Action
    why: str


@dataclass
class Pushed:
    """What a push does, or did, with one folder."""

    folder: str
    repo: str
    url: str
    made: bool
    """Whether the repository is new."""
    actions: tuple[FileAction, ...]
    notes: tuple[str, ...] = ()
    commits: list[str] = field(default_factory=list)

    @property
    def upload_bytes(self) -> int:
        """Bytes of the files that are not there yet."""
        return sum(action.size for action in self.actions if action.action == "upload")


@dataclass(frozen=True)
class _Job:
    """One folder and where it goes."""

    folder: VariantFolder
    selection: Selection
    target: Target
    upload: tuple[Outgoing, ...]
    result: Pushed


def push(
    folder: Path,
    repo: str,
    wish: Wish | None = None,
    *,
    report: Path | None = None,
    source: Path | None = None,
    dry_run: bool = False,
    on_start: Callable[[int], None] = lambda _nbytes: None,
    on_bytes: OnBytes = lambda _count: None,
    on_wait: OnWait = lambda _message, _seconds: None,
) -> tuple[Pushed, ...]:
    """Publish a variant folder, or all of an --out folder. `report` is the folder of the report, if not beside them,
    `source` that of the original, for what only it can tell a card.

    Model cards are written where they are missing or older than manifest and report, unless they are somebody's own.
    `on_start` gets the bytes to send, `on_bytes` the number just sent, `on_wait` what is tried again after how many
    seconds. A dry run asks the Hub what is there and changes nothing, here or there. Raises UsageError,
    StreamquantError, and GateFailedError for variants that may not be published.
    """
    wish = wish or Wish()
    check_name(repo)
    folders = read_folders(folder, report)
    check_finished(folder, folders)
    names = repositories(folders, repo, is_stem=folders[0].path != folder)
    for name in names.values():
        check_name(name)
    if not wish.without_report:
        check_passed(folders)
    notes = {found.path.name: _check_sizes(found) for found in folders}
    api = connect(to_write=not dry_run)
    if not dry_run:
        for found in folders:
            refresh_card(found, names[found.path.name], report, source)
    stop = threading.Event()
    jobs = []
    for found in folders:
        title = wish.message or f"Upload {found.path.name} with streamquant"
        target = Target(
            api,
            names[found.path.name],
            revision=wish.revision,
            pull_title=title if wish.create_pr else None,
            on_bytes=on_bytes,
            on_wait=on_wait,
            stop=stop,
        )
        jobs.append(_prepare(found, target, wish, notes[found.path.name], dry_run=dry_run))
    if dry_run:
        return tuple(job.result for job in jobs)
    on_start(sum(job.result.upload_bytes for job in jobs))
    for job in jobs:
        _check_card(job)
        _check_contents(job)
    for job in jobs:
        title = wish.message or f"Upload {job.folder.path.name} with streamquant"
        in_background(lambda job=job, title=title: _send(job, title), stop)  # type: ignore[misc] # mypy cannot infer it
    return tuple(job.result for job in jobs)


def check_passed(folders: Sequence[VariantFolder]) -> None:
    """Raise GateFailedError if a variant was not measured, or failed a gate."""
    refused = [variant for found in folders for variant in found.not_passed]
    if refused:
        raise GateFailedError(
            "a variant may not be published" if len(refused) == 1 else "variants may not be published",
            where=", ".join(str(found.path) for found in folders if found.not_passed),
            found="; ".join(f"{variant.spec}: {why_refused(variant)}" for variant in refused),
            required="a report of exactly these files, and every gate passed",
            hint="run `streamquant validate`, or publish with --without-report: the model card will say so",
        )


def why_refused(variant: PublishedVariant) -> str:
    """Why a variant did not pass, in words."""
    measurement = variant.measurement
    if measurement is None:
        return variant.why_not or "there is no report"
    if measurement.failed_gates:
        return ", ".join(str(gate).partition(": ")[2] for gate in measurement.failed_gates)
    return "it could not be measured"


def refresh_card(folder: VariantFolder, repo: str, report: Path | None = None, source: Path | None = None) -> bool:
    """Write the model card and the public report of a folder if `card_is_stale`; returns whether it was done."""
    from streamquant.publish.cards.card import CardOptions, write_cards

    if not card_is_stale(folder, repo):
        return False
    write_cards(folder.path, CardOptions(repo=repo, source=source), report)
    return True


def card_is_stale(folder: VariantFolder, repo: str) -> bool:
    """Whether the card is missing, older than the manifest or the report, or of another repository; never if it is
    somebody's own. The original's card that convert took over is not: ours takes its place (publish/cards/card.py).
    """
    card, manifest = folder.path / CARD, folder.path / MANIFEST
    if not card.exists():
        return True
    if not is_ours(card):
        is_copy = folder.container.is_checkpoint and not (folder.path / BASE_CARD).exists()
        return is_copy and card.stat().st_mtime_ns <= manifest.stat().st_mtime_ns
    made_from = [manifest]
    if folder.report_folder is not None:
        made_from.append(folder.report_folder / REPORT)
    if any(path.exists() and path.stat().st_mtime_ns > card.stat().st_mtime_ns for path in made_from):
        return True
    return repo not in card.read_text(encoding="utf-8", errors="replace")


def _check_sizes(folder: VariantFolder) -> tuple[str, ...]:
    option = folder.container.split_option
    files = [SizedFile(file.path, file.size, option) for file in folder.files]
    return check_limits(files, folder.path.name)


def _prepare(folder: VariantFolder, target: Target, wish: Wish, notes: tuple[str, ...], *, dry_run: bool) -> _Job:
    """Look at both sides; the repository is there afterwards, unless it is a dry run."""
    selection = select(folder)
    check_number((file.path for file in selection.files), folder.path.name)
    if dry_run:
        made = not target.exists()
        held = {} if made else target.holds()
    else:
        made = target.open(private=wish.private)
        held = target.holds()
    upload, actions = _decide(folder, selection, held)
    if dry_run and card_is_stale(folder, target.repo):
        card = FileAction(CARD, 0, "upload", "would be written")
        actions = (*(action for action in actions if action.path != CARD), card)
    result = Pushed(folder.path.name, target.repo, target.url, made, actions, notes)
    return _Job(folder, selection, target, upload, result)


def _decide(
    folder: VariantFolder, selection: Selection, held: Mapping[str, Held]
) -> tuple[tuple[Outgoing, ...], tuple[FileAction, ...]]:
    upload: list[Outgoing] = []
    actions: list[FileAction] = []
    for file in selection.files:
        there = held.get(file.path)
        if there is not None and there.is_same(file):
            actions.append(FileAction(file.path, file.size, "skip", "is there already"))
        elif file.file is None:
            raise StreamquantError(
                "a file is neither on the disk nor on the Hub",
                where=str(folder.path / file.path),
                found="nothing" if there is None else "another file of this name on the Hub",
                required=f"sha256 {file.sha256}",
                hint="convert again, or give the --repo that it was delivered to",
            )
        else:
            upload.append(file)
            why = "new" if there is None else "differs from what is there"
            actions.append(FileAction(file.path, file.size, "upload", why))
    actions += [FileAction(path, _size(folder.path / path), "leave", why) for path, why in selection.left_alone]
    return tuple(upload), tuple(actions)


def _size(path: Path) -> int:
    return path.lstat().st_size


def _check_card(job: _Job) -> None:
    """Raise StreamquantError for a card that the Hub would refuse after all else was sent."""
    for file in job.upload:
        if file.path == CARD and file.file is not None:
            job.target.check_card(file.file.read_text(encoding="utf-8", errors="replace"))


def _check_contents(job: _Job) -> None:
    """Hash again what was touched after its manifest was written. Raises StreamquantError if it differs."""
    for file in job.upload:
        if file.sha256 is not None and not is_settled(file, job.folder.path):
            check_content(file)


def batches(files: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    """Files in their order, as commits: at most FILES_IN_COMMIT, and a new one after COMMIT_BYTES."""
    batch: list[Outgoing] = []
    for file in files:
        if len(batch) == FILES_IN_COMMIT or sum(earlier.size for earlier in batch) >= COMMIT_BYTES:
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _send(job: _Job, title: str) -> None:
    """Send what is to be sent, and look whether it arrived."""
    parts = list(batches(job.upload))
    for number, batch in enumerate(parts, 1):
        message = title if len(parts) == 1 else f"{title} ({number} of {len(parts)})"
        job.result.commits.append(job.target.send(batch, message))
    if job.upload:
        check_arrived(job.target, job.upload)
    job.result.url = job.target.url


def check_arrived(target: Target, files: Sequence[Outgoing]) -> None:
    """Raise StreamquantError unless the Hub lists every file with its hash."""
    held = target.look_up([file.path for file in files]) if len(files) <= FILES_IN_COMMIT else target.holds()
    for file in files:
        there = held.get(file.path)
        if there is None or not there.is_same(file):
            raise StreamquantError(
                "a file did not arrive as it was sent",
                where=f"{target}: {file.path}",
                found="nothing" if there is None else f"{there.size:,} bytes, {there.sha256 or there.git_sha1}",
                required=f"{file.size:,} bytes" + (f", {file.sha256}" if file.sha256 else ""),
                hint="a .gitignore in the repository may name it, or somebody else changed it; run the command again",
            )
