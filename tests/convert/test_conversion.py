"""A conversion as a whole: the plan says every byte, and reads none of the weights; one run makes every variant."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from streamquant.convert.conversion import check_disk, convert
from streamquant.convert.manifest import MANIFEST
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.plan.view import plan_json
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import Checkpoint, open_checkpoint
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.formats import FORMATS
from streamquant.validate.readback.verify import verify
from tests import synthetic
from tests.conftest import PLAIN, PLAIN_SMOLLM2, TINY_PRE, read_safetensors, write_small_tokenizer
from tests.gguf_peer import read_gguf

ALL = PLAIN


def plan_of(folder: Path, **options: Any) -> Plan:
    return make_plan(open_checkpoint(folder), parse_variants(ALL), ConversionOptions(pre=TINY_PRE, **options))


def files_below(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the plan is exact ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"split_max_size": 600_000}, {"max_shard_size": 500_000, "name": "Other"}, {"split_max_size": 10**12}],
    ids=["default", "split", "shards", "unsplit"],
)
def test_every_byte_is_where_the_plan_says(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    plan = plan_of(tiny, **options)
    convert(make_plan(plan.checkpoint, parse_variants(ALL), plan.options), tmp_path, RunOptions(jobs=2))
    written = files_below(tmp_path)
    planned = {file.path: file.size for file in plan.files}
    assert {path: written[path] for path in planned} == planned
    assert plan.nbytes == sum(planned.values())
    for file in plan.files:
        content = (tmp_path / file.path).read_bytes()
        for offset, data in file.literals:
            assert content[offset : offset + len(data)] == data
        check_tensors(plan, file.path, content, tmp_path)
    others = {Path(path).name for path in written.keys() - planned.keys()}
    assert others == {MANIFEST, "config.json", "model.safetensors.index.json", *plan.checkpoint.side_files}


def check_tensors(plan: Plan, path: str, content: bytes, out: Path) -> None:
    """The tensors of a file, by readers that know nothing of the plan, are at its addresses, and no other is there."""
    if path.endswith(".gguf"):
        stored = {n: (kind.name, data) for n, (kind, _, data) in read_gguf(out / path)[1].items()}
    else:
        stored = {n: (dtype, data) for n, (dtype, _, data) in read_safetensors(out / path).items()}
    planned = {}
    for variant in plan.variants:
        for tensor in variant.tensors:
            for part, region in zip(FORMATS[tensor.format].parts, tensor.regions, strict=True):
                if plan.files[region.file].path == path:
                    data = content[region.offset : region.offset + region.nbytes]
                    planned[tensor.name + part.suffix] = (part.stored_as, data)
    generated = {name for variant in plan.variants for name in variant.generated}
    assert {n: value for n, value in stored.items() if n not in generated} == planned


def test_real_model_is_planned_exactly(smollm2: Path, smollm2_variants: Path) -> None:
    plan = make_plan(open_checkpoint(smollm2), parse_variants(PLAIN_SMOLLM2))
    written = files_below(smollm2_variants)
    assert {file.path: written[file.path] for file in plan.files} == {file.path: file.size for file in plan.files}


# --- the plan reads no weight ---------------------------------------------------------------------------------------


def test_plan_does_not_depend_on_the_weights(tiny: Path, tmp_path: Path) -> None:
    """A copy whose weights are a hole gives the same plan."""
    hollow = Path(shutil.copytree(tiny, tmp_path / tiny.name))
    for shard in hollow.glob("*.safetensors"):
        size, content = shard.stat().st_size, shard.read_bytes()
        with shard.open("wb") as file:
            file.write(content[: 8 + int.from_bytes(content[:8], "little")])
            file.truncate(size)
        assert shard.read_bytes() != content
    real, empty = plan_json(plan_of(tiny), 2), plan_json(plan_of(hollow), 2)
    assert real.pop("fingerprint") != empty.pop("fingerprint"), "the files were touched, so it is another source"
    assert real == empty


LAYERS, HIDDEN, WIDE, KEY_VALUE, VOCABULARY = 126, 16384, 53248, 1024, 128256


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Hermes-4-405B by its shapes: 812 GB in 191 files that take no room on the disk."""
    folder = tmp_path_factory.mktemp("giant") / "Giant-405B"
    tokenizer = write_small_tokenizer(folder.parent / "tokenizer")
    size = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
    }
    folder.mkdir()
    config = synthetic.make_config("LlamaForCausalLM", size, tokenizer=tokenizer, rope="llama3")
    (folder / "config.json").write_text(json.dumps(config))
    parts = synthetic.split(list(synthetic.weights_of(config)), 191)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-00191.safetensors"
        write_hollow(folder / name, part)
        weight_map |= {weight.name: name for weight in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    synthetic.copy_tokenizer(tokenizer, folder)
    return open_checkpoint(folder)


def write_hollow(path: Path, weights: list[synthetic.Weight]) -> None:
    header: dict[str, object] = {}
    at = 0
    for weight in weights:
        header[weight.name] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": (at, at + 2 * weight.count)}
        at += 2 * weight.count
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def bytes_read() -> int:
    """What this process has read so far, from any file."""
    io = Path("/proc/self/io")
    if not io.exists():
        pytest.skip("no /proc/self/io on this system")
    return int(dict(line.split(": ") for line in io.read_text().splitlines())["rchar"])


def test_405b_is_planned_from_headers_alone(giant: Checkpoint) -> None:
    linear = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KEY_VALUE * HIDDEN + 3 * WIDE * HIDDEN)
    rows = LAYERS * (3 * HIDDEN + 2 * KEY_VALUE + 2 * WIDE)
    blocks = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KEY_VALUE * HIDDEN + 3 * WIDE * HIDDEN) // (128 * 128)
    embedding, norms = VOCABULARY * HIDDEN, (2 * LAYERS + 1) * HIDDEN
    head_dim = 128
    assert giant.parameter_count == linear + 2 * embedding + norms == 405_853_388_800
    before = bytes_read()
    variants = parse_variants(["fp8-dynamic", "fp8-block", "gguf:BF16,Q8_0,Q4_0"])
    plan = make_plan(giant, variants, ConversionOptions(pre=TINY_PRE))
    assert bytes_read() - before < 2_000_000, "weights were read"
    expected = {
        "fp8-dynamic": linear + 2 * rows + 2 * (2 * embedding + norms),
        "fp8-block": linear + 2 * blocks + 2 * (2 * embedding + norms),
        "gguf:BF16": 2 * (linear + 2 * embedding) + 4 * norms,
        "gguf:Q8_0": (linear + 2 * embedding) // 32 * 34 + 4 * norms,
        "gguf:Q4_0": (linear + embedding) // 32 * 18 + embedding // 256 * 210 + 4 * norms,
    }
    assert {v.recipe.spec: sum(t.nbytes for t in v.tensors) for v in plan.variants} == expected
    for variant in plan.variants:
        headers = sum(len(plan.files[index].literals[0][1]) for index in variant.files)
        made = 4 * head_dim // 2 if variant.generated else 0
        assert plan.variant_bytes(variant) == headers + expected[variant.recipe.spec] + made
    assert plan.bits_per_weight(plan.variants[0]) == pytest.approx(8.09, abs=0.01)
    assert plan.memory_bytes(16) < 2 * 10**9
    assert plan.memory_bytes(2) > 404 * 2**20, "less than docs/benchmarks.md measured on such matrices"


