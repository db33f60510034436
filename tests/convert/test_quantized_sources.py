"""Sources that are quantized already: whole GGUF files against llama.cpp's converter, and what is refused."""

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamquant.convert.conversion import convert, disk_of
from streamquant.convert.manifest import MANIFEST
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.convert.source.open import open_source
from streamquant.convert.source.spool import GIB
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.readback.verify import verify
from tests import gguf_peer, synthetic
from tests import quantized_sources as sources
from tests.conftest import TINY_PRE, Shelf
from tests.gguf_peer import Job, read_gguf, requires_converter
from tests.hub import Hub
from tests.hub_source import REPO, files
from tests.oracle import ggml_encode

LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS = synthetic.ARCHITECTURES
QWEN3_MOE, MIXTRAL = synthetic.MIXTURES[:2]
OPTIONS = ConversionOptions(pre=TINY_PRE)
BF16_SCALES = sources.Scheme(scale_dtype=torch.bfloat16)
TENSOR = sources.Scheme(block=(None, None))
TENSOR_CONFIG = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
CHANNEL = sources.Scheme(block=(1, None), scale_dtype=torch.bfloat16, suffix="_scale")
CT_BLOCK = sources.Scheme(scale_dtype=torch.bfloat16, suffix="_scale")
ONE = sources.Scheme(block=(None, None), suffix="_scale")


