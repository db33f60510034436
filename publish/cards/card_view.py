"""A variant folder as its card shows it: rows and sentences that the templates of FP8 and GGUF share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamquant.convert.recipes.block_runtimes import BlockRuntimes
from streamquant.convert.recipes.calibration import CalibrationRecord
from streamquant.files.folders import real_path
from streamquant.files.sizes import human_bytes
from streamquant.publish.cards import commands
from streamquant.publish.cards.card_rows import CardRow, Choice, choices_among, make_row, pick_for_examples
from streamquant.publish.cards.markdown_helpers import (
    checksums,
    fence,
    file_name,
    hub_link,
    labels,
    link,
    python_example,
)
from streamquant.publish.cards.public_report import PublicReport
from streamquant.publish.results import PublishedVariant, VariantFolder
from streamquant.validate.gates import GATES, option
from streamquant.validate.report.text import MISSING, code, estimate, number
from streamquant.validate.report.view import View, cell, engine_name, few, make_view, rendered_chats, short

MARKS = {"pass": "✅", "warn": "⚠️", "fail": "❌", "none": "⚪"}


@dataclass(frozen=True, slots=True)
class CardView:
    """Everything that the templates need beside the folder itself."""

    title: str
    repo: str | None
    name: str
    """Of the repository, or of the local folder."""
    rows: tuple[CardRow, ...]
    not_passed: tuple[CardRow, ...]
    unmeasured: tuple[tuple[str, tuple[str, ...]], ...]
    """(reason, labels)"""
    choices: tuple[Choice, ...]
    pick: CardRow
    """For the examples."""
    report: View | None
    problems: tuple[tuple[str, str, str], ...]
    """(mark, label, what)"""
    limits: str
    """Gates that were set, as a sentence lists them."""
    against: str | None
    """The original of the report, if it is not the source."""
    made: tuple[commands.Made, ...]
    imatrices: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    calibrations: tuple[tuple[CalibrationRecord, tuple[str, ...]], ...]
    """(record, labels of the variants that were made with it)"""
    guarded: tuple[str, ...]
    """Labels of variants with a guarded template."""
    versions: tuple[tuple[str, str], ...]
    formats: tuple[tuple[str, str], ...]
    """(label, formats with their number of tensors)"""
    runtimes: tuple[str, ...]
    """The programs that run the files."""
    blocks: BlockRuntimes | None
    """More of them, where weights have a scale for each block."""


def make_card_view(folder: VariantFolder, repo: str | None, public: PublicReport | None) -> CardView:
    """What a card shows. `public` is the published form of the folder's report."""
    view = None if public is None else make_view(public.report)
    rows = tuple(make_row(variant, folder, view) for variant in folder.variants)
    measured = [row for row in rows if row.variant.measurement is not None]
    first = measured[0].variant.measurement if measured else None
    blocks = next((variant.made.blocks for variant in folder.variants if variant.made.blocks is not None), None)
    return CardView(
        title=real_path(folder.path).name if repo is None else repo.partition("/")[2],
        repo=repo,
        name=repo or real_path(folder.path).name,
        rows=rows,
        not_passed=tuple(row for row in measured if not row.variant.passed),
        unmeasured=_grouped((row.variant.why_not, row.variant.label) for row in rows if row.variant.why_not),
        choices=tuple(choices_among(rows)),
        pick=pick_for_examples(rows),
        report=view,
        problems=tuple(_problems(measured)),
        limits="" if first is None else _limits(first.report.gates.limits()),
        against=None if first is None or first.against_source else first.report.comparison.original.model.label,
        made=tuple(commands.made_by(folder)),
        imatrices=_imatrices(folder),
        calibrations=_calibrations(folder),
        guarded=tuple(variant.label for variant in folder.variants if variant.made.options.guard_template),
        versions=_versions(folder.variants),
        formats=tuple((row.variant.label, _formats(row.variant)) for row in rows),
        runtimes=folder.variants[0].made.recipe.runtimes if blocks is None else blocks.names,
        blocks=blocks,
    )


# The report


def _problems(rows: Sequence[CardRow]) -> list[tuple[str, str, str]]:
    marks = {"error": MARKS["fail"], "warning": MARKS["warn"], "note": "ℹ️"}
    return [
        (marks[problem.severity], row.variant.label, short(problem))
        for row in rows
        if row.measured is not None
        for problem in few(row.measured.variant.problems)
    ]


def _limits(limits: Mapping[str, float]) -> str:
    """Gates that were set; a reader who sees none on the divergence should know it."""
    said = [f"{GATES[gate].number} {GATES[gate].bound} {number(limit)}" for gate, limit in limits.items()]
    if not limits.keys() & {"max_mean_kld", "max_kld_99_9", "min_same_top", "max_ppl_ratio"}:
        said.append("no limit on the divergence")
    return ", ".join(said)


def _grouped(pairs: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    groups: dict[str, list[str]] = {}
    for reason, label in pairs:
        groups.setdefault(reason, []).append(label)
    return tuple((reason, tuple(labels)) for reason, labels in groups.items())


# How it was made


def _imatrices(folder: VariantFolder) -> tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]:
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for variant in folder.variants:
        if (made := variant.made.imatrix) is not None:
            name = file_name(made.file)
            record = {
                "file": link(name, name) if made.sha256 in folder.matrices else code(name),
                "datasets": [file_name(text) for text in made.datasets],
                "chunks": made.chunks,
                "entries": made.entries,
                "sha256": made.sha256,
            }
            groups.setdefault(repr(record), (record, []))[1].append(variant.label)
    return tuple((record, tuple(labels)) for record, labels in groups.values())


def _calibrations(folder: VariantFolder) -> tuple[tuple[CalibrationRecord, tuple[str, ...]], ...]:
    groups: dict[CalibrationRecord, list[str]] = {}
    for variant in folder.variants:
        if (made := variant.made.calibration) is not None:
            groups.setdefault(made, []).append(variant.label)
    return tuple((record, tuple(labels)) for record, labels in groups.items())


def _versions(variants: Sequence[PublishedVariant]) -> tuple[tuple[str, str], ...]:
    """Package -> version; several where variants were made at different times."""
    found: dict[str, dict[str, None]] = {}
    for variant in variants:
        for name, text in variant.made.versions.items():
            found.setdefault(name, {})[text] = None
    return tuple((name, ", ".join(texts)) for name, texts in sorted(found.items()))


def _formats(variant: PublishedVariant) -> str:
    return ", ".join(f"{name} x {count}" for name, count in variant.made.formats.items())


HELPERS: Mapping[str, Callable[..., object] | object] = {
    "MARKS": MARKS,
    "MISSING": MISSING,
    "cell": cell,
    "checksums": checksums,
    "commands": commands,
    "engine_name": engine_name,
    "fence": fence,
    "file_name": file_name,
    "estimate": estimate,
    "hub_link": hub_link,
    "human_bytes": human_bytes,
    "labels": labels,
    "link": link,
    "number": number,
    "option": option,
    "python_example": python_example,
    "rendered_chats": rendered_chats,
}
