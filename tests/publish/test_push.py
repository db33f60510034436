"""Push through the real client to the test Hub: the right files, nothing twice, nothing that must not go."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamquant.convert.manifest import MANIFEST
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.hub.outgoing import Outgoing
from streamquant.publish.results import read_folders
from streamquant.publish.upload import push as push_module
from streamquant.publish.upload.limits import SizedFile, check_limits, check_plan
from streamquant.publish.upload.options import PushOptions
from streamquant.publish.upload.push import batches, card_is_stale, push
from streamquant.publish.upload.push_report import push_view, summary
from streamquant.publish.upload.selection import name_repositories
from streamquant.quant.errors import GateFailedError, StreamquantError, UsageError
from streamquant.validate.report.data import Report, write_report
from tests.conftest import TINY_PRE
from tests.hub import WRITE_TOKEN, Fault, Hub, lost_commit
from tests.hub.process import HubProcess
from tests.publish.cards.contents import edit
from tests.publish.hub_client import ANYWAY, FP8, GGUF, expected, head, published, puts, titles

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# What goes, and where


def test_an_out_folder_goes_to_a_repository_for_each_family(hub: Hub, out: Path) -> None:
    done = push(out, "ORG/Tiny", ANYWAY)
    assert [one.repo for one in done] == [FP8, GGUF]
    assert published(hub, FP8) == expected(out / "Tiny-FP8-dynamic")
    assert published(hub, GGUF) == expected(out / "Tiny-GGUF")
    assert titles(hub, GGUF) == ["Upload Tiny-GGUF with streamquant"]
    assert hub.leaked_tokens() == []


def test_a_second_push_moves_no_bytes_and_makes_no_commit(hub: Hub, out: Path) -> None:
    push(out, "ORG/Tiny", ANYWAY)
    before = head(hub, GGUF)
    hub.log.clear()
    done = push(out, "ORG/Tiny", ANYWAY)
    assert {request.method for request in hub.requests} == {"GET"}
    assert head(hub, GGUF) == before
    assert all(one.upload_bytes == 0 and not one.commits for one in done)
    assert "already" in summary(done[0])


def test_only_what_changed_is_sent_again(hub: Hub, out: Path) -> None:
    push(out, "ORG/Tiny", ANYWAY)
    hub.log.clear()
    (out / "Tiny-FP8-dynamic" / "generation_config.json").write_text("{}")
    (fp8, gguf) = push(out, "ORG/Tiny", dataclasses.replace(ANYWAY, message="Other defaults"))
    assert [action.path for action in fp8.actions if action.action == "upload"] == ["generation_config.json"]
    assert titles(hub, FP8)[0] == "Other defaults"
    assert published(hub, FP8)["generation_config.json"] == b"{}"
    assert not gguf.commits
    assert puts(hub) == []


def test_a_single_folder_goes_where_it_is_told(hub: Hub, out: Path) -> None:
    (done,) = push(out / "Tiny-GGUF", "ORG/Another", ANYWAY)
    assert done.repo == "ORG/Another"
    assert published(hub, "ORG/Another") == expected(out / "Tiny-GGUF")


@pytest.mark.parametrize(
    ("suffixes", "repo", "is_stem", "names"),
    [
        (["-GGUF"], "O/M", True, ["O/M-GGUF"]),
        (["-GGUF"], "O/M-GGUF", True, ["O/M-GGUF"]),
        (["-GGUF"], "O/M-gguf", True, ["O/M-gguf"]),
        (["-GGUF"], "O/M", False, ["O/M"]),
        (["-GGUF", "-FP8-dynamic"], "O/M", True, ["O/M-GGUF", "O/M-FP8-dynamic"]),
    ],
)
def test_names_of_repositories(suffixes: list[str], repo: str, is_stem: bool, names: list[str]) -> None:
    folders = {f"Tiny{suffix}": suffix for suffix in suffixes}
    assert list(name_repositories(folders, repo, is_stem=is_stem).values()) == names


def test_two_families_do_not_share_a_repository() -> None:
    with pytest.raises(UsageError, match="give the stem, O/M:"):
        name_repositories({"M-GGUF": "-GGUF", "M-FP8-dynamic": "-FP8-dynamic"}, "O/M-GGUF", is_stem=True)


@pytest.mark.parametrize("name", ["Tiny", "ORG/a/b", "ORG/x@main", "../x", "ORG/..", "ORG/a b"])
def test_what_is_no_name_is_refused(hub: Hub, out: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not the name of a repository"):
        push(out, name, ANYWAY)
    assert hub.requests == []


def test_strangers_stay_at_home(hub: Hub, out: Path, tmp_path: Path) -> None:
    folder = out / "Tiny-FP8-dynamic"
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (folder / ".env").write_text("TOKEN")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / "link.json").symlink_to(tmp_path / "secret.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "pytorch_model.bin").write_bytes(b"weights of another kind")
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.md").write_text("x")
    (out / "Tiny-GGUF" / "imatrix.gguf").write_bytes(b"GGUF")
    fp8, gguf = push(out, "ORG/Tiny", ANYWAY)
    strangers = {".env", ".git", "link.json", "linked", "pytorch_model.bin", "notes/todo.md"}
    assert {action.path for action in fp8.actions if action.action == "leave"} == strangers
    assert [action.path for action in gguf.actions if action.action == "leave"] == ["imatrix.gguf"]
    assert set(published(hub, FP8)) == set(expected(folder)) - strangers - {".git/config", "linked/config.json"}
    assert "imatrix.gguf" not in published(hub, GGUF)


@pytest.mark.parametrize("place", [".", "Tiny-GGUF"])
def test_the_importance_matrix_goes_with_its_variants(hub: Hub, out: Path, place: str) -> None:
    folder, path = out / "Tiny-GGUF", out / place / "Tiny.imatrix.gguf"
    path.write_bytes(b"GGUF, and sums")

    def calibrated(record: dict[str, Any]) -> None:
        imatrix = {"file": path.name, "sha256": hashlib.sha256(b"GGUF, and sums").hexdigest()}
        record["variants"]["gguf:Q4_0"]["options"]["imatrix"] = imatrix

    edit(folder / MANIFEST, calibrated)
    push(folder, GGUF, ANYWAY)
    assert published(hub, GGUF)[path.name] == b"GGUF, and sums"
    path.write_bytes(b"GGUF, and other sums")  # of another run
    (pushed,) = push(folder, GGUF, ANYWAY)
    assert pushed.upload_bytes == 0
    assert published(hub, GGUF)[path.name] == b"GGUF, and sums"


@pytest.mark.parametrize("name", ["../secret.gguf", "link.gguf", ".hidden.gguf", "x.txt", None])
def test_a_matrix_of_a_name_that_none_has_stays_at_home(hub: Hub, out: Path, name: str | None) -> None:
    for path in (out / "secret.gguf", out / "x.txt", out / "Tiny-GGUF" / ".hidden.gguf"):
        path.write_bytes(b"")
    (out / "link.gguf").symlink_to(out / "secret.gguf")
    before = set(expected(out / "Tiny-GGUF"))

    def forged(record: dict[str, Any]) -> None:
        imatrix = {"file": name, "sha256": hashlib.sha256(b"").hexdigest()}
        record["variants"]["gguf:Q4_0"]["options"]["imatrix"] = imatrix

    edit(out / "Tiny-GGUF" / MANIFEST, forged)
    push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert set(published(hub, GGUF)) == before | {"README.md"}


def test_weights_that_call_themselves_a_matrix_go_once(hub: Hub, out: Path) -> None:
    weights = out / "Tiny-GGUF" / "Tiny-Q8_0.gguf"

    def forged(record: dict[str, Any]) -> None:
        imatrix = {"file": weights.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
        record["variants"]["gguf:Q4_0"]["options"]["imatrix"] = imatrix

    edit(out / "Tiny-GGUF" / MANIFEST, forged)
    (pushed,) = push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert [action.path for action in pushed.actions].count(weights.name) == 1


def test_a_link_to_weights_elsewhere_is_refused(hub: Hub, out: Path, tmp_path: Path) -> None:
    weights = out / "Tiny-GGUF" / "Tiny-Q4_0.gguf"
    shutil.move(weights, tmp_path / "there.gguf")
    weights.symlink_to(tmp_path / "there.gguf")
    with pytest.raises(StreamquantError, match="not a file in this folder"):
        push(out, "ORG/Tiny", ANYWAY)
    assert hub.select(method="PUT") == []


def test_a_report_with_local_paths_stays_at_home(hub: Hub, out: Path, report: Report) -> None:
    write_report(report, out / "Tiny-GGUF" / "report")
    done = push(out / "Tiny-GGUF", GGUF, ANYWAY)[0]
    assert ("report/report.json", "leave") in [(action.path, action.action) for action in done.actions]
    assert not any(path.startswith("report/") for path in published(hub, GGUF))


def test_a_dry_run_changes_nothing(hub: Hub, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = push(out, "ORG/Tiny", dataclasses.replace(ANYWAY, dry_run=True))
    assert {request.method for request in hub.requests} <= {"GET"}
    assert hub.repos == {}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert [one.made for one in done] == [True, True]
    assert "README.md" in [action.path for action in done[1].actions]
    assert push_view(done) is not None


def test_a_private_repository(hub: Hub, out: Path) -> None:
    push(out / "Tiny-GGUF", GGUF, PushOptions(private=True, without_report=True))
    assert hub.repo(GGUF).private


def test_a_public_repository_is_refused_where_a_private_one_was_asked_for(hub: Hub, out: Path) -> None:
    hub.add_repo(GGUF, {"README.md": b"# public"})
    with pytest.raises(StreamquantError, match="the repository is public"):
        push(out / "Tiny-GGUF", GGUF, PushOptions(private=True, without_report=True))
    assert hub.select(method="PUT") == []


def test_a_branch(hub: Hub, out: Path) -> None:
    for _ in range(2):
        push(out / "Tiny-GGUF", GGUF, PushOptions(revision="candidate", without_report=True))
    assert published(hub, GGUF, "candidate") == expected(out / "Tiny-GGUF")
    assert published(hub, GGUF) == {}
    assert len(hub.select(method="PUT")) == 2


def test_a_pull_request_is_opened_once(hub: Hub, out: Path) -> None:
    hub.add_repo(GGUF, {".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n"})
    for _ in range(2):
        (done,) = push(out / "Tiny-GGUF", GGUF, PushOptions(create_pr=True, without_report=True))
        assert done.url.endswith("/discussions/1")
    assert published(hub, GGUF, "refs/pr/1") == expected(out / "Tiny-GGUF")
    assert published(hub, GGUF) == {}
    assert len(hub.repo(GGUF).pulls) == 1


def test_a_lost_answer_opens_no_second_pull_request(hub: Hub, out: Path) -> None:
    hub.add_repo(GGUF, {".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n"})
    hub.arm(lost_commit())
    (done,) = push(out / "Tiny-GGUF", GGUF, PushOptions(create_pr=True, without_report=True))
    assert done.url.endswith("/discussions/1")
    assert len(hub.repo(GGUF).pulls) == 1


def test_a_pull_request_against_a_branch_is_refused() -> None:
    with pytest.raises(UsageError, match="against main"):
        PushOptions(create_pr=True, revision="candidate")


def test_a_renamed_repository_is_followed(hub: Hub, out: Path) -> None:
    hub.add_repo("ORG/Old", {".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n"}, renamed_to=GGUF)
    (done,) = push(out / "Tiny-GGUF", "ORG/Old", ANYWAY)
    assert done.repo == GGUF
    assert published(hub, GGUF) == expected(out / "Tiny-GGUF")


# What may not be published


def _reported(report: Report, four: list[Path], out: Path) -> Path:
    """The --out folder that the report is about, with the report beside the folders."""
    shutil.copytree(four[0].parent, out)
    write_report(report, out / "report")
    return out


def test_a_failed_gate_stops_everything(hub: Hub, report: Report, four_variants: list[Path], tmp_path: Path) -> None:
    folder = _reported(report, four_variants, tmp_path / "reported")
    with pytest.raises(GateFailedError) as raised:
        push(folder, "ORG/Tiny")
    failed = [gate for gate in report.gate_results if not gate.passed]
    assert failed
    assert "--max-mean-kld 0.001, found" in str(raised.value)
    assert "there is no report" not in str(raised.value)
    assert hub.requests == []


def test_variants_that_passed_are_published(
    hub: Hub, report: Report, four_variants: list[Path], tmp_path: Path
) -> None:
    gates = [dataclasses.replace(gate, passed=True) for gate in report.gate_results]
    folder = _reported(dataclasses.replace(report, gate_results=tuple(gates)), four_variants, tmp_path / "reported")
    push(folder, "ORG/Tiny")
    assert "Tiny-Q4_K_M.gguf" in published(hub, GGUF)


def test_a_report_of_other_bytes_counts_for_nothing(
    hub: Hub, report: Report, four_variants: list[Path], tmp_path: Path
) -> None:
    folder = _reported(report, four_variants, tmp_path / "reported")
    manifest = folder / "Tiny-GGUF" / "streamquant.json"
    sha256 = json.loads(manifest.read_text())["variants"]["gguf:Q8_0"]["files"][0]["sha256"]
    manifest.write_text(manifest.read_text().replace(sha256, "0" * 64))
    with pytest.raises(GateFailedError, match="gguf:Q8_0: the report is about other files of the same names"):
        push(folder / "Tiny-GGUF", GGUF)
    assert hub.requests == []


def test_what_was_not_measured_is_refused(hub: Hub, out: Path) -> None:
    with pytest.raises(GateFailedError, match="gguf:Q4_0: there is no report") as raised:
        push(out, "ORG/Tiny")
    assert raised.value.exit_code == 3
    assert hub.requests == []


def _partial(out: Path) -> None:
    (out / "Tiny-GGUF" / "Tiny-Q6_K.gguf.partial").write_bytes(b"GGUF")


def _journal(out: Path) -> None:
    (out / ".streamquant").mkdir()
    (out / ".streamquant" / "journal.jsonl").write_text("{}\n")


def _no_manifest(out: Path) -> None:
    (out / "Tiny-FP8-dynamic" / "streamquant.json").unlink()


@pytest.mark.parametrize("leave", [_partial, _journal, _no_manifest])
def test_an_unfinished_conversion_is_refused(hub: Hub, out: Path, leave: Callable[[Path], None]) -> None:
    leave(out)
    with pytest.raises(StreamquantError, match=r"not finished|without a manifest"):
        push(out, "ORG/Tiny", ANYWAY)
    assert hub.requests == []


def test_weights_that_were_damaged_are_refused(hub: Hub, out: Path) -> None:
    weights = out / "Tiny-GGUF" / "Tiny-Q8_0.gguf"
    with weights.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    os.utime(weights, (time.time() + 60, time.time() + 60))
    with pytest.raises(StreamquantError, match="not what its manifest says"):
        push(out, "ORG/Tiny", ANYWAY)
    assert hub.select(method="PUT") == []


def test_weights_of_another_size_are_refused(hub: Hub, out: Path) -> None:
    weights = out / "Tiny-GGUF" / "Tiny-Q8_0.gguf"
    with weights.open("ab") as file:
        file.write(b"x")
    found = f"{weights.stat().st_size:,}"
    with pytest.raises(StreamquantError, match=rf"not what its manifest says\n.*\n  found: +{found} bytes"):
        push(out, "ORG/Tiny", ANYWAY)


def test_weights_that_were_only_touched_are_hashed_and_sent(hub: Hub, out: Path) -> None:
    os.utime(out / "Tiny-GGUF" / "Tiny-Q8_0.gguf", (time.time() + 60, time.time() + 60))
    push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert published(hub, GGUF) == expected(out / "Tiny-GGUF")


def test_weights_are_not_hashed_a_second_time(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", refuse)
    monkeypatch.setattr(push_module, "check_content", refuse)
    push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert published(hub, GGUF) == expected(out / "Tiny-GGUF")


def test_weights_that_are_there_need_not_be_here(hub: Hub, out: Path) -> None:
    push(out / "Tiny-GGUF", GGUF, ANYWAY)
    for name in ("Tiny-Q8_0.gguf", "Tiny-Q4_0.gguf"):
        (out / "Tiny-GGUF" / name).unlink()
    (done,) = push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert not done.commits
    with pytest.raises(StreamquantError, match="neither on the disk nor on the Hub"):
        push(out / "Tiny-GGUF", "ORG/Empty", ANYWAY)


# Limits


def test_files_above_the_limit_are_refused_with_the_split_that_works() -> None:
    large = SizedFile("Big-BF16.gguf", 812 * 10**9, "--split-max-size")
    with pytest.raises(StreamquantError, match="--split-max-size 45G"):
        check_limits([large], "Big-GGUF")
    assert check_limits([dataclasses.replace(large, size=40 * 10**9)], "Big-GGUF") == ()
    assert "by custom" in check_limits([dataclasses.replace(large, size=60 * 10**9)], "Big-GGUF")[0]
    assert "advises against" in check_limits([dataclasses.replace(large, size=300 * 10**9)], "Big-GGUF")[0]


def test_a_plan_is_refused_as_the_files_would_be(tiny: Path) -> None:
    from streamquant.convert.options import ConversionOptions

    plan = make_plan(
        open_checkpoint(tiny), parse_variants(["fp8-dynamic", "gguf:Q8_0"]), ConversionOptions(pre=TINY_PRE)
    )
    assert check_plan(plan) == ()
    with pytest.raises(StreamquantError, match="--max-shard-size 45G and --split-max-size 45G"):
        check_plan(plan, limit=900_000)
    with pytest.raises(StreamquantError, match="a tensor is larger"):
        check_plan(plan, limit=50_000)


def test_commits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_module, "COMMIT_BYTES", 100)
    files = [Outgoing(f"{number}", None, size, None) for number, size in enumerate([60, 60, 10, *[0] * 205])]
    assert [len(batch) for batch in batches(files)] == [2, 100, 100, 6]


def test_several_commits_end_with_the_card(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_module, "COMMIT_BYTES", 10**6)
    (done,) = push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert len(done.commits) == 3
    assert titles(hub, GGUF)[0].endswith("(3 of 3)")
    before_last = list(hub.repo(GGUF).history())[1]
    assert {".gitattributes", "Tiny-Q8_0.gguf", "Tiny-Q4_0.gguf"} == set(before_last.files)
    assert published(hub, GGUF) == expected(out / "Tiny-GGUF")


# The card


def test_when_a_card_is_written_anew(out: Path) -> None:
    (folder,) = read_folders(out / "Tiny-GGUF")
    card = out / "Tiny-GGUF" / "README.md"
    assert card_is_stale(folder, GGUF)
    card.write_text("# My own words\n")
    assert not card_is_stale(folder, GGUF)
    ours = f"<!-- model card by streamquant: written anew by `streamquant card` -->\n{GGUF}\n"
    card.write_text(ours)
    assert not card_is_stale(folder, GGUF)
    assert card_is_stale(folder, "ORG/Other")
    os.utime(card, (0, 0))
    assert card_is_stale(folder, GGUF)


def test_the_original_s_card_in_an_fp8_folder_gives_way(out: Path) -> None:
    (folder,) = read_folders(out / "Tiny-FP8-dynamic")
    assert (folder.path / "README.md").exists()
    assert card_is_stale(folder, FP8)


# As processes


def start_push(out: Path, repo: str, environment: dict[str, str], *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "streamquant", "push", str(out), "--repo", repo, "--without-report", *flags]
    return subprocess.Popen(
        command,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("HF_")}, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )


def with_own_cards(out: Path) -> Path:
    """Cards of somebody's own: a push leaves them, and need not make any."""
    for folder in out.glob("Tiny-*"):
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    return out


