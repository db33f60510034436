"""Which files of a variant folder go to the Hub: those of the manifest, what belongs to them, and nothing else.

Weights that the manifest lists, and the importance matrix that they were made with, also from beside the folder; side
files of a checkpoint (config.json, tokenizer, templates); streamquant.json, the model card and the report. Never
*.partial, hidden files, links that lead out of the folder, or what nobody knows.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from streamquant.convert.manifest import MANIFEST, ManifestFile
from streamquant.convert.run.journal import WORK_FOLDER
from streamquant.convert.source.side_files import is_side_file
from streamquant.convert.source.weights import CONFIG, INDEX
from streamquant.files.folders import real_path
from streamquant.files.hashing import READ_BYTES
from streamquant.files.reading import open_regular
from streamquant.files.writing import PARTIAL
from streamquant.hub.outgoing import Outgoing
from streamquant.publish.cards.origin import BASE_CARD
from streamquant.publish.results import CARD, REPORT_FOLDER, VariantFolder
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.report.data import read_report, report_bytes

SETTLED_NS = 2 * 10**9
"""Nanoseconds: a file that is newer than its manifest by more was touched since, and is hashed again."""
_SUFFIX = re.compile(r"-(GGUF|(FP8|W\dA\d+|MXFP\d|NVFP4)[\w-]*)$")


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be published of one folder."""

    files: tuple[Outgoing, ...]
    """In the order of sending: weights, side files, and at last what makes it a publication."""
    left_alone: tuple[tuple[str, str], ...]
    """(path, why)."""


def check_finished(folder: Path, folders: tuple[VariantFolder, ...]) -> None:
    """Raise StreamquantError for an unfinished conversion in or around the folders that are to be published."""
    out = folder if folders[0].path != folder else folder.parent
    for found in folders:
        partial = next(found.path.rglob(f"*{PARTIAL}"), None)
        if partial is not None:
            raise _unfinished(partial)
    if folders[0].path == folder:
        return
    if (out / WORK_FOLDER / "journal.jsonl").exists():
        raise _unfinished(out / WORK_FOLDER / "journal.jsonl")
    known = {found.path.name for found in folders}
    for other in sorted(out.iterdir()):
        if other.is_dir() and other.name not in known and _SUFFIX.search(other.name) and any(other.iterdir()):
            raise StreamquantError(
                "a folder of variants without a manifest",
                where=str(other),
                required=MANIFEST,
                hint="finish the conversion, or publish the finished folders one by one",
            )


def _unfinished(path: Path) -> StreamquantError:
    return StreamquantError(
        "the conversion is not finished",
        where=str(path),
        required="finished variants",
        hint="repeat the command that began it: it continues where it stopped",
    )


def repositories(folders: tuple[VariantFolder, ...], repo: str, *, is_stem: bool) -> dict[str, str]:
    """Name of folder -> ORG/NAME.

    `repo` is the name for a single folder, or the stem for the folders of an --out folder (`is_stem`): ORG/Hermes and a
    folder Model-GGUF make ORG/Hermes-GGUF. Raises UsageError for a name that several would share.
    """
    suffixes = {found.path.name: _suffix(found) for found in folders}
    return name_repositories(suffixes, repo, is_stem=is_stem)


def name_repositories(suffixes: dict[str, str], repo: str, *, is_stem: bool) -> dict[str, str]:
    """`repositories`, from name of folder -> "-GGUF"."""
    if len(suffixes) == 1:
        ((name, suffix),) = suffixes.items()
        return {name: repo if not is_stem or repo.lower().endswith(suffix.lower()) else repo + suffix}
    for suffix in suffixes.values():
        if repo.lower().endswith(suffix.lower()):
            raise UsageError(
                "one repository for several kinds of variants",
                where=repo,
                found=", ".join(suffixes),
                required="one repository for each",
                hint=f"give the stem, {repo[: -len(suffix)]}: the endings are added; or publish one folder",
            )
    return {name: repo + suffix for name, suffix in suffixes.items()}


def _suffix(folder: VariantFolder) -> str:
    name = folder.path.name
    if name.startswith(folder.model) and name != folder.model:
        return name.removeprefix(folder.model)
    found = _SUFFIX.search(name)
    if found is not None:
        return found[0]
    return f"-{folder.variants[0].label}" if folder.container.is_checkpoint else "-GGUF"


