"""Variants with measured scales against llm-compressor: its oneshot (long), and compressed-tensors' own functions."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from streamquant.calibrate.calibration import calibrate
from streamquant.calibrate.samples import Samples
from streamquant.convert.conversion import Conversion, convert
from streamquant.convert.manifest import read_manifest
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.view import plan_view
from streamquant.convert.recipes.calibration import read_calibration
from streamquant.convert.recipes.recipe import RECIPES, parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.safetensors_file import read_header
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.checkpoint import CheckpointVariant
from streamquant.model.variants.open import open_original, open_variant
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.readback.verify import verify
from tests import synthetic
from tests.conftest import Shelf, read_safetensors, write_small_tokenizer
from tests.model.test_forward import largest_difference, resident

pytestmark = [pytest.mark.xdist_group("calibrated"), pytest.mark.timeout(900)]

VARIANTS = [spec for spec, recipe in RECIPES.items() if recipe.needs_calibration]
SIZE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"size": SIZE, "shards": 2},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "size": SIZE, "tied": True},
}
CONTEXT = 64


class Calibrated:
    """Checkpoints with some weights of -0.0, their calibrations, and all variants of each."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def source(self, case: str) -> Path:
        def make(folder: Path) -> None:
            tokenizer = write_small_tokenizer(folder / "tokenizer")
            synthetic.write_checkpoint(folder / case, tokenizer=tokenizer, extra_side_files=False, **CASES[case])
            add_minus_zeros(folder / case)

        return self.shelf.get(f"calibrated-source-{case}", make) / case

    def samples(self, case: str) -> Samples:
        variant = open_original(self.source(case))
        tokens = np.random.default_rng(1).integers(0, variant.description.vocab_size, (3, CONTEXT))
        return Samples(tokens, np.full(3, CONTEXT), CONTEXT, ("some.txt",))

    def calibration(self, case: str) -> Path:
        def make(folder: Path) -> None:
            variant = open_original(self.source(case))
            assert isinstance(variant, CheckpointVariant)
            calibrate(variant, self.samples(case), folder / "calibration.safetensors")

        return self.shelf.get(f"calibrated-file-{case}", make) / "calibration.safetensors"

    def variants(self, case: str) -> Path:
        return self.shelf.get(f"calibrated-variants-{case}", lambda out: self.convert(case, out))

    def convert(self, case: str, out: Path, specs: list[str] = VARIANTS) -> Conversion:
        options = ConversionOptions(calibration=read_calibration(self.calibration(case)))
        return convert(make_plan(open_checkpoint(self.source(case)), parse_variants(specs), options), out)

    def folder(self, case: str, spec: str) -> Path:
        return self.variants(case) / f"{case}-{RECIPES[spec].label}"


def add_minus_zeros(folder: Path) -> None:
    """Put -0.0 and a tiny weight into every matrix, which the encoders of oneshot tell apart."""
    for path in folder.glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        for tensor in read_header(path)[0].values():
            if tensor.name.endswith("_proj.weight"):
                raw[tensor.start : tensor.start + 4] = b"\x00\x80\x01\x80"  # BF16: -0.0, -2**-133
        path.write_bytes(raw)


@pytest.fixture(scope="module")
def calibrated(shelf: Shelf) -> Calibrated:
    return Calibrated(shelf)


def tensors_of(folder: Path) -> dict[str, Any]:
    return {name: found for path in folder.glob("*.safetensors") for name, found in read_safetensors(path).items()}


ONESHOT = """
import sys, numpy as np
from compressed_tensors.quantization import QuantizationArgs
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

source, tokens, out, *schemes = sys.argv[1:]
tokens = np.load(tokens)
rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
for scheme in schemes:
    name, _, kv = scheme.partition("+")
    cache = QuantizationArgs(num_bits=8, type="float", symmetric=True, dynamic=False, observer="static_minmax")
    recipe = QuantizationModifier(
        targets="Linear", scheme=name, ignore=["lm_head"], kv_cache_scheme=cache if kv else None
    )
    oneshot(model=AutoModelForCausalLM.from_pretrained(source, dtype="auto"), dataset=rows, recipe=recipe,
            processor=AutoTokenizer.from_pretrained(source), max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens), output_dir=f"{out}/{scheme}", shuffle_calibration_samples=False)
"""


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_folders_equal_oneshot(calibrated: Calibrated, case: str, tmp_path: Path) -> None:
    """All tensors, their dtypes and shapes, and all of config.json."""
    np.save(tmp_path / "tokens.npy", calibrated.samples(case).tokens)
    schemes = [RECIPES[spec].scheme or "" for spec in VARIANTS]
    command = [sys.executable, "-c", ONESHOT, str(calibrated.source(case)), "tokens.npy", str(tmp_path), *schemes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=800, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    for spec, scheme in zip(VARIANTS, schemes, strict=True):
        ours, reference = calibrated.folder(case, spec), tmp_path / scheme
        found, expected = tensors_of(ours), tensors_of(reference)
        assert found.keys() == expected.keys(), spec
        assert not [name for name in found if found[name] != expected[name]], spec
        configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, reference)]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"], spec