def test_a_push_that_is_killed_and_repeated_sends_nothing_twice(small_variants: Path, tmp_path: Path) -> None:
    out = with_own_cards(Path(shutil.copytree(small_variants, tmp_path / "out")))
    kills(out, tmp_path, times=1, longest=1.5, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_a_push_that_is_killed_often(small_variants: Path, tmp_path: Path, seed: int) -> None:
    out = with_own_cards(Path(shutil.copytree(small_variants, tmp_path / "out")))
    kills(out, tmp_path, times=8, longest=4.0, seed=seed)


def kills(out: Path, tmp_path: Path, *, times: int, longest: float, seed: int) -> None:
    """Pushes, killed (-9) at random moments after the first request, then one that ends: the right files, once."""
    moments = random.Random(seed)
    (tmp_path / "hub").mkdir()
    with HubProcess(tmp_path / "hub", "--part-size", "300000") as hub:
        environment = hub.environment(tmp_path / "home", WRITE_TOKEN)
        hub.arm(Fault(method="PUT", trickle=2_000_000, times=None))
        for _ in range(times):
            process = start_push(out, "ORG/Tiny", environment)
            known = len(hub.requests)
            while len(hub.requests) == known and process.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, longest))
            process.kill()
            process.communicate()
        hub.disarm()
        process = start_push(out, "ORG/Tiny", environment)
        printed = "".join(process.communicate(timeout=120))
        assert process.returncode == 0, printed
        assert WRITE_TOKEN not in printed
        for repo in (FP8, GGUF):
            here = expected(out / repo.split("/")[1])
            there = hub.files(repo)
            assert {path: size for path, (size, _) in there.items() if path != ".gitattributes"} == {
                path: len(data) for path, data in here.items()
            }
            assert len(hub.repos[repo]["commits"]) == 2  # the Hub's first one, and ours
        done = [request.path for request in hub.requests if "/lfs-complete/" in request.path and request.status == 200]
        assert len(done) == len(set(done)) == 4
        assert [request for request in hub.requests if request.host != "hub" and request.token] == []


