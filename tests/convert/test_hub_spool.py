"""The spool by itself, with a repository made up here; then whole conversions through it, from a test Hub."""

import contextlib
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from huggingface_hub import snapshot_download

from convert.checkpoint import Checkpoint, SourceFile
from convert.conversion import DISK_RESERVE, SPOOL, Fetching, convert, disk_of
from convert.hub import errors
from convert.hub.errors import DamagedBody
from convert.hub.repo import HubFile, HubRepo, OnBytes, Stopped, _meter
from convert.hub.source import open_source, pinned_commit
from convert.hub.spool import DEFAULT_SHARDS, GIB, Spool, spool_limit
from convert.plan import make_plan
from convert.recipe import parse_variants
from convert.safetensors_file import write_header
from quant.errors import StreamquantError, UsageError
from tests.attacks.harness import TO, checksums, flip, run, state, untouched, write_model
from tests.hub import WRITE_TOKEN, Fault, Hub
from tests.hub_source import REPO, SHARD, commit_of, fetched, gib_of, use, without_origin

SECONDS = 20
"""How long a test waits for what should happen at once."""
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

    def download(self, path: str, folder: Path, on_bytes: OnBytes, stop: threading.Event) -> Path:
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
        on_bytes(len(data))
        return partial.replace(folder / path)


def checkpoint_of(repo: FakeRepo) -> Checkpoint:
    """A checkpoint with these shards."""
    files = tuple(
        SourceFile(name, len(data), 0, hashlib.sha256(data[:HEADER]).hexdigest(), repo.files[name].sha256)
        for name, data in repo.contents.items()
    )
    return Checkpoint(Path("/nowhere/Fake"), {}, files, {}, (), (), cast(HubRepo, repo), remote=True)


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
            on_bytes=self.arrived.append,
            on_wait=lambda what, _seconds: self.waited.append(what),
            fetchers=fetchers,
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


class Later:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._call, self._arguments = call, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call(*self._arguments)
        except BaseException as error:  # looked at by the test
            self.error = error

    def wait(self) -> Any:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "it waits for ever"
        if self.error is not None:
            raise self.error
        return self.result


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


# Conversions

FIVE = ("--to", "fp8-dynamic", "--to", "gguf:Q8_0,Q6_K,Q4_K_M,Q4_0")
SIZE = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 16 MB in 8 shards."""
    return write_model(tmp_path_factory.mktemp("model") / "Tiny", size=SIZE, vocab_size=2048, shards=8)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model converted from the folder."""
    out = tmp_path_factory.mktemp("whole")
    run("convert", model, *FIVE, "--out", out).done()
    return out


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub in this process."""
    with Hub() as hub:
        use(hub, tmp_path / "home", monkeypatch)
        yield hub


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
    monkeypatch.setattr("convert.plan.CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr("convert.conversion.Spool", Recorded)
    Recorded.made = []
    repo = hub.add_repo(REPO, model, private=True)
    out, spool_gib = tmp_path / "out", gib_of(model, 2)
    checkpoint, recipes = open_source(REPO, out=out), parse_variants(FIVE[1::2])
    plan = make_plan(checkpoint, recipes)
    disk = disk_of(plan, spool_gib)
    source = sum(file.size for file in checkpoint.files)
    assert disk.spool == int(spool_gib * GIB) < source / 3
    assert disk.peak == plan.nbytes + disk.spool
    watch = Watch(out)
    watch.start()
    arrived: list[int] = []
    convert(
        checkpoint,
        recipes,
        out,
        jobs=2,
        fetching=Fetching(spool_gib, arrived.append),
        on_progress=lambda _nbytes: time.sleep(0.004),  # fetching is faster, and has to wait for room
    )
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
        fetching = Fetching(gib_of(model, 2), arrived.append)
        convert(open_source(REPO), parse_variants(FIVE[1::2]), tmp_path / "out", jobs=2, fetching=fetching)
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
    assert disk_of(make_plan(open_source(REPO), parse_variants(["fp8-dynamic"]))).spool == 0


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
    hub.arm(Fault(host="cdn", path="*00005-of*", status=403, skip=1, times=1))
    run("convert", "OLD/Tiny", *TO, "--out", out).refused(1, "fetching model-00005-of-00008.safetensors")
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