def compressed(format_: str, **weights: object) -> dict[str, object]:
    """quantization_config of compressed-tensors, as far as llama.cpp's converter looks at it."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "group_size": None, **weights}}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}}


def packed(size: int) -> dict[str, object]:
    return compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=size)


# Arguments of the synthetic checkpoint, scheme, quantization_config.
CASES: dict[str, tuple[dict[str, Any], sources.Scheme | sources.Packed, Mapping[str, object]]] = {
    "llama": ({}, sources.BLOCK, sources.BLOCK_CONFIG),
    "qwen3": ({"architecture": QWEN3, "head_dim": 64, "tied": True}, BF16_SCALES, sources.BLOCK_CONFIG),
    "qwen3-moe": (
        {"architecture": QWEN3_MOE, "head_dim": 64, "moe_intermediate_size": 160},
        BF16_SCALES,
        sources.BLOCK_CONFIG,
    ),
    "mixtral": ({"architecture": MIXTRAL, "num_local_experts": 3}, sources.BLOCK, sources.BLOCK_CONFIG),
    "mistral-per-tensor": ({"architecture": MISTRAL}, TENSOR, TENSOR_CONFIG),
    "modelopt": ({"tied": True}, ONE, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "ct-channel": ({}, CHANNEL, compressed("float-quantized", strategy="channel")),
    "ct-block": ({}, CT_BLOCK, compressed("float-quantized", strategy="block", block_structure=[128, 128])),
    "int4": ({"architecture": QWEN3, "head_dim": 64}, sources.Packed(), packed(32)),
    "int4-zero-points": ({}, sources.Packed(64, symmetric=False), packed(64)),
}
OUTTYPES: tuple[gguf_peer.OutType, ...] = ("f32", "bf16", "q8_0")
TO = "gguf:F32,BF16,Q8_0,Q4_K_M"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SCALE = Q_PROJ + "_scale_inv"


@pytest.fixture(scope="module")
def made(shelf: Shelf) -> Path:
    """CASE/Model, CASE/OUTTYPE.gguf of the converter, CASE/out of ours."""

    def make(folder: Path) -> None:
        jobs = []
        for case, (settings, scheme, config) in CASES.items():
            model = sources.write_source(folder / case / "Model", **settings)
            sources.quantize(model, scheme, config)
            jobs += [Job(str(model), out, str(folder / case / f"{out}.gguf"), pre=TINY_PRE) for out in OUTTYPES]
            plan = make_plan(open_checkpoint(model), parse_variants([TO]), OPTIONS)
            convert(plan, folder / case / "out", RunOptions(jobs=2))
        if gguf_peer.converter_folder() is not None:
            gguf_peer.convert_many(jobs)

    return shelf.get("quantized-sources", make)


def ours(made: Path, case: str, label: str) -> Path:
    return made / case / "out" / "Model-GGUF" / f"Model-{label}.gguf"


@requires_converter
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("outtype", OUTTYPES)
def test_whole_files_are_the_converters(made: Path, case: str, outtype: str) -> None:
    found, expected = ours(made, case, outtype.upper()), made / case / f"{outtype}.gguf"
    if case.startswith("int4"):  # the converter puts what it unpacked last
        assert read_gguf(found) == read_gguf(expected)
    else:
        assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_formulas(made: Path, case: str) -> None:
    """Also where the converter is not installed: of what has the rows of Hugging Face."""
    _, tensors = read_gguf(ours(made, case, "F32"))
    expected = sources.values(made / case / "Model", CASES[case][1])
    for part, name in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj")):
        weights = expected[f"model.layers.1.{name}.weight"].numpy()
        assert tensors[f"blk.1.{part}.weight"][2] == weights.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_k_quants_are_ggmls_of_the_same_floats(made: Path, case: str) -> None:
    _, floats = read_gguf(ours(made, case, "F32"))
    _, mixed = read_gguf(ours(made, case, "Q4_K_M"))
    kinds = set()
    for name, (kind, shape, raw) in mixed.items():
        kinds.add(kind.name)
        rows = np.frombuffer(floats[name][2], np.float32).reshape(-1, shape[-1])
        expected = rows.tobytes() if kind.name == "F32" else ggml_encode(rows, kind.name).tobytes()
        assert raw == expected, name
    assert {"F32", "Q4_K", "Q6_K"} <= kinds


def test_the_loss_before_is_told(made: Path) -> None:
    model = made / "llama" / "Model"
    plan = make_plan(open_checkpoint(model), parse_variants(["gguf:Q8_0"]), OPTIONS)
    (note,) = (note for note in plan.notes if note.startswith("made from a quantized source"))
    assert "FP8 E4M3, a scale for each block of 128 x 128" in note
    manifest = json.loads((made / "llama" / "out" / "Model-GGUF" / MANIFEST).read_text())
    assert manifest["source"]["quantized"] == {
        "method": "fp8",
        "formats": ["FP8 E4M3, a scale for each block of 128 x 128"],
        "tensors": 2 * 7,
    }


def test_what_was_made_verifies_against_the_source(made: Path) -> None:
    results = verify(made / "qwen3-moe" / "out", open_checkpoint(made / "qwen3-moe" / "Model"))
    assert [problem for result in results for problem in result.problems] == []
    assert {result.spec: result.total.noise == 0 for result in results}["gguf:F32"]


def test_scales_in_another_shard(tmp_path: Path, made: Path) -> None:
    """Codes and scales of one tensor lie in different files, as where a shard was full in between."""
    model = sources.write_source(tmp_path / "Model")
    sources.quantize(model)
    sources.write(model, sources.read(model), lambda name: 2 if name.endswith("_scale_inv") else len(name) % 2)
    convert(make_plan(open_checkpoint(model), parse_variants(["gguf:F32"]), OPTIONS), tmp_path / "out")
    _, found = read_gguf(tmp_path / "out" / "Model-GGUF" / "Model-F32.gguf")
    _, expected = read_gguf(ours(made, "llama", "F32"))
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q_PROJ}_scale"), ("quantized weights without their scales", f"{Q_PROJ}_scale")),
        (lambda t: t.pop(f"{Q_PROJ}_packed"), ("scales without their weights", f"{Q_PROJ}_packed")),
        (
            lambda t: t.update({f"{Q_PROJ}_scale": t[f"{Q_PROJ}_scale"][:, 1:]}),
            ("scales of the wrong shape", "[256, 4]", "a zero point for each 64 columns"),
        ),
        (
            lambda t: t.update({f"{Q_PROJ}_zero_point": t[f"{Q_PROJ}_zero_point"][1:]}),
            ("scales of the wrong shape", f"{Q_PROJ}_zero_point", "[32, 4]"),
        ),
        (lambda t: t.update({f"{Q_PROJ}_packed": t[f"{Q_PROJ}_packed"].long()}), ("not known", "I64 [256, 32]")),
    ],
)
def test_packed_codes_that_do_not_fit(
    tmp_path: Path, change: Callable[[sources.Tensors], object], words: tuple[str, ...]
) -> None:
    model = sources.write_source(tmp_path / "Model")
    sources.quantize(model, sources.Packed(64, symmetric=False), packed(64))
    tensors = sources.read(model)
    change(tensors)
    sources.write(model, tensors)
    with pytest.raises(StreamquantError) as error:
        open_checkpoint(model)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_scales_of_activations_and_of_a_cache_are_left_out(tmp_path: Path, made: Path) -> None:
    model = sources.write_source(tmp_path / "Model", **CASES["modelopt"][0])
    sources.quantize(model, ONE, CASES["modelopt"][2])
    tensors = sources.read(model)
    place = Q_PROJ.removesuffix(".q_proj.weight")
    one = torch.ones(1)
    tensors |= {f"{place}.q_proj.input_scale": one, f"{place}.k_proj.k_scale": one, f"{place}.v_proj.v_scale": one}
    sources.write(model, tensors)
    plan = make_plan(open_checkpoint(model), parse_variants(["gguf:Q8_0"]), OPTIONS)
    assert any(note.startswith("left out: 3 scales of activations") for note in plan.notes)
    convert(plan, tmp_path / "out", RunOptions(jobs=1))
    found = tmp_path / "out" / "Model-GGUF" / "Model-Q8_0.gguf"
    assert found.read_bytes() == ours(made, "modelopt", "Q8_0").read_bytes()


def lost(name: str) -> Callable[[sources.Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[sources.Tensors], None]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


def with_nan(codes: torch.Tensor) -> torch.Tensor:
    raw = codes.view(torch.uint8).clone()
    raw[200, 17] = 0xFF
    return raw.view(torch.float8_e4m3fn)


REFUSED: dict[str, tuple[Callable[[sources.Tensors], None], tuple[str, ...]]] = {
    "no scales": (lost(SCALE), ("quantized weights without their scales", Q_PROJ, "download")),
    "no weights": (lost(Q_PROJ), ("scales without their weights", SCALE, "no such tensor")),
    "scales beside floats": (
        changed(Q_PROJ, lambda codes: codes.to(torch.bfloat16)),
        ("scales without their weights", SCALE, "BF16 [256, 256]"),
    ),
    "a row too few": (changed(SCALE, lambda s: s[:1]), ("scales of the wrong shape", SCALE, "[1, 2]", "[2, 2]")),
    "flat": (changed(SCALE, lambda s: s.reshape(-1)), ("scales of the wrong shape", SCALE, "[4]")),
    "integers": (changed(SCALE, lambda s: s.to(torch.int32)), ("quantization of the source", SCALE, "I32")),
    "three dimensions": (changed(Q_PROJ, lambda c: c[None]), ("quantization of the source", Q_PROJ, "[1, 256, 256]")),
    "another FP8": (
        changed(Q_PROJ, lambda codes: codes.float().to(torch.float8_e5m2)),
        ("scales without their weights", "F8_E5M2"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_codes_and_scales_that_do_not_fit(tmp_path: Path, case: str) -> None:
    change, words = REFUSED[case]
    model = sources.quantize(sources.write_source(tmp_path / "Model"))
    tensors = sources.read(model)
    change(tensors)
    sources.write(model, tensors)
    with pytest.raises(StreamquantError) as error:
        open_checkpoint(model)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [(Q_PROJ, with_nan), (SCALE, lambda scales: scales * float("nan")), (SCALE, lambda scales: scales * 1e40)],
)
def test_values_that_are_no_numbers(tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = sources.quantize(sources.write_source(tmp_path / "Model"))
    tensors = sources.read(model)
    tensors[name] = change(tensors[name])
    sources.write(model, tensors)
    plan = make_plan(open_checkpoint(model), parse_variants(["gguf:Q8_0"]), OPTIONS)
    with pytest.raises(StreamquantError, match=r"weight is (not a number|infinite)") as error:
        convert(plan, tmp_path / "out")
    assert Q_PROJ in str(error.value)
    assert name != Q_PROJ or "row 200, column 17" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": [128]}, r"a size of blocks that is none[\s\S]*\[128\]"),
        ({"weight_block_size": [0, 128]}, "a size of blocks that is none"),
        ({"weight_block_size": [64, 64]}, r"scales of the wrong shape[\s\S]*64 x 64"),
        ({"quant_method": "fbgemm_fp8"}, "dtype cannot be converted"),
    ],
)
def test_configs_that_do_not_explain_the_codes(tmp_path: Path, change: dict[str, object], message: str) -> None:
    model = sources.quantize(sources.write_source(tmp_path / "Model"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] |= change
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(StreamquantError, match=message):
        open_checkpoint(model)


# --- checkpoints of safetensors -------------------------------------------------------------------------------------


def made_of(model: Path, out: Path, *to: str) -> Path:
    """The folder of the last variant."""
    plan = make_plan(open_checkpoint(model), parse_variants([*to]), OPTIONS)
    convert(plan, out, RunOptions(jobs=2))
    return out / plan.variants[-1].folder


@pytest.fixture(scope="module")
def plain(shelf: Shelf, made: Path) -> Path:
    """bf16 of the case "qwen3-moe", from shards."""

    def make(folder: Path) -> None:
        model = sources.write_source(folder / "Model", **CASES["qwen3-moe"][0])
        sources.quantize(model, BF16_SCALES)
        sources.write(model, sources.read(model), lambda name: len(name) % 3)
        made_of(model, folder / "out", "bf16")

    return shelf.get("quantized-sources-bf16", make)


def test_bf16_is_the_formula_rounded_and_loads_in_transformers(plain: Path) -> None:
    folder = plain / "out" / "Model-BF16"
    expected = {name: v.to(torch.bfloat16) for name, v in sources.values(plain / "Model", BF16_SCALES).items()}
    found = sources.read(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    assert (folder / "tokenizer.json").is_file()
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16


def test_fp8_of_another_kind_is_that_of_the_bf16_checkpoint(plain: Path, tmp_path: Path) -> None:
    """Which is llm-compressor's (test_fp8_parity.py), and its own way: FP8BlockDequantizer, then model_free_ptq."""
    direct = sources.read(made_of(plain / "Model", tmp_path / "direct", "gguf:Q8_0", "fp8-dynamic"))
    detour = sources.read(made_of(plain / "out" / "Model-BF16", tmp_path / "detour", "fp8-dynamic"))
    assert direct.keys() == detour.keys()
    raw = torch.uint8
    assert all(torch.equal(direct[n].reshape(-1).view(raw), detour[n].reshape(-1).view(raw)) for n in direct)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_fp8_of_the_same_kind_takes_codes_and_scales_as_they_are(made: Path, tmp_path: Path, case: str) -> None:
    model = made / case / "Model"
    folder = made_of(model, tmp_path / "out", "fp8-block")
    stored, found = sources.read(model), sources.read(folder)
    assert {name.replace("_scale_inv", "_scale") for name in stored} == found.keys()
    for name, value in stored.items():
        same = found[name.replace("_scale_inv", "_scale")]
        assert same.dtype == value.dtype, name
        assert torch.equal(same.view(torch.uint8), value.view(torch.uint8)), name
    results = verify(tmp_path / "out", open_checkpoint(model))
    assert [result.problems for result in results] == [[]]
    assert results[0].total.noise == 0
    from streamquant.model.variants.open import open_variant

    variant = open_variant(folder)
    expected = sources.values(model, CASES[case][1])
    assert all(torch.equal(variant.read(name, torch.float32), value) for name, value in expected.items())


