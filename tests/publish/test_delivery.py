"""Upload while converting: the same files as without, nothing twice, and no more disk than was said."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.disk import peak_disk
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.worker import Stopped
from streamquant.hub import errors
from streamquant.publish.upload import delivery as delivery_module
from streamquant.publish.upload.delivery import (
    HubDelivery,
    UploadRecord,
    deliver,
    plan_repositories,
)
from streamquant.publish.upload.options import ROOM, EarlyPush, PushOptions
from streamquant.publish.upload.push import push
from streamquant.quant.errors import StreamquantError, UsageError
from tests.conftest import TINY_PRE
from tests.hub import WRITE_TOKEN, Fault, Hub, Request, lost_commit
from tests.hub.process import HubProcess
from tests.publish.hub_client import Heard, without_own_commit

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

GGUF = "ORG/Tiny-GGUF"
FP8 = "ORG/Tiny-FP8-dynamic"
SPECS = parse_variants(["fp8-dynamic", "gguf:BF16,Q8_0"])
OPTIONS = ConversionOptions(pre=TINY_PRE, split_max_size=400_000, max_shard_size=400_000)
ANYWAY = PushOptions(private=True, without_report=True)


@pytest.fixture(scope="session")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversion without delivery."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(make_plan(open_checkpoint(tiny), SPECS, OPTIONS), out, RunOptions(jobs=2))
    return out


def planned(tiny: Path, options: ConversionOptions = OPTIONS) -> Plan:
    return make_plan(open_checkpoint(tiny), SPECS, options)


def weights_of(folder: Path) -> dict[str, bytes]:
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.gguf")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def run(tiny: Path, out: Path, delivery: HubDelivery) -> None:
    """A conversion as `convert --push` runs it."""
    convert(make_plan(open_checkpoint(tiny), SPECS, OPTIONS), out, RunOptions(jobs=2), delivery=delivery)


def start(tiny: Path, out: Path, *, delete: bool = True, room: int = ROOM) -> HubDelivery:
    return deliver(planned(tiny), out, EarlyPush("ORG/Tiny", PushOptions(private=True), delete, room))


def check_published(hub: Hub, out: Path, whole: Path) -> None:
    """Every file of a conversion without delivery is in the repositories, byte for byte, and was sent once."""
    push(out, "ORG/Tiny", ANYWAY)
    for repo in (FP8, GGUF):
        folder = whole / repo.split("/")[1]
        there = without_own_commit(hub.repo(repo).files("main"))
        here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert set(there) == {*here, "README.md"}
        for path, file in here.items():
            if path != "README.md":
                assert there[path] == file.read_bytes(), path
    done = [request.path for request in hub.select(method="PUT") if request.status == 200]
    assert len(done) == len(set(done))
    assert hub.leaked_tokens() == []


# Converting with delivery


def test_a_conversion_that_is_delivered(hub: Hub, tiny: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny, out, start(tiny, out))
    assert weights_of(out) == {}
    assert hub.repo(GGUF).private
    check_published(hub, out, whole)
    assert (out / "Tiny-GGUF" / "streamquant.json").read_bytes() == (
        whole / "Tiny-GGUF" / "streamquant.json"
    ).read_bytes()


def test_files_stay_unless_told_otherwise(hub: Hub, tiny: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny, out, start(tiny, out, delete=False, room=1))
    assert weights_of(out) == weights_of(whole)
    check_published(hub, out, whole)


def test_a_second_run_sends_nothing(hub: Hub, tiny: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny, out, start(tiny, out))
    push(out, "ORG/Tiny", ANYWAY)
    hub.log.clear()
    delivery = start(tiny, out)
    run(tiny, out, delivery)
    push(out, "ORG/Tiny", ANYWAY)
    assert {request.method for request in hub.requests} == {"GET"}
    assert weights_of(out) == {}


def test_the_record_names_every_file(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny, out, start(tiny, out))
    lines = UploadRecord(out).read()
    assert sorted(str(line["path"]) for line in lines) == sorted(file.path for file in planned(tiny).files)
    assert {line["repo"] for line in lines} == {FP8, GGUF}
    commits = {commit.oid for repo in (FP8, GGUF) for commit in hub.repo(repo).history()}
    assert {line["commit"] for line in lines} <= commits


@pytest.mark.parametrize("torn", ['{"repo":"ORG/A","comm', "x" * 70_000])
def test_a_torn_line_is_dropped(tmp_path: Path, torn: str) -> None:
    record = UploadRecord(tmp_path)
    record.add("ORG/A", "c" * 40, "A/x", 1, "0" * 64)
    record.close()
    with record.path.open("a") as file:
        file.write(torn)
    assert len(record.read()) == 1
    record.add("ORG/A", "d" * 40, "A/y", 2, "1" * 64)
    record.close()
    assert [json.loads(line)["path"] for line in record.path.read_text().splitlines()] == ["A/x", "A/y"]


# Commits


def commits_of(hub: Hub) -> list[Request]:
    return hub.select(method="POST", path="*/commit/*")


@pytest.mark.parametrize("delete", [False, True])
def test_finished_files_share_commits(hub: Hub, tiny: Path, whole: Path, tmp_path: Path, delete: bool) -> None:
    """The Hub allows 128 commits an hour: one for each repository's weights, and one for what comes last."""
    out = tmp_path / "out"
    run(tiny, out, start(tiny, out, delete=delete))
    assert len(planned(tiny).files) > 10
    assert len(commits_of(hub)) == 2
    check_published(hub, out, whole)
    assert len(commits_of(hub)) == 4


