"""Reports: read back as written, safe whatever models are called, the same bytes for the same JSON, and legible."""

import dataclasses
import html.parser
import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markdown_it
import pytest
from PIL import Image

from streamquant.files.records import from_json, to_json
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.gates import failed
from streamquant.validate.report.data import (
    REPORT,
    SCHEMA,
    Report,
    check_report_folder,
    read_report,
    write_report,
)
from streamquant.validate.report.plots import VARIABLES, Plot, make_plots, pareto
from streamquant.validate.report.render import render_html, render_markdown, write_pages
from streamquant.validate.report.view import make_view, remark

VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture(scope="module")
def plots(report: Report) -> list[Plot]:
    return make_plots(report, [variant.label for variant in report.variants])


@pytest.fixture(scope="module")
def strange_plots(hostile: Report) -> list[Plot]:
    return make_plots(hostile, [variant.label for variant in hostile.variants])


# --- report.json ----------------------------------------------------------------------------------------------------


def test_a_report_is_read_back_as_it_was(report: Report, hostile: Report, tmp_path: Path) -> None:
    for number, record in enumerate((report, hostile)):
        folder = tmp_path / str(number)
        write_report(record, folder)
        assert read_report(folder) == record
        assert read_report(folder / REPORT) == record
        assert json.loads((folder / REPORT).read_text())["schema"] == SCHEMA


def test_a_report_from_before_a_field_is_read_with_its_default(report: Report, tmp_path: Path) -> None:
    def forget(record: dict[str, Any]) -> None:
        for note in record["not_run"]:
            del note["requested"]

    assert any(note.requested for note in report.not_run)
    found = read_report(broken(forget, report, tmp_path))
    assert {note.requested for note in found.not_run} == {False}


def test_infinity_is_kept_and_nan_is_refused(report: Report) -> None:
    (first, *_), variants = report.comparison.variants, report.comparison.variants
    tensor = dataclasses.replace(first.tensors[0], worst_block=math.inf)
    record = to_json(tensor, "tensor")
    assert record["worst_block"] == "Infinity"
    assert from_json(type(tensor), json.loads(json.dumps(record, allow_nan=False)), "tensor") == tensor
    assert variants
    with pytest.raises(StreamquantError, match="NaN"):
        to_json(dataclasses.replace(tensor, max_error=math.nan), "tensor")


def broken(change: Callable[[dict[str, Any]], object], report: Report, folder: Path) -> Path:
    record = to_json(report, "report")
    change(record)
    folder.mkdir(exist_ok=True)
    (folder / REPORT).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.update(schema=SCHEMA + 1), f"schema {SCHEMA + 1}"),
        (lambda r: r.pop("schema"), "schema None"),
        (lambda r: r.pop("gates"), "no field 'gates'"),
        (lambda r: r.update(extra=1), "unknown field 'extra'"),
        (lambda r: r["machine"].update(cores="2"), "machine.cores"),
        (lambda r: r["machine"].update(cores=True), "machine.cores"),
        (lambda r: r["machine"].update(cores=2.0), "machine.cores"),
        (lambda r: r["comparison"].update(context=None), "comparison.context"),
        (lambda r: r["comparison"].update(scored_positions=[1]), "2 values"),
        (lambda r: r["comparison"].update(dtype="f16"), "bf16 or f32"),
        (lambda r: r["comparison"]["variants"][0]["overall"]["kld"].update(value="0.1"), "kld.value"),
        (lambda r: r["comparison"]["variants"][0]["overall"]["kld"].update(value=True), "kld.value"),
        (lambda r: r["comparison"].update(versions=[]), "an object"),
        (lambda r: r.update(variants={}), "a list"),
        (lambda r: r["variants"][0].update(problems=[3]), "problems[0]"),
    ],
)
def test_another_shape_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], named: str, report: Report, tmp_path: Path
) -> None:
    with pytest.raises(StreamquantError) as caught:
        read_report(broken(change, report, tmp_path))
    assert named in str(caught.value)


def test_no_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no report"):
        read_report(tmp_path)
    (tmp_path / REPORT).write_text(f'{{"schema": {SCHEMA}, "created": NaN}}')
    with pytest.raises(StreamquantError, match="broken JSON"):
        read_report(tmp_path)


