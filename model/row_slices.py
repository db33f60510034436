"""Work on slices of rows, on as many threads as torch uses; for kernels that release Python's lock."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

PARTS = 4
"""Slices for each thread: where another thread takes a core, the others take over its slices."""


def parts(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows, in order.

    >>> parts(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def in_parts(rows: int, work: Callable[[slice], None], multiple: int = 1) -> None:
    """Call `work` on slices of the rows, whose lengths but the last one's are multiples of `multiple`.

    `work` does not call `in_parts` itself: its threads may all be taken. Raises what `work` raises.
    """
    import torch

    threads = torch.get_num_threads()
    size = -(-rows // (threads * PARTS) // multiple) * multiple
    slices = parts(rows, max(multiple, size))
    if threads == 1 or len(slices) < 2:
        for part in slices:
            work(part)
        return
    for _ in _pool(threads, os.getpid()).map(work, slices):
        pass


@functools.cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """One for each process: a forked one has no threads of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="parts")
