"""A release from one file: what is skipped, what a change makes again, kills at any moment, gates, and the way out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from streamquant.cli import app as command_line
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.listener import Listener
from streamquant.publish.release.release import run_release
from streamquant.publish.release.release_file import read_release
from streamquant.publish.release.release_run import ReleaseOptions
from streamquant.publish.release.release_state import locked
from streamquant.publish.release.stages.validate import ValidateStage
from streamquant.quant.errors import GateFailedError, StreamquantError, UsageError
from streamquant.validate.report import render
from streamquant.validate.report.data import read_report
from tests.conftest import TINY_PRE
from tests.hub import WRITE_TOKEN, Hub, HubProcess
from tests.validate.report_fixtures import ENGINES, write_text

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # httpx, of huggingface_hub
ALL_DONE = ["plan done", "imatrix done", "convert done", "validate done"]
ALL_SKIPPED = ["plan done", "imatrix skipped", "convert skipped", "validate skipped"]


@dataclass
class Bench:
    """A folder with a release of `tiny`, run in this process."""

    folder: Path
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """The outcomes of the last run, whole."""

    @property
    def out(self) -> Path:
        return self.folder / "variants"

    @property
    def path(self) -> Path:
        return self.folder / "release.yaml"

    def write(self) -> Path:
        self.path.write_text(yaml.safe_dump(self.record))
        return self.path

    def run(self, **options: Any) -> list[str]:
        """Stage and state of every outcome."""
        self.notes.clear()
        self.texts.clear()
        outcomes = run_release(read_release(self.write()), ReleaseOptions(**options), Heard(self))
        return [f"{outcome.stage} {outcome.state}" for outcome in outcomes]

    def files(self) -> dict[str, tuple[int, bytes]]:
        """Every file below the --out folder: time and content."""
        return {
            str(path.relative_to(self.out)): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(self.out.rglob("*"))
            if path.is_file()
        }


class Heard(Listener):
    """Keeps the outcomes and the notes, also of a run that fails."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def stage_finished(self, outcome: object) -> None:
        self.bench.texts.append(str(outcome))

    def note(self, text: str) -> None:
        self.bench.notes.append(text)


