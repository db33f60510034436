"""A report that the tool made of the synthetic `tiny`, and the texts that it was measured on."""

from pathlib import Path

import pytest

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.validate.gates import Gates
from streamquant.validate.options import ValidationOptions
from streamquant.validate.report.data import Report, read_report, write_report
from streamquant.validate.sections import SKIPPABLE
from streamquant.validate.validation import validate
from tests.conftest import TINY_PRE, Shelf

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
