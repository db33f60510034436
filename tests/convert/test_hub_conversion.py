"""Whole conversions from a test Hub: disk, bytes, the client's cache, xet, pins."""

import contextlib
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from streamquant.convert.conversion import DISK_RESERVE, SPOOL, convert, disk_of
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.open import open_source, pinned_commit
from streamquant.convert.source.spool import GIB, Spool
from streamquant.files.worker import Stopped
from streamquant.hub.repo import _meter
from tests.attacks.harness import TO, checksums, flip, run, state
from tests.hub import WRITE_TOKEN, Fault, Hub
from tests.hub_source import FIVE, REPO, SHARD, Later, commit_of, fetched, gib_of, use, without_origin, write_in_shards
from tests.listeners import Hears


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 16 MB in 8 shards."""
    return write_in_shards(tmp_path_factory.mktemp("model") / "Tiny")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model converted from the folder."""
    out = tmp_path_factory.mktemp("whole")
    run("convert", model, *FIVE, "--out", out).done()
    return out


def assert_same(out: Path, expected: Path) -> None:
    """All files are the same; the manifests, but for where the source came from."""
    manifests = {name for name in checksums(expected) if name.endswith("streamquant.json")}
    found, wanted = checksums(out), checksums(expected)
    assert {k: v for k, v in found.items() if k not in manifests} == {
        k: v for k, v in wanted.items() if k not in manifests
    }
    assert without_origin(out) == without_origin(expected)


class Watch(threading.Thread):
    """The most bytes of disk that a folder and its spool took."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self._out, self._done = out, threading.Event()
        self.most = self.spool = 0

    def run(self) -> None:
        while not self._done.wait(0.002):
            spool = taken(self._out / SPOOL)
            self.spool = max(self.spool, spool)
            self.most = max(self.most, taken(self._out))

    def stop(self) -> None:
        self._done.set()
        self.join()


def taken(folder: Path) -> int:
    """Bytes of disk of all files below a folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(f"{root}/{name}").st_blocks * 512
    return total


class Recorded(Spool):
    """A spool that the test can look at."""

    made: list["Recorded"]

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        Recorded.made.append(self)