def test_half_of_the_room_is_worth_a_commit(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    out, room = tmp_path / "out", 1_000_000
    plan = planned(tiny)
    run(tiny, out, start(tiny, out, room=room))
    largest = max(file.size for file in plan.files)
    assert 2 < len(commits_of(hub)) <= 2 + plan.nbytes // (room // 2 - largest)
    assert len(commits_of(hub)) < len(plan.files)
    assert weights_of(out) == {}


def test_a_file_waits_for_its_commit_no_longer_than_it_may(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One upload takes long; what is there already is committed and deleted meanwhile."""
    monkeypatch.setattr(delivery_module, "COMMIT_SECONDS", 0.3)
    (tmp_path / "Tiny-GGUF").mkdir()
    delivery = start(tiny, tmp_path)
    files = [tmp_path / "Tiny-GGUF" / name for name in ("quick.gguf", "slow.gguf")]
    hub.arm(Fault(method="PUT", delay=4.0, skip=1))
    for number, file in enumerate(files):
        content = bytes([number]) * 1000
        file.write_bytes(content)
        delivery.take(f"Tiny-GGUF/{file.name}", file, 1000, hashlib.sha256(content).hexdigest())
        time.sleep(0.2)
    begin = time.monotonic()
    while files[0].exists() and time.monotonic() < begin + 3:
        time.sleep(0.02)
    assert not files[0].exists()
    assert files[1].exists()
    assert "quick.gguf" in hub.repo(GGUF).files("main")
    delivery.finish()
    assert not files[1].exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_limit_of_commits_is_waited_out_while_the_conversion_goes_on(
    hub: Hub, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """429 as the Hub answers to too many commits, with and without the time that it wants: everything is converted and
    uploaded meanwhile, nothing is deleted before a commit names it, and the user is told."""
    monkeypatch.setattr(delivery_module, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(errors, "LONGEST_RETRY_AFTER", 4.0)
    monkeypatch.setattr(errors, "LIMIT_WAIT", 6.0)
    message = "You have exceeded the rate limit for repository commits (128 per hour)."
    headers = {"Retry-After": "5"} if named else {}
    hub.arm(Fault(method="POST", path="*/commit/*", status=429, headers=headers, message=message))
    out, plan, heard = tmp_path / "out", planned(tiny), Heard()
    wait = EarlyPush("ORG/Tiny", PushOptions(private=True), delete=True)
    convert(plan, out, RunOptions(jobs=2), delivery=deliver(plan, out, wait, heard))
    (waited,) = [(what, seconds) for what, seconds in heard.waits if "429" in what]
    assert waited[0].startswith("uploading ")
    assert 5 <= waited[1] <= 6 if named else 2 <= waited[1] <= 6
    refused, *made = commits_of(hub)
    assert refused.status == 429
    during = [put for put in hub.select(method="PUT") if refused.started < put.started < made[0].started]
    assert len(during) >= 5, "the conversion waited as well"
    assert len(made) < len(plan.files) / 2
    assert weights_of(out) == {}
    hub.faults.clear()
    check_published(hub, out, whole)


def test_a_run_that_ends_while_a_limit_is_waited_for(
    hub: Hub, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour is a long time: Ctrl-C ends the wait, nothing was deleted, and the next run sends no content again."""
    limit = hub.arm(Fault(method="POST", path="*/commit/*", status=429, headers={"Retry-After": "3600"}, times=None))
    out, ended = tmp_path / "out", time.monotonic()
    delivery = start(tiny, out)

    def stop() -> None:
        nonlocal ended
        while not limit.fired:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(weights_of(out)) == len(planned(tiny).files), "a file was deleted that no commit names"
        ended = time.monotonic()
        delivery.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(Stopped):
        run(tiny, out, delivery)
    stopping.join()
    assert time.monotonic() - ended < 5
    hub.faults.clear()
    run(tiny, out, start(tiny, out))
    assert weights_of(out) == {}
    check_published(hub, out, whole)


# Faults


FAULTS = {
    "PUTs fail": [Fault(method="PUT", status=500, times=5)],
    "PUTs are cut": [Fault(method="PUT", cut_after=1000, times=4)],
    "answers to commits are lost": [dataclasses.replace(lost_commit(), times=3)],
    "commits come at the same time": [Fault(path="*/commit/*", status=412, times=3)],
    "the check fails": [Fault(path="*/paths-info/*", status=503, times=3)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_way(hub: Hub, tiny: Path, whole: Path, tmp_path: Path, name: str) -> None:
    faults = [hub.arm(dataclasses.replace(fault)) for fault in FAULTS[name]]
    out = tmp_path / "out"
    run(tiny, out, start(tiny, out))
    assert all(fault.fired for fault in faults)
    check_published(hub, out, whole)


def test_an_upload_that_keeps_failing_stops_the_conversion(
    hub: Hub, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "ATTEMPTS", 2)
    out = tmp_path / "out"
    hub.arm(Fault(method="PUT", status=403, skip=2, times=None))
    with pytest.raises(StreamquantError) as raised:
        run(tiny, out, start(tiny, out))
    assert WRITE_TOKEN not in str(raised.value)
    hub.faults.clear()
    run(tiny, out, start(tiny, out))
    assert weights_of(out) == {}
    check_published(hub, out, whole)


def test_a_file_that_did_not_arrive_is_not_deleted(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    delivery = start(tiny, out)
    hub.repo(FP8).add_commit({".gitignore": b"*.safetensors\n"})
    with pytest.raises(StreamquantError, match="did not arrive"):
        run(tiny, out, delivery)
    assert any(name.endswith(".safetensors") for name in weights_of(out / "Tiny-FP8-dynamic"))


def test_what_the_hub_lost_is_made_again(hub: Hub, tiny: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    delivery = start(tiny, out, room=1)  # a commit for each file, or nearly so
    hub.arm(Fault(path="*/Tiny-GGUF/commit/*", status=403, skip=1, times=None))
    with pytest.raises(StreamquantError):
        run(tiny, out, delivery)
    gone = [str(line["path"]) for line in UploadRecord(out).read() if not (out / str(line["path"])).exists()]
    lost = next(path for path in gone if path.startswith("Tiny-GGUF/"))
    hub.repo(GGUF).add_commit({lost.partition("/")[2]: None})
    hub.faults.clear()
    run(tiny, out, start(tiny, out))
    push(out, "ORG/Tiny", ANYWAY)
    there = hub.repo(GGUF).files("main")
    assert {path: there[path] for path in there if path.endswith(".gguf")} == weights_of(whole / "Tiny-GGUF")


def test_a_stop_ends_uploads_soon(
    hub: Hub, tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "STOP_SECONDS", 0.5)
    out = tmp_path / "out"
    fault = hub.arm(Fault(method="PUT", trickle=100_000, times=None))
    delivery = start(tiny, out, room=1)

    def stop() -> None:
        while not fault.fired:
            time.sleep(0.01)
        time.sleep(0.5)
        delivery.stop()

    threading.Thread(target=stop, daemon=True).start()
    before = time.monotonic()
    with pytest.raises(Stopped):
        run(tiny, out, delivery)
    assert time.monotonic() - before < 8
    for thread in delivery._threads:
        thread.join()
    hub.faults.clear()
    run(tiny, out, start(tiny, out))
    check_published(hub, out, whole)


def test_ctrl_c_reaches_workers_that_wait_for_room(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt_after: Callable[[float], None]
) -> None:
    monkeypatch.setattr(delivery_module, "STOP_SECONDS", 0.5)
    out = tmp_path / "out"
    hub.arm(Fault(method="PUT", trickle=40_000, times=None))
    delivery = start(tiny, out, room=1)
    interrupt_after(1.0)
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(tiny, out, delivery)
    assert time.monotonic() - before < 6  # the first two files alone take 10 s


def test_ctrl_c_does_not_wait_for_an_answer(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt_after: Callable[[float], None]
) -> None:
    """Uploads that are sent, and hang: they are left behind, and who waits for room is told to stop."""
    monkeypatch.setattr(delivery_module, "STOP_SECONDS", 0.5)
    out = tmp_path / "out"
    hub.arm(Fault(method="PUT", delay=20, times=None))
    delivery = start(tiny, out, room=1)
    interrupt_after(1.0)
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(tiny, out, delivery)
    assert time.monotonic() - before < 10


def test_take_waits_for_room(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    delivery = start(tiny, tmp_path, room=150_000)
    hub.arm(Fault(method="PUT", delay=2.0, times=2))
    hashes = []
    for number in range(4):
        content = random.Random(number).randbytes(100_000)
        (tmp_path / "Tiny-GGUF").mkdir(exist_ok=True)
        file = tmp_path / "Tiny-GGUF" / f"{number}.gguf"
        file.write_bytes(content)
        hashes.append(hashlib.sha256(content).hexdigest())
        before = time.monotonic()
        delivery.take(f"Tiny-GGUF/{number}.gguf", file, 100_000, hashes[-1])
        waited = time.monotonic() - before
        assert waited < 1.5 if number == 0 else number != 1 or waited > 0.5
    delivery.finish()
    assert all(delivery.has(f"Tiny-GGUF/{number}.gguf", 100_000, sha256) for number, sha256 in enumerate(hashes))
    assert not delivery.has("Tiny-GGUF/0.gguf", 100_000, hashes[1])
    assert not delivery.has("Tiny-GGUF/9.gguf", 100_000, hashes[1])


# Before a conversion


def test_what_nobody_measured_is_published_privately_or_knowingly() -> None:
    with pytest.raises(UsageError, match="--private with --push, or --without-report"):
        EarlyPush("ORG/Tiny", PushOptions())
    EarlyPush("ORG/Tiny", PushOptions(private=True))
    EarlyPush("ORG/Tiny", PushOptions(without_report=True))


def test_a_public_repository_is_refused(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(FP8, {"README.md": b"# public"})
    with pytest.raises(StreamquantError, match="the repository is public"):
        start(tiny, tmp_path)


def test_repositories_of_a_plan(tiny: Path) -> None:
    assert plan_repositories(planned(tiny), "ORG/Other") == {
        "Tiny-FP8-dynamic": "ORG/Other-FP8-dynamic",
        "Tiny-GGUF": "ORG/Other-GGUF",
    }


# The disk


@contextmanager
def watched(out: Path) -> Iterator[list[int]]:
    """The most allocated bytes of weights below a folder, looked at all the time."""
    most = [0]
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            total = 0
            for folder, _, names in os.walk(out):
                for name in names:
                    if name.removesuffix(".partial").endswith((".gguf", ".safetensors")):
                        try:
                            total += (Path(folder) / name).stat().st_blocks * 512
                        except FileNotFoundError:
                            total = 0
                            break
            most[0] = max(most[0], total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def test_the_disk_stays_within_the_figure(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    plan, room = planned(tiny), 300_000
    figure = peak_disk(plan, room, 0, delete=True, jobs=2)
    assert figure < plan.nbytes * 0.8, "or it says nothing"
    hub.arm(Fault(method="PUT", delay=0.05, times=None))
    out = tmp_path / "out"
    with watched(out) as most:
        run(tiny, out, start(tiny, out, room=room))
    slack = 4096 * 2 * len(plan.files)  # blocks of the file system that are not full
    assert most[0] <= figure + slack
    assert most[0] > room, "something was seen"


def test_peaks(tiny: Path) -> None:
    plan = planned(tiny)
    assert peak_disk(plan, 10**12, 7, delete=False) == plan.nbytes + 7
    unlimited = peak_disk(plan, 10**12, 7, delete=True)
    small = peak_disk(plan, 0, 7, delete=True)
    assert small < unlimited <= plan.nbytes + 7
    assert small <= peak_disk(plan, 0, 7, delete=True, jobs=4)
    largest = max(file.size for file in plan.files)
    assert small > largest


def test_one_file_a_variant_leaves_nothing_to_gain(tiny: Path) -> None:
    plan = planned(tiny, dataclasses.replace(OPTIONS, split_max_size=None))
    ggufs = sum(file.size for file in plan.files if file.path.endswith(".gguf"))
    assert peak_disk(plan, 0, 0, delete=True) > ggufs * 0.9


# As processes


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.publish.test_delivery import ANYWAY, run, start
from streamquant.publish.upload.push import push
tiny, out = Path({tiny!r}), Path({out!r})
run(tiny, out, start(tiny, out, room=500_000))
for folder in out.glob("Tiny-*"):
    (folder / "README.md").write_text("# Mine\\n")
push(out, "ORG/Tiny", ANYWAY)
"""


def test_a_delivery_that_is_killed_and_repeated(tiny: Path, whole: Path, tmp_path: Path) -> None:
    kills(tiny, whole, tmp_path, times=2, longest=2.0, seed=3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_a_delivery_that_is_killed_often(tiny: Path, whole: Path, tmp_path: Path, seed: int) -> None:
    kills(tiny, whole, tmp_path, times=10, longest=3.0, seed=seed)


def kills(tiny: Path, whole: Path, tmp_path: Path, *, times: int, longest: float, seed: int) -> None:
    """Conversions with delivery, killed (-9) at random moments after the first PUT, then one that ends."""
    moments, out = random.Random(seed), tmp_path / "out"
    driver = DRIVER.format(root=str(Path(__file__).parents[2]), tiny=str(tiny), out=str(out))
    (tmp_path / "hub").mkdir()
    with HubProcess(tmp_path / "hub") as hub:
        hub.arm(Fault(method="PUT", delay=0.15, times=None))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= hub.environment(tmp_path / "home", WRITE_TOKEN)
        command = [sys.executable, "-W", "ignore", "-c", driver]
        for _ in range(times):
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
            known = len(hub.requests)
            while len(hub.requests) < known + 8 and process.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, longest))
            process.kill()
            process.communicate()
        hub.disarm()
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, ended.stderr
        assert weights_of(out) == {}
        for repo in (FP8, GGUF):
            here = weights_of(whole / repo.split("/")[1])
            there = {
                path: size for path, (size, _) in hub.files(repo).items() if path.endswith((".gguf", ".safetensors"))
            }
            assert there == {path: len(data) for path, data in here.items()}
            titles = hub.repos[repo]["commits"]
            assert len(titles) == len(set(titles)), "a file was committed twice"
        done = [request.path for request in hub.requests if request.method == "PUT" and request.status == 200]
        assert len(done) == len(set(done)), "a file was sent twice"
        assert [request for request in hub.requests if request.host != "hub" and request.token] == []
