"""Which bytes were measured: the files of a variant, with the hashes that the manifest beside them has.

Nothing is hashed here: a manifest counts for a file of the size that it says, and `streamquant verify` proves the rest.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamquant.convert.manifest import listed_files
from streamquant.files.folders import real_path


@dataclass(frozen=True, slots=True)
class MeasuredFile:
    """A file with weights."""

    name: str
    """Without its folder."""
    size: int
    """Bytes."""
    sha256: str | None
    """In lower-case hexadecimal; None without a manifest that has this file in this size."""


def measured_files(paths: Sequence[Path]) -> tuple[MeasuredFile, ...]:
    """The files of one variant or original, sorted by name; one that is not there is left out."""
    # a split set has a folder of its own, and its manifest lies one above
    folders = {folder for path in paths for folder in (path.parent, *real_path(path).parents[:2])}
    listed = {key: sha256 for folder in sorted(folders) for key, sha256 in _listed(folder)}
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            found[path.name] = MeasuredFile(path.name, size, listed.get((real_path(path), size)))
    return tuple(found[name] for name in sorted(found))


def weight_files(path: Path) -> tuple[Path, ...]:
    """What an unreadable variant most likely consists of: the file itself, or the safetensors of a folder."""
    return tuple(sorted(path.glob("*.safetensors"))) if path.is_dir() else (path,)


def _listed(folder: Path) -> Iterator[tuple[tuple[Path, int], str]]:
    """((file, size), sha256) of all files in the manifest of a folder; nothing without one, or in a broken one."""
    for file in listed_files(folder):
        yield (real_path(folder / file.path), file.size), file.sha256
