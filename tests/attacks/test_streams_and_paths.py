"""Streams that are closed or full, terminals of ASCII, and paths that cannot be: one error, and no lost work."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import streamquant
from streamquant.convert.recipes.quantization_config import QuantizationConfigs
from streamquant.quant.errors import StreamquantError
from tests.attacks.harness import ROOT, TO, checksums, finished_files, run, run_process, write_model

REDIRECTIONS = (">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "| true")


def shell(command: str, redirection: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command line in bash."""
    text = f"set -o pipefail; {sys.executable} -P -m streamquant {command} {redirection}"
    return subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture(scope="module")
def sums(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole")
    run("convert", pristine, *TO, "--out", out).done()
    return checksums(out)


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_work_is_done_whatever_the_streams(
    redirection: str, pristine: Path, sums: dict[str, str], tmp_path: Path
) -> None:
    """With closed streams, files that are written must not get their numbers, and so what is printed."""
    ran = shell(f"convert {pristine} {' '.join(TO)} --out {tmp_path}", redirection)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert checksums(tmp_path) == sums


def test_result_that_nobody_got(pristine: Path) -> None:
    """A plan is printed and nothing else: a stream that does not take it is an error."""
    for more in ("", "--json"):
        ran = shell(f"plan {pristine} {' '.join(TO)} {more}", "> /dev/full")
        assert ran.returncode == 1
        assert ran.stderr.startswith("error: standard output takes no more")
        assert "Exception ignored" not in ran.stderr


def test_ascii(pristine: Path) -> None:
    ran = shell(f"plan {pristine} {' '.join(TO)}", "", PYTHONIOENCODING="ascii", LANG="C", LC_ALL="C")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "gguf:Q8_0" in ran.stdout


def test_working_folder_that_is_gone(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    run("plan", pristine, *TO).done()
    run("plan", pristine, *TO, "--out", "out").refused(1, "cannot read or write a file")
    run("convert", pristine, *TO, "--out", "out").refused(1, "cannot read or write a file")
    run("verify", "out").refused(2, "out")
    text = pristine / "config.json"
    for command in (
        ("validate", pristine, pristine, "--text", text, "--out", tmp_path / "r"),
        ("chat-check", pristine, pristine),
    ):
        run(*command).refused(1, "the working folder is gone")
    run("imatrix", pristine, "--text", text, "--out", tmp_path / "im.gguf").refused(1, "the working folder is gone")


def test_a_scheme_is_described_from_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that loads PyTorch, which ends at once in such a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert QuantizationConfigs(["FP8_DYNAMIC"])["FP8_DYNAMIC"]["quant_method"] == "compressed-tensors"


def test_name_too_long_is_in_the_plan(pristine: Path, tmp_path: Path) -> None:
    """Names of 255 bytes are allowed; while it is filled, a file's name has `.partial` at its end."""
    for command in ("plan", "convert"):
        ran = run(command, pristine, "--to", "gguf:Q8_0", "--out", tmp_path / "out", "--name", "x" * 240)
        ran.refused(1, "cannot read or write a file", "File name too long")
    assert not finished_files(tmp_path)
    run("plan", pristine, "--to", "gguf:Q8_0", "--out", tmp_path / "out", "--name", "x" * 230).done()


def test_read_only_disk_is_in_the_plan(pristine: Path, tmp_path: Path) -> None:
    options = "tmpfs", tmp_path
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=900m", *options], check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted")
    try:
        ran = run("plan", pristine, *TO, "--out", tmp_path / "out")
        ran.refused(1, "cannot read or write a file", str(tmp_path), "Read-only file system")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("out", ["/sys/x", "/proc/x"])
def test_where_nothing_can_be_written(out: str, pristine: Path) -> None:
    """Its space is no matter: there is none."""
    for command in ("plan", "convert"):
        run(command, pristine, *TO, "--out", out).refused(1, "cannot read or write a file", out)


@pytest.mark.parametrize("out", ["/proc/x/imatrix.gguf", "/proc/imatrix.gguf"])
def test_imatrix_looks_at_out_first(out: str, tmp_path: Path) -> None:
    """Before it opens the model, which is not even there."""
    with pytest.raises(StreamquantError, match="cannot read or write a file"):
        streamquant.imatrix(tmp_path / "no-model", [], out)


@pytest.mark.parametrize("hard", [200, 60])
def test_more_shards_than_open_files(hard: int, tmp_path: Path) -> None:
    """The soft limit is raised as far as the hard one permits; what is too much for that is told before work."""
    model = write_model(tmp_path / "Tiny", shards=20)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, hard))

    ran = run_process("convert", model, *TO, "--out", tmp_path / "out", preexec_fn=limit)
    if hard == 200:
        ran.done()
    else:
        ran.refused(1, "too many files have to be open at once", "a limit of 60", "86", "ulimit -n")
        assert not (tmp_path / "out").exists()
