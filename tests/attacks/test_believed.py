"""A journal that somebody edited, files that somebody changed: nothing is believed that is not as it was written."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamquant.convert.run import stream
from streamquant.convert.run.blocks import Scratch
from streamquant.convert.run.journal import VERSION, _with_check
from streamquant.convert.run.output_files import OutputFiles
from tests.attacks.harness import TO, Zygote, checksums, finished_files, flip, run

SMALL_CHUNKS = {
    "streamquant.convert.plan.records.CHUNK_BYTES": 1 << 13,
    "streamquant.files.hashing.STEP_BYTES": 1 << 13,
}
SPLIT = ("--split-max-size", "100K")


@pytest.fixture(scope="module")
def sums(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole")
    run("convert", pristine, *TO, *SPLIT, "--out", out).done()
    return checksums(out)


@pytest.fixture
def unfinished(pristine: Path, zygote: Zygote, tmp_path: Path) -> tuple[Path, tuple[Any, ...]]:
    """A run that was killed when its first file was finished, and its command."""
    out = tmp_path / "out"
    command = ("convert", pristine, *TO, *SPLIT, "--out", out, "--jobs", 1)
    process = zygote.start(*command, set=SMALL_CHUNKS, slow=0.002)
    while not finished_files(out):
        time.sleep(0.001)
    process.kill()
    assert process.wait().code == -signal.SIGKILL
    return out, command


def journal_of(out: Path) -> Path:
    return out / ".streamquant" / "journal.jsonl"


def cut_torn(journal: Path) -> bytes:
    data = journal.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def test_one_digit_of_a_finished_file(
    unfinished: tuple[Path, tuple[Any, ...]], sums: dict[str, str], zygote: Zygote
) -> None:
    out, command = unfinished
    journal = journal_of(out)
    data = cut_torn(journal)
    at = data.index(b'"sha256":"', data.index(b'{"file":')) + len(b'"sha256":"')
    digit = b"0" if data[at : at + 1] != b"0" else b"1"
    journal.write_bytes(data[:at] + digit + data[at + 1 :])
    number = data[:at].count(b"\n") + 1
    ran = zygote.run(*command, set=SMALL_CHUNKS)
    ran.refused(1, "cannot read the journal", str(journal), f"line {number}: it is not as it was written")
    assert not list(out.rglob("streamquant.json"))
    journal.write_bytes(data)
    zygote.run(*command, set=SMALL_CHUNKS).done()
    assert checksums(out) == sums


def test_any_byte_of_the_journal(unfinished: tuple[Path, tuple[Any, ...]], zygote: Zygote) -> None:
    """But for the end of a line: two lines that run into each other are none."""
    out, command = unfinished
    journal, chance = journal_of(out), random.Random(7)
    data = cut_torn(journal)
    for at in chance.sample(range(len(data) - 1), 12):
        changed = bytearray(data)
        changed[at] ^= 1 << chance.randrange(7)
        journal.write_bytes(changed)
        zygote.run(*command, set=SMALL_CHUNKS).refused(1, str(journal))
        assert not list(out.rglob("streamquant.json"))


def test_line_of_another_run(
    unfinished: tuple[Path, tuple[Any, ...]], pristine: Path, zygote: Zygote, tmp_path: Path
) -> None:
    """Whole, and with a check that is right there."""
    out, command = unfinished
    other = tmp_path / "other"
    zygote.run("convert", pristine, "--to", "gguf:F16", "--out", other, set=SMALL_CHUNKS, die_at=60)
    line = cut_torn(journal_of(other)).splitlines()[1]
    data = cut_torn(journal_of(out))
    journal_of(out).write_bytes(data + line + b"\n")
    zygote.run(*command, set=SMALL_CHUNKS).refused(1, "cannot read the journal", f"line {len(data.splitlines()) + 1}")


def test_journal_of_an_earlier_version(unfinished: tuple[Path, tuple[Any, ...]], zygote: Zygote) -> None:
    out, command = unfinished
    lines = [json.loads(line) for line in cut_torn(journal_of(out)).splitlines()]
    lines[0]["journal"] = 1
    for line in lines:
        line.pop("check")
    journal_of(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = zygote.run(*command, set=SMALL_CHUNKS)
    ran.refused(1, "cannot read the journal", "journal 1, of another version", "finish it with the version that began")


def test_journal_of_the_version_before(
    unfinished: tuple[Path, tuple[Any, ...]], sums: dict[str, str], zygote: Zygote
) -> None:
    """Version 2 had no amax, and is gone on with."""
    out, command = unfinished
    head, *lines = cut_torn(journal_of(out)).splitlines()
    record = json.loads(head)
    record.pop("check")
    old = json.dumps({**record, "journal": 2}, separators=(",", ":")).encode()
    journal_of(out).write_bytes(b"\n".join([_with_check(old, record["fingerprint"]), *lines, b""]))
    assert record["journal"] == VERSION == 3
    assert zygote.run(*command, set=SMALL_CHUNKS).done().resumed > 0
    assert checksums(out) == sums


def test_finished_file_that_was_changed(
    unfinished: tuple[Path, tuple[Any, ...]], sums: dict[str, str], zygote: Zygote
) -> None:
    out, command = unfinished
    (first, *_) = finished_files(out)
    flip(first, first.stat().st_size - 40)
    ran = zygote.run(*command, set=SMALL_CHUNKS)
    ran.refused(1, "a finished file is not as it was written", str(first), "remove it")
    assert not list(out.rglob("streamquant.json"))
    first.unlink()
    zygote.run(*command, set=SMALL_CHUNKS).done()
    assert checksums(out) == sums


def test_finished_file_before_its_rename(unfinished: tuple[Path, tuple[Any, ...]], zygote: Zygote) -> None:
    """The journal calls it complete, its name is still that of a partial file, and a bit of it is another."""
    out, command = unfinished
    (first, *_) = finished_files(out)
    partial = first.rename(first.with_name(first.name + ".partial"))
    flip(partial, partial.stat().st_size - 40)
    ran = zygote.run(*command, set=SMALL_CHUNKS)
    ran.refused(1, "a finished file is not as it was written", str(partial), "remove it")
    assert not first.exists()


# While it runs


def header(path: Path) -> None:
    flip(path, 30)


def weights(path: Path) -> None:
    flip(path, path.stat().st_size - 40)


def padding(path: Path) -> None:
    """The last bytes of a GGUF whose last tensor ends off its alignment; here of any file: its last byte."""
    flip(path, path.stat().st_size - 1)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def made_longer(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def replaced(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def linked(path: Path) -> None:
    os.link(path, path.with_name("second-name"))


@contextmanager
def somebody(what: Callable[[Path], None], when: str) -> Iterator[None]:
    """Does something to the first partial file when all its bytes are written, before or after they are hashed."""
    real_sync, real_hash = OutputFiles.sync, stream._Run._hash_output
    done: list[Path] = []

    def act(files: OutputFiles, file: int) -> None:
        if not done:
            done.append(files._out / f"{files._plan.files[file].path}.partial")
            what(done[0])

    def sync(files: OutputFiles, file: int) -> None:
        act(files, file)
        real_sync(files, file)

    def hash_output(self: stream._Run, index: int, stop: int, scratch: Scratch) -> None:
        if stop == self._plan.files[index].size:
            act(self._files, index)
        real_hash(self, index, stop, scratch)

    with pytest.MonkeyPatch.context() as patch:
        if when == "after":
            patch.setattr(OutputFiles, "sync", sync)
        else:
            patch.setattr(stream._Run, "_hash_output", hash_output)
        yield
    assert done, "nothing was changed"


CHANGES = [
    *((what, "before") for what in (header, weights, padding, cut_short, made_longer, replaced, linked)),
    *((what, "after") for what in (cut_short, made_longer, replaced, linked)),
]


@pytest.mark.parametrize(("what", "when"), CHANGES)
def test_partial_that_is_changed_during_the_run(
    what: Callable[[Path], None], when: str, pristine: Path, sums: dict[str, str], tmp_path: Path
) -> None:
    """It never gets its final name, and the same command makes what differs again."""
    out = tmp_path / "out"
    command = ("convert", pristine, *TO, *SPLIT, "--out", out, "--jobs", 1)
    with somebody(what, when):
        ran = run(*command)
    ran.refused(1, "an output file was changed while it was being written", ".partial", "what differs is made again")
    assert checksums(out).items() >= {(name, sums[name]) for name in names_of(finished_files(out), out)}
    assert not list(tmp_path.rglob("streamquant.json"))
    for path in tmp_path.rglob("second-name"):
        path.unlink()
    run(*command).done()
    assert checksums(out) == sums


def names_of(files: list[Path], out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in files]
