"""Recipe files: read with suspicion, applied, recorded, and written for any GGUF."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamquant.convert.conversion import convert
from streamquant.convert.manifest import read_manifest
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.recipes.container import GGUF
from streamquant.convert.recipes.mix import DEFAULTS, MixModel, MixTensor, choose_mix
from streamquant.convert.recipes.overrides import NO_OVERRIDES, Overrides
from streamquant.convert.recipes.recipe import RECIPES, parse_variants
from streamquant.convert.recipes.recipe_extract import extract_recipe, layers_pattern
from streamquant.convert.recipes.recipe_file import RecipeFile, parse_recipe, read_recipe
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.readback.verify import verify
from tests.conftest import TINY_PRE
from tests.gguf_peer import read_gguf
from tests.imatrix_files import some_entries, write_imatrix

DOCS = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def planned(plan: Plan, number: int = 0) -> dict[str, str]:
    return {tensor.name: tensor.format for tensor in plan.variants[number].tensors}


# --- reading --------------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_works(tiny: Path, tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    recipe = read_recipe(write(tmp_path / "recipe.yaml", text))
    plan = make_plan(open_checkpoint(tiny), parse_variants([], [recipe]), ConversionOptions(pre=TINY_PRE))
    found = planned(plan)
    assert plan.files[0].path == f"Tiny-GGUF/Tiny-{recipe.label}.gguf"
    assert found["token_embd.weight"] == recipe.overrides.token_embedding_type
    assert found["blk.0.attn_q.weight"] == recipe.overrides.tensor_types[0][1]
    assert [found[name] for name in recipe.overrides.tensors] == list(recipe.overrides.tensors.values())
    assert yaml.safe_load(recipe.yaml()) == recipe.record() == yaml.safe_load(text)


BROKEN = {
    "": "not a recipe",
    "- label": "not a recipe",
    "label: x": "no base",
    "label: x\nbase: Q4_K_M\nbases: 1": "unknown key",
    "label: x\nbase: Q4_K_M\n1: 1": "unknown key",
    "base: Q4_K_M": "bad label",
    "label: ../x\nbase: Q4_K_M": "bad label",
    "label: .x\nbase: Q4_K_M": "bad label",
    "label: 4.5\nbase: Q4_K_M": "bad label",
    "label: x\nbase: [Q4_K_M]": "no base",
    "label: x\nbase: true": "no base",
    "label: x\nbase: Q4_K_M\nnote: [a]": "not a text",
    "label: x\nbase: Q4_K_M\npure: 1": "not a switch",
    "label: x\nbase: Q4_K_M\ntensor-type: attn_v=Q8_0": "not a list of rules",
    "label: x\nbase: Q4_K_M\ntensor-type: [1]": "not a list of rules",
    "label: x\nbase: Q4_K_M\ntensor-type: [attn_v]": "not a rule",
    "label: x\nbase: Q4_K_M\ntensor-type: ['(=Q8_0']": "does not compile",
    "label: x\nbase: Q4_K_M\ntensors: [a]": "not a table of tensors",
    "label: x\nbase: Q4_K_M\ntensors: {a: Q9}": "unknown type",
    "label: x\nbase: Q4_K_M\ntensors: {1: Q8_0}": "not a table of tensors",
    "label: x\nbase: Q4_K_M\noutput-tensor-type: 8": "unknown type",
    "label: x\nlabel: y\nbase: Q4_K_M": "occurs twice",
    "label: &a x\nbase: *a": "anchors and aliases",
    "label: !!python/object:os.system x": "broken YAML",
    "label: [": "broken YAML",
    "[" * 5000: "broken YAML",
    "label: \x00": "broken YAML",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:30])
def test_broken_recipes_are_refused(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", text)
    with pytest.raises(UsageError, match=BROKEN[text]) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read a file"):
        read_recipe(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="file too large"):
        read_recipe(write(tmp_path / "large.yaml", "#" * (2 << 20)))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="broken YAML"):
        read_recipe(tmp_path / "bytes.yaml")


def test_bases_and_labels_are_checked() -> None:
    def of(label: str, base: str, overrides: Overrides = NO_OVERRIDES) -> None:
        parse_variants(["gguf:Q8_0"], [RecipeFile(label, base, overrides)])

    of("mine", "Q4_K")
    of("mine", "15")
    for base in ("Q4_K_L", "Q9", "fp8-block", "Q4_0,Q8_0"):
        with pytest.raises(UsageError, match="unknown base"):
            of("mine", base)
    with pytest.raises(UsageError, match="cannot be made yet"):
        of("mine", "IQ3_M")
    for label in ("q4_k_m", "Q4_K_L", "Q4_K", "15", "IQ3_M"):
        with pytest.raises(UsageError, match="label of another variant"):
            of(label, "Q4_K_M")
    with pytest.raises(UsageError, match="no overrides by pattern here"):
        of("mine", "BF16", Overrides((("attn_v", "Q8_0"),)))
    with pytest.raises(UsageError, match="two recipes of one label"):
        parse_variants([], [RecipeFile("mine", "Q4_0", NO_OVERRIDES), RecipeFile("mine", "Q8_0", NO_OVERRIDES)])


# --- applying -------------------------------------------------------------------------------------------------------

RECIPE = """
label: Tiny-dynamic
base: Q4_K_M
note: |
  attention at 8 bits
  wide ends
