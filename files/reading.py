"""Reads of parts of files."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.errors import StreamquantError


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