def test_bf16_of_bf16_is_a_copy_and_says_so(tmp_path: Path) -> None:
    model = sources.write_source(tmp_path / "Model")
    plan = make_plan(open_checkpoint(model), parse_variants(["bf16"]), OPTIONS)
    assert "bf16: the source is in BF16 already: this is a copy of it" in plan.notes
    convert(plan, tmp_path / "out", RunOptions(jobs=1))
    before, after = sources.read(model), sources.read(tmp_path / "out" / "Model-BF16")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_bf16_of_other_floats_is_rounded(tmp_path: Path, dtype: str) -> None:
    model = sources.write_source(tmp_path / "Model", dtype=dtype)
    after = sources.read(made_of(model, tmp_path / "out", "bf16"))
    before = sources.read(model)
    assert all(torch.equal(after[name], value.to(torch.bfloat16)) for name, value in before.items())


def test_the_original_of_a_validation_is_the_dequantized_model(made: Path, tmp_path: Path) -> None:
    from streamquant.model.variants.open import open_original

    model = made / "llama" / "Model"
    for folder in (model, made_of(model, tmp_path / "out", "fp8-block")):
        original = open_original(folder)
        assert original.activations() is None
        for name, value in sources.values(model).items():
            assert torch.equal(original.read(name, torch.float32), value)
            assert torch.equal(original.slice(name, 1, 3), value[1:3])


