"""However a plan is cut and whoever does which part of it, the bytes are the same."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.run.blocks import Piece, encode_chunk
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.writing import write_all
from tests.attacks.harness import checksums, write_model
from tests.listeners import Hears

GGUF = ["gguf:Q8_0,Q4_0,F16,F32,BF16"]
FP8 = ["fp8-dynamic", "fp8-block", "nvfp4a16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "Tiny", shards=3, vocab_size=509)


@pytest.fixture(scope="module", autouse=True)
def _known_configs() -> Iterator[None]:
    """The quantization_config is not what is tested here, and asking compressed-tensors for it takes 5 seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "streamquant.convert.recipes.quantization_config._read_cache",
            lambda scheme: {"config_groups": {scheme: {}}},
        )
        yield


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected")
    convert(make_plan(open_checkpoint(model), parse_variants([*GGUF, *FP8])), out, RunOptions(jobs=1))
    return checksums(out)


def set_sizes(patch: pytest.MonkeyPatch, chunk: int, block: int) -> None:
    patch.setattr("streamquant.convert.plan.records.CHUNK_BYTES", chunk)
    patch.setattr("streamquant.convert.plan.records.BLOCK_WEIGHTS", block)
    patch.setattr("streamquant.convert.run.blocks.BLOCK_WEIGHTS", block)


@given(
    jobs=st.sampled_from([1, 2, 7]),
    chunk=st.sampled_from([1, 100, 4096, 50_000, 1 << 25]),
    block=st.sampled_from([1, 64, 1000, 9_999, 1 << 18]),
    step=st.sampled_from([1 << 12, 1 << 26]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_bytes_however_it_is_cut(
    jobs: int, chunk: int, block: int, step: int, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch, chunk, block)
        patch.setattr("streamquant.files.hashing.STEP_BYTES", step)
        convert(make_plan(open_checkpoint(model), parse_variants([*GGUF, *FP8])), out, RunOptions(jobs=jobs))
    assert checksums(out) == expected
    shutil.rmtree(out)


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_same_bytes_by_any_number_of_workers(
    jobs: int, model: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch, 10_000, 3000)
    convert(make_plan(open_checkpoint(model), parse_variants([*GGUF, *FP8])), tmp_path, RunOptions(jobs=jobs))
    assert checksums(tmp_path) == expected


def test_nothing_is_written_after_ctrl_c(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt_after: Callable[[float], None]
) -> None:
    """The files of the run are closed then, and their descriptors may be those of other files."""
    begun, ended = [], []

    def encode(*arguments: Any) -> Iterator[list[Piece]]:
        begun.append(1)
        if len(begun) == 1:
            interrupt_after(0.3)
        try:
            time.sleep(1)
            yield from encode_chunk(*arguments)
        finally:
            ended.append(1)

    monkeypatch.setattr("streamquant.convert.run.blocks.encode_chunk", encode)
    with pytest.raises(KeyboardInterrupt):
        convert(make_plan(open_checkpoint(model), parse_variants(GGUF)), tmp_path, RunOptions(jobs=1))
    assert len(begun) == len(ended) == 1


def test_one_read_or_many(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """All variants together give the same files as one after another."""
    for spec in (*FP8, "gguf:F32", "gguf:BF16", "gguf:F16", "gguf:Q4_0", "gguf:Q8_0"):
        convert(make_plan(open_checkpoint(model), parse_variants([spec])), tmp_path, RunOptions(jobs=2))
    assert checksums(tmp_path) == expected


def test_progress_counts_every_byte_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, 10_000, 3000)
    checkpoint = open_checkpoint(model)
    seen: list[int] = []
    plan = make_plan(checkpoint, parse_variants(GGUF))
    convert(plan, tmp_path, RunOptions(jobs=3), Hears({"converting": seen.append}))
    assert sum(seen) == checkpoint.nbytes
    assert len(seen) > 20


def test_chunks_cover_every_row_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, 10_000, 3000)
    plan = make_plan(open_checkpoint(model), parse_variants([*GGUF, *FP8]))
    for index, matrix in enumerate(plan.matrices):
        rows = [row for c in plan.chunks if c.matrix == index for row in range(c.first, c.last)]
        assert rows == list(range(matrix.rows))
        assert all(c.first % matrix.row_step == 0 for c in plan.chunks if c.matrix == index)


def test_fingerprint_is_of_what_changes_the_bytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(model)

    def fingerprint(*specs: str, options: ConversionOptions | None = None) -> str:
        return make_plan(checkpoint, parse_variants(list(specs)), options).fingerprint

    same = fingerprint("gguf:Q8_0")
    assert fingerprint("gguf:Q8_0") == same
    others = [
        fingerprint("gguf:Q4_0"),
        fingerprint("gguf:Q8_0", "gguf:Q4_0"),
        fingerprint("gguf:Q8_0", options=ConversionOptions(name="Other")),
        fingerprint("gguf:Q8_0", options=ConversionOptions(split_max_size=100_000)),
        fingerprint("gguf:Q8_0", options=ConversionOptions(metadata={"general.author": "x"})),
    ]
    assert len({same, *others}) == len(others) + 1
    set_sizes(monkeypatch, 10_000, 3000)
    assert fingerprint("gguf:Q8_0") != same, "the journal counts chunks: other chunks are another run"


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_write_all_goes_on_after_short_writes(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[int, memoryview, int], int] = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:most], offset))
    with (tmp_path / "file").open("w+b") as file:
        write_all(file.fileno(), memoryview(b"0123456789"), 5)
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"0123456789"
