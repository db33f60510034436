"""Links, FIFOs and devices where a command writes: nothing outside --out changes, outputs are right or refused."""

import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attacks.harness import TO, Zygote, checksums, finished_files, run, state, untouched

SMALL_CHUNKS = {
    "streamquant.convert.plan.records.CHUNK_BYTES": 1 << 13,
    "streamquant.files.hashing.STEP_BYTES": 1 << 13,
}
BOTH = ("--to", "gguf:Q8_0", "--to", "fp8-dynamic")
PARTIALS = (
    "Tiny-GGUF/Tiny-Q8_0.gguf.partial",
    "Tiny-GGUF/streamquant.json.partial",
    "Tiny-FP8-dynamic/model.safetensors.partial",
    "Tiny-FP8-dynamic/config.json.partial",
    "Tiny-FP8-dynamic/tokenizer.json.partial",
    "Tiny-FP8-dynamic/streamquant.json.partial",
)


@pytest.fixture(autouse=True)
def _known_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantization_config is not what is tested here, and asking compressed-tensors for it takes 5 seconds."""
    monkeypatch.setattr(
        "streamquant.convert.recipes.quantization_config._read_cache", lambda scheme: {"config_groups": {scheme: {}}}
    )


@pytest.fixture(scope="module")
def sums(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "streamquant.convert.recipes.quantization_config._read_cache",
            lambda scheme: {"config_groups": {scheme: {}}},
        )
        run("convert", pristine, *BOTH, "--out", out).done()
    return checksums(out)


def symbolic(name: Path, target: Path) -> None:
    name.symlink_to(target)


def hard(name: Path, target: Path) -> None:
    os.link(target, name)


def fifo(name: Path, _target: Path) -> None:
    os.mkfifo(name)


def device(name: Path, _target: Path) -> None:
    name.symlink_to("/dev/full")


def dangling(name: Path, target: Path) -> None:
    name.symlink_to(target.with_name("not-there-yet"))


KINDS = [symbolic, hard, fifo, device, dangling]
Link = Callable[[Path, Path], None]


@pytest.mark.parametrize("link", KINDS)
def test_partial_files(link: Link, model: Path, sums: dict[str, str], tmp_path: Path) -> None:
    """Every small or large file that is written under another name first: that name is made anew."""
    for name in PARTIALS:
        partial = tmp_path / "out" / name
        partial.parent.mkdir(parents=True, exist_ok=True)
        link(partial, model / "model.safetensors")
    before = checksums(model)
    run("convert", model, *BOTH, "--out", tmp_path / "out").done()
    assert checksums(model) == before
    assert checksums(tmp_path / "out") == sums
    assert all(stat.S_ISREG(path.lstat().st_mode) for path in finished_files(tmp_path / "out"))


@pytest.mark.parametrize("link", KINDS)
@pytest.mark.parametrize("name", ["journal.jsonl", "lock"])
def test_files_of_the_run(link: Link, name: str, model: Path, tmp_path: Path) -> None:
    """The journal and the lock are opened as they are: a link is refused, whatever it leads to."""
    precious = tmp_path / "precious"
    precious.touch()
    place = tmp_path / "out" / ".streamquant" / name
    place.parent.mkdir(parents=True)
    link(place, precious)
    before = state(tmp_path)
    ran = run("convert", model, *TO, "--out", tmp_path / "out")
    ran.refused(1, "is a link, or no regular file", str(place), "remove it")
    assert precious.read_bytes() == b""
    assert not (tmp_path / "not-there-yet").exists()
    assert state(tmp_path).keys() - before.keys() <= {str(place.with_name("lock"))}
    place.unlink()
    run("convert", model, *TO, "--out", tmp_path / "out").done()


@pytest.mark.parametrize("link", [symbolic, hard, fifo, dangling])
def test_partial_of_an_unfinished_run(
    link: Link, model: Path, sums: dict[str, str], zygote: Zygote, tmp_path: Path
) -> None:
    """A journal is there, but the partial file is another's: what it lacks is made again, in a file of our own."""
    command = ("convert", model, "--to", "gguf:Q8_0", "--out", tmp_path / "out", "--jobs", 1)
    assert zygote.run(*command, set=SMALL_CHUNKS, die_at=60).code == -signal.SIGKILL
    (partial,) = (tmp_path / "out").rglob("*.gguf.partial")
    partial.unlink()
    link(partial, model / "model.safetensors")
    before = checksums(model)
    zygote.run(*command, set=SMALL_CHUNKS).done()
    assert checksums(model) == before
    name = "Tiny-GGUF/Tiny-Q8_0.gguf"
    assert checksums(tmp_path / "out")[name] == sums[name]


