"""A conversion from the Hub, killed at any moment and under every fault of the network: the same bytes in the end, and
nothing is fetched twice that was there."""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streamquant.convert.conversion import SPOOL
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests.attacks.harness import (
    TO,
    Forked,
    Ran,
    Zygote,
    checksums,
    chunks_in_journal,
    finished_files,
    run,
)
from tests.hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, SparseFile, move_main, rate_limit, refuse_token
from tests.hub.protocol import ranged
from tests.hub_source import (
    FIVE,
    REPO,
    SHARD,
    SHARDS,
    commit_of,
    environment,
    fetched,
    gib_of,
    settings,
    use,
    without_origin,
    write_in_shards,
)

CHUNK_BYTES = 1 << 18
SMALL_CHUNKS = {
    "streamquant.convert.plan.records.CHUNK_BYTES": CHUNK_BYTES,
    "streamquant.files.hashing.STEP_BYTES": 1 << 18,
}


class Reference(NamedTuple):
    """A model, and what a conversion of the folder that nobody stopped makes of it."""

    model: Path
    out: Path
    shard_of_chunk: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """16 MB in 8 shards, in small chunks, to five variants."""
    model = write_in_shards(tmp_path_factory.mktemp("model") / "Tiny")
    out = tmp_path_factory.mktemp("whole")
    run("convert", model, *FIVE, "--out", out).done()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamquant.convert.plan.records.CHUNK_BYTES", CHUNK_BYTES)
        plan = make_plan(open_checkpoint(model), parse_variants(FIVE[1::2]))
        assert len(plan.chunks) > 10 * SHARDS
    return Reference(model, out, [plan.matrices[chunk.matrix].source.file for chunk in plan.chunks])


