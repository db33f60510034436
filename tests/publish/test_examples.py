"""The releases in examples/: they can be read, their figures are the plan's, and the small one runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.publish.release.release import run_release
from streamquant.publish.release.release_file import STAGES, read_release
from streamquant.validate.report.data import read_report
from tests.conftest import Shelf
from tests.example_figures import BEGIN, END, EXAMPLES, figures, shape_of, with_figures
from tests.shapes import SHAPES, write_shape

HERMES = sorted(EXAMPLES.glob("hermes-*.yaml"))
SMOLLM2 = EXAMPLES / "smollm2.yaml"


def test_there_is_one_for_every_size() -> None:
    assert {shape_of(example) for example in HERMES} == SHAPES.keys()


@pytest.mark.parametrize("example", HERMES, ids=lambda path: path.stem)
def test_figures(example: Path, shelf: Shelf, data: Path) -> None:
    """Out of date? `python -m tests.example_figures` writes them again."""
    name = shape_of(example)
    folder = shelf.get(f"shape-{name}", lambda place: write_shape(SHAPES[name], place / name, data))
    file, text = read_release(example), example.read_text()
    made = figures(file, open_checkpoint(folder / name))
    assert with_figures(text, made) == text
    assert text.count(BEGIN) == text.count(END) == 1
    assert {recipe.spec for recipe in file.recipes} <= set(re.findall(r"^#   (\S+) ", made, re.MULTILINE))
    assert set(file.stages) == set(STAGES) - {"verify"}
    assert file.push is not None
    assert file.push.options.private


def test_the_small_one_can_be_read() -> None:
    file = read_release(SMOLLM2)
    assert Path(file.model).parts[-2:] == ("demo", "SmolLM2-135M-Instruct")
    assert file.imatrix is not None
    assert file.validate is not None
    assert all(text.is_file() for text in (*file.imatrix.text, *file.validate.text))


@pytest.mark.long
def test_the_small_one_runs(smollm2: Path, tmp_path: Path) -> None:
    file = read_release(SMOLLM2)
    assert file.validate is not None
    validate = replace(file.validate, report=tmp_path / "release" / "report", cache=False)
    file = replace(file, model=str(smollm2), out=tmp_path / "release", validate=validate)
    states = [(outcome.stage, outcome.state) for outcome in run_release(file)]
    assert states == [(stage, "done") for stage in file.stages]
    report = read_report(tmp_path / "release" / "report")
    assert all(result.passed for result in report.gate_results)
    assert {path.parent.name for path in file.out.glob("*/README.md")} == {
        "SmolLM2-135M-Instruct-FP8-dynamic",
        "SmolLM2-135M-Instruct-GGUF",
    }
    assert {outcome.state for outcome in run_release(file) if outcome.stage != "plan"} == {"skipped"}
