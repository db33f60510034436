"""A disk that is full, failing, read-only, or too small from the beginning."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.harness import TO, Zygote, checksums, finished_files, run, run_process, untouched

SMALL_CHUNKS = {
    "streamquant.convert.plan.records.CHUNK_BYTES": 1 << 13,
    "streamquant.files.hashing.STEP_BYTES": 1 << 13,
}


@pytest.fixture(scope="module")
def sums(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole")
    run("convert", pristine, *TO, "--out", out).done()
    return checksums(out)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs of its own; skips where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    ran = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if ran.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted: {ran.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("nbytes", [0, 1, 10_000, 100_000, 280_000])
def test_disk_full_while_writing(
    nbytes: int, pristine: Path, sums: dict[str, str], zygote: Zygote, tmp_path: Path
) -> None:
    command = ("convert", pristine, *TO, "--out", tmp_path, "--jobs", 2)
    with untouched(pristine):
        ran = zygote.run(*command, set=SMALL_CHUNKS, full_after=nbytes)
    ran.refused(1, "the disk is full", str(tmp_path), "No space left", "free some space", "continues where it stopped")
    assert not finished_files(tmp_path) or checksums(tmp_path).items() >= {
        (str(path.relative_to(tmp_path)), sums[str(path.relative_to(tmp_path))]) for path in finished_files(tmp_path)
    }
    assert not list(tmp_path.rglob("streamquant.json"))
    ran = zygote.run(*command, set=SMALL_CHUNKS).done()
    assert nbytes < 100_000 or ran.resumed > 0
    assert checksums(tmp_path) == sums


# The n-th call of a function fails: opening, sizing, journal, syncing, renaming, manifests, cleaning up.
SOURCE = 2  # the second file that is opened, after the lock; the journal and the outputs come behind all sources
CALLS = [
    *(("mkdir", n) for n in (1, 2)),
    *(("open", n) for n in (1, 2, 3, 4, 5, 6)),
    *(("ftruncate", n) for n in (1, 2)),
    *(("write", n) for n in (1, 2, 20)),
    *(("fsync", n) for n in (1, 2, 3, 4, 7)),
    *(("replace", n) for n in (1, 2, 3)),
    ("unlink", 1),
]


@pytest.mark.parametrize(("name", "at"), CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_call_may_fail(
    name: str, at: int, code: int, pristine: Path, sums: dict[str, str], zygote: Zygote, tmp_path: Path
) -> None:
    """One message, nothing that looks done and is not, and the same command ends well when the disk does."""
    out = tmp_path / "out"
    command = ("convert", pristine, *TO, "--out", out, "--jobs", 1)
    ran = zygote.run(*command, set=SMALL_CHUNKS, fail={"name": name, "at": at, "errno": code})
    if code == errno.ENOSPC and (name, at) != ("open", SOURCE):
        ran.refused(1, "the disk is full", str(out), "No space left", "free some space")
    else:
        ran.refused(1, "cannot read", "where:", os.strerror(code))
    for path in finished_files(out):
        assert checksums(path.parent)[path.name] == sums[str(path.relative_to(out))]
    zygote.run(*command, set=SMALL_CHUNKS).done()
    assert checksums(out) == sums


def test_disk_full_for_real(pristine: Path, sums: dict[str, str], zygote: Zygote, tmp_path: Path) -> None:
    """A tmpfs with too little room, and a disk_usage that promises more, as other programs may fill it."""
    out = tmp_path / "out"
    with mounted(out, "size=700k"), untouched(pristine):
        ballast = out / "ballast"
        ballast.write_bytes(bytes(500_000))
        command = ("convert", pristine, *TO, "--out", out)
        ran = zygote.run(*command, set=SMALL_CHUNKS, free_bytes=1 << 40)
        ran.refused(1, "the disk is full", str(out), "No space left on device", "free some space")
        assert not list(out.rglob("streamquant.json"))
        for path in finished_files(out):
            assert checksums(path.parent)[path.name] == sums[str(path.relative_to(out))]
        ballast.unlink()
        zygote.run(*command, set=SMALL_CHUNKS, free_bytes=1 << 40).done()
        assert checksums(out) == sums


def test_disk_too_small_is_refused_before_work(pristine: Path, zygote: Zygote, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = zygote.run("convert", pristine, *TO, "--out", out, free_bytes=64 * 2**20)
    ran.refused(1, "not enough disk space", str(out), "67,108,864 bytes free", "required:", "make fewer variants")
    assert not list(out.rglob("*.gguf*"))
    ran = zygote.run("plan", pristine, *TO, "--out", out, free_bytes=0)
    ran.refused(1, "not enough disk space", "0 bytes free")


def test_disk_too_small_for_real(pristine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with mounted(out, "size=1m"):
        run_process("convert", pristine, *TO, "--out", out).refused(1, "not enough disk space", str(out))
        assert not list(out.rglob("*.gguf*"))


def test_disk_is_not_asked_for_what_is_written(
    pristine: Path, sums: dict[str, str], zygote: Zygote, tmp_path: Path
) -> None:
    """Resuming needs room for the rest only."""
    command = ("convert", pristine, *TO, "--out", tmp_path)
    zygote.run(*command, set=SMALL_CHUNKS, full_after=200_000).refused(1, "the disk is full")
    written = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.partial"))
    assert written > 100_000
    total = sum((path.stat().st_size for path in tmp_path.rglob("*.partial")), 64 * 2**20)
    zygote.run(*command, set=SMALL_CHUNKS, free_bytes=total - written).done()
    assert checksums(tmp_path) == sums


def test_read_only_disk(pristine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with mounted(out, "size=1m,ro"):
        ran = run_process("convert", pristine, *TO, "--out", out)
        ran.refused(1, "cannot read or write a file", str(out), "Read-only file system", "permissions")


def test_folder_of_another_user(pristine: Path, zygote: Zygote, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    readable = {path: path.stat().st_mode for path in (tmp_path, *tmp_path.parents) if path.stat().st_uid == 0}
    faults: dict[str, Any] = {"user": 65534}
    for path in (*pristine.parents, *readable):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    ran = zygote.run("convert", pristine, *TO, "--out", tmp_path / "out", **faults)
    ran.refused(1, "cannot read or write a file", str(tmp_path / "out"), "Permission denied", "permissions")
    (tmp_path / "out").mkdir(mode=0o555)
    ran = zygote.run("convert", pristine, *TO, "--out", tmp_path / "out", **faults)
    ran.refused(1, "cannot read or write a file", str(tmp_path / "out"), "Permission denied")
    assert not list((tmp_path / "out").iterdir())


def test_immutable_folder(pristine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["chattr", "+i", out], capture_output=True, check=False).returncode != 0:
        pytest.skip("chattr +i is not permitted here")
    try:
        run("convert", pristine, *TO, "--out", out).refused(1, "cannot read or write", str(out), "not permitted")
    finally:
        subprocess.run(["chattr", "-i", out], check=True)
    assert not list(out.iterdir())
