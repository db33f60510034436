"""What the machine has to offer."""

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from streamquant.quant.errors import StreamquantError

OTHER_FILES = 64
"""That a process has open besides: libraries, pipes, the journal."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that a program can have without swapping: what is free, and the page cache where that is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's search for cycles, for work that makes a million records and no cycles; also a decorator.

    The search goes through all records again and again: a third of the time of a plan of Kimi K2.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def allow_open_files(count: int) -> None:
    """Let this process open `count` files at once, and some more: macOS begins with 256.

    The soft limit is raised as far as the hard one permits. Raises StreamquantError if that is not enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):  # what the system really permits may be less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return
    raise StreamquantError(
        "too many files have to be open at once",
        found=f"a limit of {hard if hard != resource.RLIM_INFINITY else soft} open files",
        required=f"{wanted}: shards of the source, files of all variants, and {OTHER_FILES} more",
        hint="raise the limit (ulimit -n), make fewer variants at a time, or larger files",
    )
