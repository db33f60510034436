"""Output folders that are in use, someone else's, or part of the source; commands that are wrong."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.attacks.harness import (
    TO,
    Zygote,
    checksums,
    chunks_in_journal,
    finished_files,
    run,
    run_process,
    state,
    untouched,
    write_model,
)


def test_output_is_a_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    run_process("convert", model, *TO, "--out", out).refused(2, "output folder is a file", str(out), "required:")
    run("plan", model, *TO, "--out", out).refused(2, "output folder is a file", str(out))
    assert out.read_text() == "precious"


def test_output_is_below_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    run("convert", model, *TO, "--out", tmp_path / "file" / "out").refused(1, "cannot", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("where", ["equal", "inside", "deep", "through a link", "with dots"])
def test_output_inside_the_source(where: str, model: Path, tmp_path: Path) -> None:
    out = {
        "equal": model,
        "inside": model / "out",
        "deep": model / "a" / "b",
        "through a link": tmp_path / "link" / "out",
        "with dots": tmp_path / "x" / ".." / "Tiny" / "out",
    }[where]
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(model)
    with untouched(model):
        run("convert", model, *TO, "--out", out).refused(2, "inside the source", str(out), "never written to")
        run("plan", model, *TO, "--out", out).refused(2, "inside the source")


def test_source_through_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    with untouched(model):
        run("convert", tmp_path / "link", *TO, "--out", model / "out").refused(2, "inside the source")


@pytest.mark.parametrize("to", ["gguf:Q8_0", "fp8-dynamic"])
def test_variant_folder_is_the_source(to: str, tmp_path: Path) -> None:
    """--out is the folder above the source, and the variant's folder would have the name of the source."""
    name = {"gguf:Q8_0": "Tiny-GGUF", "fp8-dynamic": "Tiny-FP8-dynamic"}[to]
    model = write_model(tmp_path / name)
    with untouched(model):
        ran = run("convert", model, "--to", to, "--name", "Tiny", "--out", tmp_path)
    ran.refused(2, "inside the source", str(model))


def test_variant_folder_is_a_link_to_the_source(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "Tiny-GGUF").symlink_to(model)
    with untouched(model):
        run("convert", model, *TO, "--out", tmp_path / "out").refused(2, "inside the source")


