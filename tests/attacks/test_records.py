"""Our own records, wrong at any place: one error that names it, or read as what they say; nothing is done with them."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from streamquant.convert.manifest import MANIFEST, listed_files, read_manifest
from streamquant.convert.recipes import quantization_config
from streamquant.convert.run.journal import JOURNAL, WORK_FOLDER, FinishedFile, Head, Journal, _with_check
from streamquant.convert.source.open import PIN, pin, pinned_commit
from streamquant.hub.repo import HubRepo
from streamquant.publish.release.release_file import STAGES
from streamquant.publish.release.release_state import Made, ReleaseState
from streamquant.quant.errors import StreamquantError
from tests.attacks.harness import Ran, run, untouched
from tests.attacks.wrong_json import wrong_records, wrong_texts
from tests.imatrix_files import legacy_bytes

Case = tuple[str, bytes]


def cases(record: object) -> list[Case]:
    return [*((what, json.dumps(wrong).encode()) for what, wrong in wrong_records(record)), *wrong_texts(record)]


def read_all(path: Path, wrong: Iterable[Case], read: Callable[[], object]) -> tuple[list[Case], list[Case]]:
    """The cases that were read, and those that were refused with an error that says where and what to do."""
    taken: list[Case] = []
    refused: list[Case] = []
    for what, data in wrong:
        path.write_bytes(data)
        try:
            read()
        except StreamquantError as error:
            if str(path.parent) not in str(error.where) or (error.found or error.required) is None or not error.hint:
                pytest.fail(f"{what}: {error}")
            refused.append((what, data))
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            taken.append((what, data))
    return taken, refused


# --- Manifest ---


@pytest.fixture(scope="module")
def made(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variants whose manifests have every field, and few tensors."""
    folder = tmp_path_factory.mktemp("records")
    metadata, matrix = folder / "metadata.json", folder / "tiny.dat"
    metadata.write_text('{"general.author": "somebody", "general.tags": ["a", "b"]}')
    columns = json.loads((pristine / "config.json").read_text())["intermediate_size"]
    matrix.write_bytes(legacy_bytes({"blk.0.ffn_down.weight": (3, np.ones(columns, np.float32))}))
    more = ("--metadata", metadata, "--imatrix", matrix, "--tensor-type", "attn_v=q8_0", "--split-max-size", "100K")
    run("convert", pristine, "--to", "gguf:Q4_0", "--to", "fp8-block", *more, "--out", folder / "out").done()
    for path in (folder / "out").glob(f"*/{MANIFEST}"):
        record = json.loads(path.read_text())
        for variant in record["variants"].values():
            variant["tensors"] = variant["tensors"][:1]
            variant["versions"] = {"python": variant["versions"]["python"]}
        path.write_text(json.dumps(record, indent=1))
    return folder / "out"


@pytest.mark.parametrize("name", ["Tiny-GGUF", "Tiny-FP8-block"])
def test_manifest(name: str, made: Path, pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / name, tmp_path / name))
    path = folder / MANIFEST
    record = json.loads(path.read_text())

    def read() -> None:
        list(listed_files(folder))
        read_manifest(folder)

    taken, refused = read_all(path, cases(record), read)
    assert len(taken) < len(refused) / 3
    for what, data in taken[::31]:
        path.write_bytes(data)
        check(what, run("card", folder))
        (folder / "README.md").unlink(missing_ok=True)
    for what, data in [*taken[::61], *refused[::300]]:
        path.write_bytes(data)
        with untouched(folder):
            check(what, run("verify", folder, "--source", pristine))
    for what, data in refused[::300]:
        path.write_bytes(data)
        with untouched(folder):
            run("card", folder).refused(1, MANIFEST)
            assert run("push", folder, "--repo", "ORG/NAME").code == 1, what


def check(what: str, ran: Ran) -> None:
    """It worked, or told what is wrong in words."""
    if ran.code == 0 or not ran.err:  # verify prints what it found
        assert "Traceback" not in ran.err + ran.out, f"{what}: {ran}"
    else:
        ran.refused(ran.code)


