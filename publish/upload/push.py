"""Variant folders to the Hub: check, make the repositories, send what is not there yet.

    push(DIR, "ORG/MODEL-GGUF")     one variant folder to the repository of that name
    push(OUT, "ORG/MODEL")          every variant folder of OUT: ORG/MODEL-GGUF, ORG/MODEL-FP8-dynamic

Everything is checked before the first byte is sent: variants finished and passed, sizes within the Hub's limits, files
as their manifest says. A push that was interrupted is repeated; a second one sends nothing and makes no commit.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from streamquant.convert.manifest import MANIFEST
from streamquant.files.listener import SILENT, Listener
from streamquant.files.reading import open_regular
from streamquant.hub.background import in_background
from streamquant.hub.client import connect
from streamquant.hub.outgoing import UPLOADING, Held, Outgoing
from streamquant.hub.reference import check_name
from streamquant.hub.target import Destination, Target
from streamquant.publish.cards.origin import BASE_CARD, is_ours
from streamquant.publish.results import CARD, PublishedVariant, VariantFolder, read_folders
from streamquant.publish.upload.limits import FILES_IN_COMMIT, GB, SizedFile, check_limits, check_number
from streamquant.publish.upload.options import PushOptions
from streamquant.publish.upload.selection import (
    Selection,
    check_content,
    check_finished,
    is_settled,
    repositories,
    select,
)
from streamquant.quant.errors import GateFailedError, StreamquantError
from streamquant.validate.report.data import REPORT

COMMIT_BYTES = 20 * GB
"""Bytes after which a commit is made: what was committed needs no second look after an interruption."""
Action = Literal["upload", "skip", "leave"]


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
class _Upload:
    """One folder and where it goes."""

    folder: VariantFolder
    selection: Selection
    target: Target
    title: str
    """Of the commits."""
    files: tuple[Outgoing, ...]
    """Those that are not there yet."""
    result: Pushed


@dataclass(frozen=True)
class PreparedPush:
    """A push that was checked, and waits to be sent."""

    uploads: tuple[_Upload, ...]
    stop: threading.Event
    """Set, it ends uploads and waits."""

    @property
    def results(self) -> tuple[Pushed, ...]:
        """What is done, or was done, with each folder."""
        return tuple(upload.result for upload in self.uploads)

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are not there yet."""
        return sum(result.upload_bytes for result in self.results)

    def send(self) -> tuple[Pushed, ...]:
        """Send what is not there yet. Raises StreamquantError."""
        for upload in self.uploads:
            _check_card(upload)
            _check_contents(upload)
        for upload in self.uploads:
            in_background(partial(_send, upload), self.stop)
        return self.results


def push(
    folder: Path,
    repo: str,
    options: PushOptions = PushOptions(),
    listener: Listener = SILENT,
) -> tuple[Pushed, ...]:
    """Publish a variant folder, or all of an --out folder; see `prepare_push`."""
    prepared = prepare_push(folder, repo, options, listener)
    if options.dry_run:
        return prepared.results
    listener.started(UPLOADING, prepared.nbytes, "bytes")
    return prepared.send()


def prepare_push(folder: Path, repo: str, options: PushOptions, listener: Listener = SILENT) -> PreparedPush:
    """Check what is to be published, make the repositories, and look at what they hold.

    Model cards are written where they are missing or older than manifest and report, unless they are somebody's own.
    A dry run changes nothing, here or there. Raises UsageError, StreamquantError, and GateFailedError for variants that
    may not be published.
    """
    check_name(repo)
    folders = read_folders(folder, options.report)
    check_finished(folder, folders)
    names = repositories(folders, repo, is_stem=folders[0].path != folder)
    for name in names.values():
        check_name(name)
    if not options.without_report:
        check_passed(folders)
    notes = {found.path.name: _check_sizes(found) for found in folders}
    api = connect(to_write=not options.dry_run)
    if not options.dry_run:
        for found in folders:
            refresh_card(found, names[found.path.name], options)
    stop = threading.Event()
    uploads = []
    for found in folders:
        title = options.message or f"Upload {found.path.name} with streamquant"
        to = Destination(names[found.path.name], options.revision, title if options.create_pr else None)
        upload = _prepare(found, Target(api, to, listener, stop), title, options)
        upload.result.notes = notes[found.path.name]
        uploads.append(upload)
    return PreparedPush(tuple(uploads), stop)


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
        return ", ".join(gate.finding for gate in measurement.failed_gates)
    return "it could not be measured"


def refresh_card(folder: VariantFolder, repo: str, options: PushOptions) -> bool:
    """Write the model card and the public report of a folder if `card_is_stale`; returns whether it was done."""
    from streamquant.publish.cards.card import write_cards
    from streamquant.publish.cards.options import CardOptions

    if not card_is_stale(folder, repo):
        return False
    write_cards(folder.path, CardOptions(repo=repo, source=options.source), options.report)
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
    return repo not in _read_card(card)


def _read_card(card: Path) -> str:
    with open_regular(card) as file:
        return file.read().decode(errors="replace")


def _check_sizes(folder: VariantFolder) -> tuple[str, ...]:
    option = folder.container.split_option
    files = [SizedFile(file.path, file.size, option) for file in folder.files]
    return check_limits(files, folder.path.name)


def _prepare(folder: VariantFolder, target: Target, title: str, options: PushOptions) -> _Upload:
    """Look at both sides; the repository is there afterwards, unless it is a dry run."""
    selection = select(folder)
    check_number((file.path for file in selection.files), folder.path.name)
    if options.dry_run:
        made = not target.exists()
        held = {} if made else target.holds()
    else:
        made = target.open(private=options.private)
        held = target.holds()
    upload, actions = _decide(folder, selection, held)
    if options.dry_run and card_is_stale(folder, target.repo):
        card = FileAction(CARD, 0, "upload", "would be written")
        actions = (*(action for action in actions if action.path != CARD), card)
    result = Pushed(folder.path.name, target.repo, target.url, made, actions)
    return _Upload(folder, selection, target, title, upload, result)


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


def _check_card(upload: _Upload) -> None:
    """Raise StreamquantError for a card that the Hub would refuse after all else was sent."""
    for file in upload.files:
        if file.path == CARD and file.file is not None:
            upload.target.check_card(_read_card(file.file))


def _check_contents(upload: _Upload) -> None:
    """Hash again what was touched after its manifest was written. Raises StreamquantError if it differs."""
    for file in upload.files:
        if file.sha256 is not None and not is_settled(file, upload.folder.path):
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


def _send(upload: _Upload) -> None:
    """Send what is to be sent, and look whether it arrived."""
    parts = list(batches(upload.files))
    for number, batch in enumerate(parts, 1):
        message = upload.title if len(parts) == 1 else f"{upload.title} ({number} of {len(parts)})"
        upload.result.commits.append(upload.target.send(batch, message))
    if upload.files:
        check_arrived(upload.target, upload.files)
    upload.result.url = upload.target.url


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