@pytest.fixture(scope="module")
def small(pristine_sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model converted from the folder."""
    out = tmp_path_factory.mktemp("small")
    run("convert", pristine_sharded, *TO, "--out", out).done()
    return out


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub in this process."""
    with Hub() as hub:
        yield hub


def assert_same(out: Path, expected: Path) -> None:
    """All files are the same; the manifests, but for where the source came from."""
    found, wanted = (
        {name: digest for name, digest in checksums(folder).items() if not name.endswith("streamquant.json")}
        for folder in (out, expected)
    )
    assert found == wanted
    assert without_origin(out) == without_origin(expected)


def assert_nothing_looks_done(out: Path, expected: Path) -> None:
    """Every file of weights under a final name is the one that an uninterrupted run writes."""
    sums = checksums(expected)
    for path in finished_files(out):
        if ".streamquant" not in path.parts:
            assert checksums(path.parent)[path.name] == sums[str(path.relative_to(out))]


# kill -9


class Command:
    """`streamquant convert` from a test Hub in a process of its own, again and again."""

    def __init__(self, zygote: Zygote, hub: Hub, reference: Reference, folder: Path, *more: object) -> None:
        self.zygote, self.hub, self.reference = zygote, hub, reference
        self.out = folder / "out"
        self.home = folder / "home"
        self.arguments = ("convert", REPO, *FIVE, "--out", self.out, *more)
        self.fetched: Counter[str] = Counter()
        self.allowed = {path.name for path in reference.model.glob(SHARD)}

    def start(self, **faults: Any) -> Forked:
        self.hub.log.clear()
        values = settings(self.hub, self.home) | SMALL_CHUNKS
        return self.zygote.start(*self.arguments, set=values, environ=environment(self.home), **faults)

    def look(self) -> None:
        """Compare what this run fetched with what it had to; note what the next one has to."""
        found = fetched(self.hub.requests)
        assert set(found) <= self.allowed, f"fetched without need: {set(found) - self.allowed}"
        assert not found or max(found.values()) == 1, found
        self.fetched += found
        assert not self.hub.leaked_tokens()
        assert_nothing_looks_done(self.out, self.reference.out)
        spool = self.out / SPOOL
        lying = {path.name for path in spool.glob(SHARD)} if spool.exists() else set()
        sizes = {path.name: path.stat().st_size for path in self.reference.model.glob(SHARD)}
        assert all((spool / name).stat().st_size == sizes[name] for name in lying), "half a shard under its name"
        written = self.written()
        left = Counter(name for number, name in enumerate(self.reference.shard_of_chunk) if number not in written)
        self.allowed = set(left) - lying

    def written(self) -> set[int]:
        """Chunks that the journal lists."""
        path = self.out / ".streamquant" / "journal.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return {json.loads(line)["chunk"] for line in lines if line.startswith(b'{"chunk":')}


def kill_when(command: Command, process: Forked, chunks: int, delay: float) -> None:
    """kill -9 a moment after the journal lists so many chunks."""
    deadline = time.monotonic() + 30
    while chunks_in_journal(command.out) < chunks and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()


@pytest.mark.parametrize("shards", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ten_kills(shards: int, whole: Reference, zygote: Zygote, hub: Hub, tmp_path: Path) -> None:
    """One conversion, killed ten times, while main moves: what was written or lay whole in the spool is not fetched
    again, and the end is that of a run that nobody stopped."""
    repo = hub.add_repo(REPO, whole.model)
    commit = commit_of(repo).oid
    hub.arm(Fault(host="cdn", path=SHARD, trickle=20e6, times=None))  # so that shards are in flight
    command = Command(zygote, hub, whole, tmp_path, "--spool-gib", gib_of(whole.model, shards), "--jobs", 2)
    chance = random.Random(shards)
    total = len(whole.shard_of_chunk)
    for number in range(10):
        process = command.start(slow=0.002)
        if number == 0:
            time.sleep(chance.uniform(0.3, 0.6))  # before the first chunk, while headers or first shards come
            process.kill()
        else:
            kill_when(command, process, number * total // 10 - 3, chance.uniform(0, 0.05))
        assert process.wait().code == -signal.SIGKILL, "the run ended before it could be killed"
        command.look()
        if number > 0:  # from the first chunk on the commit is pinned
            repo.add_commit({f"note-{number}.txt": b"moved", "config.json": b"{}"})
    process = command.start()
    ran = process.wait().done()
    command.look()
    assert ran.resumed >= 9 * total // 10 - 8
    assert_same(command.out, whole.out)
    assert not (command.out / ".streamquant").exists()
    assert f'"revision": "{commit}"' in (command.out / "Tiny-GGUF" / "streamquant.json").read_text()
    assert SHARDS <= command.fetched.total() <= SHARDS + 10 * 2  # two fetchers: two shards in flight at each kill
    assert set(command.fetched) == {path.name for path in whole.model.glob(SHARD)}


LAST_STEPS = [
    "run.output_files.give_name",
    "conversion.write_manifests",
    "source.spool.Spool.remove",
    "run.journal.Journal.remove",
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [*LAST_STEPS, "conversion.unpin"])
def test_kill_in_the_last_moments(
    step: str, when: str, whole: Reference, zygote: Zygote, hub: Hub, tmp_path: Path
) -> None:
    """While files get their names and the work folder goes: what a finished journal still says is believed, the commit
    is pinned as long as there is one, and no shard is fetched again."""
    repo = hub.add_repo(REPO, whole.model)
    commit = commit_of(repo).oid
    command = Command(zygote, hub, whole, tmp_path, "--jobs", 1)
    command.arguments = ("convert", REPO, "--to", "fp8-dynamic", "--out", command.out, "--jobs", 1)
    assert command.start(die_around=[when, f"streamquant.convert.{step}"]).wait().code == -signal.SIGKILL
    command.look()
    pinned = (command.out / ".streamquant" / "journal.jsonl").exists()
    assert pinned == ((step, when) not in [("run.journal.Journal.remove", "after"), ("conversion.unpin", "before"),
                                           ("conversion.unpin", "after")])  # fmt: skip
    if pinned:
        repo.add_commit({".hidden": b"main has moved"})
    again = command.start().wait().done()
    assert pinned or "was done already" in again.out
    command.look()
    assert not (command.out / ".streamquant").exists()
    assert f'"revision": "{commit}"' in (command.out / "Tiny-FP8-dynamic" / "streamquant.json").read_text()
    name = "Tiny-FP8-dynamic/"
    assert {k: v for k, v in checksums(command.out).items() if not k.endswith("streamquant.json")} == {
        k: v for k, v in checksums(whole.out).items() if k.startswith(name) and not k.endswith("streamquant.json")
    }


def test_damage_of_a_power_loss_fetches_the_shard_again(
    whole: Reference, zygote: Zygote, hub: Hub, tmp_path: Path
) -> None:
    """Chunks that the journal lists and the disk lost: their shard, which nobody expected, comes while the spool is
    full of others."""
    hub.add_repo(REPO, whole.model)
    command = Command(zygote, hub, whole, tmp_path, "--spool-gib", gib_of(whole.model, 1), "--jobs", 3)
    process = command.start(slow=0.002)
    kill_when(command, process, len(whole.shard_of_chunk) // 2, 0.0)
    assert process.wait().code == -signal.SIGKILL
    command.look()
    for partial in command.out.rglob("*.partial"):
        size = partial.stat().st_size
        with partial.open("r+b") as file:
            file.seek(size // 8)
            file.write(bytes(size // 8))
    gone = {name for name in set(whole.shard_of_chunk) if name not in command.allowed}
    command.allowed |= gone
    command.start().wait().done()
    assert set(fetched(hub.requests)) & gone
    assert_same(command.out, whole.out)


# Faults


def convert_here(out: Path, *more: object) -> Ran:
    """`streamquant convert` in this process."""
    return run("convert", REPO, *TO, "--out", out, *more)


CONTENT: dict[str, Any] = {
    "method": "GET",
    "host": "cdn",
    "path": "*00002-of-00003.safetensors",
    "skip": 1,
}  # after its header
FAULTS = {
    "500": Fault(**CONTENT, status=500, times=2),
    "503 of the Hub": Fault(method="GET|HEAD", path="*/resolve/*00002-of*", status=503, skip=1, times=3),
    "429 with Retry-After": rate_limit(0, policy=False, **CONTENT),
    "429 with a policy": rate_limit(0, **CONTENT),
    "cut": Fault(**CONTENT, cut_after=50_000, times=2),
    "reset": Fault(**CONTENT, reset_after=50_000, times=2),
    "hang up": Fault(**CONTENT, hang_up=True, times=2),
    "wrong bytes": Fault(**CONTENT, flip=(50_000, -1), times=2),
    "wrong first byte": Fault(**CONTENT, flip=(0,), times=1),
    "short, and says so": Fault(**CONTENT, shrink_by=100, times=2),
    "short": Fault(**CONTENT, short_by=100, times=2),
    "trickle": Fault(**CONTENT, trickle=150_000, times=1),
    "another host": Fault(**CONTENT, redirect="stranger", times=2),
    "expired address": Fault(**CONTENT, delay=0.2, status=504, times=2),
    "403 of the CDN": Fault(**CONTENT, status=403, times=2, message="Request has expired"),
    "400 of the CDN": Fault(**CONTENT, status=400, times=3, message="ExpiredToken"),
    "moved": move_main(REPO, {"config.json": "{}"}, path="*/resolve/*00002-of*", skip=1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(
    name: str, pristine_sharded: Path, small: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault while a shard is fetched: tried again, the same bytes, and no other shard is fetched twice."""
    use(hub, tmp_path / "home", monkeypatch, token=WRITE_TOKEN)
    hub.add_repo(REPO, pristine_sharded, private=True)
    fault = hub.arm(FAULTS[name])
    fault.fired = fault.seen = 0
    ran = convert_here(tmp_path / "out", "--spool-gib", gib_of(pristine_sharded, 2))
    assert ran.code == 0, ran.err
    assert WRITE_TOKEN not in ran.err
    assert "Signature" not in ran.err
    assert fault.fired == fault.times
    found = fetched(hub.requests)
    hurt = next(file for file in found if "00002-of" in file)
    assert found.pop(hurt) <= 1 + fault.fired
    assert set(found.values()) == {1}
    assert not hub.leaked_tokens()
    assert_same(tmp_path / "out", small)


def test_all_faults_at_once(whole: Reference, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad day: every request may fail, in any way."""
    use(hub, tmp_path / "home", monkeypatch)
    monkeypatch.setattr("streamquant.hub.errors.ATTEMPTS", 30)
    hub.add_repo(REPO, whole.model)
    effects: list[dict[str, Any]] = [
        {"status": 500},
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"hang_up": True},
        {"host": "cdn", "cut_after": 700_000},
        {"host": "cdn", "reset_after": 500_000},
        {"host": "cdn", "flip": (1000,)},
        {"host": "cdn", "shrink_by": 17},
        {"host": "cdn", "short_by": 17},
    ]
    armed = [hub.arm(Fault(method="GET|HEAD", probability=0.07, times=None, **effect)) for effect in effects]
    ran = run("convert", REPO, *FIVE, "--out", tmp_path / "out", "--spool-gib", gib_of(whole.model, 2))
    assert ran.code == 0, ran.err
    assert sum(fault.fired for fault in armed) > 8
    assert_same(tmp_path / "out", whole.out)


def test_a_header_whose_address_expired(
    pristine_sharded: Path, small: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning reads headers and small files by signed addresses as well."""
    use(hub, tmp_path / "home", monkeypatch)
    hub.add_repo(REPO, pristine_sharded)
    fault = hub.arm(Fault(host="cdn", status=403, times=3))
    ran = convert_here(tmp_path / "out")
    assert ran.code == 0, ran.err
    assert fault.fired == 3
    assert_same(tmp_path / "out", small)


@pytest.mark.parametrize("token", [None, READ_TOKEN])
def test_a_cdn_that_refuses_for_ever(
    token: str | None, pristine_sharded: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt asks the Hub for a new address; then the message is about the download, whoever asks."""
    use(hub, tmp_path / "home", monkeypatch, token=token)
    hub.add_repo(REPO, pristine_sharded)
    fault = hub.arm(
        Fault(**{**CONTENT, "skip": 1}, status=403, times=None, message="Storage limit: request has expired")
    )
    ran = convert_here(tmp_path / "out", "--spool-gib", gib_of(pristine_sharded, 1))
    assert ran.code == 1
    assert "error: the download was refused by the Hub's storage" in ran.err
    assert "fetching model-00002-of-00003.safetensors), from 127.0.0.2" in ran.err
    assert "403 Forbidden" in ran.err
    assert "firewall" in ran.err
    assert "token" not in ran.err
    assert "Signature" not in ran.err
    assert fault.fired == 4
    asked = [request for request in hub.select(host="hub", path="*/resolve/*/model-00002*") if request.method == "HEAD"]
    assert len(asked) >= 4, "each attempt asks for a new address"


def test_slow_server_asks_for_patience(
    pristine_sharded: Path, small: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retry-After is waited for, and said."""
    use(hub, tmp_path / "home", monkeypatch)
    hub.add_repo(REPO, pristine_sharded)
    hub.arm(Fault(**CONTENT, status=503, headers={"Retry-After": "1"}))
    begin = time.monotonic()
    ran = convert_here(tmp_path / "out")
    assert ran.code == 0
    assert time.monotonic() - begin >= 1
    assert "fetching model-00002-of-00003.safetensors: 503 Service Unavailable; again in 1 s" in ran.err
    assert_same(tmp_path / "out", small)


def test_token_refused_in_the_middle(
    pristine_sharded: Path, small: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message; with a good token the same command goes on, and fetches only what was missing."""
    use(hub, tmp_path / "home", monkeypatch, token=WRITE_TOKEN)
    hub.add_repo(REPO, pristine_sharded, private=True)
    fault = hub.arm(refuse_token(path="*/resolve/*00003-of*", skip=1, times=None))
    spool = ("--spool-gib", gib_of(pristine_sharded, 3))
    ran = convert_here(tmp_path / "out", *spool)
    ran.refused(1, "the token was refused", "fetching model-00003-of-00003.safetensors", "make a new token")
    assert WRITE_TOKEN not in ran.err
    there = fetched(hub.requests)
    assert "model-00003-of-00003.safetensors" not in there
    assert fault.fired
    hub.faults.clear()
    hub.log.clear()
    assert convert_here(tmp_path / "out", *spool).code == 0
    assert not set(fetched(hub.requests)) & {file for file in there if (tmp_path / "out" / SPOOL / file).exists()}
    assert fetched(hub.requests)["model-00003-of-00003.safetensors"] == 1
    assert_same(tmp_path / "out", small)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(**CONTENT | {"times": None}, flip=(50_000,)), ("what arrived is not what the Hub holds", "a hash of")),
        (Fault(**CONTENT | {"times": None}, shrink_by=100), ("what arrived is not what the Hub holds",)),
        (Fault(**CONTENT | {"times": None}, reset_after=5000), ("the Hub cannot be reached",)),
        (Fault(**CONTENT | {"times": None}, status=500), ("the Hub has a fault", "500")),
        (Fault(**CONTENT | {"times": None}, status=404), ("fetching model-00002-of-00003.safetensors",)),
        (Fault(**CONTENT | {"times": None}, status=403), ("fetching model-00002-of-00003.safetensors",)),
    ],
    ids=["wrong bytes", "short", "reset", "500", "404", "403"],
)
def test_faults_that_do_not_end(
    fault: Fault,
    words: tuple[str, ...],
    pristine_sharded: Path,
    small: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One message after all attempts, nothing that looks done; when the fault is over the same command ends well."""
    use(hub, tmp_path / "home", monkeypatch, token=READ_TOKEN)
    hub.add_repo(REPO, pristine_sharded)
    hub.arm(fault)
    ran = convert_here(tmp_path / "out")
    assert ran.code == 1
    assert ran.err.count("error: ") == 1
    assert "Traceback" not in ran.err
    for word in (*words, "model-00002-of-00003.safetensors", REPO):
        assert word in ran.err, ran.err
    assert READ_TOKEN not in ran.err
    assert "Signature" not in ran.err
    assert_nothing_looks_done(tmp_path / "out", small)
    hub.faults.clear()
    assert convert_here(tmp_path / "out").code == 0
    assert_same(tmp_path / "out", small)


def test_body_that_does_not_end(
    pristine_sharded: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lies about a file's size does not fill the disk."""
    use(hub, tmp_path / "home", monkeypatch)
    hub.add_repo(REPO, pristine_sharded)

    def endless(blob: Any, wanted: str | None, headers: dict[str, str]) -> Any:
        if wanted is None and blob.size > 50_000 and "Content-Disposition" in headers:
            return ranged(SparseFile(b"", 400_000_000), None, headers)
        return ranged(blob, wanted, headers)

    monkeypatch.setattr("tests.hub.reading.ranged", endless)
    ran = convert_here(tmp_path / "out")
    assert ran.code == 1
    assert "what arrived is not what the Hub holds" in ran.err
    assert max(hub.sent_by_file().values()) < 400_000_000


def test_header_changed_on_the_way(
    pristine_sharded: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that came alone has no hash; it is compared when the shard is there, before a byte is converted."""
    use(hub, tmp_path / "home", monkeypatch)
    hub.add_repo(REPO, pristine_sharded)
    shard = next(pristine_sharded.glob("*00001-of*"))
    at = shard.read_bytes().index(b'"pt"') + 1
    fault = hub.arm(Fault(host="cdn", path="*00001-of*", flip=(at,)))
    convert_here(tmp_path / "out").refused(1, "header is not the one that the plan was made from", shard.name)
    assert fault.fired == 1
    assert chunks_in_journal(tmp_path / "out") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_a_shard_trickles(number: int, whole: Reference, zygote: Zygote, hub: Hub, tmp_path: Path) -> None:
    """It ends soon, without a traceback, and what was whole is not fetched again."""
    hub.add_repo(REPO, whole.model)
    fault = hub.arm(Fault(host="cdn", path="*00003-of*", trickle=20_000, skip=1, times=None))
    command = Command(zygote, hub, whole, tmp_path, "--spool-gib", gib_of(whole.model, 3))
    process = command.start()
    deadline = time.monotonic() + 30
    while not fault.fired or chunks_in_journal(command.out) < 2 * len(whole.shard_of_chunk) // SHARDS - 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    begin = time.monotonic()
    process.kill(number)
    ran = process.wait()
    assert ran.code == 130
    assert ran.err == "interrupted; run the same command again to continue\n"
    assert time.monotonic() - begin < 10
    hub.faults.clear()
    command.look()
    assert command.start().wait().done().resumed > 0
    command.look()
    assert_same(command.out, whole.out)
