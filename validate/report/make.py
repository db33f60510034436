"""What a validation found, as a report."""

import datetime
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from streamquant.validate.gates import Gates, Measured, judge
from streamquant.validate.logits.comparison import Comparison, VariantResult
from streamquant.validate.readback.measured_files import measured_files
from streamquant.validate.report.data import SCHEMA, Report, VariantReport, this_machine
from streamquant.validate.run import ValidationRun

PACKAGES = ("streamquant", "xllamacpp", "jinja2", "accelerate")
"""Packages that take part beside those of the comparison."""


def make_report(run: ValidationRun, comparison: Comparison) -> Report:
    """The report of all that was found, judged by the gates of the options."""
    variants = tuple(candidate.report() for candidate in run.candidates)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = Report(
        schema=SCHEMA,
        created=now,
        command=run.options.command,
        versions=_versions(run, comparison),
        machine=this_machine(),
        comparison=comparison,
        original_files=measured_files(run.original.files),
        variants=variants,
        original_lints=run.original_lints,
        not_run=tuple(run.not_run),
        gates=run.options.gates,
        gate_results=(),
    )
    return judge_again(report, run.options.gates)


def judge_again(report: Report, gates: Gates) -> Report:
    """The same measurement under other gates."""
    results = [
        found
        for variant in report.variants
        for found in judge(gates, variant.label, measured_numbers(variant, report.measured(variant)))
    ]
    return replace(report, gates=gates, gate_results=tuple(results))


def measured_numbers(variant: VariantReport, result: VariantResult | None) -> Measured:
    """What the gates are about (validate/gates.py): number by name, None where it was not measured."""
    chat = None if variant.chat is None or not variant.chat.right + variant.chat.wrong else variant.chat.wrong
    numbers: dict[str, float | None] = {
        "errors": variant.errors,
        "token mismatches": None if variant.tokens is None else variant.tokens.different,
        "chat mismatches": chat,
    }
    if result is not None:
        numbers |= {
            "mean KLD": result.overall.kld.value,
            "99.9% KLD": result.overall.kld_percentiles.p99_9,
            "same top": result.overall.same_top.value,
            "PPL ratio": result.overall.ratio.value,
        }
    return numbers


def _versions(run: ValidationRun, comparison: Comparison) -> dict[str, str]:
    found = dict(comparison.versions) | run.versions
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return dict(sorted(found.items()))