# --- What a run that was killed left behind ---


HEAD = Head("f" * 64, {"gguf:Q8_0": "a" * 64})


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A journal with a line of each kind."""
    out = tmp_path / "out"
    with contextlib.closing(Journal(out)) as journal:
        journal.open(HEAD)
        journal.chunk(3, ["a" * 32, ""])
        journal.file("Tiny-GGUF/Tiny-Q8_0.gguf", FinishedFile("5" * 64, {"0:token_embd.weight": "b" * 32}))
        journal.source("model.safetensors", "6" * 64)
    return out


def test_journal(unfinished: Path) -> None:
    """A line that is wrong and has the check of a line that was written so."""
    path = unfinished / WORK_FOLDER / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    wrong: list[Case] = []
    for number, line in enumerate(lines):
        record = json.loads(line)
        del record["check"]
        for what, data in (*cases(record), *(("a line of a list", json.dumps(x).encode()) for x in ([], [record]))):
            own = json.loads(data).get("fingerprint", "") if number == 0 and is_object(data) else HEAD.fingerprint
            checked = _with_check(data.replace(b"\n", b""), ascii(own).strip("'")) + b"\n"
            wrong.append((f"line {number + 1}: {what}", b"".join([*lines[:number], checked, *lines[number + 1 :]])))
        wrong.append((f"line {number + 1} twice", b"".join([*lines[: number + 1], line, *lines[number + 1 :]])))
    before = path.read_bytes()

    def read() -> None:
        with contextlib.closing(Journal(unfinished)) as journal:
            journal.open(HEAD)

    _, refused = read_all(path, wrong, read)
    assert len(refused) > 300
    path.write_bytes(before)
    read()


def is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def test_commit_of_an_unfinished_run(unfinished: Path) -> None:
    pin(unfinished, HubRepo("ORG/Tiny", "main", "c" * 40, {}, "", "org/tiny"))
    path = unfinished / WORK_FOLDER / PIN
    record = json.loads(path.read_text())
    found: list[str | None] = []
    _, refused = read_all(path, cases(record), lambda: found.append(pinned_commit(unfinished, "ORG/Tiny", "main")))
    assert set(found) <= {None, "c" * 40}
    assert len(refused) > 60


# --- A release, what is kept in the cache ---


def test_state_of_a_release(pristine: Path, tmp_path: Path) -> None:
    path, output = tmp_path / ".tiny.release.json", tmp_path / "imatrix.gguf"
    output.write_bytes(b"x")
    state = ReleaseState(path)
    state.begin("imatrix", "a" * 64)
    state.finish("imatrix", "a" * 64, [output])
    state["convert"].made = Made(("Tiny-GGUF",), ("b" * 64,))
    state.begin("convert", "c" * 64)
    record = json.loads(path.read_text())
    again = ReleaseState(path)
    assert [again[stage] for stage in STAGES] == [state[stage] for stage in STAGES]

    def read() -> None:
        found = ReleaseState(path)
        found.is_intact("imatrix")
        assert all(name.replace("-", "").isalpha() for name in found["convert"].made.folders)

    _, refused = read_all(path, cases(record), read)
    assert len(refused) > 200
    release = tmp_path / "tiny.yaml"
    release.write_text(f"model: {pristine}\nout: {tmp_path}\nvariants: [gguf:Q8_0]\n")
    for _, data in refused[::40]:
        path.write_bytes(data)
        with untouched(tmp_path):
            run("run", release).refused(1, path.name)


def test_quantization_config_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts for nothing if it is not as it was written: it would go into config.json."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = {"config_groups": {"FP8_DYNAMIC": {"targets": ["Linear"], "weights": {"num_bits": 8}}}, "ignore": ["a"]}
    quantization_config._write_cache("FP8_DYNAMIC", config)
    path = quantization_config._cache_path("FP8_DYNAMIC")
    assert quantization_config._read_cache("FP8_DYNAMIC") == config
    for what, data in cases(json.loads(path.read_text())):
        path.write_bytes(data)
        assert quantization_config._read_cache("FP8_DYNAMIC") in (None, config), what