tensor-type: ["blk.0.ffn_down=Q6_K", "attn_(k|v)=q8_0", "nothing=Q8_0"]
output-tensor-type: Q8_0
tensors: {blk.2.ffn_up.weight: BF16, blk.9.ffn_up.weight: F16}
"""


def test_recipes_are_variants_beside_others(tiny: Path, tmp_path: Path) -> None:
    """Converted, recorded in full, verified from the record alone, and taken out of the file again."""
    recipe = read_recipe(write(tmp_path / "recipe.yaml", RECIPE))
    variants, out = parse_variants(["gguf:Q4_K_M"], [recipe]), tmp_path / "out"
    options = ConversionOptions(pre=TINY_PRE, overrides=Overrides(token_embedding_type="Q5_K"))
    done = convert(make_plan(open_checkpoint(tiny), variants, options), out, RunOptions(jobs=2))
    notes = "\n".join(done.plan.notes)
    assert "gguf:Tiny-dynamic: nothing: in the name of no tensor" in notes
    assert "gguf:Tiny-dynamic: blk.9.ffn_up.weight: in the name of no tensor" in notes

    keys, tensors = read_gguf(out / "Tiny-GGUF/Tiny-Tiny-dynamic.gguf")
    kinds = {name: kind.name for name, (kind, _, _) in tensors.items()}
    assert keys["general.file_type"][1] == 15
    assert [kinds[f"blk.{i}.attn_v.weight"] for i in range(3)] == ["Q8_0"] * 3
    assert kinds["blk.0.ffn_down.weight"] == "Q6_K"
    assert kinds["blk.2.ffn_up.weight"] == "BF16"
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == "Q4_K", "the command line's overrides are for the others"
    _, plain = read_gguf(out / "Tiny-GGUF/Tiny-Q4_K_M.gguf")
    assert plain["token_embd.weight"][0].name == "Q5_K"

    manifest = read_manifest(out / "Tiny-GGUF")
    assert manifest is not None
    entry = manifest.variants["gguf:Tiny-dynamic"]
    assert entry.recipe.file == recipe
    assert entry.json()["recipe"] == recipe.record()
    assert parse_recipe(entry.json()["recipe"], "manifest") == recipe
    plain_entry = manifest.variants["gguf:Q4_K_M"].json()
    assert plain_entry["recipe"] is None
    assert plain_entry["options"]["overrides"] == {"token-embedding-type": "Q5_K"}
    assert [result.problems for result in verify(out, open_checkpoint(tiny))] == [[], []]

    found = extract_recipe(out / "Tiny-GGUF/Tiny-Tiny-dynamic.gguf", "again")
    again = make_plan(open_checkpoint(tiny), parse_variants([], [found.recipe]), ConversionOptions(pre=TINY_PRE))
    assert planned(again) == planned(done.plan, 1)
    assert len(found.recipe.overrides.tensor_types) <= 4


def test_broken_records_of_recipes_are_broken_manifests(tiny_variants: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Tiny-GGUF"
    folder.mkdir()
    manifest = json.loads((tiny_variants / "Tiny-GGUF/streamquant.json").read_text())
    entry = manifest["variants"]["gguf:Q4_0"]
    for change in ({"recipe": 1}, {"recipe": {"label": "x"}}, {"recipe": {"label": "x", "base": "nothing"}}):
        manifest["variants"] = {"gguf:x": entry | change}
        (folder / "streamquant.json").write_text(json.dumps(manifest))
        with pytest.raises(StreamquantError, match="broken manifest"):
            verify(folder)
    wrong: list[dict[str, Any]] = [
        {"imatrix": 1},
        {"imatrix": {"file": "x"}},
        {"overrides": [1]},
        {"overrides": {"pure": 1}},
    ]
    for option in wrong:
        manifest["variants"] = {"gguf:Q4_0": entry | {"options": entry["options"] | option}}
        (folder / "streamquant.json").write_text(json.dumps(manifest))
        with pytest.raises(StreamquantError, match="broken manifest"):
            verify(folder)


# --- extraction -----------------------------------------------------------------------------------------------------


def write_gguf(path: Path, kinds: Mapping[str, str], *, layers: int, file_type: int | None = 15, **keys: int) -> Path:
    """A GGUF of these types, all tensors of 256 columns and one row, written by the package gguf."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    if file_type is not None:
        writer.add_file_type(file_type)
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    for name, kind in kinds.items():
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        raw = np.zeros((2, 256 // block * size), np.uint8)
        writer.add_tensor(name, raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def model_tensors(layers: int) -> list[MixTensor]:
    ends = [MixTensor("token_embd.weight", (2, 256)), MixTensor("output.weight", (2, 256))]
    return ends + [MixTensor(f"blk.{i}.{name}.weight", (2, 256)) for i in range(layers) for name in NAMES]


def kinds_of(base: str, layers: int, overrides: Overrides = NO_OVERRIDES) -> dict[str, str]:
    model = MixModel("llama", layers, 8, 2)
    return {n: c.format for n, c in choose_mix(base, model_tensors(layers), model, overrides=overrides).items()}


def test_mixes_are_recognized_without_rules(tmp_path: Path) -> None:
    for base in ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "Q8_0"):
        file_type = int(RECIPES[f"gguf:{base}"].file_type or 0)
        path = write_gguf(tmp_path / f"{base}.gguf", kinds_of(base, 12), layers=12, file_type=file_type)
        found = extract_recipe(path)
        assert (found.recipe.base, found.recipe.overrides, found.recipe.label) == (base, NO_OVERRIDES, f"{base}-like")


def test_deviations_become_few_rules_for_any_number_of_layers(tmp_path: Path) -> None:
    kinds = kinds_of("Q4_K_M", 12)
    for i in range(12):
        kinds[f"blk.{i}.attn_k.weight"] = "Q8_0"
        kinds[f"blk.{i}.ffn_up.weight"] = "Q6_K" if i in (0, 1, 2, 11) else "Q5_K"
    kinds |= {"blk.3.attn_q.weight": "Q8_0", "output.weight": "BF16"}
    found = extract_recipe(write_gguf(tmp_path / "m.gguf", kinds, layers=12)).recipe
    assert found.base == "Q4_K_M"
    assert found.overrides == Overrides(
        (
            (r"^blk\.[0-9]+\.attn_k\.weight$", "Q8_0"),
            (r"^blk\.(3)\.attn_q\.weight$", "Q8_0"),
            (r"^blk\.([0-2]|11)\.ffn_up\.weight$", "Q6_K"),
            (r"^blk\.[0-9]+\.ffn_up\.weight$", "Q5_K"),
        ),
        output_tensor_type="BF16",
    )
    assert kinds_of("Q4_K_M", 12, found.overrides) == kinds
    longer = kinds_of("Q4_K_M", 30, found.overrides)
    assert {longer[f"blk.{i}.attn_k.weight"] for i in range(30)} == {"Q8_0"}
    assert longer["blk.29.ffn_up.weight"] == "Q5_K"
    shorter = [tensor.name for tensor in model_tensors(3)]
    assert found.overrides.unmatched(shorter) == [r"^blk\.(3)\.attn_q\.weight$"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["Q4_K_M", "Q3_K_M", "Q4_0", "BF16", "MXFP4_MOE"]),
    st.dictionaries(
        st.sampled_from([tensor.name for tensor in model_tensors(13)]),
        st.sampled_from(["Q8_0", "Q6_K", "Q4_K", "F16", "IQ3_S"]),
        max_size=60,
    ),
)
def test_what_is_extracted_gives_the_same_types(tmp_path: Path, base: str, others: dict[str, str]) -> None:
    """Whatever differs, rules that shift the mix's own counting included."""
    kinds = {**kinds_of(base, 13), **others}
    path = write_gguf(tmp_path / "m.gguf", kinds, layers=13, file_type=int(RECIPES[f"gguf:{base}"].file_type or 0))
    found = extract_recipe(path)
    assert kinds_of(found.recipe.base, 13, found.recipe.overrides) == kinds
    assert ("types that cannot be made yet: IQ3_S" in found.notes) == ("IQ3_S" in kinds.values())
    if "IQ3_S" not in kinds.values():
        assert parse_recipe(yaml.safe_load(found.recipe.yaml()), "here") == found.recipe


def test_the_file_type_is_found_where_the_file_does_not_say_it(tmp_path: Path) -> None:
    kinds = kinds_of("Q5_K_M", 12)
    for file_type in (None, 999):
        found = extract_recipe(write_gguf(tmp_path / "m.gguf", kinds, layers=12, file_type=file_type))
        assert (found.recipe.base, found.recipe.overrides) == ("Q5_K_M", NO_OVERRIDES)
        assert "does not say which file type" in found.notes[0]
    found = extract_recipe(write_gguf(tmp_path / "m.gguf", kinds, layers=12, file_type=7))
    assert (found.recipe.base, found.recipe.overrides) == ("Q5_K_M", NO_OVERRIDES)
    assert "the file says Q8_0, but Q5_K_M" in found.notes[0]


def test_all_files_of_a_split_set_are_read(tiny: Path, tmp_path: Path) -> None:
    options = ConversionOptions(pre=TINY_PRE, split_max_size=500_000, overrides=Overrides((("attn_v", "Q8_0"),)))
    done = convert(
        make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q4_K_M"]), options), tmp_path, RunOptions(jobs=2)
    )
    files = sorted(tmp_path.rglob("*.gguf"))
    assert len(files) > 1
    found = extract_recipe(files[-1])
    again = make_plan(open_checkpoint(tiny), parse_variants([], [found.recipe]), ConversionOptions(pre=TINY_PRE))
    assert planned(again) == planned(done.plan)
    files[0].unlink()
    with pytest.raises(StreamquantError, match="cannot read a file"):
        extract_recipe(files[-1])


def test_files_that_are_no_models_are_refused(tmp_path: Path, matrix_file: Path) -> None:
    with pytest.raises(StreamquantError, match="not a model"):
        extract_recipe(matrix_file)
    with pytest.raises(StreamquantError, match="no weights of a model"):
        extract_recipe(write_gguf(tmp_path / "norms.gguf", {"output_norm.weight": "F32"}, layers=1))
    with pytest.raises(StreamquantError, match="not a type of weights"):
        extract_recipe(write_gguf(tmp_path / "odd.gguf", {"output.weight": "I32"}, layers=1))
    with pytest.raises(UsageError, match="bad label"):
        extract_recipe(write_gguf(tmp_path / "m.gguf", kinds_of("Q4_0", 1), layers=1), "../x")


@pytest.fixture
def matrix_file(tmp_path: Path) -> Path:
    return write_imatrix(tmp_path / "imatrix.gguf", some_entries({"a.weight": 4}))


@given(st.sets(st.integers(0, 300), min_size=1))
def test_patterns_of_layers_match_exactly_those(numbers: set[int]) -> None:
    pattern = re.compile(f"({layers_pattern(numbers)})")
    assert {i for i in range(400) if pattern.fullmatch(str(i))} == numbers


def test_every_file_type_has_a_base() -> None:
    assert {recipe.base for recipe in RECIPES.values() if recipe.container is GGUF} <= DEFAULTS.keys()
