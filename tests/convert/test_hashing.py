"""FileHash gives hashlib's digest whatever the order in which chunks are finished, and never reads ahead of them."""

import hashlib
import itertools
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamquant.files import hashing
from streamquant.files.hashing import Extent, FileHash, quick_hash


class Filling:
    """A file whose chunks get their bytes one after another, in any order."""

    def __init__(self, path: Path, content: bytes, extents: list[Extent], tensors: list[tuple[str, int, int]]) -> None:
        self.content, self.extents = content, extents
        covered = bytearray(content)
        for extent in extents:
            covered[extent.start : extent.stop] = b"\xee" * (extent.stop - extent.start)  # not there yet
        path.write_bytes(covered)
        self.descriptor = os.open(path, os.O_RDWR)
        self.hash = FileHash(len(content), extents, tensors)

    def finish(self, chunk: int) -> None:
        for extent in self.extents:
            if extent.chunk == chunk:
                os.pwrite(self.descriptor, self.content[extent.start : extent.stop], extent.start)
        self.hash.mark(chunk)

    def hash_what_is_ready(self) -> int:
        steps = 0
        while (step := self.hash.step()) is not None:
            assert step[0] < step[1] or step[1] == len(self.content)
            self.hash.hash(self.descriptor, step[1])
            self.hash.busy = False
            steps += 1
            if self.hash.complete:
                break
        return steps


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_gives_hashlibs_digest(data: st.DataObject, tmp_path: Path) -> None:
    chance = random.Random(data.draw(st.integers(0, 1 << 30)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 3000), min_size=2, max_size=16, unique=True)))
    size = cuts[-1] + data.draw(st.integers(0, 50))
    content = chance.randbytes(size)
    runs = [(start, stop) for start, stop in itertools.pairwise(cuts) if chance.random() < 0.8]
    chunks = data.draw(st.integers(1, 6))
    extents = [Extent(start, stop, chance.randrange(chunks)) for start, stop in runs]
    chance.shuffle(extents)
    tensors = [(f"t{i}", start, stop) for i, (start, stop) in enumerate(itertools.pairwise(cuts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "STEP_BYTES", data.draw(st.sampled_from([1, 64, 1000, 1 << 26])))
        patch.setattr(hashing, "READ_BYTES", data.draw(st.sampled_from([1, 7, 512, 1 << 21])))
        filling = Filling(tmp_path / "file", content, extents, tensors)
        try:
            order = list(range(chunks))
            chance.shuffle(order)
            for chunk in order:
                filling.finish(chunk)
                filling.hash_what_is_ready()
            assert filling.hash.complete
        finally:
            os.close(filling.descriptor)
    assert filling.hash.sha256() == hashlib.sha256(content).hexdigest()
    for name, start, stop in tensors:
        expected = quick_hash()
        expected.update(content[start:stop])
        assert filling.hash.tensor_hashes()[name] == expected.hexdigest()


def test_nothing_is_hashed_before_it_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "STEP_BYTES", 1)
    content = bytes(range(100))
    filling = Filling(tmp_path / "file", content, [Extent(10, 50, 0), Extent(50, 90, 1)], [])
    assert filling.hash.step() == (0, 4)  # four steps' worth at most
    filling.hash.busy = False
    monkeypatch.setattr(hashing, "STEP_BYTES", 100)
    filling.finish(1)
    assert filling.hash.step() is None, "the first chunk is missing"
    filling.finish(0)
    assert filling.hash.step() == (0, 100)
    assert filling.hash.step() is None, "one step at a time"
    filling.hash.hash(filling.descriptor, 100)
    os.close(filling.descriptor)
    assert filling.hash.sha256() == hashlib.sha256(content).hexdigest()


def test_file_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(99))
    with path.open("rb") as file, pytest.raises(EOFError):
        FileHash(100, []).hash(file.fileno(), 100)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = FileHash(0, [])
    with (tmp_path / "file").open("rb") as file:
        found.hash(file.fileno(), 0)
    assert found.complete
    assert found.sha256() == hashlib.sha256(b"").hexdigest()


def test_shared_ends_of_tensors(tmp_path: Path) -> None:
    """Tensors without bytes, and tensors that touch, inside one read and across reads."""
    content = random.Random(0).randbytes(1000)
    (tmp_path / "file").write_bytes(content)
    ranges = [("none", 0, 0), ("a", 0, 300), ("empty", 300, 300), ("b", 300, 301), ("rest", 301, 1000)]
    found = FileHash(1000, [], ranges)
    with (tmp_path / "file").open("rb") as file:
        for stop in (1, 299, 300, 301, 999, 1000):
            found.hash(file.fileno(), stop)
    for name, start, stop in ranges:
        expected = quick_hash()
        expected.update(content[start:stop])
        assert found.tensor_hashes()[name] == expected.hexdigest()
