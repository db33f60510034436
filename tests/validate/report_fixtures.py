"""A report that the tool made of the synthetic `tiny`, and the texts that it was measured on."""

import dataclasses
from pathlib import Path

import pytest

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.problem import Problem
from streamquant.validate.gates import Gates
from streamquant.validate.options import ValidationOptions
from streamquant.validate.report.data import NotRun, Report, read_report, write_report
from streamquant.validate.sections import SKIPPABLE
from streamquant.validate.text.chat import ChatDifference, ChatReport
from streamquant.validate.text.template_lints import Lint
from streamquant.validate.text.tokens import TokenDifference, TokenGroup, TokenReport
from streamquant.validate.validation import validate
from tests.conftest import TINY_PRE, Shelf

HOSTILE = "<script>alert(1)</script>\"'|`[x](javascript:y) $\\frac$ \u202egnp.\x1b[31m {{7*7}} &lt; ![i](//e)"
CONTEXT = 32
ENGINES = frozenset(SKIPPABLE) - {"tensors", "noise"}
"""Sections that start engines."""
SPECS = ("fp8-dynamic", "gguf:BF16,Q8_0,Q4_K_M")


def write_text(path: Path, letters: str = "abcdefgh") -> Path:
    """A text of a few hundred words that repeats nothing."""
    path.write_text(" ".join(f"the {letters[number % len(letters)]}{number} in" for number in range(300)) + "\n")
    return path


@pytest.fixture(scope="session")
def four_variants(shelf: Shelf, tiny: Path) -> list[Path]:
    """FP8-dynamic, BF16, Q8_0 and Q4_K_M of `tiny`."""
    options = ConversionOptions(pre=TINY_PRE)
    folder = shelf.get(
        "report-variants",
        lambda out: convert(make_plan(open_checkpoint(tiny), parse_variants(SPECS), options), out, RunOptions(jobs=2)),
    )
    ggufs = [folder / "Tiny-GGUF" / f"Tiny-{kind}.gguf" for kind in ("BF16", "Q8_0", "Q4_K_M")]
    return [folder / "Tiny-FP8-dynamic", *ggufs]


def small_options(*texts: Path, **more: object) -> ValidationOptions:
    """Options for a validation of seconds: no engines, three chunks of each text."""
    settings: dict[str, object] = {"context": CONTEXT, "chunks": 3, "skip": ENGINES, **more}
    return ValidationOptions(texts, **settings)  # type: ignore[arg-type] # the tests name its fields


@pytest.fixture(scope="session")
def report(shelf: Shelf, tiny: Path, four_variants: list[Path]) -> Report:
    """The report of those four, over two texts, with a gate that fails for one of them."""

    def make(folder: Path) -> None:
        texts = write_text(folder / "plain.txt"), write_text(folder / "other.txt", "xyz")
        options = small_options(*texts, gates=Gates(max_mean_kld=1e-3), command=("streamquant", "validate"))
        write_report(validate(tiny, four_variants, options), folder / "report")

    return read_report(shelf.get("tiny-report", make) / "report")


@pytest.fixture(scope="session")
def hostile(report: Report) -> Report:
    """Every text that a stranger chooses, chosen badly."""
    difference = TokenDifference(HOSTILE, 1, (1, 2), (1, 3), HOSTILE, HOSTILE, HOSTILE)
    tokens = TokenReport(HOSTILE, HOSTILE, (TokenGroup(HOSTILE, True, False, 3, 9, 2, 1, (difference,)),), (HOSTILE,))
    chats = (ChatDifference(HOSTILE, "ids", "file", 4, HOSTILE, HOSTILE, (1,), (2,)),)
    chat = ChatReport(HOSTILE, HOSTILE, HOSTILE, 5, 4, 0, False, chats, (HOSTILE,))
    lint = Lint("two-templates", "error", HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    problem = Problem(HOSTILE, "error", HOSTILE, HOSTILE, HOSTILE, HOSTILE)

    def renamed(number: int) -> str:
        return f"{HOSTILE}{number}"

    comparison = report.comparison
    results = []
    for number, result in enumerate(comparison.variants):
        model = dataclasses.replace(result.model, label=renamed(number), path=renamed(number), architecture=HOSTILE)
        tensors = tuple(dataclasses.replace(tensor, name=HOSTILE, stored_as=HOSTILE) for tensor in result.tensors[:2])
        by_category = {HOSTILE + key: value for key, value in result.by_category.items()}
        results.append(dataclasses.replace(result, model=model, tensors=tensors, by_category=by_category))
    base = comparison.original
    original = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, label=HOSTILE, architecture=HOSTILE, path=HOSTILE),
        problems=(problem,),
        by_category={HOSTILE + key: value for key, value in base.by_category.items()},
    )
    files = tuple(dataclasses.replace(file, path=Path(f"{HOSTILE}{file.path.name}")) for file in comparison.files)
    return dataclasses.replace(
        report,
        command=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        comparison=dataclasses.replace(comparison, original=original, variants=tuple(results), files=files),
        variants=tuple(
            dataclasses.replace(
                variant, label=renamed(number), path=renamed(number), problems=(problem,), tokens=tokens, chat=chat,
                lints=(lint,),
            )
            for number, variant in enumerate(report.variants)
        ),
        original_lints=(lint,),
        not_run=(NotRun("engines", renamed(0), HOSTILE),),
        gate_results=tuple(dataclasses.replace(result, variant=renamed(0)) for result in report.gate_results),
    )  # fmt: skip
