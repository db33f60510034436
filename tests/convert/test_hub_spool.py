"""The spool by itself, with a repository made up here."""

import contextlib
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from streamquant.convert.source.checkpoint import SourceFile
from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.convert.source.spool import DEFAULT_SHARDS, GIB, Spool, spool_limit
from streamquant.convert.source.tensor import Codes, SourceTensor, StoredPart
from streamquant.files.listener import Listener
from streamquant.files.safetensors_file import write_header
from streamquant.files.worker import Stopped
from streamquant.hub import errors
from streamquant.hub.errors import DamagedBody
from streamquant.hub.repo import HubFile, HubRepo
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.source_format import fp8
from tests.attacks.harness import untouched
from tests.hub_source import SECONDS, Later
from tests.listeners import Hears

COMMIT = "c" * 40


# A repository without a Hub


HEADER = 72
"""Bytes of the headers of these shards."""


def shard_bytes(name: str, size: int = 1000) -> bytes:
    """A safetensors file of `size` bytes."""
    head = write_header([("x", "U8", (size - HEADER,), size - HEADER)], {})
    assert len(head) == HEADER
    return head + random.Random(name).randbytes(size - HEADER)


class FakeRepo:
    """Shards a, b, c ... as a HubRepo gives them; `gate` holds downloads back until they are let through."""

    def __init__(self, sizes: dict[str, int], cache: Path | None = None) -> None:
        self.contents = {name: shard_bytes(name, size) for name, size in sizes.items()}
        self.files = {
            name: HubFile(name, len(data), hashlib.sha256(data).hexdigest(), None)
            for name, data in self.contents.items()
        }
        self.cache = cache
        self.downloads: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.fail: dict[str, list[BaseException]] = {}
        self.lock = threading.Lock()

    def __str__(self) -> str:
        return "ORG/Fake"

    def gate(self, *names: str) -> None:
        """Downloads of these wait."""
        self.gates.update((name, threading.Event()) for name in names)

    def file(self, path: str) -> HubFile:
        return self.files[path]

    def cached(self, path: str) -> Path | None:
        found = self.cache / path if self.cache is not None else None
        return found if found is not None and found.exists() else None

    def check(self, path: str, local: Path, stop: threading.Event) -> None:
        HubRepo.check(cast(HubRepo, self), path, local, stop)

    def check_cached(self, path: str, local: Path, stop: threading.Event) -> None:
        HubRepo.check_cached(cast(HubRepo, self), path, local, stop)

    def download(self, path: str, folder: Path, listener: Listener, stop: threading.Event) -> Path:
        with self.lock:
            self.downloads.append(path)
            error = self.fail[path].pop(0) if self.fail.get(path) else None
        partial = folder / ".cache" / f"{path}.incomplete"
        partial.parent.mkdir(exist_ok=True)
        data = self.contents[path]
        partial.write_bytes(data[: len(data) // 2])
        while path in self.gates and not self.gates[path].wait(0.005):
            if stop.is_set():
                raise Stopped
        if error is not None:
            raise error
        partial.write_bytes(data)
        listener.advanced("fetching", len(data))
        return partial.replace(folder / path)


def checkpoint_of(repo: FakeRepo) -> HubCheckpoint:
    """A checkpoint with these shards."""
    files = tuple(
        SourceFile(name, len(data), 0, hashlib.sha256(data[:HEADER]).hexdigest(), repo.files[name].sha256)
        for name, data in repo.contents.items()
    )
    return HubCheckpoint(Path("/nowhere/Fake"), {}, files, {}, (), (), cast(HubRepo, repo))


class Setup:
    """A spool over a made-up repository of shards of 1000 bytes."""

    def __init__(self, folder: Path, shards: str, limit: int, *, cache: Path | None = None, fetchers: int = 2) -> None:
        self.folder = folder
        self.repo = FakeRepo(dict.fromkeys(shards, 1000), cache)
        self.arrived: list[int] = []
        self.waited: list[str] = []
        self.spool = Spool(
            checkpoint_of(self.repo),
            folder,
            limit * 1000,
            Hears({"fetching": self.arrived.append}, lambda what, _seconds: self.waited.append(what)),
            fetchers,
        )

    def read(self, name: str) -> bytes:
        """The bytes of a shard, by its descriptor; fails if it never comes."""
        found: bytes = Later(lambda: os.pread(self.spool.open(name), 2000, 0)).wait()
        return found

    def lying(self) -> list[str]:
        """Shards in the folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def settled(condition: Callable[[], bool]) -> None:
    """Something is so, and stays so for a moment."""
    until(condition)
    time.sleep(0.05)
    assert condition()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.001)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Setup]]:
    """Makes spools in tmp_path / "spool", closed at the end."""
    with contextlib.ExitStack() as stack:

        def new(shards: str, limit: int, **options: Any) -> Setup:
            setup = Setup(tmp_path / "spool", shards, limit, **options)
            stack.callback(setup.spool.close)
            return setup

        yield new


# Order and limit


def test_shards_come_in_order_and_no_more_than_fit(make: Callable[..., Setup]) -> None:
    s = make("abcdef", 3, fetchers=1)
    s.spool.expect(list("abcdef"))
    settled(lambda: s.lying() == ["a", "b", "c"])
    assert s.repo.downloads == ["a", "b", "c"]
    for name in "abcdef":
        assert s.read(name) == s.repo.contents[name]
        s.spool.done(name)
        assert not (s.folder / name).exists()
    assert s.repo.downloads == list("abcdef")
    assert s.spool.most == 3000
    assert sum(s.arrived) == 6000


def test_two_at_once(make: Callable[..., Setup]) -> None:
    s = make("abcd", 4)
    s.repo.gate("a", "b", "c")
    s.spool.expect(list("abcd"))
    settled(lambda: sorted(s.repo.downloads) == ["a", "b"])
    s.repo.gates["b"].set()
    settled(lambda: sorted(s.repo.downloads) == ["a", "b", "c"])
    assert s.read("b") == s.repo.contents["b"]
    s.repo.gates["a"].set()
    s.repo.gates["c"].set()
    until(lambda: s.lying() == list("abcd"))


def test_room_is_not_given_away_to_a_later_shard(tmp_path: Path) -> None:
    """b does not fit; c, which would, has to wait for it."""
    repo = FakeRepo({"a": 600, "b": 900, "c": 300})
    spool = Spool(checkpoint_of(repo), tmp_path, 1000)
    with contextlib.closing(spool):
        spool.expect(["a", "b", "c"])
        spool.open("a")
        settled(lambda: repo.downloads == ["a"])
        spool.done("a")
        spool.open("b")
        settled(lambda: repo.downloads == ["a", "b"])
        spool.done("b")
        spool.open("c")
    assert spool.most == 900


def test_one_shard_at_a_time(make: Callable[..., Setup]) -> None:
    s = make("abc", 1)
    s.spool.expect(list("abc"))
    for name in "abc":
        assert s.read(name) == s.repo.contents[name]
        assert s.lying() == [name]
        s.spool.done(name)
    assert s.spool.most == 1000


def test_open_twice_is_one_descriptor_and_done_is_idempotent(make: Callable[..., Setup]) -> None:
    s = make("ab", 2)
    s.spool.expect(list("ab"))
    descriptor = s.spool.open("a")
    assert s.spool.open("a") == descriptor
    s.spool.done("a")
    s.spool.done("a")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    s.spool.done("b")
    until(lambda: s.lying() == [])
    assert s.spool.sha256("a") == s.repo.files["a"].sha256


# What nobody expected


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_open_of_what_was_not_expected_makes_room(limit: int, make: Callable[..., Setup]) -> None:
    """The spool is full of shards for later: they are given back, and fetched again."""
    s = make("abcdef", limit)
    s.spool.expect(list("cdef"))
    settled(lambda: len(s.lying()) == limit)
    for name in "abcdef":
        assert s.read(name) == s.repo.contents[name]
        s.spool.done(name)
    assert s.spool.most <= limit * 1000
    assert s.lying() == []


def test_open_waits_for_an_open_shard_that_is_in_the_way(make: Callable[..., Setup]) -> None:
    """What somebody reads is not taken away."""
    s = make("ab", 1)
    s.spool.expect(["b"])
    descriptor = s.spool.open("b")
    waiting = Later(s.read, "a")
    time.sleep(0.05)
    assert s.repo.downloads == ["b"]
    assert os.pread(descriptor, 1000, 0) == s.repo.contents["b"]
    s.spool.done("b")
    assert waiting.wait() == s.repo.contents["a"]
    assert s.spool.most == 1000


def test_nothing_is_given_back_in_vain(make: Callable[..., Setup]) -> None:
    """a would not fit even without c: c stays."""
    s = make("abc", 2)
    s.repo.contents["a"] = shard_bytes("a", 2000)
    s.repo.files["a"] = HubFile("a", 2000, hashlib.sha256(s.repo.contents["a"]).hexdigest(), None)
    spool = s.spool = Spool(checkpoint_of(s.repo), s.folder, 2000)
    with contextlib.closing(spool):
        spool.expect(["b", "c"])
        spool.open("b")
        until(lambda: s.lying() == ["b", "c"])
        waiting = Later(s.read, "a")
        time.sleep(0.05)
        assert s.lying() == ["b", "c"]
        spool.done("b")
        assert waiting.wait() == s.repo.contents["a"]
        assert sorted(s.repo.downloads) == ["a", "b", "c"]
        spool.done("a")
        assert s.read("c") == s.repo.contents["c"]


def test_open_while_the_room_is_being_filled(make: Callable[..., Setup]) -> None:
    """Shards on their way are waited for, then given back: no deadlock."""
    s = make("abc", 2)
    s.repo.gate("b", "c")
    s.spool.expect(["b", "c"])
    settled(lambda: sorted(s.repo.downloads) == ["b", "c"])
    waiting = Later(s.read, "a")
    time.sleep(0.03)
    s.repo.gates["b"].set()
    s.repo.gates["c"].set()
    assert waiting.wait() == s.repo.contents["a"]
    s.spool.done("a")
    assert s.read("b") == s.repo.contents["b"]
    s.spool.done("b")
    assert s.read("c") == s.repo.contents["c"]
    assert s.spool.most == 2000


def test_done_while_it_is_queued_or_fetched(make: Callable[..., Setup]) -> None:
    s = make("abc", 1)
    s.repo.gate("a")
    s.spool.expect(list("abc"))
    until(lambda: s.repo.downloads == ["a"])
    s.spool.done("b")
    s.spool.done("a")
    s.repo.gates["a"].set()
    assert s.read("c") == s.repo.contents["c"]
    assert s.repo.downloads == ["a", "c"]
    assert s.lying() == ["c"]


def test_wanted_again_while_it_is_fetched(make: Callable[..., Setup]) -> None:
    """Not fetched twice into the same place."""
    s = make("a", 1)
    s.repo.gate("a")
    s.spool.expect(["a"])
    until(lambda: s.repo.downloads == ["a"])
    s.spool.done("a")
    waiting = Later(s.read, "a")
    time.sleep(0.02)
    s.repo.gates["a"].set()
    assert waiting.wait() == s.repo.contents["a"]
    assert s.repo.downloads == ["a"]


# Ends


def test_stop_wakes_everybody(make: Callable[..., Setup]) -> None:
    s = make("abc", 2)
    s.repo.gate("a", "b", "c")
    s.spool.expect(list("abc"))
    waiting = [Later(s.spool.open, name) for name in "abcc"]
    until(lambda: sorted(s.repo.downloads) == ["a", "b"])
    s.spool.stop()
    for later in waiting:
        with pytest.raises(Stopped):
            later.wait()
    begin = time.monotonic()
    s.spool.close()
    assert time.monotonic() - begin < 2
    assert s.lying() == []


def test_stop_wakes_who_waits_for_room(make: Callable[..., Setup]) -> None:
    """Nobody fetches: the open shard is in the way."""
    s = make("ab", 1)
    s.spool.expect(list("ab"))
    s.spool.open("a")
    waiting = Later(s.spool.open, "b")
    time.sleep(0.05)
    s.spool.stop()
    with pytest.raises(Stopped):
        waiting.wait()
    for thread in s.spool._threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_stop_ends_a_wait_for_the_next_attempt(make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "FIRST_WAIT", 60.0)
    s = make("a", 1)
    s.repo.fail["a"] = [ConnectionError("reset")]
    s.spool.expect(["a"])
    waiting = Later(s.spool.open, "a")
    until(lambda: bool(s.waited))
    s.spool.stop()
    with pytest.raises(Stopped):
        waiting.wait()
    s.spool.close()
    assert all(not thread.is_alive() for thread in s.spool._threads)


def test_failures_are_tried_again(make: Callable[..., Setup]) -> None:
    s = make("ab", 2)
    s.repo.fail["a"] = [ConnectionError("reset"), DamagedBody("short"), TimeoutError()]
    s.spool.expect(list("ab"))
    assert s.read("a") == s.repo.contents["a"]
    assert s.repo.downloads.count("a") == 4
    assert len(s.waited) == 3
    assert "fetching a: reset" in s.waited[0]


def test_failure_reaches_everybody_who_waits(make: Callable[..., Setup]) -> None:
    s = make("abc", 3, fetchers=1)
    s.repo.gate("b")
    s.repo.fail["b"] = [ValueError("something of the client's")]
    s.spool.expect(list("abc"))
    waiting = [Later(s.spool.open, name) for name in "bc"]
    assert s.read("a") == s.repo.contents["a"]
    s.repo.gates["b"].set()
    for later in waiting:
        with pytest.raises(StreamquantError, match=r"(?s)client failed.*fetching b"):
            later.wait()
    assert s.read("a") == s.repo.contents["a"]


def test_whole_shards_stay_after_close_and_go_after_remove(make: Callable[..., Setup]) -> None:
    s = make("ab", 2)
    s.spool.expect(list("ab"))
    descriptors = [s.spool.open(name) for name in "ab"]
    s.spool.close()
    assert s.lying() == ["a", "b"]
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    s.spool.remove()
    assert not s.folder.exists()


# What a killed run left


def leave(folder: Path, **contents: bytes) -> None:
    """Files in the folder of the spool, as a killed run leaves them, and what the client leaves."""
    client = folder / ".cache" / "huggingface" / "download"
    client.mkdir(parents=True)
    (client / "b.incomplete").write_bytes(b"half")
    (client / "a.metadata").write_text("...")
    for name, data in contents.items():
        (folder / name).write_bytes(data)


def test_leftovers(make: Callable[..., Setup]) -> None:
    """A whole shard is kept and checked; a damaged one is fetched again; all else is deleted."""
    s = make("abcde", 3)
    wrong = bytearray(s.repo.contents["b"])
    wrong[500] ^= 1
    leave(s.folder, a=s.repo.contents["a"], b=bytes(wrong), c=b"short", e=s.repo.contents["e"], x=b"?")
    (s.folder / "link").symlink_to(s.folder / "a")
    (s.folder / "old").mkdir()
    s.spool.expect(list("abcd"))  # e has been done with
    for name in "abcd":
        assert s.read(name) == s.repo.contents[name]
        s.spool.done(name)
    assert sorted(s.repo.downloads) == ["b", "c", "d"]
    assert s.lying() == []
    assert not (s.folder / "old").exists()
    assert s.spool.most <= 3000


def test_leftovers_that_do_not_fit(make: Callable[..., Setup]) -> None:
    """--spool-gib is smaller than in the killed run."""
    s = make("abc", 2)
    leave(s.folder, **{name: s.repo.contents[name] for name in "abc"})
    s.spool.expect(list("abc"))
    assert s.lying() == ["a", "b"]
    for name in "abc":
        assert s.read(name) == s.repo.contents[name]
        s.spool.done(name)
    assert s.repo.downloads == ["c"]
    assert s.spool.most == 2000


def test_leftover_of_a_later_shard_makes_room(make: Callable[..., Setup]) -> None:
    s = make("abc", 2)
    leave(s.folder, b=s.repo.contents["b"], c=s.repo.contents["c"])
    s.spool.expect(list("abc"))
    for name in "abc":
        assert s.read(name) == s.repo.contents[name]
        s.spool.done(name)
    assert s.repo.downloads == ["a", "c"]
    assert s.spool.most == 2000


def test_leftover_link_is_not_followed(make: Callable[..., Setup], tmp_path: Path) -> None:
    s = make("a", 1)
    outside = tmp_path / "outside"
    outside.write_bytes(s.repo.contents["a"])
    (s.folder / "a").symlink_to(outside)
    with untouched(outside.parent / "outside"):
        s.spool.expect(["a"])
        assert s.read("a") == s.repo.contents["a"]
        s.spool.done("a")
    assert s.repo.downloads == ["a"]


# The client's cache


def test_cached_shards_take_no_room_and_stay(make: Callable[..., Setup], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    s = make("abcd", 1, cache=cache)
    for name in "abd":
        (cache / name).write_bytes(s.repo.contents[name])
    with untouched(cache):
        s.spool.expect(list("abcd"))
        assert [s.read(name) for name in "abcd"] == [s.repo.contents[name] for name in "abcd"]
        for name in "abcd":
            s.spool.done(name)
        s.spool.remove()
    assert s.repo.downloads == ["c"]
    assert s.spool.most == 1000


def test_damaged_cached_shard(make: Callable[..., Setup], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    s = make("a", 1, cache=cache)
    (cache / "a").write_bytes(s.repo.contents["a"][:-1] + b"?")
    with untouched(cache):
        s.spool.expect(["a"])
        with pytest.raises(StreamquantError, match=r"(?s)cache is damaged.*delete it; then it is fetched again"):
            s.spool.open("a")
    assert s.repo.downloads == []


def test_cache_that_vanishes(tmp_path: Path) -> None:
    """All shards were in the cache, so that the spool has no room; then one is not."""
    cache = tmp_path / "cache"
    cache.mkdir()
    repo = FakeRepo({"a": 1000}, cache)
    (cache / "a").write_bytes(repo.contents["a"])
    checkpoint = checkpoint_of(repo)
    assert spool_limit(checkpoint, None) == spool_limit(checkpoint, 0.0) == 0
    (cache / "a").unlink()
    spool = Spool(checkpoint, tmp_path / "spool", 0)
    with contextlib.closing(spool):
        spool.expect(["a"])
        with pytest.raises(StreamquantError, match="not in the Hub client's cache any more"):
            Later(spool.open, "a").wait()


def test_header_of_another_file(make: Callable[..., Setup]) -> None:
    """The bytes are the Hub's, and the plan was made of others."""
    s = make("a", 1)
    s.spool._files["a"] = SourceFile("a", 1000, 0, "0" * 64, None)
    s.spool.expect(["a"])
    with pytest.raises(StreamquantError, match="header is not the one that the plan was made from"):
        s.spool.open("a")


# Limits


def test_shards_that_codes_and_scales_share_fit_together() -> None:
    """x lies in a with scales in c, y in b with scales in c, z in d alone: a, c and then b, c are there at a time."""
    checkpoint = checkpoint_of(FakeRepo({"a": 1000, "b": 3000, "c": 2000, "d": 4500}))
    places = {"x": ("a", "c"), "y": ("b", "c"), "z": ("d", "d")}
    tensors = {
        name: SourceTensor(
            *(name, "BF16", (1, 8), codes, 0, 8),
            Codes(fp8(128, 128, "F32"), (StoredPart(f"{name}_scale_inv", scales, 0, 4),)),
        )
        for name, (codes, scales) in places.items()
    }
    checkpoint = replace(checkpoint, tensors=tensors)
    assert spool_limit(checkpoint, 5000 / GIB) == 5000
    with pytest.raises(UsageError, match=r"(?s)smaller than a shard.*for b, c; twice that"):
        spool_limit(checkpoint, 4999 / GIB)


def test_limits(tmp_path: Path) -> None:
    repo = FakeRepo({"a": 1000, "b": 3000, "c": 2000})
    checkpoint = checkpoint_of(repo)
    assert spool_limit(checkpoint, None) == 6000
    assert spool_limit(checkpoint, 3000 / GIB) == 3000
    assert spool_limit(checkpoint, 1.0) == 6000
    many = checkpoint_of(FakeRepo(dict.fromkeys("abcdefgh", 1000)))
    assert spool_limit(many, None) == DEFAULT_SHARDS * 1000
    for gib in (0.0, -1.0, 2999 / GIB):
        with pytest.raises(UsageError, match=r"(?s)smaller than a shard.*for b; twice that"):
            spool_limit(checkpoint, gib)
    repo.cache = tmp_path
    (tmp_path / "b").touch()
    assert spool_limit(checkpoint, 2000 / GIB) == 2000
    assert spool_limit(checkpoint, None) == 3000


# Many schedules


@pytest.mark.parametrize("seed", range(40))
def test_random_schedules(seed: int, tmp_path: Path) -> None:
    """Readers as stream.py has them: in order, each shard by several; some shards unexpected, some left over, some in
    the cache, downloads that fail. All bytes are right, the limit holds, nothing is left, nobody waits for ever."""
    chance = random.Random(seed)
    names = [f"{number:02}" for number in range(chance.randint(1, 8))]
    repo = FakeRepo({name: chance.randrange(180, 3000) for name in names}, tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "spool").mkdir()
    for name in names:
        if chance.random() < 0.2:
            (tmp_path / "cache" / name).write_bytes(repo.contents[name])
        if chance.random() < 0.3:
            data = bytearray(repo.contents[name])
            data[chance.randrange(len(data))] ^= int(chance.random() < 0.3)
            (tmp_path / "spool" / name).write_bytes(data)
        if chance.random() < 0.3:
            repo.fail[name] = [ConnectionError("reset")] * chance.randint(1, 2)
    largest = max(len(data) for data in repo.contents.values())
    limit = largest + chance.randrange(1, 4000)
    spool = Spool(checkpoint_of(repo), tmp_path / "spool", limit, fetchers=chance.randint(1, 3))
    tasks = [name for name in names for _ in range(chance.randint(1, 4))]
    left = {name: tasks.count(name) for name in names}
    lock = threading.Lock()
    pauses = [chance.random() * 0.003 for _ in tasks]

    def work() -> None:
        while True:
            with lock:
                if not tasks:
                    return
                name, pause = tasks.pop(0), pauses.pop()
            assert os.pread(spool.open(name), 4000, 0) == repo.contents[name]
            time.sleep(pause)
            with lock:
                left[name] -= 1
                last = left[name] == 0
            if last:
                spool.done(name)

    with contextlib.closing(spool), untouched(tmp_path / "cache"):
        spool.expect([name for name in names if chance.random() < 0.8])
        for worker in [Later(work) for _ in range(chance.randint(1, 4))]:
            worker.wait()
    assert spool.most <= limit
    assert [path for path in (tmp_path / "spool").iterdir() if path.is_file()] == []
