"""Reads of parts of files."""

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.errors import StreamquantError


def open_regular(path: Path) -> BufferedReader:
    """A file, open for reading, whose name others may have chosen: opening a FIFO would wait, a device might act.

    Links are followed. Raises StreamquantError if it is no regular file, OSError.
    """
    check_regular(path)
    return path.open("rb")


def check_regular(path: Path) -> None:
    """Raise StreamquantError if a name is not that of a regular file, OSError if it is none at all."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise StreamquantError("not a regular file", where=str(path))


def read_bytes(path: Path, start: int, stop: int) -> NDArray[np.uint8]:
    """Bytes [start, stop) of a file. Raises StreamquantError if the file has become shorter."""
    data = np.empty(stop - start, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(data), 0  # type: ignore[arg-type] # numpy's arrays are buffers
            while done < len(data):
                step = file.readinto(view[done:])
                if not step:
                    break
                done += step
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error
    if done < len(data):
        raise StreamquantError(
            "a file became shorter while it was read",
            where=str(path),
            found=f"{start + done:,} bytes",
            required=f"{stop:,} bytes",
        )
    return data


def read_into(descriptor: int, buffer: NDArray[np.uint8], offset: int) -> None:
    """Fill `buffer` from `offset` of a file. Raises EOFError if the file ends before, OSError."""
    view, at = buffer.data, 0
    while at < buffer.size:
        count = os.preadv(descriptor, [view[at:]], offset + at)
        if count == 0:
            raise EOFError(offset + at)
        at += count


def read_blocks(descriptor: int, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
    """Bytes [start, stop) of a file, block by block; each is a part of `buffer` and valid until the next.

    Raises EOFError if the file ends before, OSError.
    """
    while start < stop:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), stop - start)]], start)
        if count == 0:
            raise EOFError(start)
        yield buffer[:count]
        start += count
