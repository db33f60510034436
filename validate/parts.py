"""Work on slices of rows, on as many threads as torch uses; for kernels that release Python's lock."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def parts(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows, in order.

    >>> parts(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def in_parts(rows: int, work: Callable[[slice], None], multiple: int = 1) -> None:
    """Call `work` on slices of the rows, whose lengths but the last one's are multiples of `multiple`.

    Raises what `work` raises.
    """
    import torch

    size = -(-rows // torch.get_num_threads() // multiple) * multiple
    slices = parts(rows, max(multiple, size))
    if len(slices) < 2:
        for part in slices:
            work(part)
        return
    with ThreadPoolExecutor(len(slices)) as pool:
        list(pool.map(work, slices))
