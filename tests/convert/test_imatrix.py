"""Importance matrices: what llama-quantize reads in them, what it refuses, and the bytes that come of it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from streamquant.convert.conversion import convert
from streamquant.convert.manifest import read_manifest
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.imatrix import ImportanceMatrix, read_imatrix
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.formats import FORMATS
from streamquant.validate.readback.verify import verify
from tests.conftest import TINY_PRE, read_safetensors
from tests.gguf_peer import read_gguf
from tests.imatrix_files import TINY_COLUMNS, legacy_bytes, some_entries, write_imatrix
from tests.oracle import ggml_encode

VARIANTS = ["gguf:Q4_K_M,Q2_K_S,IQ4_XS,IQ4_NL,Q4_0,Q8_0,BF16"]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An importance matrix of `tiny`, without an entry for embeddings and output, as usual."""
    return write_imatrix(tmp_path_factory.mktemp("imatrix") / "Tiny.imatrix.gguf", some_entries(TINY_COLUMNS))


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory, tiny: Path, matrix: Path) -> Path:
    """The --out folder of `tiny` with the matrix."""
    out = tmp_path_factory.mktemp("weighted")
    options = ConversionOptions(pre=TINY_PRE, imatrix=read_imatrix(matrix))
    convert(make_plan(open_checkpoint(tiny), parse_variants(VARIANTS), options), out, RunOptions(jobs=2))
    return out


def f32(values: object) -> NDArray[np.float32]:
    return np.array(values, np.float32)


# --- reading --------------------------------------------------------------------------------------------------------