def test_shards_of_codes_and_scales_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    """Scales lie in the shard after that of their codes; the spool holds no more than what it must."""
    model = sources.quantize(sources.write_source(tmp_path / "Model"))
    tensors = sources.read(model)
    codes = [name for name in tensors if not name.endswith("_scale_inv")]
    place = {name: 5 * number // len(codes) for number, name in enumerate(sorted(codes))}
    sources.write(model, tensors, lambda name: place[name] if name in place else place[name[: -len("_scale_inv")]] + 1)
    hub.add_repo(REPO, files(model))
    checkpoint = open_source(REPO)
    with pytest.raises(UsageError, match=r"at least ([0-9.]+) GiB for model-\S+, model-") as error:
        disk_of(make_plan(checkpoint, parse_variants(["gguf:F32"]), OPTIONS), RunOptions(spool_gib=1e-9))
    least = max(sum(file.size for file in pair) for pair in pairwise(checkpoint.files))
    for number, gib in enumerate((least / GIB, None)):
        plan = make_plan(checkpoint, parse_variants(["gguf:F32"]), OPTIONS)
        convert(plan, tmp_path / f"out{number}", RunOptions(jobs=3, spool_gib=gib))
        local = make_plan(open_checkpoint(model), parse_variants(["gguf:F32"]), OPTIONS)
        convert(local, tmp_path / f"local{number}", RunOptions(jobs=1))
        made_there, made_here = tmp_path / f"out{number}" / plan.files[0].path, tmp_path / f"local{number}"
        assert read_gguf(made_there)[1] == read_gguf(made_here / local.files[0].path)[1]
    assert "smaller than a shard" in str(error.value)