def test_a_folder_with_other_files_is_not_written_to(tmp_path: Path) -> None:
    check_report_folder(tmp_path / "new")
    check_report_folder(tmp_path)
    (tmp_path / "thesis.tex").touch()
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UsageError):
            check_report_folder(folder)
    (tmp_path / REPORT).touch()
    check_report_folder(tmp_path)


# --- what it says ---------------------------------------------------------------------------------------------------


def test_the_verdict_names_what_failed(report: Report) -> None:
    view = make_view(report)
    names = [row.name for row in view.rows]
    assert names == ["FP8-dynamic", "BF16", "Q8_0", "Q4_K_M"]
    wrong = {result.variant for result in failed(report.gate_results)}
    assert "Tiny-Q4_K_M" in wrong
    assert "Tiny-BF16" not in wrong
    assert view.verdict.status == "fail"
    assert "Not fit to publish" in view.verdict.headline
    assert view.verdict.sentences[0] == "A gate is not passed by Q4_K_M."
    assert "BF16 is closest to the original" in " ".join(view.verdict.sentences)
    skipped = {section for section, _, _ in view.not_run}
    assert skipped == {"tokens", "chat templates", "known faults of chat templates", "greedy answers",
                       "the engine that the file is made for"}  # fmt: skip


def test_a_clean_report_passes(report: Report) -> None:
    clean = dataclasses.replace(
        report,
        gate_results=(),
        not_run=(),
        variants=tuple(dataclasses.replace(variant, problems=()) for variant in report.variants),
    )
    verdict = make_view(clean).verdict
    assert (verdict.status, verdict.headline) == ("pass", "No fault was found in 4 variants")
    assert "Not checked" not in " ".join(verdict.sentences)


def test_remarks_grow_worse(report: Report) -> None:
    words = [remark(kld, report) for kld in (0.0, 0.001, 0.01, 0.05, 0.3, 3.0)]
    assert len(set(words)) == len(words)
    assert "as far as can be measured" in words[0]


def test_pareto() -> None:
    points = [(3.0, 1.0), (1.0, 9.0), (2.0, 9.0), (2.0, 2.0), (4.0, 1.0), (1.0, 9.0)]
    assert pareto(points) == [1, 3, 0]


# --- pages ----------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags that are open, everything that would load or run, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> of nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_the_page_is_whole_and_runs_and_loads_nothing(which: str, request: pytest.FixtureRequest) -> None:
    record: Report = request.getfixturevalue(which)
    found = render_html(record, request.getfixturevalue({"report": "plots", "hostile": "strange_plots"}[which]))
    page = Page(found)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.isdisjoint({"script", "iframe", "object", "embed", "link", "img", "base", "form", "a", "image"})
    assert not any(name.startswith("on") or name in ("src", "action", "ping") for name, _ in page.attributes)
    links = [value for name, value in page.attributes if name in ("href", "xlink:href")]
    assert all(value and value.startswith("#") for value in links)
    assert "@import" not in found
    assert set(re.findall(r"url\((.)", found)) <= {"#"}
    assert "default-src 'none'" in found
    assert "\u202e" not in found
    assert "\x1b" not in found


def test_every_section_shows_strangers_text_as_text(hostile: Report) -> None:
    page = Page(render_html(hostile, []))
    assert page.text.count("<script>alert(1)</script>") > 40
    assert "{{7*7}}" in page.text
    assert "49" not in re.sub(r"[\d.,]{3,}", "", page.text.partition("How it was measured")[0].partition("main")[0])


def test_a_report_renders_itself(report: Report, hostile: Report) -> None:
    """In a notebook: no markup of strangers, nothing that runs or loads, no rule for what is not the report's own."""
    for record in (report, hostile):
        found = record._repr_html_()
        page = Page(found)
        assert page.open == []
        allowed = "div style section h2 p ul li table thead tbody tr th td span bdi b small code"
        assert page.tags <= set(allowed.split())
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in page.attributes)
        assert not re.search(r"url\(|@import", found)
        rules = re.findall(r"^(.*) \{", found.partition("</style>")[0], re.MULTILINE)
        assert rules
        assert all(part.strip().startswith(".streamquant-report ") for rule in rules for part in rule.split(","))
        for row in make_view(record).rows:
            assert row.kld[0] in page.text
            assert row.size in page.text
        assert len(repr(record)) < 300
        assert not {"\u202e", "\x1b"} & {*found, *repr(record)}
    assert "Not fit to publish: 1 variant of 4" in report._repr_html_()
    assert "--max-mean-kld" in report._repr_html_()
    assert repr(report) == "<Report: 4 variants of Tiny, 0 errors, 1 failed gates>"