def test_gguf_values_are_mean_squares(tmp_path: Path) -> None:
    """sum / count in single precision for each expert, ones for one that saw nothing."""
    sums = f32([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    counts = f32([[3], [0], [7]])
    found = read_imatrix(write_imatrix(tmp_path / "m.gguf", {"a.weight": (sums, counts)}, datasets=("x", "y")))
    expected = np.stack([sums[0] / np.float32(3), np.ones(3, np.float32), sums[2] / np.float32(7)])
    assert found.entries.keys() == {"a.weight"}
    assert found.entries["a.weight"].tobytes() == expected.astype(np.float32).tobytes()
    assert (found.datasets, found.chunk_count, found.name) == (("x", "y"), 8, "m.gguf")


def test_counts_are_rounded_half_up(tmp_path: Path) -> None:
    entries = {"a": (f32([[9, 8]]), f32([[2.5]])), "b": (f32([[9, 8]]), f32([[0.4]]))}
    found = read_imatrix(write_imatrix(tmp_path / "m.gguf", entries)).entries
    assert found["a"].tolist() == [3.0, np.float32(8) / np.float32(3)]
    assert found["b"].tolist() == [1.0, 1.0]


def test_legacy_values_are_divided_by_calls(tmp_path: Path) -> None:
    values = f32([1, 2, 5])
    content = legacy_bytes({"a.weight": (3, values), "b.weight": (0, values)}, chunks=17, dataset="text.raw")
    path = tmp_path / "m.dat"
    path.write_bytes(content)
    found = read_imatrix(path)
    assert found.entries["a.weight"].tobytes() == (values / np.float32(3)).tobytes()
    assert found.entries["b.weight"].tobytes() == values.tobytes()
    assert (found.datasets, found.chunk_count) == (("text.raw",), 17)


def test_legacy_files_may_end_after_the_entries(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    content = legacy_bytes({"a.weight": (3, f32([1]))}, dataset="")
    path.write_bytes(content[:-8])
    found = read_imatrix(path)
    assert (found.datasets, found.chunk_count, len(found.entries)) == ((), 0, 1)


def gguf_of(path: Path, change: Callable[[gguf.GGUFWriter], object]) -> None:
    writer = gguf.GGUFWriter(path, "unused")
    writer.kv_data[0].pop("general.architecture")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair(writer: gguf.GGUFWriter, sums: object, counts: object) -> bool:
    writer.add_tensor("a.in_sum2", np.asarray(sums))
    writer.add_tensor("a.counts", np.asarray(counts))
    return True


ONE = f32([1])
BROKEN_GGUF: dict[str, tuple[Callable[[gguf.GGUFWriter], object], str]] = {
    "a model": (lambda w: (w.add_string("general.type", "model"), pair(w, ONE, ONE)), "general.type 'model'"),
    "no chunk size": (lambda w: (w.kv_data[0].pop("imatrix.chunk_size"), pair(w, ONE, ONE)), "no imatrix.chunk_size"),
    "no datasets": (lambda w: (w.kv_data[0].pop("imatrix.datasets"), pair(w, ONE, ONE)), "no imatrix.datasets"),
    "datasets are numbers": (
        lambda w: (w.kv_data[0].pop("imatrix.datasets"), w.add_array("imatrix.datasets", [1]), pair(w, ONE, ONE)),
        "not a list of strings",
    ),
    "no entries": (lambda w: w.add_tensor("a.stats", ONE), "no tensor ends in"),
    "no counts": (lambda w: w.add_tensor("a.in_sum2", ONE), "no tensor 'a.counts'"),
    "no sums": (lambda w: w.add_tensor("a.counts", ONE), "no tensor 'a.in_sum2'"),
    "means alone": (lambda w: w.add_tensor("a.in_sum", ONE), "no tensor 'a.in_sum2'"),
    "half floats": (lambda w: pair(w, np.array([1], np.float16), ONE), "is F16, not F32"),
    "uneven": (lambda w: pair(w, f32([1, 2, 3]), f32([1, 1])), "3 sums and 2 counts"),
    "nan": (lambda w: pair(w, f32([np.nan]), ONE), "not finite"),
    "infinity": (lambda w: pair(w, f32([np.inf]), ONE), "not finite"),
    "negative": (lambda w: pair(w, f32([-1]), ONE), "negative values"),
    "negative count": (lambda w: pair(w, ONE, f32([-1])), "counts that are negative"),
    "nan count": (lambda w: pair(w, ONE, f32([np.nan])), "counts that are negative or not finite"),
}


@pytest.mark.parametrize("name", BROKEN_GGUF)
def test_broken_gguf_is_refused(name: str, tmp_path: Path) -> None:
    change, message = BROKEN_GGUF[name]
    path = tmp_path / "m.gguf"
    gguf_of(path, change)
    with pytest.raises(StreamquantError, match=message) as caught:
        read_imatrix(path)
    assert str(path) in str(caught.value)


def legacy(*numbers: int, name: bytes = b"a", tail: bytes = b"") -> bytes:
    """One entry: entries, length of the name, calls, values; then bytes."""
    entries, length, calls, size = numbers
    return struct.pack("<ii", entries, length) + name + struct.pack("<ii", calls, size) + tail


FLOAT = struct.pack("<f", 1)
BROKEN_LEGACY = {
    "empty": (b"", "ends in the number of entries"),
    "no entries": (struct.pack("<i", 0), "0 entries"),
    "negative entries": (struct.pack("<i", -1), "-1 entries"),
    "too many entries": (legacy(1 << 30, 1, 1, 1, tail=FLOAT), "1,073,741,824 entries"),
    "long name": (legacy(1, 1 << 30, 1, 1, tail=FLOAT), "a name of 1,073,741,824 bytes"),
    "negative name": (legacy(1, -1, 1, 1, tail=FLOAT), "a name of -1 bytes"),
    "zero in the name": (legacy(1, 1, 1, 1, name=b"\0", tail=FLOAT), "a zero byte"),
    "no name": (legacy(1, 0, 1, 1, name=b"", tail=FLOAT), "entry ''"),
    "no values": (legacy(1, 1, 1, 0, tail=FLOAT), "0 values"),
    "negative calls": (legacy(1, 1, -1, 1, tail=FLOAT), "-1 calls"),
    "many values": (legacy(1, 1, 1, 1 << 30, tail=FLOAT), "ends in the values of 'a'"),
    "nan": (legacy(1, 1, 1, 1, tail=struct.pack("<f", float("nan"))), "not finite"),
    "negative": (legacy(1, 1, 1, 1, tail=struct.pack("<f", -1)), "negative values"),
    "cut dataset": (legacy(1, 1, 1, 1, tail=FLOAT + struct.pack("<ii", 1, 9) + b"x"), "ends in the dataset"),
    "bytes too many": (legacy(1, 1, 1, 1, tail=FLOAT + struct.pack("<ii", 1, 0) + b"x"), "1 bytes too many"),
    "twice": (struct.pack("<i", 2) + 2 * legacy(1, 1, 1, 1, tail=FLOAT)[4:] + bytes(8), "occurs twice"),
}


@pytest.mark.parametrize("name", BROKEN_LEGACY)
def test_broken_legacy_file_is_refused(name: str, tmp_path: Path) -> None:
    content, message = BROKEN_LEGACY[name]
    path = tmp_path / "m.dat"
    path.write_bytes(content)
    with pytest.raises(StreamquantError, match=message):
        read_imatrix(path)


def test_truncated_files_are_refused_at_every_length(tmp_path: Path) -> None:
    """Of the legacy file but where an old version would end."""
    whole = write_imatrix(tmp_path / "m.gguf", {"a.weight": (ONE, ONE)}).read_bytes()
    old = legacy_bytes({"a.weight": (3, f32([1, 2]))})
    ends = {len(old) - 8 - len("calibration.txt")}
    path = tmp_path / "cut"
    for content, fine in ((whole, set(range(len(whole) - 31, len(whole)))), (old, ends)):
        for length in sorted(set(range(0, len(content), 3)) - fine):
            path.write_bytes(content[:length])
            with pytest.raises(StreamquantError):
                read_imatrix(path)


def test_no_such_file_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StreamquantError, match="no importance matrix here"):
            read_imatrix(path)


# --- rules ----------------------------------------------------------------------------------------------------------


def of(**entries: int) -> ImportanceMatrix:
    values = {name: np.ones(size, np.float32) for name, size in entries.items()}
    return ImportanceMatrix("m.gguf", "0" * 64, ("x",), 5, values)


def test_entries_are_found_by_exact_name_and_length() -> None:
    matrix = of(**{"a.weight": 6, "token_embd.weight": 5})
    assert matrix.find("a.weight", (4, 6)) is not None
    assert matrix.find("a.weight", (3, 4, 2)) is not None, "three experts of two columns"
    assert matrix.find("a", (4, 6)) is None
    assert matrix.find("token_embd.weight", (4, 6)) is None, "another length counts as none"
    for shape in ((6, 4), (2, 4, 6)):
        with pytest.raises(StreamquantError, match="another length"):
            matrix.find("a.weight", shape)


def test_weights_are_included_and_excluded_by_part_of_the_name() -> None:
    matrix = of(**{"blk.0.ffn_up": 1, "blk.0.ffn_down": 1, "blk.1.attn_q": 1})
    assert matrix.select(["ffn_", "attn_q"]).entries.keys() == matrix.entries.keys()
    assert set(matrix.select(include=["down"]).entries) == {"blk.0.ffn_down"}
    assert set(matrix.select(exclude=["down", "attn"]).entries) == {"blk.0.ffn_up"}
    assert matrix.select(exclude=["down"]).record().exclude_weights == ("down",)
    with pytest.raises(UsageError, match="contradict"):
        matrix.select(["a"], ["b"])
    with pytest.raises(UsageError, match="no entry"):
        matrix.select(["nothing"])


def test_keys_are_cut_and_typed_as_llama_quantize_does() -> None:
    values = {"a": np.ones(1, np.float32)}
    matrix = ImportanceMatrix("n" * 126 + "éé", "", ("d" * 200, "second"), 5, values)
    keys = {key: (value.value, value.type) for key, value in matrix.keys().items()}
    assert list(keys) == [f"quantize.imatrix.{key}" for key in ("file", "dataset", "entries_count", "chunks_count")]
    assert keys["quantize.imatrix.file"] == ("n" * 126, GGUFValueType.STRING), "127 bytes, and whole characters"
    assert keys["quantize.imatrix.dataset"] == ("d" * 127, GGUFValueType.STRING)
    assert keys["quantize.imatrix.chunks_count"] == (5, GGUFValueType.UINT32)
    assert list(ImportanceMatrix("n", "", (), 0, values).keys()) == [
        "quantize.imatrix.file",
        "quantize.imatrix.entries_count",
    ]


# --- conversion -----------------------------------------------------------------------------------------------------


def source_rows(tiny: Path) -> dict[str, NDArray[np.float32]]:
    rows = {}
    for shard in tiny.glob("*.safetensors"):
        for name, (_, shape, raw) in read_safetensors(shard).items():
            rows[name] = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return rows


HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def as_llama(name: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of q and k in pairs, as llama.cpp has them."""
    heads = {"attn_q": 8, "attn_k": 2}.get(name)
    return rows if heads is None else rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("label", ["Q4_K_M", "Q2_K_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q8_0"])
def test_bytes_are_ggmls_with_importance(label: str, weighted: Path, tiny: Path, matrix: Path) -> None:
    entries, rows = read_imatrix(matrix).entries, source_rows(tiny)
    _, tensors = read_gguf(weighted / f"Tiny-GGUF/Tiny-{label}.gguf")
    weighs = 0
    for layer in range(3):
        for short, hf_name in HF_NAMES.items():
            name = f"blk.{layer}.{short}.weight"
            kind, _, raw = tensors[name]
            source = as_llama(short, rows[f"model.layers.{layer}.{hf_name}.weight"])
            assert raw == ggml_encode(source, kind.name, entries[name]).tobytes(), (name, kind)
            weighs += raw != ggml_encode(source, kind.name).tobytes()
    kind, _, raw = tensors["output.weight"]
    assert raw == ggml_encode(rows["lm_head.weight"], kind.name).tobytes(), "no entry: without"
    assert weighs >= 20 if label != "Q8_0" else weighs == 0


def test_files_say_what_weighed_them(weighted: Path) -> None:
    keys, _ = read_gguf(weighted / "Tiny-GGUF/Tiny-Q4_K_M.gguf")
    last = dict(list(keys.items())[-4:])
    assert last == {
        "quantize.imatrix.file": ((GGUFValueType.STRING,), "Tiny.imatrix.gguf"),
        "quantize.imatrix.dataset": ((GGUFValueType.STRING,), "calibration.txt"),
        "quantize.imatrix.entries_count": ((GGUFValueType.UINT32,), 21),
        "quantize.imatrix.chunks_count": ((GGUFValueType.UINT32,), 8),
    }
    for label in ("Q8_0", "BF16"):  # the converter's own: nothing in them was weighed
        keys, _ = read_gguf(weighted / f"Tiny-GGUF/Tiny-{label}.gguf")
        assert not [key for key in keys if "imatrix" in key]


def test_manifest_records_the_matrix(weighted: Path, matrix: Path) -> None:
    manifest = read_manifest(weighted / "Tiny-GGUF")
    assert manifest is not None
    assert manifest.variants["gguf:Q4_K_M"].json()["options"]["imatrix"] == {
        "file": "Tiny.imatrix.gguf",
        "sha256": read_imatrix(matrix).sha256,
        "datasets": ["calibration.txt"],
        "entries": 21,
        "chunks": 8,
        "include_weights": [],
        "exclude_weights": [],
    }
    assert manifest.variants["gguf:Q8_0"].json()["options"]["imatrix"] is None
    assert str(matrix.parent) not in json.dumps(manifest.json())


def test_source_is_verified_with_the_same_matrix(weighted: Path, tiny: Path, matrix: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    renamed = read_imatrix(Path(shutil.copy(matrix, tmp_path / "another name.gguf")))
    assert [result.problems for result in verify(weighted, checkpoint, renamed)] == [[]] * 7
    assert [result.problems for result in verify(weighted)] == [[]] * 7
    other = read_imatrix(write_imatrix(tmp_path / "Tiny.imatrix.gguf", some_entries(TINY_COLUMNS, seed=2)))
    for wrong in (None, other):
        with pytest.raises(UsageError, match="can only be encoded again with it") as caught:
            verify(weighted, checkpoint, wrong)
        assert renamed.sha256 in str(caught.value)


def test_weighted_bytes_are_compared(weighted: Path, tiny: Path, matrix: Path, tmp_path: Path) -> None:
    """A manifest that names a selection of the entries is encoded again with that selection, and so differs."""
    out = shutil.copytree(weighted / "Tiny-GGUF", tmp_path / "out")
    manifest = json.loads((out / "streamquant.json").read_text())
    manifest["variants"] = {"gguf:Q4_0": manifest["variants"]["gguf:Q4_0"]}
    manifest["variants"]["gguf:Q4_0"]["options"]["imatrix"]["exclude_weights"] = ["blk.1.ffn_up"]
    (out / "streamquant.json").write_text(json.dumps(manifest))
    (result,) = verify(out, open_checkpoint(tiny), read_imatrix(matrix))
    assert any("blk.1.ffn_up.weight" in problem for problem in result.problems)
    assert not any("blk.2" in problem for problem in result.problems)


def test_another_matrix_is_another_plan(tiny: Path, matrix: Path, tmp_path: Path) -> None:
    def fingerprints(imatrix: ImportanceMatrix | None) -> dict[str, str]:
        variants = parse_variants(["fp8-block", "gguf:Q8_0,Q4_K_M"])
        plan = make_plan(open_checkpoint(tiny), variants, ConversionOptions(pre=TINY_PRE, imatrix=imatrix))
        return {variant.recipe.spec: plan.variant_fingerprint(variant) for variant in plan.variants}

    first = read_imatrix(matrix)
    second = read_imatrix(write_imatrix(tmp_path / matrix.name, some_entries(TINY_COLUMNS, seed=2)))
    plain, one, two, some = map(fingerprints, (None, first, second, first.select(exclude=["ffn_up"])))
    assert len({found["gguf:Q4_K_M"] for found in (plain, one, two, some)}) == 4
    for spec in ("fp8-block", "gguf:Q8_0"):
        assert len({found[spec] for found in (plain, one, two, some)}) == 1, "it has no part in them"


def test_plan_says_what_is_missing_and_what_is_left_over(tiny: Path, tmp_path: Path) -> None:
    columns = {**TINY_COLUMNS, "blk.3.attn_q.weight": 256}
    del columns["blk.0.attn_q.weight"]
    imatrix = read_imatrix(write_imatrix(tmp_path / "m.gguf", some_entries(columns)))
    plan = make_plan(
        open_checkpoint(tiny), parse_variants(["gguf:Q4_K_M"]), ConversionOptions(pre=TINY_PRE, imatrix=imatrix)
    )
    notes = "\n".join(plan.notes)
    assert "encoded without: blk.0.attn_q.weight, output.weight, token_embd.weight" in notes
    assert "not in this model: blk.3.attn_q.weight" in notes
    assert plan.memory_bytes(1) > make_plan(
        open_checkpoint(tiny), parse_variants(["gguf:Q4_K_M"]), ConversionOptions(pre=TINY_PRE)
    ).memory_bytes(1)


def test_the_matrix_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    def plan(columns: dict[str, int]) -> None:
        imatrix = read_imatrix(write_imatrix(tmp_path / "m.gguf", some_entries(columns)))
        make_plan(
            open_checkpoint(tiny), parse_variants(["gguf:Q4_K_M"]), ConversionOptions(pre=TINY_PRE, imatrix=imatrix)
        )

    with pytest.raises(StreamquantError, match="importance matrix of another model"):
        plan({"encoder.weight": 256})
    with pytest.raises(StreamquantError, match="another length") as caught:
        plan({**TINY_COLUMNS, "blk.1.ffn_down.weight": 256})
    assert "'blk.1.ffn_down.weight'" in str(caught.value)
    plan({**TINY_COLUMNS, "token_embd.weight": 100})


def test_formats_that_need_importance_are_refused_without(tiny: Path, tmp_path: Path) -> None:
    """Before anything is written, by the names of the tensors."""
    checkpoint, variants = open_checkpoint(tiny), parse_variants(["gguf:Q2_K_S"])
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="gguf:Q2_K_S needs an importance matrix") as caught:
        convert(make_plan(checkpoint, variants, ConversionOptions(pre=TINY_PRE)), out, RunOptions(jobs=1))
    assert "blk.0.ffn_down.weight" in str(caught.value)
    columns = dict(TINY_COLUMNS)
    del columns["blk.2.ffn_up.weight"]
    imatrix = read_imatrix(write_imatrix(tmp_path / "m.gguf", some_entries(columns)))
    with pytest.raises(StreamquantError, match="has no entry for some tensors") as refused:
        convert(
            make_plan(checkpoint, variants, ConversionOptions(pre=TINY_PRE, imatrix=imatrix)), out, RunOptions(jobs=1)
        )
    assert "none for blk.2.ffn_up.weight" in str(refused.value)
    assert not out.exists()


def test_every_format_says_whether_importance_counts() -> None:
    """The shared table of formats and ggml agree."""
    rng = np.random.default_rng(0)
    rows, importance = rng.standard_normal((4, 512), np.float32), rng.random(512, np.float32) ** 4
    for name, entry in FORMATS.items():
        if name not in gguf.GGMLQuantizationType.__members__ or name in ("F32", "F16", "BF16"):
            assert not entry.uses_importance, name
            continue
        weighs = not np.array_equal(ggml_encode(rows, name), ggml_encode(rows, name, importance))
        assert entry.uses_importance == weighs, name
