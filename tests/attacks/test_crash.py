"""kill -9, power loss, signals: what has its final name is whole, and the same command ends with the same bytes."""

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan, extents
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests.attacks.harness import (
    TO,
    Forked,
    Zygote,
    checksums,
    chunks_in_journal,
    finish,
    finished_files,
    run,
    start,
    untouched,
    wait_for_chunks,
    write_model,
)

SMALL_CHUNKS = {
    "streamquant.convert.plan.records.CHUNK_BYTES": 1 << 19,
    "streamquant.files.hashing.STEP_BYTES": 1 << 19,
}
TINY_CHUNKS = {"streamquant.convert.plan.records.CHUNK_BYTES": 1 << 13, "streamquant.files.hashing.STEP_BYTES": 1 << 13}
SPLIT = ("--split-max-size", "8M")


class Reference(NamedTuple):
    """A run that nobody stopped."""

    model: Path
    sums: dict[str, str]


@pytest.fixture(scope="module")
def whole(medium: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    out = tmp_path_factory.mktemp("whole")
    run("convert", medium, *TO, *SPLIT, "--out", out).done()
    return Reference(medium, checksums(out))


@pytest.fixture(scope="module")
def whole_tiny(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    out = tmp_path_factory.mktemp("whole")
    run("convert", pristine, *TO, "--out", out).done()
    return Reference(pristine, checksums(out))


def assert_nothing_looks_done(out: Path, reference: Reference) -> None:
    """Every file under a final name is the one that an uninterrupted run writes."""
    if not out.exists():
        return
    for name, digest in checksums(out).items():
        if not name.endswith(".partial") and not name.startswith(".streamquant"):
            assert digest == reference.sums[name], f"{name} has its final name and is not complete"


def kill_when(out: Path, process: Forked, chunks: int, delay: float) -> None:
    """kill -9 a moment after the journal lists so many chunks."""
    deadline = time.monotonic() + 20
    while chunks_in_journal(out) < chunks and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()


def test_kill_9_at_many_moments_and_resume(whole: Reference, zygote: Zygote, tmp_path: Path) -> None:
    """Each moment of its own: kill, look, resume, compare everything, the manifest too."""
    moments = random.Random(0)
    resumed = []
    with untouched(whole.model):
        for number, share in enumerate((0.0, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.85, 0.93, 0.98)):
            out = tmp_path / str(number)
            command = ("convert", whole.model, *TO, *SPLIT, "--out", out, "--jobs", 1 + number % 3)
            process = zygote.start(*command, set=SMALL_CHUNKS, slow=0.001)
            kill_when(out, process, int(share * 92), moments.uniform(0, 0.02))
            assert process.wait().code == -signal.SIGKILL, "the run ended before it could be killed"
            assert_nothing_looks_done(out, whole)
            ran = zygote.run(*command, set=SMALL_CHUNKS).done()
            resumed.append(ran.resumed)
            assert checksums(out) == whole.sums
            shutil.rmtree(out)
    assert sum(count > 0 for count in resumed) >= 8, resumed
    assert max(resumed) > 70, resumed


def test_kill_resume_kill(whole: Reference, zygote: Zygote, tmp_path: Path) -> None:
    """One conversion, killed again and again: it gets on each time."""
    out = tmp_path / "out"
    command = ("convert", whole.model, *TO, *SPLIT, "--out", out, "--jobs", 2)
    progress = []
    for target in range(10, 90, 10):
        process = zygote.start(*command, set=SMALL_CHUNKS, slow=0.001)
        kill_when(out, process, target, 0)
        assert process.wait().code == -signal.SIGKILL
        assert_nothing_looks_done(out, whole)
        progress.append(chunks_in_journal(out))
    assert progress == sorted(set(progress)), progress
    assert zygote.run(*command, set=SMALL_CHUNKS).done().resumed >= progress[-1] - 2  # lines without bytes: redone
    assert checksums(out) == whole.sums


FOLDERS = ("--to", "nvfp4a16", "--to", "w4a16-g32")
"""A scale that has to be found first, and one for each group."""


def test_kill_9_of_folders_and_resume(pristine_sharded: Path, zygote: Zygote, tmp_path: Path) -> None:
    """Crash between visits and chunks, after an amax and before it: the resumed run finds the same scales."""
    source, whole = pristine_sharded, tmp_path / "whole"
    zygote.run("convert", source, *FOLDERS, "--out", whole).done()
    sums, last = checksums(whole), set()
    out = tmp_path / "out"
    command = ("convert", source, *FOLDERS, "--out", out, "--jobs", 1)
    for point in (20, 60, *range(76, 90, 2), 110):
        assert zygote.start(*command, set=TINY_CHUNKS, die_at=point).wait().code == -signal.SIGKILL
        journal = out / ".streamquant" / "journal.jsonl"
        lines = journal.read_bytes().splitlines() if journal.exists() else []
        last |= {line[2:6] for line in lines[-1:]}
        zygote.run(*command, set=TINY_CHUNKS).done()
        assert checksums(out) == sums, point
        shutil.rmtree(out)
    assert {b"amax", b"chun"} <= last, "no run was killed between a visit and its chunk"


def changes_of(zygote: Zygote, command: tuple[object, ...], out: Path, tmp_path: Path) -> int:
    """How often a command changes the file system."""
    count = tmp_path / "count"
    zygote.run(*command, set=TINY_CHUNKS, count_changes=str(count)).done()
    return int(count.read_text())


@pytest.mark.parametrize("first", [None, "gguf:Q8_0"], ids=["new", "a variant more"])
def test_crash_at_every_change_of_the_file_system(
    first: str | None, whole_tiny: Reference, zygote: Zygote, tmp_path: Path
) -> None:
    """Crash at the n-th call that changes the disk: between any two of them, and half way through a write."""
    out, begin = tmp_path / "out", tmp_path / "begin"
    command = ("convert", whole_tiny.model, *TO, "--out", out, "--jobs", 1)
    begin.mkdir()
    if first is not None:
        zygote.run("convert", whole_tiny.model, "--to", first, "--out", begin).done()
    shutil.copytree(begin, out)
    changes = changes_of(zygote, command, out, tmp_path)
    shutil.rmtree(out)
    # All of the begin and the end, where opening, syncing, renaming and manifests are; every 12th in the middle.
    middle = range(12, changes - 24, 12) if first is None else ()
    points = [*range(1, 12), *middle, *range(changes - 24, changes + 1)]
    assert len(points) > 30
    resumed = 0
    for point in points:
        shutil.copytree(begin, out)
        process = zygote.start(*command, set=TINY_CHUNKS, die_at=point)
        assert process.wait().code == -signal.SIGKILL, f"no change number {point}"
        assert_nothing_looks_done_but(out, whole_tiny, first)
        resumed += zygote.run(*command, set=TINY_CHUNKS).done().resumed > 0
        assert checksums(out) == whole_tiny.sums, f"other files after a crash at change {point}"
        shutil.rmtree(out)
    assert resumed > 10


def assert_nothing_looks_done_but(out: Path, reference: Reference, first: str | None) -> None:
    """As `assert_nothing_looks_done`, where the manifest may still be the one of the first variant."""
    if not out.exists():
        return
    manifest = out / "Tiny-GGUF" / "streamquant.json"
    if manifest.exists():
        variants = json.loads(manifest.read_text())["variants"]
        assert list(variants) in ([first], ["gguf:Q4_0", "gguf:Q8_0"])
    for path in finished_files(out):
        name = str(path.relative_to(out))
        assert checksums(path.parent)[path.name] == reference.sums[name]


def run_until_killed(zygote: Zygote, reference: Reference, out: Path, point: int) -> tuple[object, ...]:
    command = ("convert", reference.model, *TO, "--out", out, "--jobs", 1)
    assert zygote.start(*command, set=TINY_CHUNKS, die_in_pwrite=point).wait().code == -signal.SIGKILL
    assert chunks_in_journal(out) > 10
    return command


def partials(out: Path) -> Iterator[Path]:
    found = sorted(out.rglob("*.gguf.partial"))
    assert found
    return iter(found)


@pytest.fixture
def tiny_plan(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(
        "streamquant.convert.plan.records.CHUNK_BYTES", TINY_CHUNKS["streamquant.convert.plan.records.CHUNK_BYTES"]
    )
    return make_plan(open_checkpoint(pristine), parse_variants([TO[1]]))


POINT = 60  # of about 90 calls of pwrite: many chunks are done, no file is


@pytest.mark.parametrize("which", [0, 5, 11])
def test_power_loss_zeroes_a_chunk(
    which: int, whole_tiny: Reference, tiny_plan: Plan, zygote: Zygote, tmp_path: Path
) -> None:
    """A journaled chunk whose bytes never reached the disk is converted again; the others are not."""
    out = tmp_path / "out"
    command = run_until_killed(zygote, whole_tiny, out, POINT)
    done = chunks_in_journal(out)
    for _, _, region in extents(tiny_plan, tiny_plan.chunks[which]):
        path = out / tiny_plan.files[region.file].path
        with path.with_name(path.name + ".partial").open("r+b") as opened:
            opened.seek(region.offset)
            assert any(opened.read(region.nbytes)), "the chunk had not been written"
            opened.seek(region.offset)
            opened.write(bytes(region.nbytes))
    assert zygote.run(*command, set=TINY_CHUNKS).done().resumed == done - 1
    assert checksums(out) == whole_tiny.sums


@pytest.mark.parametrize("left", [0, 1, 5000])
def test_power_loss_truncates_a_partial(left: int, whole_tiny: Reference, zygote: Zygote, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = run_until_killed(zygote, whole_tiny, out, POINT)
    done = chunks_in_journal(out)
    with next(partials(out)).open("r+b") as file:
        file.truncate(left)
    assert zygote.run(*command, set=TINY_CHUNKS).done().resumed < done
    assert checksums(out) == whole_tiny.sums


def test_power_loss_removes_a_partial(whole_tiny: Reference, zygote: Zygote, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = run_until_killed(zygote, whole_tiny, out, POINT)
    next(partials(out)).unlink()
    zygote.run(*command, set=TINY_CHUNKS).done()
    assert checksums(out) == whole_tiny.sums


@pytest.mark.parametrize("seed", range(6))
def test_power_loss_of_random_pages(seed: int, whole_tiny: Reference, zygote: Zygote, tmp_path: Path) -> None:
    """Pages of unfinished files and the end of the journal are gone, as after a real one."""
    out, chance = tmp_path / "out", random.Random(seed)
    command = run_until_killed(zygote, whole_tiny, out, chance.randrange(30, 85))
    for path in out.rglob("*.gguf.partial"):
        with path.open("r+b") as file:
            for page in range(0, path.stat().st_size, 4096):
                if chance.random() < 0.3:
                    file.seek(page)
                    file.write(bytes(min(4096, path.stat().st_size - page)))
    journal = out / ".streamquant" / "journal.jsonl"
    synced = journal.read_bytes().rfind(b'{"file":') + 1  # such lines are synced before anything is renamed
    with journal.open("r+b") as file:
        size = journal.stat().st_size
        file.truncate(size if synced else chance.randrange(size))
    zygote.run(*command, set=TINY_CHUNKS).done()
    assert checksums(out) == whole_tiny.sums


@pytest.mark.parametrize("torn", [b'{"chunk":', b'{"chunk":3,"hashes":["00"', b"\x00\xff", b'{"file":"x'])
def test_torn_last_line_of_the_journal(torn: bytes, whole_tiny: Reference, zygote: Zygote, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = run_until_killed(zygote, whole_tiny, out, POINT)
    done = chunks_in_journal(out)
    with (out / ".streamquant" / "journal.jsonl").open("ab") as file:
        file.write(torn)
    assert zygote.run(*command, set=TINY_CHUNKS).done().resumed == done
    assert checksums(out) == whole_tiny.sums


GARBAGE = [
    b"not json\n",
    b"\x00\x01\xff\xfe\n",
    b"[]\n",
    b"{}\n",
    b'"journal"\n',
    b'{"journal":999,"fingerprint":"x"}\n',
    b'{"journal":1,"fingerprint":7}\n',
    b"[" * 100_000 + b"\n",
]
GARBAGE_LINES = [
    b"7",
    b"[]",
    b"{}",
    b"null",
    b'{"chunk":"x","hashes":[]}',
    b'{"chunk":1}',
    b'{"chunk":1,"hashes":3}',
    b'{"chunk":[],"hashes":[]}',
    b'{"chunk":1,"hashes":[3]}',
    b'{"file":"x"}',
    b'{"file":[],"sha256":"","tensors":{}}',
    b'{"file":"x","sha256":"","tensors":[]}',
    b'{"source":{},"sha256":""}',
    b'{"source":"x","sha256":7}',
    b'{"amax":"x"}',
    b'{"amax":3,"value":0.5}',
    b'{"amax":"x","value":"0.5"}',
    b'{"amax":"x","value":true}',
    b'{"amax":"x","value":-0.5}',
    b'{"amax":"x","value":1e999}',
    b"\xff",
    b"[" * 100_000,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_journal_is_refused(garbage: bytes, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".streamquant"
    folder.mkdir(parents=True)
    (folder / "journal.jsonl").write_bytes(garbage)
    ran = run("convert", model, *TO, "--out", tmp_path / "out")
    ran.refused(
        1, "cannot read the journal of an unfinished run", str(folder / "journal.jsonl"), "to do:", "start again"
    )
    assert not finished_files(tmp_path / "out")


@pytest.mark.parametrize("line", GARBAGE_LINES, ids=range(len(GARBAGE_LINES)))
def test_garbage_line_in_a_journal_is_refused(
    line: bytes, whole_tiny: Reference, zygote: Zygote, tmp_path: Path
) -> None:
    """The head is right, a line is not: no traceback, no guess."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".streamquant").mkdir()
    plan = make_plan(open_checkpoint(whole_tiny.model), parse_variants([TO[1]]))
    journal = out / ".streamquant" / "journal.jsonl"
    run_and_keep_head(zygote, whole_tiny, out)
    head = journal.read_bytes().splitlines()[0]
    assert plan.fingerprint.encode() in head
    journal.write_bytes(head + b"\n" + line + b"\n")
    run("convert", whole_tiny.model, *TO, "--out", out).refused(1, "cannot read the journal", str(journal), "line 2")
    assert not finished_files(out)


def run_and_keep_head(zygote: Zygote, reference: Reference, out: Path) -> None:
    process = zygote.start("convert", reference.model, *TO, "--out", out, "--jobs", 1, die_at=16)
    assert process.wait().code == -signal.SIGKILL


def test_journal_of_another_plan_is_refused(whole_tiny: Reference, zygote: Zygote, tmp_path: Path) -> None:
    """Other variants, other options, another source: never mixed into one folder."""
    out = tmp_path / "out"
    command = run_until_killed(zygote, whole_tiny, out, POINT)
    before = checksums(out)
    for other in (("--to", "gguf:F16"), (*TO, "--split-max-size", "100K"), (*TO, "--name", "Other")):
        ran = run("convert", whole_tiny.model, *other, "--out", out)
        ran.refused(1, "unfinished run of another plan", str(out), "found:", "required:", "repeat the command")
        assert checksums(out) == before
    zygote.run(*command, set=TINY_CHUNKS).done()
    assert checksums(out) == whole_tiny.sums


def test_message_about_another_plan_names_its_variants(whole_tiny: Reference, zygote: Zygote, tmp_path: Path) -> None:
    run_until_killed(zygote, whole_tiny, tmp_path, POINT)
    ran = run("convert", whole_tiny.model, "--to", "gguf:F16", "--out", tmp_path)
    ran.refused(1, "another plan", "gguf:Q8_0, gguf:Q4_0")


def test_finished_command_leaves_an_unfinished_run_alone(whole_tiny: Reference, zygote: Zygote, tmp_path: Path) -> None:
    """F16 is done; Q8_0 and Q4_0 were stopped. Asking for F16 again must not forget what they had."""
    zygote.run("convert", whole_tiny.model, "--to", "gguf:F16", "--out", tmp_path).done()
    command = run_until_killed(zygote, whole_tiny, tmp_path, POINT)
    done = chunks_in_journal(tmp_path)
    ran = zygote.run("convert", whole_tiny.model, "--to", "gguf:F16", "--out", tmp_path).done()
    assert "was done already" in ran.out
    assert chunks_in_journal(tmp_path) == done
    assert zygote.run(*command, set=TINY_CHUNKS).done().resumed == done
    sums = checksums(tmp_path)
    assert all(sums[name] == digest for name, digest in whole_tiny.sums.items() if name.endswith(".gguf"))


def test_crash_between_the_last_manifest_and_the_end(whole_tiny: Reference, zygote: Zygote, tmp_path: Path) -> None:
    """The journal of a run that had written everything is no obstacle to the next one."""
    zygote.run("convert", whole_tiny.model, "--to", "gguf:Q8_0", "--out", tmp_path).done()
    command = ("convert", whole_tiny.model, *TO, "--out", tmp_path)
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    process = zygote.start(*command, fail={"name": "unlink", "at": 1, "errno": 5})
    process.wait().refused(1, "cannot read or write a file")
    assert (tmp_path / ".streamquant" / "journal.jsonl").exists()
    assert "was done already" in zygote.run(*command).done().out
    assert checksums(tmp_path) == whole_tiny.sums
    zygote.run("convert", whole_tiny.model, "--to", "gguf:F16", "--out", tmp_path).done()


def test_final_file_is_there_and_its_line_too(whole: Reference, zygote: Zygote, tmp_path: Path) -> None:
    """Killed after the first file of several had its name: it is neither written again nor refused."""
    out = tmp_path / "out"
    command = ("convert", whole.model, *TO, *SPLIT, "--out", out, "--jobs", 1)
    process = zygote.start(*command, set=SMALL_CHUNKS, slow=0.002)
    while not finished_files(out):
        time.sleep(0.001)
    process.kill()
    assert process.wait().code == -signal.SIGKILL
    first = finished_files(out)[0]
    before = (first.stat().st_ino, first.stat().st_mtime_ns)
    zygote.run(*command, set=SMALL_CHUNKS).done()
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == before
    assert checksums(out) == whole.sums


@pytest.mark.parametrize("size", [None, 0, 100], ids=["whole", "empty", "short"])
def test_crash_between_the_journals_line_and_the_rename(
    size: int | None, whole: Reference, zygote: Zygote, tmp_path: Path
) -> None:
    """The rename is made up for; a partial that is not what the line says never gets the final name."""
    out = tmp_path / "out"
    command = ("convert", whole.model, *TO, *SPLIT, "--out", out, "--jobs", 1)
    process = zygote.start(*command, set=SMALL_CHUNKS, slow=0.002)
    while not finished_files(out):
        time.sleep(0.001)
    process.kill()
    process.wait()
    first = finished_files(out)[0]
    partial = first.rename(first.with_name(first.name + ".partial"))
    if size is not None:
        with partial.open("r+b") as file:
            file.truncate(size)
    inode = partial.stat().st_ino
    zygote.run(*command, set=SMALL_CHUNKS).done()
    assert first.stat().st_ino == inode
    assert checksums(out) == whole.sums


def test_leftover_partial_of_another_run_leaves_no_trace(tmp_path: Path) -> None:
    """A partial without a journal: padding between tensors is zero all the same."""
    model = write_model(tmp_path / "Odd", vocab_size=509)  # 509 rows of 68 bytes end off the alignment of 32
    run("convert", model, *TO, "--out", tmp_path / "clean").done()
    sums = checksums(tmp_path / "clean")
    for name in sums:
        if name.endswith(".gguf"):
            partial = tmp_path / "out" / f"{name}.partial"
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(b"\xff" * 1_000_000)
    run("convert", model, *TO, "--out", tmp_path / "out").done()
    assert checksums(tmp_path / "out") == sums


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_real_command(number: int, whole: Reference, tmp_path: Path) -> None:
    """Exit code 130, one line, and the same command goes on."""
    out = tmp_path / "out"
    command = ("convert", whole.model, *TO, *SPLIT, "--out", out, "--jobs", "1")
    with untouched(whole.model):
        process = start(*command)
        wait_for_chunks(out, 3, process)
        process.send_signal(number)
        ran = finish(process)
        assert ran.code == 130, ran
        assert ran.err == "interrupted; run the same command again to continue\n"
        assert_nothing_looks_done(out, whole)
        assert run(*command).done().resumed >= 3
    assert checksums(out) == whole.sums


def test_kill_9_of_the_real_command(whole: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("convert", whole.model, *TO, *SPLIT, "--out", out, "--jobs", "1")
    process = start(*command)
    wait_for_chunks(out, 5, process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert_nothing_looks_done(out, whole)
    assert run(*command).done().resumed >= 5
    assert checksums(out) == whole.sums


def test_two_signals_at_once(whole: Reference, zygote: Zygote, tmp_path: Path) -> None:
    """An impatient user: still no file that looks done, still resumable."""
    out = tmp_path / "out"
    command = ("convert", whole.model, *TO, *SPLIT, "--out", out, "--jobs", 2)
    process = zygote.start(*command, set=SMALL_CHUNKS, slow=0.003)
    while chunks_in_journal(out) < 10:
        time.sleep(0.001)
    process.kill(signal.SIGINT)
    process.kill(signal.SIGTERM)
    process.kill(signal.SIGINT)
    process.wait()
    assert_nothing_looks_done(out, whole)
    assert zygote.run(*command, set=SMALL_CHUNKS).done().resumed > 0
    assert checksums(out) == whole.sums
