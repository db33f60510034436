"""The source is only read, and it is the same from the first byte to the last: changes are noticed, never mixed."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant.errors import StreamquantError
from tests.attacks.harness import (
    TO,
    checksums,
    edit_json,
    entry,
    finished_files,
    poke,
    rewrite,
    run,
    run_process,
    shards_of,
    state,
    unpack,
    untouched,
)
from tests.listeners import Hears


class _Stop(Exception):  # noqa: N818 - stands for a crash
    pass


def stop_after(model: Path, out: Path, chunks: int, then: Callable[[], None] | None = None) -> BaseException:
    """Run until so many chunks are done, then do something, or crash; returns what the run raised."""
    lock = threading.Lock()
    left = [chunks]

    def progress(_nbytes: int) -> None:
        with lock:
            left[0] -= 1
            if left[0] == 0:
                if then is None:
                    raise _Stop
                then()

    plan = make_plan(open_checkpoint(model), parse_variants([TO[1]]))
    with pytest.raises((_Stop, StreamquantError)) as caught:
        convert(plan, out, RunOptions(jobs=1), Hears({"converting": progress}))
    return caught.value


def spoil(kind: str, shard: Path) -> None:
    size = shard.stat().st_size
    match kind:
        case "truncated":
            os.truncate(shard, size - 100)
        case "grown":
            os.truncate(shard, size + 100)
        case "overwritten":
            poke(shard, size - 50, b"x")
        case "replaced":
            shutil.copyfile(shard, shard.with_suffix(".new"))
            shard.with_suffix(".new").replace(shard)
        case "touched":
            os.utime(shard)
        case "gone":
            shard.unlink()
        case "other tensors":
            rewrite(shard, {"__metadata__": {"format": "np"}})


KINDS = ["truncated", "grown", "overwritten", "replaced", "touched", "gone", "other tensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_change_between_runs(kind: str, sharded: Path, tmp_path: Path) -> None:
    """A resumed run must not join weights of two sources."""
    out = tmp_path / "out"
    assert isinstance(stop_after(sharded, out, 4), _Stop)
    before = checksums(out)
    spoil(kind, shards_of(sharded)[1])
    with untouched(sharded):
        ran = run("convert", sharded, *TO, "--out", out)
    ran.refused(1, "where:", "to do:")
    if kind in ("truncated", "grown", "gone"):
        assert str(shards_of(sharded)[1]) in ran.err or "model-00002" in ran.err
    else:
        for word in ("unfinished run of another plan", "the same source (unchanged)", "remove the folder"):
            assert word in ran.err
    assert checksums(out) == before
    assert not finished_files(out)


@pytest.mark.parametrize("kind", KINDS)
def test_change_during_a_run(kind: str, sharded: Path, tmp_path: Path) -> None:
    """Noticed before any file gets its final name."""
    out = tmp_path / "out"
    error = stop_after(sharded, out, 2, lambda: spoil(kind, shards_of(sharded)[2]))
    assert isinstance(error, StreamquantError)
    text = str(error)
    assert "model-00003-of-00003" in text
    assert any(words in text for words in ("changed while", "became shorter", "missing shard")), text
    assert "to do:" in text
    assert not finished_files(out)
    assert not list(out.rglob("streamquant.json"))


@pytest.mark.parametrize("noticed", [True, False], ids=["by its size", "by its end"])
def test_end_of_a_shard_that_is_being_read(
    noticed: bool, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut to its header: the next read finds the end, even where a file system still tells the old size."""
    victim = shards_of(sharded)[0]
    begin = victim.stat().st_size - len(unpack(victim)[1])
    if not noticed:
        monkeypatch.setattr("streamquant.convert.source.checkpoint.Checkpoint.check_unchanged", lambda _self: None)
    error = stop_after(sharded, tmp_path / "out", 1, lambda: os.truncate(victim, begin))
    assert isinstance(error, StreamquantError)
    assert str(victim) in str(error)
    assert ("changed while it was being converted" if noticed else "became shorter while it was being read") in str(
        error
    )
    assert "to do:" in str(error)
    assert not finished_files(tmp_path / "out")


def test_source_is_never_written_to(sharded: Path, tmp_path: Path) -> None:
    """Every command, with a folder that nobody may write to."""
    for path in (*sharded.iterdir(), sharded):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state(sharded)
    out = tmp_path / "out"
    run_process("plan", sharded, *TO, "--out", out).done()
    run_process("convert", sharded, *TO, "--out", out).done()
    run_process("verify", out, "--source", sharded).done()
    run_process("inspect", sharded).done()
    assert state(sharded) == before


# NaN and infinity


