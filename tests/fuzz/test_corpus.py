"""The corpus of `make fuzz`: every file of it is read or refused, in a second and in bounded memory."""

import time
import tracemalloc
from collections.abc import Iterator

import pytest

from tests.fuzz.targets import CORPUS, TARGETS, answer
from tests.hub.client import client_put_back

SECONDS = 5.0
MEMORY = 64 << 20


@pytest.fixture(scope="module", autouse=True)
def hub_client() -> Iterator[None]:
    """The target `hub_answer` answers all requests of the process itself."""
    with client_put_back():
        yield


def test_every_target_has_a_corpus() -> None:
    folders = {folder.name: [path for path in folder.iterdir() if path.stat().st_size] for folder in CORPUS.iterdir()}
    assert folders.keys() == TARGETS.keys()
    assert all(folders.values())
    assert sum(path.stat().st_size for paths in folders.values() for path in paths) < 1_000_000


@pytest.mark.parametrize("name", TARGETS)
def test_a_good_file_is_read(name: str) -> None:
    """So that fuzzing begins behind the first check."""
    assert any(answer(name, path.read_bytes()) is None for path in (CORPUS / name).iterdir())


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str) -> None:
    tracemalloc.start()
    try:
        for path in sorted((CORPUS / name).iterdir()):
            data = path.read_bytes()
            for part in (data, data[: len(data) // 2], data[:-1], data + data):
                tracemalloc.reset_peak()
                before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
                answer(name, part)
                assert time.perf_counter() - start < SECONDS, path
                assert tracemalloc.get_traced_memory()[1] - before < MEMORY, path
    finally:
        tracemalloc.stop()
