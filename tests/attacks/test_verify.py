"""verify finds every kind of damage, names what is damaged, and exits with 1."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.harness import checksums, flip, run, run_process, untouched, write_model

GGUF = ("--to", "gguf:Q8_0,Q4_0")
FOLDER = "Odd-GGUF"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, out) with padding between tensors, in GGUF and FP8."""
    root = tmp_path_factory.mktemp("made")
    model = write_model(root / "Odd", vocab_size=509)
    run("convert", model, *GGUF, "--to", "fp8-dynamic", "--out", root / "out").done()
    return model, root / "out"


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "out"))


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "streamquant.json").read_text()))


def parts_of(folder: Path, spec: str) -> list[dict[str, Any]]:
    return [part for tensor in manifest(folder)["variants"][spec]["tensors"] for part in tensor["parts"]]


def assert_found(out: Path, *words: str) -> None:
    with untouched(out):
        ran = run("verify", out)
    assert ran.code == 1, ran.out
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.out, ran.out


def test_whole_output(made: tuple[Path, Path]) -> None:
    model, out = made
    run("verify", out).done()
    run_process("verify", out, "--source", model).done()
    run("verify", out / FOLDER).done()
    found = json.loads(run("verify", out, "--json").done().out)
    assert "problems" in json.dumps(found)


@pytest.mark.parametrize("which", [0, 5, -1])
def test_flipped_bit_in_a_tensor(which: int, out: Path) -> None:
    for folder, spec in ((out / FOLDER, "gguf:Q4_0"), (out / "Odd-FP8-dynamic", "fp8-dynamic")):
        part = parts_of(folder, spec)[which]
        for at in (0, part["size"] // 2, part["size"] - 1):
            flip(folder / part["file"], part["offset"] + at)
            assert_found(out, part["file"], f"tensor {part['name']} is damaged")
            flip(folder / part["file"], part["offset"] + at)
    run("verify", out).done()


def test_flipped_bit_through_the_real_command(out: Path) -> None:
    part = parts_of(out / FOLDER, "gguf:Q8_0")[3]
    flip(out / FOLDER / part["file"], part["offset"])
    ran = run_process("verify", out)
    assert ran.code == 1
    assert f"tensor {part['name']} is damaged" in ran.out


def test_only_the_damaged_tensor_is_named(out: Path) -> None:
    parts = parts_of(out / FOLDER, "gguf:Q8_0")
    flip(out / FOLDER / parts[2]["file"], parts[2]["offset"] + 9)
    ran = run("verify", out)
    named = [part["name"] for part in parts if f"tensor {part['name']} is damaged" in ran.out]
    assert named == [parts[2]["name"]]


def test_flipped_bit_in_the_padding(out: Path) -> None:
    path = out / FOLDER / "Odd-Q8_0.gguf"
    covered = {(p["offset"], p["offset"] + p["size"]) for p in parts_of(out / FOLDER, "gguf:Q8_0")}
    gap = next(stop for start, stop in sorted(covered) if stop not in {start for start, _ in covered})
    assert path.read_bytes()[gap] == 0
    flip(path, gap)
    assert_found(out, "Odd-Q8_0.gguf", "header or padding damaged")


@pytest.mark.parametrize("name", ["Odd-GGUF/Odd-Q8_0.gguf", "Odd-FP8-dynamic/model.safetensors"])
@pytest.mark.parametrize("seed", range(8))
def test_flipped_bit_in_the_header(seed: int, name: str, out: Path) -> None:
    """Any bit of any header: a problem or a message, never a traceback, never silence."""
    path = out / name
    folder, spec = path.parent, "gguf:Q8_0" if name.endswith("gguf") else "fp8-dynamic"
    begin = min(part["offset"] for part in parts_of(folder, spec))
    flip(path, random.Random(seed).choice([seed, random.Random(seed).randrange(begin)]))
    assert_found(folder, path.name, "header or padding damaged")


@pytest.mark.parametrize("change", ["short", "empty", "long", "gone", "folder"])
def test_file_of_another_size(change: str, out: Path) -> None:
    path = out / FOLDER / "Odd-Q4_0.gguf"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate({"short": size - 1, "empty": 0, "long": size + 1}.get(change, size))
    if change in ("gone", "folder"):
        path.unlink()
    if change == "folder":
        path.mkdir()
    assert_found(out, "Odd-Q4_0.gguf", "missing" if change in ("gone", "folder") else f"should be {size:,}")


def change_manifest(folder: Path, spec: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = manifest(folder)
    change(content["variants"][spec])
    (folder / "streamquant.json").write_text(json.dumps(content))


def test_edited_hash_of_a_file(out: Path) -> None:
    change_manifest(out / FOLDER, "gguf:Q8_0", lambda entry: entry["files"][0].update(sha256="0" * 64))
    assert_found(out, "Odd-Q8_0.gguf", "SHA-256 differs")


def test_edited_hash_of_a_tensor(out: Path) -> None:
    name = parts_of(out / FOLDER, "gguf:Q8_0")[4]["name"]
    change_manifest(out / FOLDER, "gguf:Q8_0", lambda entry: entry["tensors"][4]["parts"][0].update(xxh3_128="0" * 32))
    assert_found(out, "Odd-Q8_0.gguf", name)


def test_edited_place_or_type_of_a_tensor(out: Path) -> None:
    name = parts_of(out / FOLDER, "gguf:Q8_0")[4]["name"]
    change_manifest(out / FOLDER, "gguf:Q8_0", lambda entry: entry["tensors"][4]["parts"][0].update(stored_as="Q4_0"))
    assert_found(out, f"tensor {name} has another place or type")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../x", ".."])
def test_path_that_leaves_the_folder(path: str, out: Path) -> None:
    change_manifest(out / FOLDER, "gguf:Q8_0", lambda entry: entry["files"][0].update(path=path))
    run("verify", out).refused(1, "broken manifest", "gguf:Q8_0", "leaves the folder", path)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("files"),
        lambda entry: entry.pop("tensors"),
        lambda entry: entry.pop("options"),
        lambda entry: entry.update(files=3),
        lambda entry: entry.update(files=[3]),
        lambda entry: entry["files"][0].update(size="big"),
        lambda entry: entry["files"][0].update(sha256=None),
        lambda entry: entry["files"][0].update(path=7),
        lambda entry: entry["tensors"][0].update(parts=None),
        lambda entry: entry["tensors"][0]["parts"][0].update(offset=None),
        lambda entry: entry["tensors"][0]["parts"][0].update(offset="0", size="1"),
        lambda entry: entry["tensors"][0]["parts"][0].pop("xxh3_128"),
        lambda entry: entry["tensors"][0]["parts"][0].update(name=["a"]),
        lambda entry: entry["tensors"][0]["parts"][0].update(offset=-5),
        lambda entry: entry["tensors"][0]["parts"][0].update(size=-5),
        lambda entry: entry["tensors"][0]["parts"][0].update(offset=1 << 70),
        lambda entry: entry["tensors"][0]["parts"][0].update(size=1 << 70),
    ],
)
def test_broken_manifest(change: Callable[[dict[str, Any]], object], out: Path) -> None:
    change_manifest(out / FOLDER, "gguf:Q8_0", change)
    run("verify", out).refused(1, "broken manifest", "streamquant.json", "gguf:Q8_0")