def test_five_variants_with_a_spool_of_two_shards(
    model: Path, whole: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more disk than stated, the same bytes as from the folder, each shard once, no token elsewhere."""
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr("streamquant.convert.plan.records.CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr("streamquant.convert.conversion.Spool", Recorded)
    Recorded.made = []
    repo = hub.add_repo(REPO, model, private=True)
    out, spool_gib = tmp_path / "out", gib_of(model, 2)
    checkpoint, recipes = open_source(REPO, out=out), parse_variants(FIVE[1::2])
    plan = make_plan(checkpoint, recipes)
    disk = disk_of(plan, RunOptions(spool_gib=spool_gib))
    source = sum(file.size for file in checkpoint.files)
    assert disk.spool == int(spool_gib * GIB) < source / 3
    assert disk.peak == plan.nbytes + disk.spool
    watch = Watch(out)
    watch.start()
    arrived: list[int] = []
    slow = lambda _nbytes: time.sleep(0.004)  # noqa: E731 - fetching is faster, and has to wait for room
    listener = Hears({"fetching": arrived.append, "converting": slow})
    convert(make_plan(checkpoint, recipes), out, RunOptions(2, spool_gib=spool_gib), listener)
    watch.stop()
    small = 256 * 1024  # journal, pin, tokenizer, manifests, the client's own notes, the last block of each file
    assert small < DISK_RESERVE
    assert disk.spool * 0.8 < watch.spool <= disk.spool + small
    assert watch.most <= disk.peak + small
    (spool,) = Recorded.made
    assert spool.most <= spool.limit == disk.spool
    assert sum(arrived) == source
    assert max(arrived) <= 1 << 18, "the client's own pieces"
    assert fetched(hub.requests) == dict.fromkeys((path.name for path in model.glob(SHARD)), 1)
    assert not hub.leaked_tokens()
    assert not (out / ".streamquant").exists()
    assert_same(out, whole)
    for manifest in out.rglob("streamquant.json"):
        assert f'"repo": "{REPO}"' in manifest.read_text()
        assert f'"revision": "{commit_of(repo).oid}"' in manifest.read_text()
    run("verify", out, "--source", model).done()
    hub.log.clear()
    again = run("convert", REPO, *FIVE, "--out", out).done()
    assert again.out.count("was done already") == 5
    assert not fetched(hub.requests)


def test_conversion_by_xet(model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the Hub has xet, with the real hf_xet."""
    pytest.importorskip("hf_xet")
    arrived: list[int] = []
    with Hub(xet=True) as hub:
        use(hub, tmp_path / "home", monkeypatch)
        hub.add_repo(REPO, model)
        plan, how = make_plan(open_source(REPO), parse_variants(FIVE[1::2])), RunOptions(2, spool_gib=gib_of(model, 2))
        convert(plan, tmp_path / "out", how, Hears({"fetching": arrived.append}))
        assert not fetched(hub.requests), "it came by HTTP"
    assert sum(arrived) == sum(path.stat().st_size for path in model.glob(SHARD))
    assert_same(tmp_path / "out", whole)


def test_progress_of_xet_is_counted_once() -> None:
    """The client reports what came over the network and what is on the disk; the latter is counted. What is raised in
    the thread of hf_xet would only be printed: nothing is."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    arrived: list[int] = []
    stop = threading.Event()
    names: dict[str, Any] = {"reconstruction_desc": "", "log_level": 0, "tqdm_class": _meter(arrived.append, stop)}
    with XetDownloadProgressReporter(**names, total=100) as progress:
        for done in (10, 100):
            report = SimpleNamespace(total_bytes_completed=done, total_transfer_bytes_completed=done // 2)
            report.total_bytes_completion_rate = report.total_transfer_bytes_completion_rate = 1.0
            report.total_bytes = 100
            progress.update_progress(report)
        assert arrived == [10, 90]
        stop.set()
        with pytest.raises(Stopped):
            progress.reconstruction_bar.update(1)
        Later(lambda: progress.reconstruction_bar.update(1)).wait()


def test_repo_in_the_cache_is_used_in_place(model: Path, whole: Path, hub: Hub, tmp_path: Path) -> None:
    """No shard is fetched, no header either, nothing in the cache is touched; the disk that is asked for is smaller."""
    hub.add_repo(REPO, model)
    snapshot_download(REPO)
    cache = tmp_path / "home" / "hub"
    hub.log.clear()
    before = state(cache)
    run("convert", REPO, *FIVE, "--out", tmp_path / "out").done()
    assert {name: s for name, s in state(cache).items() if ".no_exist" not in name} == before
    assert not hub.select(path="*/resolve/*")
    assert not hub.select(host="cdn")
    assert_same(tmp_path / "out", whole)
    assert disk_of(make_plan(open_source(REPO), parse_variants(["fp8-dynamic"])), RunOptions()).spool == 0


def test_partly_cached_repo_fetches_the_rest(model: Path, whole: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, model)
    snapshot_download(REPO, allow_patterns=["*0000[13]-of*", "config.json"])
    hub.log.clear()
    before = state(tmp_path / "home" / "hub")
    run("convert", REPO, *FIVE, "--out", tmp_path / "out", "--spool-gib", gib_of(model, 1)).done()
    assert state(tmp_path / "home" / "hub") == before
    missing = [path.name for path in model.glob(SHARD) if "00001-of" not in path.name and "00003-of" not in path.name]
    assert fetched(hub.requests) == dict.fromkeys(missing, 1)
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("damage", ["bit", "short"])
def test_damaged_cached_shard_is_said(damage: str, model: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, model)
    cached = Path(snapshot_download(REPO)) / "model-00002-of-00008.safetensors"
    blob = cached.resolve()
    if damage == "bit":
        flip(blob, blob.stat().st_size - 5)
    else:
        os.truncate(blob, blob.stat().st_size - 5)
    ran = run("convert", REPO, *TO, "--out", tmp_path / "out")
    ran.refused(
        1, "a file in the Hub client's cache is damaged", str(cached), "to do:    delete it; then it is fetched"
    )
    cached.unlink()
    blob.unlink()
    run("convert", REPO, *TO, "--out", tmp_path / "out").done()
    run("verify", tmp_path / "out", "--source", model).done()


def test_damaged_cached_config_is_said(model: Path, hub: Hub) -> None:
    hub.add_repo(REPO, model)
    cached = Path(snapshot_download(REPO)) / "tokenizer.json"
    flip(cached.resolve(), 100)
    run("plan", REPO, *TO).refused(1, "a file in the Hub client's cache is damaged", str(cached))


def test_shard_without_sha256(model: Path, whole: Path, hub: Hub, tmp_path: Path) -> None:
    """A shard in git itself has git's hash alone: checked by it, and hashed while it is converted."""
    content = {path.name: path.read_bytes() for path in model.iterdir()}
    repo = hub.add_repo(REPO, content)
    commit = commit_of(repo)
    for name, entry in commit.files.items():
        if name.endswith(".safetensors"):
            object.__setattr__(entry, "lfs", False)
    run("convert", REPO, *FIVE, "--out", tmp_path / "out", "--spool-gib", gib_of(model, 1), "--jobs", 3).done()
    assert_same(tmp_path / "out", whole)


def test_pin_is_that_of_the_run_that_began(model: Path, hub: Hub, tmp_path: Path) -> None:
    """A command for another revision, refused for the unfinished run, does not take its commit away."""
    repo = hub.add_repo("OLD/Tiny", model, renamed_to=REPO)
    first = commit_of(repo).oid
    repo.branches["other"] = first
    out = tmp_path / "out"
    hub.arm(Fault(host="cdn", path="*00005-of*", status=451, skip=1, times=1))
    run("convert", "OLD/Tiny", *TO, "--out", out).refused(1, "model-00005-of-00008.safetensors")
    assert pinned_commit(out, REPO, "main") == pinned_commit(out, "old/tiny", "main") == first
    assert pinned_commit(out, REPO, "other") is None
    changed = {path.name: path.read_bytes() for path in model.iterdir()}
    changed["note.txt"] = b"new"
    shard = bytearray(changed["model-00008-of-00008.safetensors"])
    shard[-1] ^= 1
    repo.add_commit(changed | {"model-00008-of-00008.safetensors": bytes(shard)}, revision="other")
    repo.add_commit({"model-00008-of-00008.safetensors": bytes(shard)})
    run("convert", f"{REPO}@other", *TO, "--out", out).refused(1, "unfinished run of another plan")
    assert pinned_commit(out, REPO, "main") == first
    run("convert", "OLD/Tiny", *TO, "--out", out).done()
    run("verify", out, "--source", model).done()
    assert not (out / ".streamquant").exists()
