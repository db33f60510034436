"""INT4, INT8, MXFP4 and MXFP8 folders against llm-compressor's model_free_ptq: tensors, config.json, index."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import RECIPES, parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import UsageError
from streamquant.quant.formats import FORMATS
from streamquant.validate.readback.verify import verify
from tests import synthetic
from tests.conftest import PLAIN_SMOLLM2, Shelf, read_safetensors
from tests.convert.test_fp8_parity import IGNORE, Job, check_index, run_driver
from tests.oracle import round_to

pytestmark = [pytest.mark.xdist_group("compressed-parity"), pytest.mark.timeout(900)]

SIZE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"size": SIZE, "shards": 2},
    "llama-f32": {"size": SIZE, "dtype": "F32"},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "size": SIZE, "tied": True, "dtype": "F16"},
}
CASES = (
    "llama",
    "qwen3",
    pytest.param("llama-f32", marks=pytest.mark.long),
    pytest.param("smollm2", marks=pytest.mark.long),
)
VARIANTS = [
    name
    for name, recipe in RECIPES.items()
    if recipe.scheme is not None and not recipe.needs_calibration and not name.startswith("fp8")
]

LEFT_ALONE = ("re:.*down_proj$", "model.layers.0.self_attn.o_proj", "re:.*nothing")
IGNORING = ["nvfp4a16", "w8a8", "fp8-dynamic"]

REFERENCE = """
import json, sys
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import model_free_ptq

for job in json.loads(sys.argv[1]):
    name, _, group = job["scheme"].partition("-g")
    scheme = name
    if group:
        scheme = preset_name_to_scheme(name, ["Linear"])
        scheme.weights.group_size = int(group)
    model_free_ptq(job["source"], job["out"], scheme=scheme, ignore=job["ignore"], device="cpu")
"""


class Pairs:
    """Checkpoints, our variants of each, and the reference's."""

    def __init__(self, request: pytest.FixtureRequest, shelf: Shelf) -> None:
        self.request, self.shelf = request, shelf

    def source(self, case: str) -> Path:
        if case == "smollm2":
            found: Path = self.request.getfixturevalue("smollm2")
            return found

        def write(folder: Path) -> None:
            synthetic.write_checkpoint(folder / case, extra_side_files=False, **SETTINGS[case])

        return self.shelf.get(f"compressed-source-{case}", write) / case

    def variants(self, case: str) -> list[str]:
        """Those that its rows are long enough for."""
        return [name for name in VARIANTS if case != "smollm2" or name in PLAIN_SMOLLM2]

    def ours(self, case: str) -> Path:
        source = open_checkpoint(self.source(case))
        return self.shelf.get(
            f"compressed-ours-{case}",
            lambda out: convert(make_plan(source, parse_variants(self.variants(case))), out, RunOptions(jobs=2)),
        )

    def reference(self, case: str, variant: str) -> Path:
        return self.shelf.get("compressed-references", self.run_reference) / f"{case}-{variant}"

    def run_reference(self, out: Path) -> None:
        """All cases that this run asks for, in one process."""
        items = [item for item in self.request.session.items if isinstance(item, pytest.Function)]
        asked: list[Any] = [i.callspec.params["case"] for i in items if i.function is test_folders_equal_llm_compressor]
        jobs = [
            asdict(Job(str(self.source(case)), str(out / f"{case}-{name}"), RECIPES[name].scheme or "", IGNORE))
            for case in dict.fromkeys(asked)
            for name in self.variants(case)
        ]
        if any(item.function is test_ignored_modules_as_llm_compressor_leaves_them for item in items):
            jobs += [
                asdict(
                    Job(
                        str(self.source("llama")),
                        str(out / f"ignoring-{name}"),
                        RECIPES[name].scheme or "",
                        [*IGNORE, *LEFT_ALONE],
                    )
                )
                for name in IGNORING
            ]
        run_driver(REFERENCE, json.dumps(jobs))


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, shelf: Shelf) -> Pairs:
    return Pairs(request, shelf)


@pytest.mark.parametrize("case", CASES)
def test_folders_equal_llm_compressor(pairs: Pairs, case: str) -> None:
    (out,) = {path.parent for path in pairs.ours(case).iterdir()}
    for variant in pairs.variants(case):
        ours = out / f"{pairs.source(case).name}-{RECIPES[variant].label}"
        reference = pairs.reference(case, variant)
        shards = sorted(path.name for path in ours.glob("*.safetensors"))
        assert shards == sorted(path.name for path in reference.glob("*.safetensors"))
        assert_same_tensors(ours, reference)
        index = "model.safetensors.index.json"
        if len(shards) > 1:
            made, wanted = (json.loads((folder / index).read_text()) for folder in (ours, reference))
            assert made["weight_map"] == wanted["weight_map"]
            assert made["metadata"]["total_size"] == wanted["metadata"]["total_size"]
        check_index(ours)


