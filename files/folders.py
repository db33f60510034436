"""Folders that several rooms need: the user's cache, the part of a path that is there, and where a path leads."""

import os
from pathlib import Path

from streamquant.quant.errors import StreamquantError


def cache_folder() -> Path:
    """Where streamquant keeps what it can make again: $XDG_CACHE_HOME/streamquant, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamquant"


def nearest_folder(path: Path) -> Path:
    """A path, or the nearest folder above it that exists: whose disk it would be on."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def real_path(path: Path) -> Path:
    """An absolute path without links. A loop of links, at which `Path.resolve` raises RuntimeError, stays as it is."""
    return Path(os.path.realpath(path))


def folder_of_children() -> str | None:
    """Where a process that loads PyTorch is started: here, or at the root where the working folder is gone."""
    try:
        Path.cwd()
    except OSError:
        return os.sep
    return None


def check_working_folder() -> None:
    """Raise StreamquantError if the working folder is gone: a process that loads PyTorch there is ended."""
    try:
        Path.cwd()
    except OSError as error:
        raise StreamquantError(
            "the working folder is gone",
            found=error.strerror,
            required="a folder that exists",
            hint="change to a folder that exists, and run the same command again",
        ) from error
