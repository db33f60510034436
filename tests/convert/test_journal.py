"""The journal: what was recorded comes back, torn lines do not, and one folder has one writer."""

import contextlib
import fcntl
import json
import multiprocessing
import multiprocessing.synchronize
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamquant.convert.run.journal import WORK_FOLDER, FinishedFile, Head, Journal, Progress
from streamquant.quant.errors import StreamquantError

HEAD = Head("f" * 64, {"gguf:Q8_0": "a" * 64})
HEX = st.text("0123456789abcdef", min_size=32, max_size=32)
NAMES = st.text(min_size=1, max_size=20).filter(lambda text: text.encode("utf-8", "ignore").decode() == text)
RECORDS = st.lists(
    st.one_of(
        st.tuples(st.just("chunk"), st.integers(0, 99), st.lists(st.one_of(HEX, st.just("")), max_size=4)),
        st.tuples(st.just("file"), NAMES, st.dictionaries(NAMES, HEX, max_size=3)),
        st.tuples(st.just("source"), NAMES, HEX),
    ),
    max_size=20,
)


def record(journal: Journal, expected: Progress, entry: tuple[object, ...]) -> None:
    match entry:
        case ("chunk", int(number), list(hashes)):
            journal.chunk(number, hashes)
            expected.chunks[number] = hashes
        case ("file", str(path), dict(tensors)):
            expected.files[path] = FinishedFile("5" * 64, tensors)
            journal.file(path, expected.files[path])
        case ("source", str(name), str(sha256)):
            journal.source(name, sha256)
            expected.sources[name] = sha256


@given(first=RECORDS, second=RECORDS, torn=st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(
    first: list[tuple[object, ...]],
    second: list[tuple[object, ...]],
    torn: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Records of two runs, with a torn line between them."""
    out = tmp_path_factory.mktemp("out")
    expected = Progress()
    with contextlib.closing(Journal(out)) as journal:
        assert journal.head() is None
        assert journal.open(HEAD) == Progress()
        for entry in first:
            record(journal, expected, entry)
    with (out / WORK_FOLDER / "journal.jsonl").open("ab") as file:
        file.write(torn)
    with contextlib.closing(Journal(out)) as journal:
        assert journal.head() == HEAD
        assert journal.open(HEAD) == expected
        for entry in second:
            record(journal, expected, entry)
    with contextlib.closing(Journal(out)) as journal:
        assert journal.open(HEAD) == expected
        journal.remove()
    assert not (out / WORK_FOLDER).exists()


@pytest.mark.parametrize("cut", range(0, 400, 13))
def test_cut_anywhere(cut: int, tmp_path: Path) -> None:
    """Whatever length is left of it, the whole lines of that are believed."""
    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.open(HEAD)
        for number in range(10):
            journal.chunk(number, [f"{number:032x}"])
    path = tmp_path / WORK_FOLDER / "journal.jsonl"
    os.truncate(path, min(cut, path.stat().st_size))
    whole = path.read_bytes().count(b"\n")
    with contextlib.closing(Journal(tmp_path)) as journal:
        progress = journal.open(HEAD)
        assert list(progress.chunks) == list(range(max(0, whole - 1)))
        journal.chunk(77, ["x"])
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert lines[0]["fingerprint"] == HEAD.fingerprint
    assert lines[-1].pop("check")
    assert lines[-1] == {"chunk": 77, "hashes": ["x"]}


def test_another_plan(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.open(HEAD)
    with contextlib.closing(Journal(tmp_path)) as journal:
        with pytest.raises(StreamquantError, match="unfinished run of another plan") as caught:
            journal.open(Head("e" * 64, {"fp8-block": "b"}))
        assert "f" * 12 in str(caught.value)
        assert "e" * 12 in str(caught.value)
        assert "gguf:Q8_0" in str(caught.value)
        assert journal.open(HEAD) == Progress()


def test_one_writer(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path)), pytest.raises(StreamquantError, match="another streamquant"):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_folder_is_left_as_it_was(tmp_path: Path) -> None:
    """A run that recorded nothing leaves nothing; one that did leaves the journal."""
    Journal(tmp_path).close()
    assert not list(tmp_path.iterdir())
    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.open(HEAD)
    assert (tmp_path / WORK_FOLDER / "journal.jsonl").exists()


def test_lock_that_the_last_run_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the last run removed it, locked after: such a lock keeps nobody out and is not enough."""
    real = fcntl.flock
    calls: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / WORK_FOLDER / "lock").unlink()
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.closing(Journal(tmp_path)):
        assert len(calls) == 2
        with pytest.raises(StreamquantError, match="another streamquant"):
            Journal(tmp_path)


def _hold(folder: str, ready: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    with contextlib.closing(Journal(Path(folder))):
        ready.set()
        done.wait(30)


def test_one_writer_of_all_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(StreamquantError, match="another streamquant is writing to this folder"):
            Journal(tmp_path)
    finally:
        done.set()
        process.join(30)
    Journal(tmp_path).close()


def test_lines_of_many_threads(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.open(HEAD)

        def write(first: int) -> None:
            for number in range(first, first + 50):
                journal.chunk(number, [str(number) * 50])

        threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 400, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with contextlib.closing(Journal(tmp_path)) as journal:
        assert journal.open(HEAD).chunks == {number: [str(number) * 50] for number in range(400)}


def test_short_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of a line: an error, and no half line for the next to run into."""
    path = tmp_path / WORK_FOLDER / "journal.jsonl"
    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.open(HEAD)
        journal.chunk(0, ["a"])
        before = path.read_bytes()
        real = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
            with pytest.raises(OSError, match="No space left"):
                journal.chunk(1, ["b"])
        assert path.read_bytes() == before
        journal.chunk(2, ["c"])
    with contextlib.closing(Journal(tmp_path)) as journal:
        assert journal.open(HEAD).chunks == {0: ["a"], 2: ["c"]}