@pytest.mark.parametrize("change", [{"offset": 10**9}, {"offset": 1 << 62}, {"size": 10**9}, {"size": 1 << 62}])
def test_tensor_outside_its_file(change: dict[str, int], out: Path) -> None:
    change_manifest(out / FOLDER, "gguf:Q8_0", lambda entry: entry["tensors"][4]["parts"][0].update(change))
    assert_found(out, parts_of(out / FOLDER, "gguf:Q8_0")[4]["name"])


def test_no_manifest(out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run("verify", tmp_path / "empty").refused(2, "nothing to verify", str(tmp_path / "empty"), "required:")
    run("verify", tmp_path / "missing").refused(2, "nothing to verify")
    run("verify", out / FOLDER / "Odd-Q8_0.gguf").refused(2, "nothing to verify")


def test_source_of_another_model(out: Path, tmp_path: Path) -> None:
    """The same shapes and sizes, other weights: every difference is found by content."""
    other = write_model(tmp_path / "Odd", vocab_size=509, seed=1)
    ran = run("verify", out / FOLDER, "--source", other)
    assert ran.code == 1
    assert "not what the source gives" in ran.out
    bigger = write_model(tmp_path / "Bigger", vocab_size=512)
    ran = run("verify", out / FOLDER, "--source", bigger)
    assert ran.code == 1
    assert "made of another source" in ran.out


def test_source_of_another_name(made: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    """The folder's name is in the header: with a longer one every address is another."""
    renamed = shutil.copytree(made[0], tmp_path / ("Odd-" + "x" * 60))
    ran = run("verify", out / FOLDER, "--source", renamed)
    assert ran.code == 1
    assert "the header is another" in ran.out


def test_forged_manifest_is_found_with_the_source(made: tuple[Path, Path], out: Path) -> None:
    """Damage with matching hashes: only the source can tell."""
    import hashlib

    import xxhash

    folder = out / FOLDER
    part = parts_of(folder, "gguf:Q8_0")[4]
    path = folder / part["file"]
    flip(path, part["offset"] + 7)
    raw = path.read_bytes()
    data = raw[part["offset"] : part["offset"] + part["size"]]

    def forge(entry: dict[str, Any]) -> None:
        entry["files"][0]["sha256"] = hashlib.sha256(raw).hexdigest()
        entry["tensors"][4]["parts"][0]["xxh3_128"] = xxhash.xxh3_128(data).hexdigest()

    change_manifest(folder, "gguf:Q8_0", forge)
    assert run("verify", folder).code == 0
    ran = run("verify", folder, "--source", made[0])
    assert ran.code == 1
    assert part["name"] in ran.out
    assert "not what the source gives" in ran.out


def test_nothing_of_the_output_is_written(made: tuple[Path, Path]) -> None:
    before = checksums(made[1])
    run("inspect", made[1]).done()
    run("verify", made[1], "--source", made[0]).done()
    assert checksums(made[1]) == before