@pytest.mark.parametrize("folder", ["Tiny-GGUF", "Tiny-GGUF/Tiny-Q8_0", ".streamquant", ".streamquant/spool"])
@pytest.mark.parametrize("to", ["source", "elsewhere", "inside", "loop", "nowhere"])
def test_folders(folder: str, to: str, model: Path, tmp_path: Path) -> None:
    """A folder in --out that is a link is refused by plan and convert, before anything is written."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    (out / "inside").mkdir(parents=True)
    place = out / folder
    place.parent.mkdir(exist_ok=True)
    targets = {"source": model, "elsewhere": elsewhere, "inside": out / "inside", "loop": place, "nowhere": out / "x"}
    place.symlink_to(targets[to])
    command = (model, "--to", "gguf:Q8_0", "--split-max-size", "100K", "--out", out)
    with untouched(tmp_path):
        words = ("inside the source",) if to == "source" else ("in the output folder is a link", "remove the link")
        run("plan", *command).refused(2, *words, str(place))
        run("convert", *command).refused(2, *words, str(place))


def test_folder_of_a_side_file(model: Path, tmp_path: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    folder = tmp_path / "out" / "Tiny-FP8-dynamic" / "additional_chat_templates"
    folder.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with untouched(tmp_path):
        run("convert", model, *BOTH, "--out", tmp_path / "out").refused(2, "is a link", str(folder))


def test_out_is_a_link_to_a_folder(model: Path, sums: dict[str, str], tmp_path: Path) -> None:
    """As people do who have a second disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    run("plan", model, *BOTH, "--out", tmp_path / "out").done()
    run("convert", model, *BOTH, "--out", tmp_path / "out").done()
    assert checksums(tmp_path / "disk") == sums


@pytest.mark.parametrize("target", ["nowhere", "out", "file"])
def test_out_is_a_link_to_no_folder(target: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "out").symlink_to(target)
    with untouched(tmp_path):
        run("plan", model, *TO, "--out", tmp_path / "out").refused(2, "the output folder is a file", "a link to")
        run("convert", model, *TO, "--out", tmp_path / "out").refused(2, "the output folder is a file", "a link to")


@pytest.mark.parametrize("link", [symbolic, dangling])
def test_final_file_is_a_link(link: Link, model: Path, tmp_path: Path) -> None:
    final = tmp_path / "out" / "Tiny-GGUF" / "Tiny-Q8_0.gguf"
    final.parent.mkdir(parents=True)
    link(final, model / "model.safetensors")
    with untouched(model):
        run("convert", model, *TO, "--out", tmp_path / "out").refused(1, "another run's files", str(final))


def test_manifest_is_a_link(model: Path, tmp_path: Path) -> None:
    """It is replaced: what it led to stays as it was."""
    run("convert", model, "--to", "gguf:Q8_0", "--out", tmp_path / "out").done()
    manifest, kept = tmp_path / "out" / "Tiny-GGUF" / "streamquant.json", tmp_path / "kept.json"
    shutil.move(manifest, kept)
    manifest.symlink_to(kept)
    before = kept.read_bytes()
    run("convert", model, *TO, "--out", tmp_path / "out").done()
    assert kept.read_bytes() == before
    assert not manifest.is_symlink()
    assert set(json.loads(manifest.read_text())["variants"]) == {"gguf:Q8_0", "gguf:Q4_0"}


@pytest.mark.parametrize("link", KINDS)
def test_recipe(link: Link, model: Path, sums: dict[str, str], tmp_path: Path) -> None:
    run("convert", model, "--to", "gguf:Q8_0", "--out", tmp_path / "out").done()
    (tmp_path / "precious").write_text("precious")
    link(tmp_path / "recipe.yaml.partial", tmp_path / "precious")
    run("recipe", tmp_path / "out" / "Tiny-GGUF" / "Tiny-Q8_0.gguf", "--out", tmp_path / "recipe.yaml").done()
    assert (tmp_path / "precious").read_text() == "precious"
    assert "Q8_0" in (tmp_path / "recipe.yaml").read_text()