def select(folder: VariantFolder) -> Selection:
    """The files of a folder that are published, and those that are not. Reads no weight.

    Raises StreamquantError for a file of the manifest that is a link to elsewhere or has another size.
    """
    root = real_path(folder.path)
    weights = tuple(_weights(root, file) for file in folder.files)
    matrices = tuple(_matrix(sha256, path) for sha256, path in folder.matrices.items())
    known = {file.path for file in (*weights, *matrices)}
    side: list[Outgoing] = []
    last: list[Outgoing] = []
    left: list[tuple[str, str]] = []
    private = not _report_is_public(root / REPORT_FOLDER)
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        if name in known:
            continue
        why = _why_not(path, name, root, folder)
        if why is None and private and name.startswith(f"{REPORT_FOLDER}/"):
            why = "a report that names folders of this machine; `streamquant card` writes one for the public"
        if why is not None:
            left.append((name, why))
        elif _belongs_to_publication(name):
            last.append(_whole(path, name))
        else:
            side.append(_whole(path, name))
    last.sort(key=lambda file: (file.path == MANIFEST, file.path == CARD, file.path))
    return Selection((*weights, *matrices, *side, *last), tuple(left))


def _walk(root: Path) -> Iterator[Path]:
    """Every file below a folder, sorted; a hidden folder and a linked one stand for what is in them."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _walk(path)
        else:
            yield path


def _why_not(path: Path, name: str, root: Path, folder: VariantFolder) -> str | None:
    if any(part.startswith(".") for part in PurePosixPath(name).parts):
        return "hidden"
    if path.name.endswith(PARTIAL):
        return "unfinished"
    if not path.is_file() or not real_path(path).is_relative_to(root):
        return "not a file in this folder"
    if name == BASE_CARD:
        return "the original's card, which ours was made from"
    if _belongs_to_publication(name) or (folder.container.is_checkpoint and _is_side_file(path, name)):
        return None
    return "not in the manifest"


def _belongs_to_publication(name: str) -> bool:
    return name in (MANIFEST, CARD) or name.startswith(f"{REPORT_FOLDER}/")


def _report_is_public(folder: Path) -> bool:
    """Whether a report is the form that is published (cards/public_report.py), as the model card brings it along."""
    from streamquant.publish.cards.public_report import public_report

    try:
        report = read_report(folder)
        return report_bytes(public_report(report)) == report_bytes(report)
    except StreamquantError:
        return False


def _is_side_file(path: Path, name: str) -> bool:
    """Whether a file belongs to a checkpoint, by the rule that convert takes it over (convert/source/side_files.py)."""
    return name in (CONFIG, INDEX) or is_side_file(name, path.stat().st_size)


def _matrix(sha256: str, path: Path) -> Outgoing:
    return Outgoing(path.name, path, path.stat().st_size, sha256)


def _whole(path: Path, name: str) -> Outgoing:
    return Outgoing(name, path, path.stat().st_size, None)


def _weights(root: Path, file: ManifestFile) -> Outgoing:
    path = root / file.path
    if not path.exists():
        return Outgoing(file.path, None, file.size, file.sha256)
    if not path.is_file() or not real_path(path).is_relative_to(root):
        raise StreamquantError("not a file in this folder", where=str(path), required="a file, not a link to elsewhere")
    size = path.stat().st_size
    if size != file.size:
        raise _changed(path, f"{size:,} bytes", f"{file.size:,} bytes")
    return Outgoing(file.path, path, file.size, file.sha256)


def is_settled(file: Outgoing, folder: Path) -> bool:
    """Whether a file of the manifest is not newer than the manifest: then its hash is believed."""
    assert file.file is not None, "only files that are there are sent"
    return file.file.stat().st_mtime_ns <= (folder / MANIFEST).stat().st_mtime_ns + SETTLED_NS


def check_content(file: Outgoing, on_bytes: Callable[[int], None] = lambda _count: None) -> None:
    """Compare a file with the hash in its manifest. Raises StreamquantError if it differs."""
    assert file.file is not None, "only files that are there are sent"
    digest = hashlib.sha256()
    with open_regular(file.file) as stream:
        while data := stream.read(READ_BYTES):
            digest.update(data)
            on_bytes(len(data))
    if digest.hexdigest() != file.sha256:
        raise _changed(file.file, f"sha256 {digest.hexdigest()}", f"sha256 {file.sha256}")


def _changed(path: Path, found: str, required: str) -> StreamquantError:
    return StreamquantError(
        "a file is not what its manifest says",
        where=str(path),
        found=found,
        required=required,
        hint="convert again into an empty folder; nothing was published",
    )