def assert_same_tensors(ours: Path, reference: Path) -> None:
    """Those of each shard, and config.json."""
    for path in sorted(ours.glob("*.safetensors")):
        found, expected = read_safetensors(path), read_safetensors(reference / path.name)
        assert found.keys() == expected.keys(), ours.name
        assert not [name for name in found if found[name] != expected[name]], ours.name
    assert (ours / "config.json").read_text().strip() == (reference / "config.json").read_text().strip(), ours.name


def test_ignored_modules_as_llm_compressor_leaves_them(pairs: Pairs, tmp_path: Path) -> None:
    """--ignore of all kinds of formats: tensors and config.json; verify takes the list from the manifest."""
    source = open_checkpoint(pairs.source("llama"))
    plan = make_plan(source, parse_variants(IGNORING), ConversionOptions(ignore=LEFT_ALONE))
    convert(plan, tmp_path, RunOptions(jobs=2))
    for variant in IGNORING:
        assert_same_tensors(tmp_path / f"llama-{RECIPES[variant].label}", pairs.reference("ignoring", variant))
    assert any("--ignore re:.*nothing: means no linear layer" in note for note in plan.notes)
    assert not any(result.problems for result in verify(tmp_path, source))


def test_verify_compares_with_the_source(pairs: Pairs) -> None:
    results = verify(pairs.ours("llama"), open_checkpoint(pairs.source("llama")))
    assert sorted(result.spec for result in results) == sorted(VARIANTS)
    assert not [problem for result in results for problem in result.problems]
    signal = {result.spec: result.quantized.sqnr_db for result in results}
    assert all(signal[name] > 40 for name in ("w8a8", "w8a16"))
    assert all(17 < signal[name] < 23 for name in signal if name.startswith(("w4a16", "mxfp4", "nvfp4")))


def test_weights_are_read_as_they_were_encoded(pairs: Pairs) -> None:
    """By compressed-tensors' own decompression, and by the format."""
    out, original = pairs.ours("llama"), open_variant(pairs.source("llama"))
    for variant in make_plan(open_checkpoint(pairs.source("llama")), parse_variants(VARIANTS)).variants:
        made = open_variant(out / variant.folder)
        name = "model.layers.0.mlp.down_proj.weight"
        format_ = next(FORMATS[tensor.format] for tensor in variant.tensors if tensor.name == name)
        rows = original.read(name, torch.float32).numpy()
        expected = format_.decode(format_.encode(rows), rows.shape[1])
        if variant.recipe.weights == "NVFP4":
            expected = round_to(expected, "BF16")  # decompress of compressed-tensors knows no other dtype
        assert np.array_equal(made.read(name, torch.float32).numpy(), expected), variant.recipe.spec
        assert (made.activations() is None) == variant.recipe.spec.partition("-")[0].endswith("a16")
        assert not made.problems


def test_variants_alone_and_with_one_worker_give_the_same(pairs: Pairs, tmp_path: Path) -> None:
    """Also where a read serves fewer variants, and blocks have another number of rows."""
    source, whole = pairs.source("llama"), pairs.ours("llama")
    chosen = parse_variants(["w4a16-asym", "w8a8"])
    convert(make_plan(open_checkpoint(source), chosen), tmp_path / "again", RunOptions(jobs=1))
    for path in (tmp_path / "again").rglob("*.safetensors"):
        assert path.read_bytes() == (whole / path.relative_to(tmp_path / "again")).read_bytes()


def test_rows_that_groups_do_not_fill_are_one_error(tmp_path: Path) -> None:
    source = synthetic.write_checkpoint(tmp_path / "odd", size={**SIZE, "intermediate_size": 320})
    with pytest.raises(UsageError) as error:
        make_plan(open_checkpoint(source), parse_variants(["w4a16"]))
    assert error.value.what == "w4a16 has groups that the rows of this model do not fill"
    assert error.value.where == "'model.layers.0.mlp.down_proj.weight'"
    assert error.value.found == "rows of 320 weights"
    assert "w4a16-g32" in (error.value.hint or "")
    make_plan(open_checkpoint(source), parse_variants(["w4a16-g32", "w8a8", "mxfp4"]))