NAN = {"BF16": b"\xc0\x7f", "F16": b"\x00\x7e", "F32": b"\x00\x00\xc0\x7f"}
NEGATIVE_NAN = {"BF16": b"\xc1\xff", "F16": b"\x01\xfc", "F32": b"\x01\x00\x80\xff"}
INFINITY = {"BF16": b"\x80\x7f", "F16": b"\x00\x7c", "F32": b"\x00\x00\x80\x7f"}
NEGATIVE_INFINITY = {"BF16": b"\x80\xff", "F16": b"\x00\xfc", "F32": b"\x00\x00\x80\xff"}
BAD = [(NAN, "not a number"), (NEGATIVE_NAN, "not a number"), (INFINITY, "infinite"), (NEGATIVE_INFINITY, "infinite")]
DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
PLACES = [  # tensor, shape, row, column
    (DOWN, 160, 0, 0),
    (DOWN, 160, 31, 77),
    (DOWN, 160, 63, 159),
    (QUERY, 64, 33, 5),  # its rows are stored in another order
    ("model.norm.weight", 64, 0, 0),
    ("model.norm.weight", 64, 0, 63),
    ("lm_head.weight", 64, 511, 63),
]


def put(model: Path, name: str, index: int, value: bytes) -> Path:
    """Overwrite one weight; returns its shard."""
    for shard in shards_of(model):
        header, data = unpack(shard)
        if name in header:
            start, stop = entry(header, name)
            at = start + index * len(value)
            assert at + len(value) <= stop
            poke(shard, shard.stat().st_size - len(data) + at, value)
            return shard
    raise AssertionError(name)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}[{place[2]},{place[3]}]")
