"""Results: what a manifest says, and a report only where it is about exactly these bytes."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamquant.convert.manifest import MANIFEST
from streamquant.convert.recipes.container import GGUF, SAFETENSORS
from streamquant.publish.results import read_folder, read_folders
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.report.data import REPORT, Report, VariantReport, write_report
from tests.publish.cards.contents import edit


@pytest.fixture
def out(four_variants: list[Path], report: Report, tmp_path: Path) -> Path:
    """An --out folder of FP8 and GGUF with their report; the gate on mean KLD failed for Q4_K_M."""
    folder = Path(shutil.copytree(four_variants[0].parent, tmp_path / "out"))
    write_report(report, folder / "report")
    return folder


def rewrite(out: Path, report: Report, change: Callable[[VariantReport], VariantReport]) -> None:
    write_report(dataclasses.replace(report, variants=tuple(map(change, report.variants))), out / "report")


def test_a_folder_is_read_with_its_report(out: Path, report: Report) -> None:
    fp8, gguf = read_folders(out)
    assert (fp8.container, gguf.container) == (SAFETENSORS, GGUF)
    assert (gguf.model, gguf.source.name, gguf.source.architecture) == ("Tiny", "Tiny", "LlamaForCausalLM")
    assert (gguf.source.repo, gguf.source.revision) == (None, None)
    assert [variant.label for variant in gguf.variants] == ["BF16", "Q8_0", "Q4_K_M"]
    assert [(variant.label, variant.spec) for variant in fp8.variants] == [("FP8-dynamic", "fp8-dynamic")]
    for folder in (fp8, gguf):
        for file in folder.files:
            assert (folder.path / file.path).stat().st_size == file.size
    bf16, q8_0, q4_k_m = gguf.variants
    assert bf16.made.formats["BF16"] > 0
    assert q8_0.nbytes == q8_0.files[0].size
    assert bf16.passed
    assert not q4_k_m.passed
    found = q4_k_m.measurement
    assert found is not None
    assert found.result is not None
    assert found.against_source
    assert [gate.gate for gate in found.failed_gates] == ["max_mean_kld"]
    assert {gate.variant for gate in found.gates} == {"Tiny-Q4_K_M"}
    assert gguf.not_passed[-1] is q4_k_m
    assert gguf.report == report
    assert found.variant.label == "Tiny-Q4_K_M"


def test_a_report_is_looked_for_beside_and_inside(out: Path, report: Report, tmp_path: Path) -> None:
    shutil.move(out / "report", tmp_path / "elsewhere")
    folder = read_folder(out / "Tiny-GGUF")
    assert (folder.report, folder.report_folder) == (None, None)
    assert {variant.why_not for variant in folder.variants} == {"there is no report"}
    assert folder.not_passed == folder.variants
    for place in (tmp_path / "elsewhere", tmp_path / "elsewhere" / REPORT):
        assert read_folder(out / "Tiny-GGUF", place).report_folder == tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "elsewhere", out / "Tiny-GGUF" / "report")
    assert read_folder(out / "Tiny-GGUF").report_folder == out / "Tiny-GGUF" / "report"
    with pytest.raises(UsageError, match="no report"):
        read_folder(out / "Tiny-GGUF", tmp_path / "nothing")


def sha(record: dict[str, Any]) -> None:
    record["variants"]["gguf:Q8_0"]["files"][0]["sha256"] = "0" * 64


def size(record: dict[str, Any]) -> None:
    record["variants"]["gguf:Q8_0"]["files"][0]["size"] += 1


@pytest.mark.parametrize("change", [sha, size])
def test_a_report_of_other_bytes_is_not_read_as_fresh(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(out / "Tiny-GGUF" / MANIFEST, change)
    bf16, q8_0, _ = read_folder(out / "Tiny-GGUF").variants
    assert bf16.measurement is not None
    assert q8_0.measurement is None
    assert q8_0.why_not == "the report is about other files of the same names"
    assert not q8_0.passed


def test_a_report_that_does_not_name_its_bytes_counts_for_nothing(out: Path, report: Report) -> None:
    def without_hashes(variant: VariantReport) -> VariantReport:
        return dataclasses.replace(
            variant, files=tuple(dataclasses.replace(file, sha256=None) for file in variant.files)
        )

    rewrite(out, report, without_hashes)
    assert all(variant.measurement is None for folder in read_folders(out) for variant in folder.variants)
    rewrite(out, report, lambda variant: dataclasses.replace(variant, files=()))
    assert all(variant.measurement is None for folder in read_folders(out) for variant in folder.variants)


def test_a_report_against_another_original_says_so(out: Path, report: Report) -> None:
    files = tuple(dataclasses.replace(file, size=file.size + 1) for file in report.original_files)
    write_report(dataclasses.replace(report, original_files=files), out / "report")
    found = read_folder(out / "Tiny-GGUF").variants[0].measurement
    assert found is not None
    assert not found.against_source


def test_a_variant_that_could_not_be_read_did_not_pass(out: Path, report: Report) -> None:
    left = tuple(result for result in report.comparison.variants if not result.model.path.endswith("BF16.gguf"))
    changed = dataclasses.replace(report, comparison=dataclasses.replace(report.comparison, variants=left))
    write_report(changed, out / "report")
    bf16 = read_folder(out / "Tiny-GGUF").variants[0]
    assert bf16.measurement is not None
    assert bf16.measurement.result is None
    assert not bf16.measurement.failed_gates
    assert not bf16.passed


def test_a_variant_that_the_report_lacks_has_none(out: Path, report: Report) -> None:
    write_report(dataclasses.replace(report, variants=report.variants[:2]), out / "report")
    assert [v.why_not for v in read_folder(out / "Tiny-GGUF").variants] == [None, *["the report is not about it"] * 2]


def test_a_report_of_another_version_is_named(out: Path) -> None:
    edit(out / "report" / REPORT, lambda record: record.update(schema=1))
    reasons = {variant.why_not for variant in read_folder(out / "Tiny-GGUF").variants}
    assert reasons == {"the report cannot be read: a report of another version"}
    with pytest.raises(StreamquantError, match="another version"):
        read_folder(out / "Tiny-GGUF", out / "report")


def test_where_there_is_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError):
            read_folders(folder)
    with pytest.raises(UsageError):
        read_folder(tmp_path)


def test_the_source_on_the_hub(out: Path) -> None:
    edit(out / "Tiny-GGUF" / MANIFEST, lambda r: r["source"].update(repo="ORG/Tiny", revision="a" * 40))
    source = read_folder(out / "Tiny-GGUF").source
    assert (source.repo, source.revision) == ("ORG/Tiny", "a" * 40)


Change = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        *(
            (lambda _r, _v, file, path=path: file.update(path=path))
            for path in ("../../etc/x", "/etc/x", "a/../b", "a//b", "./a", "a\\b", "", ".", "..", "a\nb", "a\u202eb", 3)
        ),
        lambda _r, _v, file: file.update(size=-1),
        lambda _r, _v, file: file.update(size="1"),
        lambda _r, _v, file: file.update(sha256="A" * 64),
        lambda _r, _v, file: file.update(sha256="a" * 63),
        lambda _r, variant, _f: variant["files"].append(variant["files"][0]),
        lambda _r, variant, _f: variant.update(files=[]),
        lambda _r, variant, _f: variant.update(files=None),
        lambda _r, variant, _f: variant.update(bits_per_weight=True),
        lambda _r, variant, _f: variant.update(bits_per_weight="8"),
        lambda _r, variant, _f: variant.update(options=None),
        lambda _r, variant, _f: variant["options"].update(imatrix=["x"]),
        lambda _r, variant, _f: variant.update(recipe="x"),
        lambda _r, variant, _f: variant.update(versions={"numpy": 2}),
        lambda _r, variant, _f: variant.update(tensors=[{"format": 3}]),
        lambda _r, variant, _f: variant.update(description=None),
        lambda record, _v, _f: record["source"].update(repo="../x"),
        lambda record, _v, _f: record["source"].update(repo="ORG/N\n"),
        lambda record, _v, _f: record["source"].update(revision="main"),
        lambda record, _v, _f: record["source"].update(parameters=1.5),
        lambda record, _v, _f: record["source"].update(files=[]),
        lambda record, _v, _f: record.update(model=""),
    ],
)
def test_a_broken_manifest_is_refused_by_name(out: Path, change: Change) -> None:
    path = out / "Tiny-GGUF" / MANIFEST
    record = json.loads(path.read_text())
    variant = record["variants"]["gguf:Q8_0"]
    change(record, variant, variant["files"][0])
    path.write_text(json.dumps(record))
    with pytest.raises(StreamquantError, match="broken manifest") as caught:
        read_folder(path.parent)
    assert MANIFEST in str(caught.value)


def test_a_folder_of_two_kinds_is_refused(out: Path) -> None:
    fp8 = json.loads((out / "Tiny-FP8-dynamic" / MANIFEST).read_text())
    edit(out / "Tiny-GGUF" / MANIFEST, lambda record: record["variants"].update(fp8["variants"]))
    with pytest.raises(StreamquantError, match="one kind"):
        read_folder(out / "Tiny-GGUF")