def test_405b_does_not_fit_and_says_so_at_once(giant: Checkpoint, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free > 10**12:
        pytest.skip("this disk holds it")
    with pytest.raises(StreamquantError, match="not enough disk space") as caught:
        convert(
            make_plan(giant, parse_variants(["gguf:F32"]), ConversionOptions(pre=TINY_PRE)),
            tmp_path / "out",
            RunOptions(jobs=1),
        )
    assert "1,62" in str(caught.value), "the bytes that it takes"
    assert not list((tmp_path / "out").rglob("*.gguf*"))


def test_check_disk_counts_what_is_there_already(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tiny)
    free = plan.nbytes + 64 * 2**20
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=free))
    check_disk(plan, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=free - 1))
    with pytest.raises(StreamquantError, match="not enough disk space"):
        check_disk(plan, tmp_path)
    file = tmp_path / (plan.files[0].path + ".partial")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 8192)
    check_disk(plan, tmp_path)


# --- one read, every variant ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 3])
def test_one_run_equals_many(tiny: Path, tiny_variants: Path, tmp_path: Path, jobs: int) -> None:
    """Each variant on its own, by other numbers of threads, has the bytes that it has in a run of all."""
    together = {path: size for path, size in files_below(tiny_variants).items() if not path.endswith(MANIFEST)}
    for variant in ALL:
        convert(
            make_plan(open_checkpoint(tiny), parse_variants([variant]), ConversionOptions(pre=TINY_PRE)),
            tmp_path,
            RunOptions(jobs=jobs),
        )
    alone = {path: size for path, size in files_below(tmp_path).items() if not path.endswith(MANIFEST)}
    assert alone == together
    assert [p for p in alone if (tmp_path / p).read_bytes() != (tiny_variants / p).read_bytes()] == []


