"""Work on slices of rows, on as many threads as torch uses; for kernels that release Python's lock."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

SLICES = 4
"""Slices for each thread: where another thread takes a core, the others take over its slices."""


def row_slices(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows, in order.

    >>> row_slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def for_each_slice(rows: int, work: Callable[[slice], None], multiple: int = 1) -> None:
    """Call `work` on slices of the rows, whose lengths but the last one's are multiples of `multiple`.

    `work` does not call `for_each_slice` itself: its threads may all be taken. Raises what `work` raises.
    """
    import torch

    threads = torch.get_num_threads()
    size = -(-rows // (threads * SLICES) // multiple) * multiple
    slices = row_slices(rows, max(multiple, size))
    if threads == 1 or len(slices) < 2:
        for rows_slice in slices:
            work(rows_slice)
        return
    for _ in _pool(threads, os.getpid()).map(work, slices):
        pass


@functools.cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """One for each process: a forked one has no threads of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="slices")