def test_final_file_that_is_not_ours(model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "Tiny-GGUF" / "Tiny-Q4_0.gguf"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    before = state(foreign.parent)
    ran = run_process("convert", model, *TO, "--out", tmp_path / "out")
    ran.refused(1, "another run's files", str(foreign), "found:", "choose another --out")
    assert state(foreign.parent) == before


def test_fp8_folder_with_foreign_files(model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "Tiny-FP8-dynamic" / "adapter_config.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    before = state(foreign.parent)
    ran = run("convert", model, "--to", "fp8-dynamic", "--out", tmp_path / "out")
    ran.refused(1, "another run's files", str(foreign), "choose another --out")
    assert state(foreign.parent) == before


def test_other_files_beside_ggufs_stay(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "Tiny-GGUF").mkdir(parents=True)
    (out / "Tiny-GGUF" / "README.md").write_text("precious")
    (out / "notes.txt").write_text("precious")
    run("convert", model, *TO, "--out", out).done()
    assert (out / "Tiny-GGUF" / "README.md").read_text() == "precious"
    assert (out / "notes.txt").read_text() == "precious"


MANIFESTS = [
    "",
    "[]",
    "{}",
    '{"manifest": 2, "variants": {}}',
    '{"manifest": 1, "variants": []}',
    '{"manifest": 1, "variants": {}}',
    '{"manifest": 1, "variants": {}, "source": 3}',
    '{"manifest": 1, "variants": {"gguf:Q8_0": 3}, "source": {}}',
    '{"manifest": 1, "variants": {"gguf:Q8_0": null}, "source": {"files": []}}',
    '{"manifest": 1, "variants": {}, "source": {"files": [{"path": 1}]}}',
]


@pytest.mark.parametrize("text", MANIFESTS)
def test_foreign_manifest_is_refused_before_work(text: str, model: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "out" / "Tiny-GGUF" / "streamquant.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(text)
    run("convert", model, *TO, "--out", tmp_path / "out").refused(1, str(manifest))
    assert manifest.read_text() == text
    assert not finished_files(tmp_path / "out")
    run("verify", tmp_path / "out").refused(1, str(manifest))


def test_manifest_of_the_source_is_not_taken_over(model: Path, tmp_path: Path) -> None:
    """A source that has a streamquant.json of its own, whatever is in it."""
    (model / "streamquant.json").write_text("not even JSON")
    with untouched(model):
        run("convert", model, "--to", "fp8-dynamic", "--out", tmp_path / "out").done()
    run("verify", tmp_path / "out", "--source", model).done()


def test_two_runs_at_the_same_time(medium: Path, zygote: Zygote, tmp_path: Path) -> None:
    command = ("convert", medium, *TO, "--out", tmp_path)
    first = zygote.start(*command, slow=0.005)
    while chunks_in_journal(tmp_path) < 1:
        time.sleep(0.001)
    first.kill(signal.SIGSTOP)
    second = run_process(*command)
    second.refused(1, "another streamquant is writing to this folder", str(tmp_path), "wait for it")
    other = run("convert", medium, "--to", "gguf:F16", "--out", tmp_path)
    other.refused(1, "another streamquant is writing to this folder")
    first.kill(signal.SIGCONT)
    first.wait().done()
    run("verify", tmp_path).done()
    assert not (tmp_path / ".streamquant").exists()


def test_lock_of_a_dead_run_is_no_lock(model: Path, zygote: Zygote, tmp_path: Path) -> None:
    assert zygote.run("convert", model, *TO, "--out", tmp_path, die_at=9).code == -9
    assert (tmp_path / ".streamquant" / "lock").exists()
    run("convert", model, *TO, "--out", tmp_path).done()


# Again, and more


def test_finished_command_again_changes_nothing(model: Path, tmp_path: Path) -> None:
    command = ("convert", model, *TO, "--out", tmp_path / "out")
    first = run(*command).done()
    assert "gguf:Q8_0: done, " in first.out
    before = state(tmp_path / "out" / "Tiny-GGUF")
    ran = run_process(*command).done()
    assert "gguf:Q8_0: was done already" in ran.out
    assert "gguf:Q4_0: was done already" in ran.out
    assert state(tmp_path / "out" / "Tiny-GGUF") == before


def test_variant_more_keeps_the_first(model: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "out" / "Tiny-GGUF"
    run("convert", model, "--to", "gguf:Q8_0", "--out", out).done()
    first = json.loads((folder / "streamquant.json").read_text())
    before = state(folder / "Tiny-Q8_0.gguf")
    ran = run("convert", model, "--to", "gguf:Q8_0", "--to", "gguf:Q4_0", "--out", out).done()
    assert "gguf:Q8_0: was done already" in ran.out
    assert "gguf:Q4_0: done, " in ran.out
    second = json.loads((folder / "streamquant.json").read_text())
    assert set(second["variants"]) == {"gguf:Q8_0", "gguf:Q4_0"}
    assert second["variants"]["gguf:Q8_0"] == first["variants"]["gguf:Q8_0"]
    assert state(folder / "Tiny-Q8_0.gguf") == before
    run("convert", model, "--to", "gguf:F16", "--out", out).done()
    third = json.loads((folder / "streamquant.json").read_text())
    assert third["variants"].items() >= second["variants"].items()
    run("verify", out, "--source", model).done()


def test_order_of_variants_does_not_matter(model: Path, tmp_path: Path) -> None:
    run("convert", model, "--to", "gguf:Q8_0,Q4_0", "--out", tmp_path / "a").done()
    run("convert", model, "--to", "gguf:Q4_0", "--out", tmp_path / "b").done()
    run("convert", model, "--to", "gguf:Q8_0", "--out", tmp_path / "b").done()
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")


def test_lost_file_is_made_again(model: Path, tmp_path: Path) -> None:
    command = ("convert", model, *TO, "--out", tmp_path / "out")
    run(*command).done()
    sums = checksums(tmp_path / "out")
    (tmp_path / "out" / "Tiny-GGUF" / "Tiny-Q4_0.gguf").unlink()
    ran = run(*command).done()
    assert "gguf:Q8_0: was done already" in ran.out
    assert "gguf:Q4_0: done, " in ran.out
    assert checksums(tmp_path / "out") == sums


def test_changed_source_is_not_taken_for_done(model: Path, tmp_path: Path) -> None:
    """The same command on other weights does not say that all is done."""
    command = ("convert", model, *TO, "--out", tmp_path / "out")
    run(*command).done()
    before = checksums(tmp_path / "out")
    shutil.rmtree(model)
    write_model(model, seed=1)
    run(*command).refused(1, "another run's files", "choose another --out")
    assert checksums(tmp_path / "out") == before


# Commands that are wrong


WRONG = {
    "unknown variant": (("--to", "gguf:Q9_9"), ("unknown variant", "gguf:Q9_9", "gguf:Q8_0")),
    "unknown family": (("--to", "awq"), ("unknown variant", "awq", "fp8-dynamic")),
    "empty variant": (("--to", ""), ("unknown variant",)),
    "empty type": (("--to", "gguf:"), ("unknown variant", "gguf:")),
    "one of several is unknown": (("--to", "gguf:Q8_0,Q0"), ("unknown variant", "gguf:Q0")),
    "split of 0": ((*TO, "--split-max-size", "0"), ("not a size", "--split-max-size", "'0'", "40G")),
    "split of -1": ((*TO, "--split-max-size=-1"), ("not a size", "'-1'")),
    "split of abc": ((*TO, "--split-max-size", "abc"), ("not a size", "'abc'")),
    "split of 1.5G": ((*TO, "--split-max-size", "1.5G"), ("not a size", "'1.5G'")),
    "split of nothing": ((*TO, "--split-max-size", ""), ("not a size", "''")),
    "shard of 5X": ((*TO, "--max-shard-size", "5X"), ("not a size", "--max-shard-size", "'5X'")),
    "name with a folder": ((*TO, "--name", "a/b"), ("name not allowed", "'a/b'", "plain file name")),
    "name that climbs": ((*TO, "--name", "../x"), ("name not allowed", "'../x'")),
    "name of dots": ((*TO, "--name", ".."), ("name not allowed", "'..'")),
    "absolute name": ((*TO, "--name", "/tmp/x"), ("name not allowed",)),
    "empty name": ((*TO, "--name", ""), ("name not allowed", "''")),
    "hidden name": ((*TO, "--name", ".x"), ("name not allowed", "'.x'")),
    "unknown pre-tokenizer": ((*TO, "--pre", "nonsense"), ("nonsense", "--pre")),
}


def test_a_file_below_a_tensor_is_as_large_as_the_tensor(model: Path, tmp_path: Path) -> None:
    """As gguf-py and save_pretrained have it: a tensor is not cut."""
    sizes = (*TO, "--split-max-size", "10K", "--to", "fp8-dynamic", "--max-shard-size", "10K")
    told = " ".join(run("plan", model, *sizes).done().out.split())
    assert "gguf:Q8_0: output.weight alone has" in told
    assert "fp8-dynamic: lm_head.weight alone has" in told
    run("convert", model, *sizes, "--out", tmp_path / "out").done()
    files = [path for path in (tmp_path / "out").rglob("*-of-*") if path.is_file()]
    assert len(files) > 10
    for folder in ("Tiny-GGUF", "Tiny-FP8-dynamic"):
        run("verify", tmp_path / "out" / folder, "--source", model).done()


@pytest.mark.parametrize("case", WRONG)
def test_wrong_command(case: str, model: Path, tmp_path: Path) -> None:
    arguments, words = WRONG[case]
    with untouched(tmp_path):
        run("convert", model, *arguments, "--out", tmp_path / "out").refused(2, *words)
        run("plan", model, *arguments).refused(2, *words)


def test_wrong_command_through_the_real_command(model: Path, tmp_path: Path) -> None:
    with untouched(tmp_path):
        run_process("convert", model, "--to", "gguf:Q9_9", "--out", tmp_path / "out").refused(2, "unknown variant")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Usage"),
        (("convert",), "Usage"),
        (("convert", "x"), "Usage"),
        (("convert", "x", "--out", "y"), "required: --recipe, or --to with one of fp8-dynamic"),
        (("nonsense",), "Usage"),
        (("plan", "x", "--jobs", "0"), "Usage"),
    ],
)
def test_incomplete_command(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert said in ran.err + ran.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_model_that_is_none(command: str, model: Path, tmp_path: Path) -> None:
    more = ("--out", tmp_path / "out") if command == "convert" else ()
    run(command, tmp_path / "missing", *TO, *more).refused(2, "no such model folder", "missing", "hf download")
    run(command, model / "model.safetensors", *TO, *more).refused(2, "no such model folder", "model.safetensors")
    run(command, "org/model/x", *TO, *more).refused(2, "no such model folder", "org/model/x")
    assert not (tmp_path / "out").exists()


def test_name_as_long_as_a_file_system_allows(model: Path, tmp_path: Path) -> None:
    run("convert", model, *TO, "--out", tmp_path / "out", "--name", "x" * 400).refused(1, "cannot", "too long")
    assert not finished_files(tmp_path / "out")


def test_file_size_limit_of_the_shell(model: Path, tmp_path: Path) -> None:
    """ulimit -f: the kernel's own way to stop a file."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    ran = run_process("convert", model, *TO, "--out", tmp_path / "out", preexec_fn=limit)
    ran.refused(1, "File too large")
    assert not finished_files(tmp_path / "out")