def test_source_is_not_touched(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "Tiny"))
    for path in source.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    source.chmod(0o555)

    def state() -> list[tuple[str, int, int]]:
        return [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(source.rglob("*"))]

    before = state()
    convert(
        make_plan(open_checkpoint(source), parse_variants(ALL), ConversionOptions(pre=TINY_PRE)),
        tmp_path / "out",
        RunOptions(jobs=2),
    )
    assert state() == before
    source.chmod(0o755)


def test_nothing_is_left_of_the_run(tiny_variants: Path) -> None:
    names = [Path(path).name for path in files_below(tiny_variants)]
    assert [name for name in names if name.startswith(".") or name.endswith(".partial") or "journal" in name] == []


def test_second_run_does_nothing(tiny: Path, tmp_path: Path) -> None:
    checkpoint, variants, options = (
        open_checkpoint(tiny),
        parse_variants(["gguf:Q8_0,Q4_0"]),
        ConversionOptions(pre=TINY_PRE),
    )
    assert convert(make_plan(checkpoint, variants[:1], options), tmp_path, RunOptions(jobs=1)).already_done == ()
    (first,) = tmp_path.rglob("*Q8_0.gguf")
    stamp = first.stat().st_mtime_ns
    assert convert(make_plan(checkpoint, variants, options), tmp_path, RunOptions(jobs=1)).already_done == (
        "gguf:Q8_0",
    )
    assert convert(make_plan(checkpoint, variants, options), tmp_path, RunOptions(jobs=1)).already_done == (
        "gguf:Q8_0",
        "gguf:Q4_0",
    )
    assert first.stat().st_mtime_ns == stamp
    manifest = json.loads((first.parent / MANIFEST).read_text())
    assert list(manifest["variants"]) == ["gguf:Q4_0", "gguf:Q8_0"]


def test_output_inside_the_source_is_refused(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "Tiny"))
    with pytest.raises(UsageError, match="inside the source"):
        convert(
            make_plan(open_checkpoint(source), parse_variants(["gguf:Q8_0"]), ConversionOptions(pre=TINY_PRE)),
            source / "out",
            RunOptions(jobs=1),
        )
    assert not (source / "out").exists()


def test_files_of_others_are_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "Tiny-GGUF" / "Tiny-Q8_0.gguf"
    other.parent.mkdir()
    other.write_bytes(b"somebody else's")
    with pytest.raises(StreamquantError, match="another run's files"):
        convert(
            make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q8_0"]), ConversionOptions(pre=TINY_PRE)),
            tmp_path,
            RunOptions(jobs=1),
        )
    assert other.read_bytes() == b"somebody else's"


# --- verify measures what was lost ----------------------------------------------------------------------------------


def test_verify_measures_the_error(tiny: Path, tiny_variants: Path) -> None:
    """SQNR of every GGUF variant, computed here from the files by gguf's own decoders."""
    results = {result.spec: result for result in verify(tiny_variants, open_checkpoint(tiny))}
    assert set(results) == set(ALL)
    assert [result.problems for result in results.values()] == [[] for _ in ALL]
    folder = tiny_variants / "Tiny-GGUF"
    original = decoded(folder / "Tiny-F32.gguf")
    for variant in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16"):
        stored = decoded(folder / f"Tiny-{variant}.gguf")
        signal = sum(float(np.sum(original[name].astype(np.float64) ** 2)) for name in original)
        noise = sum(float(np.sum((original[n].astype(np.float64) - stored[n]) ** 2)) for n in original)
        assert results[f"gguf:{variant}"].total.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
        largest = max(float(np.max(np.abs(original[n] - stored[n]))) for n in original)
        assert results[f"gguf:{variant}"].total.max_error == pytest.approx(largest)
    assert results["gguf:BF16"].total.sqnr_db == results["gguf:F32"].total.sqnr_db == math.inf
    ladder = ["gguf:Q8_0", "gguf:Q5_1", "gguf:Q5_0", "gguf:Q4_1", "gguf:Q4_0"]
    found = [results[spec].quantized.sqnr_db for spec in ladder]
    assert found == sorted(found, reverse=True)
    assert 25 < results["fp8-dynamic"].quantized.sqnr_db < 40


def decoded(path: Path) -> dict[str, Any]:
    """float32 weights by name, without the tensors that have no source."""
    _, tensors = read_gguf(path)
    return {
        name: gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape((*shape[:-1], -1)), kind).reshape(shape)
        for name, (kind, shape, data) in tensors.items()
        if name != "rope_freqs.weight"
    }