def test_markdown_of_strangers_text(hostile: Report, report: Report) -> None:
    """As a renderer of Markdown that lets HTML through shows it."""
    reader = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    for record in (hostile, report):
        found = render_markdown(record, [])
        page = Page(reader.render(found))
        assert page.open == []
        assert page.tags <= {"h2", "h3", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "code", "ul", "li"}
        rows = [token for token in reader.parse(found) if token.type in ("tr_open", "td_open", "th_open")]
        cells = "".join("|" if token.type == "tr_open" else "." for token in rows).strip("|").split("|")
        assert [len(row) for row in cells[:5]] == [9] * 5
        assert not any((ord(letter) < 32 and letter != "\n") or letter == "\u202e" for letter in found)
    assert page.text.count("Q4_K_M") >= 2
    assert Page(reader.render(render_markdown(hostile, []))).text.count("<script>alert(1)</script>") > 20


def test_the_markdown_fits_a_card(report: Report, plots: list[Plot]) -> None:
    found = render_markdown(report, plots)
    assert len(found) < 12_000
    assert found.startswith("## Validation of Tiny\n")
    assert "![Size against divergence](plots/size-kld.png)" in found
    assert "`--max-mean-kld`" in found


def test_plots_are_pictures(plots: list[Plot], strange_plots: list[Plot]) -> None:
    assert [plot.name for plot in plots] == ["size-kld", "kld-histogram", "layers", "delta-p"]
    for plot in (*plots, *strange_plots):
        picture = Image.open(io.BytesIO(plot.png))
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20
        for svg in (plot.file_svg.decode(), plot.page_svg):
            xml.etree.ElementTree.fromstring(svg)
        assert not any(colour in plot.page_svg for colour in VARIABLES)
        assert "<style" not in plot.page_svg
    text = "".join(xml.etree.ElementTree.fromstring(plots[0].page_svg).itertext())
    assert "Tiny-Q8_0" in text
    assert "size, MB" in text


def test_no_plots_of_nothing(report: Report) -> None:
    nothing = dataclasses.replace(report, comparison=dataclasses.replace(report.comparison, variants=()))
    assert make_plots(nothing, [variant.label for variant in nothing.variants]) == []
    view = make_view(nothing)
    assert view.verdict.status == "fail"
    assert {row.remark for row in view.rows} == {"cannot be read"}
    assert Page(render_html(nothing, [])).open == []
    assert "cannot be read" in render_markdown(nothing, [])


def test_the_same_json_gives_the_same_bytes(report: Report, tmp_path: Path) -> None:
    """In another process, with another seed of hashes."""
    write_report(report, tmp_path)
    paths = write_pages(report, tmp_path)
    before = {path: path.read_bytes() for path in paths}
    assert {path.relative_to(tmp_path).as_posix() for path in paths} >= {
        "report.md", "report.html", "plots/size-kld.svg", "plots/layers.png"
    }  # fmt: skip
    for path in paths:
        path.unlink()
    command = [sys.executable, "-m", "streamquant", "report", str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "TZ": "Asia/Tokyo"}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=Path(__file__).parents[2])
    assert {path: path.read_bytes() for path in paths} == before


def test_many_variants_are_told_apart(report: Report) -> None:
    """More variants than colours."""
    comparison = report.comparison
    results, variants = [], []
    for number in range(20):
        result, variant = comparison.variants[number % 4], report.variants[number % 4]
        label = f"Tiny-a-rather-long-name-of-a-variant-{number}"
        results.append(dataclasses.replace(result, model=dataclasses.replace(result.model, label=label, path=label)))
        variants.append(dataclasses.replace(variant, label=label, path=label))
    many = dataclasses.replace(
        report, comparison=dataclasses.replace(comparison, variants=tuple(results)), variants=tuple(variants)
    )
    drawn = make_plots(many, [variant.label for variant in many.variants])
    assert all(Image.open(io.BytesIO(plot.png)).size[0] > 800 for plot in drawn)
