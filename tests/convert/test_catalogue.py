"""The catalogue of variants and families: its figures, the command that prints it, and the table in the docs."""

import json
import re
import sys

import pytest

from streamquant.cli import app as command_line
from streamquant.convert.architectures import ARCHITECTURES
from streamquant.convert.recipes.catalogue import CatalogueVariant, families, variants
from streamquant.convert.recipes.recipe import RECIPES
from tests.docs.pages import PAGES, ROOT
from tests.docs.variants_table import HEADER, variants_table


@pytest.fixture(scope="module")
def catalogue() -> dict[str, CatalogueVariant]:
    return {entry.spec: entry for entry in variants()}


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["streamquant", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    assert not end.value.code
    return capsys.readouterr().out


def test_every_recipe_and_family_is_in_it(catalogue: dict[str, CatalogueVariant]) -> None:
    assert list(catalogue) == list(RECIPES)
    assert [entry.hf_architecture for entry in families()] == list(ARCHITECTURES)


@pytest.mark.parametrize("spec", RECIPES)
def test_sizes_are_those_of_the_descriptions(spec: str, catalogue: dict[str, CatalogueVariant]) -> None:
    """Descriptions say the size that llama.cpp's users know; the proportions of a model move it by a tenth or so."""
    said = re.match(r"([\d.]+) bits, |(\d+)-bit float", RECIPES[spec].description)
    if said is not None:
        assert catalogue[spec].bits_per_weight == pytest.approx(float(said[1] or said[2]), abs=0.15)


def test_sizes_by_hand(catalogue: dict[str, CatalogueVariant]) -> None:
    ends, norms, all_weights = 2 * 32000 * 4096, 65 * 4096, 6_738_415_616
    by_hand = (8 * (all_weights - ends - norms) + 16 * (ends + norms)) / all_weights
    assert catalogue["fp8-block"].bits_per_weight == pytest.approx(by_hand, abs=0.01)
    assert catalogue["gguf:Q8_0"].size == "8.5"
    assert catalogue["gguf:BF16"].size == "16"


def test_importance(catalogue: dict[str, CatalogueVariant]) -> None:
    found: dict[str, set[str]] = {}
    for entry in catalogue.values():
        found.setdefault(entry.importance, set()).add(entry.spec.removeprefix("gguf:"))
    assert found["required"] == {"Q2_K_S"}
    floats, others = {"F32", "F16", "BF16"}, {"Q8_0", "MXFP4_MOE", "TQ1_0", "TQ2_0"}
    folders = {spec for spec, entry in catalogue.items() if entry.container == "safetensors"}
    assert {"fp8-dynamic", "w4a16", "mxfp4", "bf16"} < folders
    assert {spec for spec, entry in catalogue.items() if entry.measured == "calibration required"} == {
        *("fp8-static", "fp8-static+kv", "fp8-dynamic+kv", "nvfp4", "nvfp4+kv")
    }
    assert found["unused"] == {*folders, *floats, *others}


def test_command_prints_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(monkeypatch, capsys, "formats")
    for entry in variants():
        assert re.search(rf"^{re.escape(entry.spec)} +{entry.size} +{entry.measured} ", text, re.MULTILINE), entry.spec
    assert all(
        re.search(rf"^{entry.hf_architecture} +{entry.gguf_arch} *$", text, re.MULTILINE) for entry in families()
    )


def test_command_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(monkeypatch, capsys, "formats", "--json"))
    assert [entry["spec"] for entry in found["variants"]] == list(RECIPES)
    assert found["families"][0] == {"hf_architecture": "LlamaForCausalLM", "gguf_arch": "llama"}


def test_table_of_the_docs_is_the_catalogue() -> None:
    """Out of date? `python -m tests.docs.variants_table` prints it."""
    pages = [page for page in PAGES if HEADER in page.read_text()]
    assert ROOT / "docs" / "formats.md" in pages
    for page in pages:
        assert f"\n{variants_table()}\n\n" in page.read_text(), page.name
