"""A report as its pages show it: names, rows and sentences that Markdown and HTML share."""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from streamquant.model.problem import Problem
from streamquant.validate.gates import GateResult, failed, option
from streamquant.validate.logits.comparison import VariantResult
from streamquant.validate.report.plots import SERIES
from streamquant.validate.report.text import MISSING, error_digits, estimate, human_bytes, number, percent
from streamquant.validate.sections import SECTIONS, Section
from streamquant.validate.text.chat import ChatReport

if TYPE_CHECKING:
    from streamquant.validate.report.data import NotRun, Report, VariantReport

Status = Literal["pass", "warn", "fail"]

REMARKS: Sequence[tuple[float, str]] = (
    (0.002, "practically the original"),
    (0.02, "very close"),
    (0.1, "close"),
    (0.5, "noticeably different"),
    (math.inf, "another model"),
)
"""Mean KLD in nats per token up to which a remark holds. Conventions of this report, not of a paper: measured ladders
put Q8_0 in the first, good 5 and 6 bit mixes in the second, good 4 bit mixes in the third, 2 bits in the fourth row."""
MOST = 8
"""Differences of tokens and chat that a page shows for each variant; report.json has them all."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first thing to read."""

    status: Status
    headline: str
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A variant in the table; numbers are ready to print, MISSING where there are none."""

    name: str
    label: str
    path: str
    number: int
    """Of its colour."""
    status: Status
    size: str
    bits: str
    ppl_ratio: tuple[str, str]
    """Value and error."""
    kld: tuple[str, str]
    kld_99_9: str
    same_top: tuple[str, str]
    remark: str
    variant: "VariantReport"
    result: VariantResult | None


@dataclass(frozen=True, slots=True)
class View:
    """Everything that the templates need beside the report itself."""

    report: "Report"
    title: str
    verdict: Verdict
    rows: tuple[Row, ...]
    failed_gates: tuple[GateResult, ...]
    not_run: tuple[tuple[str, str, str], ...]
    """(section, variants, reason)"""
    facts: tuple[tuple[str, str], ...]
    """How it was measured."""
    categories: tuple[str, ...]
    """Texts, if there are several."""


def make_view(report: "Report") -> View:
    """What the pages show of a report."""
    names = short_names([variant.label for variant in report.variants], report.comparison.original.model.label)
    rows = tuple(
        _row(number, name, variant, report)
        for number, (name, variant) in enumerate(zip(names, report.variants, strict=True))
    )
    wrong = tuple(failed(report.gate_results))
    categories = tuple(report.comparison.original.by_category)
    return View(
        report=report,
        title=f"Validation of {report.comparison.original.model.label}",
        verdict=_verdict(report, rows, wrong),
        rows=rows,
        failed_gates=wrong,
        not_run=grouped(report.not_run),
        facts=tuple(_facts(report)),
        categories=categories if len(categories) > 1 else (),
    )


def short_names(labels: Sequence[str], original: str) -> list[str]:
    """Labels without the original's name in front, where all have it and something is left.

    >>> short_names(["Tiny-1B-Q8_0", "Tiny-1B-FP8-dynamic"], "Tiny-1B"), short_names(["a", "Tiny-1B-b"], "Tiny-1B")
    (['Q8_0', 'FP8-dynamic'], ['a', 'Tiny-1B-b'])
    """
    for separator in "-._":
        prefix = f"{original}{separator}"
        short = [label.removeprefix(prefix) for label in labels]
        if all(label.startswith(prefix) for label in labels) and all(short) and len(set(short)) == len(labels):
            return short
    return list(labels)


def _row(number_: int, name: str, variant: "VariantReport", report: "Report") -> Row:
    result = report.measured(variant)
    severities = {problem.severity for problem in variant.problems}
    gates = any(found.variant == variant.label for found in failed(report.gate_results))
    doubtful = "warning" in severities or unchecked(report.not_run, variant)
    status: Status = "fail" if gates or "error" in severities else "warn" if doubtful else "pass"
    if result is None:
        nothing = (MISSING, "")
        return Row(name, variant.label, variant.path, number_, status, MISSING, MISSING, nothing, nothing, MISSING,
                   nothing, "cannot be read", variant, None)  # fmt: skip
    found = result.overall
    return Row(
        name=name,
        label=variant.label,
        path=variant.path,
        number=number_,
        status=status,
        size=human_bytes(result.model.nbytes),
        bits=f"{result.model.bits_per_weight:.2f}",
        ppl_ratio=error_digits(found.ratio.value, found.ratio.error_by_chunk),
        kld=error_digits(found.kld.value, found.kld.error_by_chunk),
        kld_99_9=number(found.kld_percentiles.p99_9),
        same_top=error_digits(found.same_top.value, found.same_top.error_by_chunk, 100),
        remark=remark(found.kld.value, report),
        variant=variant,
        result=result,
    )


def remark(kld: float, report: "Report") -> str:
    """A few honest words on a mean KLD."""
    floors = [floor.overall.kld.value for floor in report.comparison.noise_floors]
    if kld < 1e-8 or any(kld <= floor for floor in floors):
        return "the original, as far as can be measured"
    return next(words for limit, words in REMARKS if kld <= limit)


# Verdict


def _verdict(report: "Report", rows: Sequence[Row], wrong: Sequence[GateResult]) -> Verdict:
    count, bad = len(rows), [row.name for row in rows if row.status == "fail"]
    measured = [row for row in rows if row.result is not None]
    sentences = []
    if bad:
        these = "the variant" if count == 1 else "1 variant" if len(bad) == 1 else f"{len(bad)} variants"
        headline = f"Not fit to publish: {these}" + ("" if count == 1 else f" of {count}")
        sentences += _reasons(rows, wrong)
    elif measured:
        headline = "No fault was found" + (f" in {count} variants" if count > 1 else "")
        if any(unchecked(report.not_run, row.variant) for row in rows):
            headline += ", but not everything was checked"
    else:
        headline = "Nothing was measured"
    if not wrong and [gate for gate in report.gates.limits() if gate != "max_errors"]:
        sentences.append("All gates passed.")
    if len(measured) > 1:
        ordered = sorted(measured, key=_kld)
        best, worst = ordered[0], ordered[-1]
        sentences.append(
            f"{best.name} is closest to the original (mean KLD {best.kld[0]} nats per token), {worst.name} is furthest"
            f" from it ({worst.kld[0]})."
        )
    elif measured:
        sentences.append(f"Mean KLD {measured[0].kld[0]} nats per token: {measured[0].remark}.")
    warnings = sum(problem.severity == "warning" for row in rows for problem in row.variant.problems)
    if warnings:
        sentences.append("1 warning." if warnings == 1 else f"{warnings} warnings.")
    unloaded = [row.name for row in rows if "engines" in unchecked(report.not_run, row.variant)]
    if unloaded:
        sentences.append(f"No engine has run {_list(unloaded)}.")
    if missing := sorted(
        {note.section for note in report.not_run if not note.nothing_to_check}, key=list(SECTIONS).index
    ):
        sentences.append(f"Not checked, or not for every variant: {_list([SECTIONS[section] for section in missing])}.")
    doubtful = any(row.status == "warn" for row in rows)
    status: Status = "fail" if bad or not measured else "warn" if doubtful else "pass"
    return Verdict(status, headline, tuple(sentences))


def _reasons(rows: Sequence[Row], wrong: Sequence[GateResult]) -> list[str]:
    """Why variants are not fit: their errors, and the gates that they fail beside those that count errors."""
    errors = [row.name for row in rows if row.variant.errors]
    gates = {found.variant for found in wrong if found.gate != "max_errors"}
    below = [row.name for row in rows if row.label in gates]
    found = [f"Errors in {_list(errors)}: see the problems."] if errors else []
    return [*found, *([f"A gate is not passed by {_list(below)}."] if below else [])]


def _kld(row: Row) -> float:
    assert row.result is not None
    return row.result.overall.kld.value


def _list(names: Sequence[str]) -> str:
    """Names as a sentence lists them.

    >>> _list(["a"]), _list(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def grouped(notes: "Iterable[NotRun]") -> tuple[tuple[str, str, str], ...]:
    """(section, variants, reason) of sections that did not run, those of one reason in one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        groups.setdefault((SECTIONS[note.section], note.reason), []).append(note.variant or "all variants")
    return tuple((section, _list(variants), reason) for (section, reason), variants in groups.items())


# How it was measured


def _facts(report: "Report") -> list[tuple[str, str]]:
    found, machine = report.comparison, report.machine
    first, stop = found.scored_positions
    texts = [
        f"{file.path.name}: {file.chunks} chunks of {found.context} tokens, of {file.tokens:,} tokens in it; SHA-256 "
        f"{file.sha256}"
        for file in found.files
    ]
    facts = [
        ("original", f"{found.original.model.label}, {found.original.model.architecture}, "
                     f"{found.original.model.parameters:,} parameters, {human_bytes(found.original.model.nbytes)}"),
        ("texts", "\n".join(texts)),
        ("tokens", f"{found.chunks * found.context:,} in {found.chunks} chunks; {found.scored_tokens:,} scored, those "
                   f"that follow positions {first} to {stop - 1} of each chunk, as llama-perplexity; SHA-256 of the "
                   f"ids {found.corpus_sha256}"),
        ("BOS", "none" if found.bos is None else f"token {found.bos} at the beginning of each chunk"),
        ("computed in", f"{found.dtype} on {found.device}, {found.threads} threads, layer by layer; logits float32, "
                        "statistics float64"),
        ("activations", _activations(report)),
        ("errors", "± is one standard error, clustered by chunk" if found.chunks > 1 else
                   "a single chunk: errors by chunk are not known"),
        ("seed", "none: no random numbers are drawn, answers are greedy"),
        ("took", f"{found.effort.seconds_layers + found.effort.seconds_head:.0f} s for {found.effort.models} models, "
                 f"{human_bytes(found.effort.bytes_read)} of weights read"
                 + ("; hidden states of the original came from the cache" if found.effort.original_cached else "")),
        ("machine", f"{machine.cpu}, {machine.cores} cores, {human_bytes(machine.memory_bytes)} of memory, "
                    f"{machine.system}, Python {machine.python}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))),
        ("command", shlex.join(report.command) if report.command else MISSING),
        ("date", report.created),
    ]  # fmt: skip
    return [(name, text) for name, text in facts if text]


def _activations(report: "Report") -> str:
    """How inputs of linear layers were quantized, variants of one way in one line."""
    ways: dict[str, list[str]] = {}
    for result in report.comparison.variants:
        if result.activations is not None:
            done = "" if result.activations_emulated else " (not emulated)"
            ways.setdefault(f"{result.activations}{done}", []).append(result.model.label)
    return "\n".join(f"{way}: {', '.join(labels)}" for way, labels in ways.items())


# What the templates call


def cell(pair: tuple[str, str], unit: str = "") -> str:
    """A value and its error, as `error_digits` gives them, in one cell.

    >>> cell(("90.4", "0.9"), "%"), cell(("1.02", ""))
    ('90.4 ± 0.9%', '1.02')
    """
    return f"{pair[0]} ± {pair[1]}{unit}" if pair[1] else f"{pair[0]}{unit if pair[0] != MISSING else ''}"


def engine_name(engine: str) -> str:
    """An engine without its name in front of a version that begins with it.

    >>> engine_name("transformers, transformers 5.17.0"), engine_name("llama.cpp, xllamacpp 1")
    ('transformers 5.17.0', 'llama.cpp, xllamacpp 1')
    """
    kind, _, version = engine.partition(", ")
    return version if version.startswith(kind) else engine


def rendered_chats(chat: ChatReport | None) -> str:
    """Conversations that are rendered right, of all, and how many of these the original cannot render."""
    if chat is None:
        return MISSING
    shown = f"{chat.right} of {chat.cases}"
    if chat.original_fails:
        shown += f", {chat.original_fails} fail in the original" + (
            " too" if chat.failing == chat.original_fails else ""
        )
    return shown


def unchecked(notes: "Iterable[NotRun]", variant: "VariantReport") -> tuple[Section, ...]:
    """Sections of a variant that nobody has checked and nobody has left out, in the order of a report."""
    missing = {note.section for note in notes if note.unchecked and note.variant in (None, variant.label)}
    return tuple(section for section in SECTIONS if section in missing)


def short(problem: Problem) -> str:
    """A problem in one line of bounded length."""
    line = str(problem)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def few(problems: Sequence[Problem]) -> list[Problem]:
    """Problems as a person reads them: the first ALIKE of a check and severity, and how many more there are.

    A damaged checkpoint has one for each tensor; report.json lists them all.
    """
    counts = Counter((problem.check, problem.severity) for problem in problems)
    shown, seen = [], Counter[tuple[str, str]]()
    for problem in problems:
        kind = (problem.check, problem.severity)
        seen[kind] += 1
        if seen[kind] <= ALIKE or counts[kind] == ALIKE + 1:
            shown.append(problem)
        elif seen[kind] == ALIKE + 1:
            shown.append(Problem(problem.check, problem.severity, f"{counts[kind] - ALIKE:,} more of this kind"))
    return shown


LONGEST = 600
ALIKE = 5
HELPERS = {
    "estimate": estimate,
    "number": number,
    "percent": percent,
    "human_bytes": human_bytes,
    "option": option,
    "cell": cell,
    "engine_name": engine_name,
    "short": short,
    "few": few,
    "rendered_chats": rendered_chats,
    "MOST": MOST,
    "MISSING": MISSING,
    "SERIES": len(SERIES),
}
"""Functions and values that both templates use."""