@pytest.fixture
def bench(whole_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The same without the pages of the report, whose plots take seconds."""
    monkeypatch.setattr(render, "write_pages", lambda _report, _folder: [])
    return whole_bench


@pytest.fixture
def whole_bench(tiny: Path, tmp_path: Path) -> Bench:
    """A release of two GGUF variants, of which one depends on the importance matrix."""
    write_text(tmp_path / "calibration.txt")
    write_text(tmp_path / "text.txt", "xyz")
    record = {
        "model": str(tiny),
        "pre": TINY_PRE,
        "variants": ["gguf:Q8_0,Q4_K_M"],
        "imatrix": {"text": "calibration.txt", "context": 32, "chunks": 2},
        "validate": {
            **{"text": "text.txt", "context": 32, "chunks": 2, "cache": False, "noise": []},
            **{"skip": sorted(ENGINES), "gates": {"max_mean_kld": 1}},
        },
        "device": "cpu",
        "jobs": 2,
    }
    return Bench(tmp_path, record)


def gguf(bench: Bench, kind: str) -> Path:
    return bench.out / "Tiny-GGUF" / f"Tiny-{kind}.gguf"


# --- skipping, and what a change makes again ------------------------------------------------------------------------


def test_a_repeat_changes_nothing(whole_bench: Bench) -> None:
    bench = whole_bench
    assert bench.run() == ALL_DONE
    before = bench.files()
    assert {"Tiny.imatrix.gguf", "Tiny-GGUF/Tiny-Q8_0.gguf", "report/report.html"} <= before.keys()
    assert bench.run() == ALL_SKIPPED
    assert bench.files() == before


def test_the_bytes_are_those_of_the_commands(bench: Bench, tiny: Path, tmp_path: Path) -> None:
    bench.record.pop("validate")
    bench.run()
    options = ConversionOptions(pre=TINY_PRE, imatrix=read_imatrix(bench.out / "Tiny.imatrix.gguf"))
    convert(
        make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q8_0,Q4_K_M"]), options),
        tmp_path / "plain",
        RunOptions(jobs=1),
    )
    for kind in ("Q8_0", "Q4_K_M"):
        assert gguf(bench, kind).read_bytes() == (tmp_path / "plain" / "Tiny-GGUF" / f"Tiny-{kind}.gguf").read_bytes()


def test_another_calibration_text(bench: Bench) -> None:
    """Everything from the importance matrix on, but for the variant that does not depend on it."""
    bench.run()
    before = bench.files()
    write_text(bench.folder / "calibration.txt", "mnop")
    assert bench.run(dry_run=True) == ["plan done", "imatrix would run", "convert would run", "validate would run"]
    assert "make gguf:Q4_K_M 1.11 MB; there already: gguf:Q8_0" in bench.texts[2]
    assert bench.files() == before
    assert bench.run() == ALL_DONE
    after = bench.files()
    assert after["Tiny-GGUF/Tiny-Q8_0.gguf"] == before["Tiny-GGUF/Tiny-Q8_0.gguf"]
    assert after["Tiny-GGUF/Tiny-Q4_K_M.gguf"][1] != before["Tiny-GGUF/Tiny-Q4_K_M.gguf"][1]
    assert any("gguf:Q4_K_M: made again" in note for note in bench.notes)
    assert not list(bench.out.glob("*.old"))
    manifest = json.loads(after["Tiny-GGUF/streamquant.json"][1])
    assert list(manifest["variants"]) == ["gguf:Q4_K_M", "gguf:Q8_0"]
    measured = [file.sha256 for variant in read_report(bench.out / "report").variants for file in variant.files]
    assert measured == [manifest["variants"][spec]["files"][0]["sha256"] for spec in ("gguf:Q8_0", "gguf:Q4_K_M")]
    assert bench.run() == ALL_SKIPPED


def test_a_text_that_changes_behind_its_chunks_changes_the_matrix_alone(bench: Bench) -> None:
    bench.run()
    with (bench.folder / "calibration.txt").open("a") as file:
        file.write("an end that no chunk reaches\n")
    assert bench.run() == ["plan done", "imatrix done", "convert skipped", "validate skipped"]


def test_another_text_to_measure_on(bench: Bench) -> None:
    bench.run()
    before = bench.files()
    write_text(bench.folder / "text.txt", "qrs")
    assert bench.run() == ["plan done", "imatrix skipped", "convert skipped", "validate done"]
    assert {name for name, value in bench.files().items() if value != before[name]} == {
        name for name in before if name.startswith(("report/", ".release"))
    }


def test_other_gates_need_no_measurement(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run()
    created = read_report(bench.out / "report").created

    def measure(_stage: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(ValidateStage, "_measure", measure)
    bench.record["validate"]["gates"] = {"max_mean_kld": 1e-6}
    with pytest.raises(GateFailedError, match="Tiny-Q4_K_M: --max-mean-kld 1e-06"):
        bench.run()
    report = read_report(bench.out / "report")
    assert report.created == created
    assert [result.passed for result in report.gate_results] == [False, True, False, True]
    bench.record["validate"]["gates"] = {"max_mean_kld": 1}
    assert bench.run()[-1] == "validate done"
    assert bench.run() == ALL_SKIPPED


def test_what_is_missing_or_damaged_is_made_again(bench: Bench) -> None:
    bench.run()
    before = bench.files()
    gguf(bench, "Q8_0").unlink()
    (bench.out / "Tiny.imatrix.gguf").write_bytes(b"damaged")
    (bench.out / "report" / "report.json").write_text("{}")
    assert bench.run() == ALL_DONE
    after = bench.files()
    assert after["Tiny.imatrix.gguf.old"][1] == b"damaged"
    for name in ("Tiny.imatrix.gguf", "Tiny-GGUF/Tiny-Q8_0.gguf", "Tiny-GGUF/Tiny-Q4_K_M.gguf"):
        assert after[name][1] == before[name][1]


def test_a_variant_of_another_run_is_not_replaced(bench: Bench, tiny: Path) -> None:
    convert(
        make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q4_K_M"]), ConversionOptions(pre=TINY_PRE)),
        bench.out,
        RunOptions(jobs=1),
    )
    before = gguf(bench, "Q4_K_M").read_bytes()
    with pytest.raises(StreamquantError, match="the output folder holds another run's files"):
        bench.run()
    assert gguf(bench, "Q4_K_M").read_bytes() == before


def test_variants_that_are_there_are_taken(bench: Bench, tiny: Path) -> None:
    """Whoever made them: the manifest says that they are these."""
    convert(
        make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q8_0"]), ConversionOptions(pre=TINY_PRE)),
        bench.out,
        RunOptions(jobs=1),
    )
    before = gguf(bench, "Q8_0").stat().st_mtime_ns
    assert bench.run() == ALL_DONE
    assert gguf(bench, "Q8_0").stat().st_mtime_ns == before


def test_a_folder_that_was_moved_is_known(bench: Bench) -> None:
    bench.run()
    moved = bench.folder / "elsewhere"
    moved.mkdir()
    for name in ("variants", "calibration.txt", "text.txt"):
        (bench.folder / name).rename(moved / name)
    assert Bench(moved, bench.record).run() == ALL_SKIPPED


def test_fp8_of_other_options_is_replaced_as_a_whole(bench: Bench, tmp_path: Path, tiny: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "Tiny"))
    bench.record |= {"model": "Tiny", "variants": ["fp8-dynamic"]}
    del bench.record["imatrix"], bench.record["validate"], bench.record["pre"]
    bench.run()
    folder = bench.out / "Tiny-FP8-dynamic"
    (folder / "README.md").write_text("a card")
    shards = sorted(source.glob("*.safetensors"))
    os.utime(shards[0], ns=(0, 1))
    bench.record["max_shard_size"] = "1M"
    bench.run()
    assert not {path.name for path in shards} <= {path.name for path in folder.iterdir()}
    assert (folder / "README.md").read_bytes() == (source / "README.md").read_bytes()
    assert bench.run() == ["plan done", "convert skipped"]

    bench.record["max_shard_size"] = "2M"
    (folder / "notes.txt").write_text("somebody's own")
    with pytest.raises(StreamquantError, match="the output folder holds another run's files"):
        bench.run()
    assert (folder / "notes.txt").exists()


# --- which stages ---------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_its_sizes_come_true(bench: Bench) -> None:
    states = bench.run(dry_run=True)
    assert states == ["plan done", "imatrix would run", "convert would run", "validate would run"]
    assert not bench.out.exists()
    planned = bench.texts[0]
    bench.record.pop("validate")
    bench.run()
    size = gguf(bench, "Q4_K_M").stat().st_size
    assert f"gguf:Q4_K_M {size / 1e6:.2f} MB" in planned
    bench.run()
    assert bench.texts[0] == planned


def test_from_and_only(bench: Bench) -> None:
    bench.run()
    before = bench.files()
    assert bench.run(only="validate") == ["validate done"]
    assert bench.run(first="convert") == ["convert done", "validate done"]
    assert bench.run(only="imatrix") == ["imatrix done"]
    assert bench.files()["Tiny.imatrix.gguf"][1] == before["Tiny.imatrix.gguf"][1]
    assert bench.run() == ALL_SKIPPED
    with pytest.raises(UsageError, match="a stage that the file does not ask for"):
        bench.run(only="card")
    with pytest.raises(UsageError, match="contradict each other"):
        bench.run(first="plan", only="plan")


def test_a_later_stage_alone_needs_the_earlier_ones(bench: Bench) -> None:
    with pytest.raises(StreamquantError, match="nothing is converted yet"):
        bench.run(only="validate")


def test_a_given_importance_matrix(bench: Bench) -> None:
    bench.run()
    (bench.out / "Tiny.imatrix.gguf").rename(bench.folder / "given.gguf")
    bench.record["imatrix"] = {"file": "given.gguf"}
    bench.record["out"] = "other"
    assert bench.run() == ALL_DONE
    key = "quantize.imatrix.file"
    assert key.encode() in (bench.folder / "other" / "Tiny-GGUF" / "Tiny-Q4_K_M.gguf").read_bytes()
    assert bench.run() == ALL_SKIPPED


def test_texts_are_looked_at_before_the_hours(bench: Bench) -> None:
    (bench.folder / "text.txt").write_text("too short")
    with pytest.raises(UsageError, match="a text is too short"):
        bench.run()
    assert not bench.out.exists()


def test_a_disk_that_is_too_small(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**6))
    with pytest.raises(StreamquantError, match="not enough disk space"):
        bench.run()
    assert bench.run(dry_run=True)[0] == "plan done"
    assert any(note.startswith("not enough disk space where:") for note in bench.notes)
    assert not bench.out.exists()


def test_verify(bench: Bench) -> None:
    bench.record["verify"] = {"source": True}
    del bench.record["validate"]
    assert bench.run() == ["plan done", "imatrix done", "convert done", "verify done"]
    assert bench.run()[-1] == "verify skipped"
    data = bytearray(gguf(bench, "Q8_0").read_bytes())
    data[-100] ^= 1
    gguf(bench, "Q8_0").write_bytes(data)
    with pytest.raises(StreamquantError, match="what was written is not what it should be"):
        bench.run(only="verify")


def test_two_runs_at_once(bench: Bench) -> None:
    with locked(bench.write()), pytest.raises(StreamquantError, match="another run of this release"):
        bench.run()


def test_a_broken_state(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / ".release.release.json").write_text('{"release": 99}')
    with pytest.raises(StreamquantError, match="not the state of a release"):
        bench.run()


# --- gates and the way out ------------------------------------------------------------------------------------------


def test_a_failed_gate_stops_before_the_push(bench: Bench, hub: Hub) -> None:
    bench.record["validate"]["gates"] = {"max_mean_kld": 1e-6}
    bench.record["push"] = {"repo": "ORG/Tiny", "private": True}
    with pytest.raises(GateFailedError) as error:
        bench.run()
    assert error.value.exit_code == 3
    assert "--max-mean-kld 1e-06" in str(error.value)
    assert "validate done" in bench.texts[-1].replace(": ", " ")
    assert not hub.select(method="POST")
    with pytest.raises(GateFailedError):  # nor does a repeat, which skips the validation
        bench.run()
    bench.record["push"]["without_report"] = True
    assert bench.run()[-1] == "push done"
    assert hub.select(method="POST")


def test_a_release_reaches_the_hub_once(bench: Bench, hub: Hub) -> None:
    bench.record["push"] = {"repo": "ORG/Tiny", "private": True}
    assert bench.run() == [*ALL_DONE, "push done"]
    matrix = (bench.out / "Tiny.imatrix.gguf").read_bytes()
    assert hub.repo("ORG/Tiny-GGUF").files("main")["Tiny.imatrix.gguf"] == matrix
    held = hub.repo("ORG/Tiny-GGUF").files("main")
    assert held["Tiny-Q4_K_M.gguf"] == gguf(bench, "Q4_K_M").read_bytes()
    assert {"README.md", "streamquant.json", "Tiny-Q8_0.gguf"} <= held.keys()
    hub.log.clear()
    assert bench.run() == [*ALL_SKIPPED, "push skipped"]
    assert not hub.requests
    assert bench.run(only="push") == ["push done"]
    assert hub.uploaded_bytes == 0


def test_a_missing_token_is_found_before_the_hours(bench: Bench, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    bench.record["push"] = {"repo": "ORG/Tiny"}
    with pytest.raises(StreamquantError, match="no token for the Hub"):
        bench.run()
    assert not bench.out.exists()
    assert not hub.requests


def test_the_command_line(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["streamquant", "run", *map(str, arguments)])
        try:
            command_line.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert call(bench.write(), "--dry-run") == 0
        assert "convert: would run: make gguf:Q8_0 1.97 MB, gguf:Q4_K_M 1.11 MB" in capsys.readouterr().out
        bench.record["validate"]["gates"] = {"max_mean_kld": 1e-6}
        assert call(bench.write()) == 3
        captured = capsys.readouterr()
        assert "validate: done: 2 variants, 2 of 4 gates FAILED" in captured.out
        assert "gates failed" in captured.err
        assert call(bench.path, "--from", "nowhere") == 2
        assert call("--help") == 0
        assert "Example" in capsys.readouterr().out
    finally:
        signal.signal(signal.SIGTERM, before)


# --- kill -9 --------------------------------------------------------------------------------------------------------

KILLER = """
    import os, signal, sys
    from pathlib import Path
    from streamquant.files.listener import Listener
    from streamquant.publish.release.release import run_release
    from streamquant.publish.release.release_file import read_release

    path, stage, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    seen = 0

    class Killer(Listener):
        def started(self, task, total, unit="steps"):
            if total == 1:
                self.advanced(task)

        def advanced(self, task, amount=1):
            global seen
            seen += task.startswith(stage)
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

        def stage_finished(self, outcome):
            self.advanced(str(outcome))

    run_release(read_release(path), listener=Killer())
"""


def kill_at(bench: Bench, stage: str, count: int, environment: Mapping[str, str] | None = None) -> None:
    """Run the release in a process that kills itself when `stage` is told for the `count`th time."""
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(bench.write()), stage, str(count)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


Made = Mapping[str, bytes]


def contents(bench: Bench) -> Made:
    """What a release makes, without what says when."""
    return {
        name: data
        for name, (_, data) in bench.files().items()
        if name.endswith((".gguf", ".safetensors", "streamquant.json"))
    }


def undisturbed(bench: Bench) -> Made:
    """The same release, run in one piece somewhere else."""
    other = Bench(bench.folder, {**bench.record, "out": "undisturbed"})
    other.run()
    return {name: (bench.folder / "undisturbed" / name).read_bytes() for name in contents(bench)}


@pytest.mark.parametrize(("stage", "count"), [("convert:", 1), ("converting", 2)], ids=["after", "within"])
def test_killed_after_and_within_the_conversion(bench: Bench, stage: str, count: int) -> None:
    """Without what needs torch, so that it costs two seconds."""
    bench.record |= {"imatrix": None, "validate": None, "verify": {"source": False}}
    kill_at(bench, stage, count)
    states = bench.run()
    assert states == ["plan done", "convert skipped" if stage == "convert:" else "convert done", "verify done"]
    assert not list(bench.out.rglob("*.partial"))
    assert contents(bench) == undisturbed(bench)


@pytest.mark.long
def test_killed_at_every_stage(bench: Bench) -> None:
    """Within every stage and between them, one after another; each run goes on where the one before was."""
    bench.record["imatrix"]["save_every"] = 1
    bench.record["variants"] = ["fp8-dynamic", "gguf:Q8_0,Q4_K_M"]
    moments = [
        *[("plan:", 1), ("layers", 2), ("layers", 3), ("imatrix:", 1), ("converting", 1)],
        *[("converting", 2), ("convert:", 1), ("layers", 1), ("logits", 1), ("report", 1), ("validate:", 1)],
    ]
    for stage, count in moments:
        kill_at(bench, stage, count)
    assert bench.run() == ALL_SKIPPED
    assert contents(bench) == undisturbed(bench)
    assert not list(bench.out.rglob("*.partial"))


@pytest.mark.long
def test_killed_within_the_matrix_and_then_another_text(bench: Bench) -> None:
    """What the killed run left is not continued with other texts."""
    bench.record["imatrix"]["save_every"] = 1
    kill_at(bench, "layers", 5)
    assert (bench.out / "Tiny.imatrix.gguf").exists()
    write_text(bench.folder / "calibration.txt", "mnop")
    assert bench.run() == ALL_DONE
    assert contents(bench) == undisturbed(bench)


# --- a Hub at both ends ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_from_the_hub_and_back_to_it(bench: Bench, tiny: Path, tmp_path: Path) -> None:
    """The whole release in processes of its own, killed once on the way; cards and report are on the Hub in the end."""
    shutil.copytree(tiny, tmp_path / "hub" / "ORG" / "Tiny")
    bench.record |= {
        "model": "ORG/Tiny@main",
        "variants": ["fp8-dynamic", "gguf:Q8_0,Q4_K_M"],
        "verify": {"source": True},
        "card": {"quantized_by": "somebody"},
        "push": {"repo": "ORG/Tiny", "private": True},
    }
    with HubProcess(tmp_path / "hub") as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home", WRITE_TOKEN)}
        command = [sys.executable, "-m", "streamquant", "run", str(bench.write())]

        def run() -> str:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert WRITE_TOKEN not in done.stdout + done.stderr
            return done.stdout

        kill_at(bench, "converting", 1, environment)
        first = run()
        assert "imatrix: skipped" in first
        assert "push: done: Tiny-FP8-dynamic:" in first
        held = hub.files("ORG/Tiny-GGUF")
        assert {"README.md", "report/report.html", "Tiny-Q4_K_M.gguf", "streamquant.json"} <= set(held)
        assert "config.json" in hub.files("ORG/Tiny-FP8-dynamic")
        assert not [request for request in hub.requests if request.token and request.host != "hub"]
        assert run().count("skipped") == 6
    source = json.loads((bench.out / "Tiny-GGUF" / "streamquant.json").read_text())["source"]
    assert source["repo"] == "ORG/Tiny"
    assert "quantized_by: somebody" in (bench.out / "Tiny-GGUF" / "README.md").read_text()
