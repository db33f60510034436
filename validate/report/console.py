"""A report, and the checks of tokens and chat alone, for a terminal."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streamquant.files.records import to_json
from streamquant.quant.printable import visible
from streamquant.validate.report.data import ChatCheck, Report, VariantReport
from streamquant.validate.report.text import MISSING
from streamquant.validate.report.view import cell, grouped, make_view, wrong_chats
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
        for section, variants, reason in grouped(note for note in report.not_run if not note.requested)
    ]
    headline = Text(view.verdict.headline, COLOURS[view.verdict.status])
    return Group(headline, table, *[line for lines in problems for line in lines], *skipped)


def _problems(name: str, variant: VariantReport) -> list[Text]:
    return [
        Text(visible(f"{name}: {problem.severity} {problem.check}: {problem}"), COLOURS[problem.severity])
        for problem in variant.problems
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
            MISSING if chat is None else f"{chat.cases - wrong_chats(chat)} of {chat.cases}",
            MISSING if chat is None else str(len(chat.differences) - wrong_chats(chat)),
            Text(f"{variant.errors} errors", "bold red") if variant.errors else Text("ok", "green"),
        )
    lines = [line for variant in found.variants for line in _problems(variant.label, variant)]
    for lint in found.original_lints:
        text = f"the original: {lint.severity} {lint.check}: {lint.found}: {lint.consequence}; to do: {lint.fix}"
        lines.append(Text(visible(text), COLOURS[lint.severity]))
    for note in found.not_run:
        text = f"not checked: {SECTIONS[note.section]} ({note.variant or 'all variants'}): {note.reason}"
        lines.append(Text(visible(text), "dim"))
    return Group(table, *lines)


def chat_json(found: ChatCheck) -> dict[str, Any]:
    """The same for programs: the records of report.json."""
    record: dict[str, Any] = to_json(found, "chat-check")
    return record