def test_cards_and_reports_come_along(report: Report, four_variants: list[Path], tmp_path: Path) -> None:
    gates = [dataclasses.replace(gate, passed=True) for gate in report.gate_results]
    out = _reported(dataclasses.replace(report, gate_results=tuple(gates)), four_variants, tmp_path / "reported")
    (tmp_path / "hub").mkdir()
    with HubProcess(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home", WRITE_TOKEN)
        process = start_push(out / "Tiny-FP8-dynamic", FP8, environment)
        printed = "".join(process.communicate(timeout=120))
        assert process.returncode == 0, printed
        there = set(hub.files(FP8))
        assert {"README.md", "report/report.json", "report/report.html", "report/plots/size-kld.png"} <= there
        assert "README.base.md" not in there
        card = (out / "Tiny-FP8-dynamic" / "README.md").read_text()
        assert FP8 in card
        assert str(tmp_path) not in card
        assert str(tmp_path) not in (out / "Tiny-FP8-dynamic" / "report" / "report.json").read_text()


def test_a_hub_without_xet_is_served_without(small_variants: Path, tmp_path: Path) -> None:
    """With hf_xet installed the client would send by xet without asking."""
    out = with_own_cards(Path(shutil.copytree(small_variants, tmp_path / "out")))
    (tmp_path / "hub").mkdir()
    with HubProcess(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home", WRITE_TOKEN)
        del environment["HF_HUB_DISABLE_XET"]
        process = start_push(out / "Tiny-GGUF", GGUF, environment)
        printed = "".join(process.communicate(timeout=120))
        assert process.returncode == 0, printed
        assert "Tiny-GGUF: 4 files" in printed
        assert "Tiny-Q8_0.gguf" in hub.files(GGUF)
        assert any("xet-write-token" in request.path for request in hub.requests)


def test_the_command_line_says_what_is_wrong(out: Path, tmp_path: Path) -> None:
    process = start_push(out, "ORG/Tiny", {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"})
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert told.startswith("error: no token for the Hub")
    assert printed == ""
