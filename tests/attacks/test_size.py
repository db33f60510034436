"""Files made to exhaust memory: 100 MB of JSON, declared or real, is refused quickly and cheaply."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streamquant.files.safetensors_file import MAX_HEADER
from tests.attacks.harness import TO, pack, run, run_measured, untouched

HUNDRED_MB = 100 * 1000 * 1000


def declared_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pack(b"{", length=HUNDRED_MB))
    os.truncate(model / "model.safetensors", HUNDRED_MB + 8)


def real_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pack(b'{"a":[' + b"[]," * (HUNDRED_MB // 3)))


def sparse(name: str) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        (model / name).touch()
        os.truncate(model / name, HUNDRED_MB)

    return make


def costly_config(model: Path) -> None:
    text = (model / "config.json").read_text().rstrip().removesuffix("}")
    (model / "config.json").write_text(text + ', "x": [' + "[]," * 20_000_000 + "[]]}")


def nested_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pack(b"[" * MAX_HEADER))


def many_shards(model: Path) -> None:
    (model / "model.safetensors").unlink()
    entries = ",".join(f'"t{i}":"s{i}.safetensors"' for i in range(100_000))
    (model / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{entries}}}}}')


def large_index(model: Path) -> None:
    (model / "model.safetensors").unlink()  # beside it nobody reads an index
    sparse("model.safetensors.index.json")(model)


ATTACKS = {
    "a header that says 100 MB": (declared_header, "header too large"),
    "a header of 100 MB": (real_header, "header too large"),
    "a header of brackets, as long as it may be": (nested_header, "nested too deeply"),
    "config.json": (sparse("config.json"), "JSON file too large"),
    "config.json of 60 MB of lists": (costly_config, "JSON file too large"),
    "index": (large_index, "JSON file too large"),
    "tokenizer.json": (sparse("tokenizer.json"), "JSON file too large"),
    "tokenizer_config.json": (sparse("tokenizer_config.json"), "JSON file too large"),
    "generation_config.json": (sparse("generation_config.json"), "JSON file too large"),
    "100,000 shards": (many_shards, "missing shard"),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_refused_quickly_in_little_memory(case: str, model: Path, tmp_path: Path) -> None:
    spoil, words = ATTACKS[case]
    spoil(model)
    began = time.monotonic()
    ran, memory = run_measured(tmp_path, "convert", model, *TO, "--out", tmp_path / "out")
    assert time.monotonic() - began < 20, "not quick"
    ran.refused(1, words, str(model))
    assert memory < 300 * 2**20, f"{memory / 2**20:.0f} MiB"
    assert not (tmp_path / "out").exists()


def test_measurement_sees_memory(model: Path, tmp_path: Path) -> None:
    """The bound above is near what the command takes anyway, and not below it."""
    ran, memory = run_measured(tmp_path, "plan", model, *TO)
    ran.done()
    assert 50 * 2**20 < memory < 300 * 2**20


@pytest.mark.parametrize("option", ["--metadata"])
def test_metadata_file_of_100_mb(option: str, model: Path, tmp_path: Path) -> None:
    sparse("big.json")(tmp_path)
    with untouched(model):
        ran = run("plan", model, *TO, option, tmp_path / "big.json")
    ran.refused(1, "JSON file too large", "big.json", "100,000,000 bytes")
