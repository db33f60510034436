"""Folders with cards, and without."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from streamquant.publish.cards.card import write_cards
from streamquant.validate.report.data import Report
from tests.conftest import Shelf
from tests.publish.cards.contents import OPTIONS, fill


@pytest.fixture
def out(four_variants: list[Path], report: Report, tmp_path: Path) -> Path:
    """An --out folder whose FP8 variant came with the original's card."""
    fill(tmp_path / "out", four_variants, report)
    return tmp_path / "out"


@pytest.fixture(scope="session")
def cards(shelf: Shelf, four_variants: list[Path], report: Report) -> Path:
    """The same with cards, prompts and all. Must not be written to."""

    def make(folder: Path) -> None:
        fill(folder / "out", four_variants, report)
        write_cards(folder / "out", dataclasses.replace(OPTIONS, prompts=True))

    return shelf.get("publish-cards", make) / "out"


@pytest.fixture
def plain(out: Path) -> Path:
    """An --out folder without a report: cards of it are made in no time."""
    shutil.rmtree(out / "report")
    return out