def test_nan_is_refused_with_its_place(
    dtype: str, place: tuple[str, int, int, int], tmp_path: Path, models: Callable[[str], Path]
) -> None:
    name, columns, row, column = place
    out = tmp_path / "out"
    value, words = BAD[(row + column + len(dtype)) % 4]
    model = models(dtype)
    shard = put(model, name, row * columns + column, value[dtype])
    with untouched(model):
        ran = run("convert", model, "--to", "gguf:Q8_0,Q4_0,F16,F32", "--out", out)
    ran.refused(1, words, shard.name, repr(name), f"row {row}, column {column}\n", "finite weights", "fetch this shard")
    assert not finished_files(out)
    assert not list(out.rglob("streamquant.json"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.attacks.harness import write_model

    root = tmp_path_factory.mktemp("dtypes")
    return {dtype: write_model(root / dtype / "Tiny", dtype=dtype, shards=2) for dtype in NAN}


@pytest.fixture
def models(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda dtype: Path(shutil.copytree(originals[dtype], tmp_path / dtype))


@pytest.mark.parametrize("value", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_bad_value(value: int, dtype: str, tmp_path: Path, models: Callable[[str], Path]) -> None:
    patterns, words = BAD[value]
    model = models(dtype)
    put(model, DOWN, 100, patterns[dtype])
    run("convert", model, "--to", "gguf:F32", "--out", tmp_path / "out").refused(1, words, DOWN, "row 0, column 100")


def test_nan_in_a_later_block_of_a_chunk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row counts from the tensor's begin, not from the block's or the chunk's."""
    monkeypatch.setattr("streamquant.convert.run.blocks.BLOCK_WEIGHTS", 64 * 8)
    monkeypatch.setattr("streamquant.convert.plan.records.CHUNK_BYTES", 64 * 2 * 100)
    put(model, "lm_head.weight", 237 * 64 + 3, NAN["BF16"])  # third chunk, fifth block of it
    ran = run("convert", model, *TO, "--out", tmp_path / "out", "--jobs", 3)
    ran.refused(1, "not a number", "'lm_head.weight', row 237, column 3\n")
    assert not finished_files(tmp_path / "out")


def test_nan_through_the_real_command(model: Path, tmp_path: Path) -> None:
    put(model, QUERY, 70, NAN["BF16"])
    with untouched(model):
        ran = run_process("convert", model, *TO, "--out", tmp_path / "out")
    ran.refused(
        1, "weight is not a number", "model.safetensors", QUERY, "row 1, column 6", "found:", "required:", "to do:"
    )


def test_the_largest_and_smallest_weights_are_fine(tmp_path: Path, models: Callable[[str], Path]) -> None:
    """Not everything with a large exponent is infinite."""
    model = models("BF16")
    for index, value in enumerate((b"\x7f\x7f", b"\x7f\xff", b"\x01\x00", b"\x00\x80")):
        put(model, DOWN, index, value)
    run("convert", model, "--to", "gguf:F32,BF16", "--out", tmp_path / "out").done()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_weight_too_large_for_f16(dtype: str, tmp_path: Path, models: Callable[[str], Path]) -> None:
    """1e6 becomes infinity in F16: refused, not stored."""
    model = models(dtype)
    put(model, DOWN, 2 * 160 + 9, {"BF16": b"\x74\x49", "F32": b"\x00\x24\x74\x49"}[dtype])
    ran = run("convert", model, "--to", "gguf:F16", "--out", tmp_path / "out")
    ran.refused(1, "weight too large for F16", DOWN, "row 2, column 9", "found:", "16-bit", "gguf:BF16")
    assert not finished_files(tmp_path / "out")
    run("convert", model, "--to", "gguf:BF16", "--out", tmp_path / "other").done()


def test_block_scale_too_large_for_f16(tmp_path: Path, models: Callable[[str], Path]) -> None:
    model = models("F32")
    put(model, DOWN, 2 * 160 + 9, b"\x00\x00\x00\x7f")  # 1.7e38
    ran = run("convert", model, "--to", "gguf:Q8_0", "--out", tmp_path / "out")
    ran.refused(1, "weight too large for Q8_0", DOWN, "row 2, column 9")


# What config.json and the names of tensors say


def rename_tensor(model: Path, old: str, new: str) -> None:
    header, _ = unpack(model / "model.safetensors")
    rewrite(model / "model.safetensors", {old: None, new: header[old]})


def drop_last(model: Path) -> None:
    header, data = unpack(model / "model.safetensors")
    last = max((name for name in header if name != "__metadata__"), key=lambda name: entry(header, name)[1])
    start, _ = entry(header, last)
    rewrite(model / "model.safetensors", {last: None})
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - (len(data) - start))


def reshape(model: Path) -> None:
    header, _ = unpack(model / "model.safetensors")
    rewrite(model / "model.safetensors", {DOWN: {**header[DOWN], "shape": [160, 64]}})


def config(model: Path, **change: object) -> None:
    edit_json(model / "config.json", **change)


def gptq(model: Path) -> None:
    """A quantization_config, and a tensor of a quantized layer: without one it is another model's, and left out."""
    config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    rename_tensor(model, "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.qweight")


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


REFUSALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "unknown architecture": (
        lambda m: config(m, architectures=["GPT9ForCausalLM"]),
        ("GPT9ForCausalLM", "LlamaForCausalLM", "config.json"),
    ),
    "no architecture": (lambda m: config(m, architectures=...), ("architectures", "config.json")),
    "architectures of no list": (lambda m: config(m, architectures="LlamaForCausalLM"), ("architectures",)),
    "unknown tensor": (
        lambda m: rename_tensor(m, DOWN, "model.layers.1.mlp.secret.weight"),
        ("does not explain", "model.layers.1.mlp.secret.weight", "[64, 160]"),
    ),
    "missing tensor": (drop_last, ("lacks tensors", "required:", "is a shard missing?")),
    "layer too many": (lambda m: config(m, num_hidden_layers=3), ("lacks tensors", "model.layers.2.")),
    "layer too few": (lambda m: config(m, num_hidden_layers=1), ("does not explain", "model.layers.1.")),
    "wrong shape": (reshape, (DOWN, "[160, 64]", "[64, 160]")),
    "wrong vocabulary": (lambda m: config(m, vocab_size=500), ("shape does not fit", "512", "500")),
    "unknown rope type": (
        lambda m: config(m, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        ("rope type 'spiral' is unknown", "llama3"),
    ),
    "unsupported rope type": (
        lambda m: config(m, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("'dynamic' is not supported",),
    ),
    "already quantized": (
        gptq,
        ("already quantized", "gptq", "start from the original checkpoint"),
    ),
    "a mixture of experts": (lambda m: config(m, num_local_experts=8), ("mixture of experts", "num_local_experts")),
    "config.json is a list": (lambda m: (m / "config.json").write_text("[]"), ("unexpected JSON", "list", "an object")),
    "no config.json": (lambda m: (m / "config.json").unlink(), ("no config.json",)),
    "only pickles": (only_pickles, ("no weights to convert", "pytorch_model.bin", "pickle", "safetensors first")),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ("no tokenizer", "tokenizer.model")),
    "tokenizer.json is broken": (lambda m: (m / "tokenizer.json").write_text("{"), ("broken JSON", "tokenizer.json")),
    "unknown tokenizer": (
        lambda m: edit_json(m / "tokenizer.json", model={"type": "WordPiece", "vocab": {"a": 0}}),
        ("unknown tokenizer model", "WordPiece", "BPE"),
    ),
    "unknown pre-tokenizer": (
        lambda m: edit_json(
            m / "tokenizer.json",
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "[0-9]"}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            },
        ),
        ("unknown pre-tokenizer", "tokenizer.json", "[0-9]", "--pre"),
    ),
}


@pytest.mark.parametrize("command", ["plan", "convert"])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_unknown_is_refused(case: str, command: str, model: Path, tmp_path: Path) -> None:
    change, words = REFUSALS[case]
    change(model)
    out = tmp_path / "out"
    with untouched(model):
        ran = run(command, model, *TO, *(("--out", out) if command == "convert" else ()))
    ran.refused(1, *words)
    assert not out.exists()


def test_unknown_architecture_through_the_real_command(model: Path, tmp_path: Path) -> None:
    config(model, architectures=["GPT9ForCausalLM"])
    with untouched(model):
        run_process("convert", model, *TO, "--out", tmp_path / "out").refused(1, "GPT9ForCausalLM", "required:")
    assert not (tmp_path / "out").exists()