def test_scales_and_codes_are_those_of_compressed_tensors(calibrated: Calibrated) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    measured = load_file(calibrated.calibration("llama"))
    module = "model.layers.1.mlp.down_proj"
    with safe_open(next(calibrated.source("llama").glob("*2-of*.safetensors")), "pt") as file:
        weight = file.get_tensor(f"{module}.weight")
    amax = torch.from_numpy(measured[f"{module}.input.amax"]).bfloat16()

    def stored(spec: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for path in calibrated.folder("llama", spec).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping
        return tensors

    scheme = preset_name_to_scheme("FP8", ["Linear"])
    assert scheme.weights is not None
    assert scheme.input_activations is not None
    found = stored("fp8-static+kv")
    scale, zero = calculate_qparams(weight.min().reshape(1), weight.max().reshape(1), scheme.weights)
    codes = BaseCompressor.get_value_from_registry("float-quantized").compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme
    )
    assert torch.equal(found[f"{module}.weight_scale"], scale)
    bits = [tensor.view(torch.uint8) for tensor in (found[f"{module}.weight"], codes["weight"])]
    assert torch.equal(*bits)
    assert bits[0][0, 0] == 0, "-0.0 has the code of 0"
    assert torch.equal(found[f"{module}.input_scale"], calculate_qparams(-amax, amax, scheme.input_activations)[0])
    cache = QuantizationArgs(num_bits=8, type="float", symmetric=True, dynamic=False)
    for kind in "kv":
        largest = torch.from_numpy(measured[f"model.layers.1.self_attn.{kind}.amax"]).bfloat16()
        expected = calculate_qparams(-largest, largest, cache)[0]
        assert torch.equal(found[f"model.layers.1.self_attn.{kind}_scale"], expected)
    assert torch.equal(stored("nvfp4")[f"{module}.input_global_scale"], generate_gparam(-amax, amax))
    assert not [name for name in stored("fp8-static") if name.endswith(("k_scale", "v_scale"))]


@pytest.mark.parametrize("spec", ["fp8-static", "nvfp4"])
def test_they_are_computed_as_transformers_does(calibrated: Calibrated, spec: str) -> None:
    """With the static scales of inputs."""
    folder, tokens = calibrated.folder("llama", spec), calibrated.samples("llama").tokens
    variant = open_variant(folder)
    setting = Setting(dtype="bf16", batch_tokens=4096)
    found = all_logits(variant, tokens, setting)
    assert largest_difference(found, resident(folder, tokens, "bfloat16")) < 1e-6
    assert not variant.problems
    plain = all_logits(variant, tokens, Setting(dtype="bf16", batch_tokens=4096, weights_only=True))
    assert largest_difference(plain, found) > 1e-4


def test_index_manifest_and_verify(calibrated: Calibrated, tmp_path: Path) -> None:
    out, source = calibrated.variants("llama"), open_checkpoint(calibrated.source("llama"))
    calibration = read_calibration(calibrated.calibration("llama"))
    results = verify(out, source, calibration=calibration)
    assert sorted(result.spec for result in results) == sorted(VARIANTS)
    assert not [problem for result in results for problem in result.problems]
    for spec in VARIANTS:
        folder = calibrated.folder("llama", spec)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        where = {n: path.name for path in folder.glob("*.safetensors") for n in read_safetensors(path)}
        assert index["weight_map"] == where
        stored = [t for path in folder.glob("*.safetensors") for t in read_header(path)[0].values()]
        assert index["metadata"]["total_size"] == sum(tensor.stop - tensor.start for tensor in stored)
        manifest = read_manifest(folder)
        assert manifest is not None
        assert manifest.variants[spec].calibration == calibration.record
    for wrong in (None, read_calibration(calibrated.calibration("qwen3"))):
        with pytest.raises(UsageError, match="made with a calibration"):
            verify(out, source, calibration=wrong)
    damaged = tmp_path / "out"
    shutil.copytree(calibrated.folder("llama", "fp8-static"), damaged / "llama-FP8-static")
    path = damaged / "llama-FP8-static" / "model-00001-of-00002.safetensors"
    tensor = next(t for t in read_header(path)[0].values() if t.name.endswith("input_scale"))
    raw = bytearray(path.read_bytes())
    raw[tensor.start] ^= 1
    path.write_bytes(raw)
    assert verify(damaged)[0].problems


