"""Small files written at once, and what the operating system says when that fails."""

import errno
import os
from pathlib import Path

from streamquant.quant.errors import StreamquantError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it has either its old or its new contents, whatever happens. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def explain(error: OSError, out: Path) -> StreamquantError:
    """An error of the operating system as a message for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StreamquantError(
            "the disk is full",
            where=str(out),
            found=error.strerror,
            hint="free some space and run the same command again: it continues where it stopped",
        )
    return StreamquantError(
        "cannot read or write a file",
        where=str(error.filename or out),
        found=error.strerror or str(error),
        hint="check the disk and the permissions of the folder; then run the same command again",
    )
