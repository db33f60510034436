"""Slices of rows on several threads."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamquant.model.row_slices import for_each_slice
from tests.peers import ROOT

FORKED = """
import os
import torch
from streamquant.model.row_slices import for_each_slice
torch.set_num_threads(2)
for_each_slice(100, lambda part: None)
child = os.fork()
for_each_slice(100, lambda part: None)
if child:
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch uses."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.sampled_from([1, 7, 32]))
def test_every_row_once_in_whole_multiples(rows: int, multiple: int) -> None:
    seen: list[slice] = []
    for_each_slice(rows, seen.append, multiple)
    seen.sort(key=lambda part: part.start)
    assert [row for part in seen for row in range(part.start, part.stop)] == list(range(rows))
    assert all((part.stop - part.start) % multiple == 0 for part in seen[:-1])


def test_what_a_slice_raises(threads: int) -> None:
    def work(part: slice) -> None:
        if part.stop > 50 * threads:
            raise ValueError("this slice")

    with pytest.raises(ValueError, match="this slice"):
        for_each_slice(100 * threads, work)


def test_a_forked_process_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, check=True, timeout=60)
