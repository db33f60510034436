"""A report, and the checks of tokens and chat alone, for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streamquant.files.records import to_json
from streamquant.quant.printable import visible
from streamquant.validate.report.data import ChatCheck, NotRun, Report, VariantReport
from streamquant.validate.report.text import MISSING
from streamquant.validate.report.view import cell, few, grouped, make_view, rendered_chats, unchecked
from streamquant.validate.sections import SECTIONS

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", "error": "red", "warning": "yellow", "note": ""}


def report_view(report: Report) -> RenderableType:
    """Verdict, a line a variant, its problems, and what did not run."""
    view = make_view(report)
    table = Table("variant", box=None, header_style="bold", pad_edge=False)
    for column in ("size", "bits/weight", "PPL ratio", "mean KLD", "99.9% KLD", "same top"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("result")
    for row in view.rows:
        table.add_row(
            Text(visible(row.name)),
            row.size,
            row.bits,
            cell(row.ppl_ratio),
            cell(row.kld),
            row.kld_99_9,
            cell(row.same_top, "%"),
            Text(row.remark, COLOURS[row.status]),
        )
    problems = [_problems(row.name, row.variant) for row in view.rows]
    skipped = [
        Text(visible(f"not checked: {section} ({variants}): {reason}"), "dim")
        for section, variants, reason in grouped(note for note in report.not_run if note.unchecked)
    ]
    headline = Text(view.verdict.headline, COLOURS[view.verdict.status])
    return Group(headline, table, *[line for lines in problems for line in lines], *skipped)


def _problems(name: str, variant: VariantReport) -> list[Text]:
    return [
        Text(visible(f"{name}: {problem.severity} {problem.check}: {problem}"), COLOURS[problem.severity])
        for problem in few(variant.problems)
    ]


def chat_view(found: ChatCheck) -> RenderableType:
    """What chat-check found: a line a variant, its problems, the original's own faults, and what did not run."""
    table = Table("variant", box=None, header_style="bold", pad_edge=False)
    for column in ("texts tokenized right", "chats rendered right", "engine differs"):
        table.add_column(column, justify="right")
    table.add_column("result")
    for variant in found.variants:
        tokens, chat = variant.tokens, variant.chat
        table.add_row(
            Text(visible(variant.label)),
            MISSING if tokens is None else f"{tokens.texts - tokens.different} of {tokens.texts}",
            rendered_chats(chat),
            MISSING if chat is None else str(chat.engine_differs),
            _result(variant, found.not_run),
        )
    lines = [line for variant in found.variants for line in _problems(variant.label, variant)]
    for lint in found.original_lints:
        text = f"the original: {lint.severity} {lint.check}: {lint.found}: {lint.consequence}; to do: {lint.fix}"
        lines.append(Text(visible(text), COLOURS[lint.severity]))
    for note in found.not_run:
        state = "nothing to check" if note.nothing_to_check else "not checked"
        text = f"{state}: {SECTIONS[note.section]} ({note.variant or 'all variants'}): {note.reason}"
        lines.append(Text(visible(text), "dim"))
    return Group(table, *lines)


def _result(variant: VariantReport, notes: Sequence[NotRun]) -> Text:
    """In a word: ok is what was checked, all of it."""
    if variant.errors:
        return Text(f"{variant.errors} errors", COLOURS["fail"])
    if missing := unchecked(notes, variant):
        return Text(f"not checked: {', '.join(SECTIONS[section] for section in missing)}", COLOURS["warn"])
    return Text("ok", COLOURS["pass"])


def chat_json(found: ChatCheck) -> dict[str, Any]:
    """The same for programs: the records of report.json."""
    record: dict[str, Any] = to_json(found, "chat-check")
    return record