def test_the_plan_says_what_is_needed(calibrated: Calibrated) -> None:
    source = open_checkpoint(calibrated.source("llama"))
    for spec in VARIANTS:
        with pytest.raises(UsageError, match=r"needs a calibration") as caught:
            make_plan(source, parse_variants([spec]))
        assert "--calibration FILE" in str(caught.value)
    other = ConversionOptions(calibration=read_calibration(calibrated.calibration("qwen3")))
    with pytest.raises(StreamquantError, match="calibration of another model"):
        make_plan(source, parse_variants(["fp8-static"]), other)
    right = ConversionOptions(calibration=read_calibration(calibrated.calibration("llama")))
    unused = make_plan(source, parse_variants(["fp8-dynamic"]), right)
    assert any("the calibration has no use" in note for note in unused.notes)
    assert unused.options_of(unused.variants[0]).calibration is None
    plan = make_plan(source, parse_variants(["fp8-static+kv"]), right)
    assert len(plan.variants[0].generated) == 2 * 7 + 2 * 2
    assert plan_view(plan, 1) is not None


def test_other_measurements_are_another_plan(calibrated: Calibrated, tmp_path: Path) -> None:
    """The scales are in the fingerprint, so that an unfinished run is not continued with others."""
    path = calibrated.calibration("llama")
    arrays = load_file(path)
    arrays["model.layers.0.self_attn.q_proj.input.amax"] *= 2
    save_file(arrays, tmp_path / "b.safetensors", read_header(path)[1])
    plans = [
        make_plan(
            open_checkpoint(calibrated.source("llama")),
            parse_variants(["fp8-static"]),
            ConversionOptions(calibration=read_calibration(file)),
        )
        for file in (path, tmp_path / "b.safetensors")
    ]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_layers_that_no_pass_goes_through(tmp_path: Path) -> None:
    """A layer for multi-token prediction has no scales: it is refused by name, or left as it is."""
    folder = synthetic.write_checkpoint(tmp_path / "glm", architecture="Glm4MoeForCausalLM", size="tiny")
    variant = open_original(folder)
    assert isinstance(variant, CheckpointVariant)
    calibrate(variant, Samples(np.arange(8)[None], np.array([8]), 8, ("x",)), tmp_path / "a.safetensors")
    options = ConversionOptions(calibration=read_calibration(tmp_path / "a.safetensors"))
    source, recipes = open_checkpoint(folder), parse_variants(["fp8-static+kv"])
    with pytest.raises(UsageError, match=r"model\.layers\.2\.[\s\S]*--ignore 're:model\[\.\]layers\[\.\]2"):
        make_plan(source, recipes, options)
    plan = make_plan(source, recipes, dataclasses.replace(options, ignore=("re:model[.]layers[.]2[.].*",)))
    names = plan.variants[0].generated
    assert any(".layers.1.mlp.experts.0." in name for name in names)
    assert not [name for name in names if ".layers.2." in name]


def test_experts_have_scales_of_their_own(tmp_path: Path) -> None:
    folder = synthetic.write_checkpoint(tmp_path / "moe", architecture=synthetic.MIXTURES[0], size="tiny")
    variant = open_original(folder)
    assert isinstance(variant, CheckpointVariant)
    samples = Samples(np.arange(8)[None], np.array([8]), 8, ("x",))
    calibrate(variant, samples, tmp_path / "a.safetensors")
    options = ConversionOptions(calibration=read_calibration(tmp_path / "a.safetensors"))
    plan = make_plan(open_checkpoint(folder), parse_variants(["fp8-static", "nvfp4"]), options)
    assert any("fewer than 64 tokens went through" in note for note in plan.notes)
    convert(plan, tmp_path / "out", RunOptions(jobs=2))
    for spec in ("fp8-static", "nvfp4"):
        made = tmp_path / "out" / f"moe-{RECIPES[spec].label}"
        names = {name for path in made.glob("*.safetensors") for name in read_safetensors(path)}
        ends = (".weight_packed", ".input_global_scale") if spec == "nvfp4" else (".weight_scale", ".input_scale")
        modules = [{name.removesuffix(end) for name in names if name.endswith(end)} for end in ends]
        assert modules[0] == modules[1]
        assert any(".experts.3." in name for name in modules[0])
        assert not open_variant(made).problems
