"""The figures of docs/hermes-4.md are those of the plans, and its times those of docs/benchmarks.md."""

from pathlib import Path

import pytest

from streamquant.convert.source.checkpoint import open_checkpoint
from tests.conftest import Shelf
from tests.docs.hermes_figures import (
    BEGIN,
    BENCHMARKS,
    END,
    PAGE,
    RELEASES,
    figures,
    plan_of,
    read_rates,
    section,
    with_figures,
)
from tests.shapes import SHAPES, write_shape


def test_figures(shelf: Shelf, data: Path) -> None:
    """Out of date? `python -m tests.docs.hermes_figures` writes them again."""
    sizes = {}
    for name in RELEASES:
        sizes[name] = plan_of(name, open_checkpoint(_shape(name, shelf, data)))
    text = PAGE.read_text()
    assert with_figures(text, figures(sizes, read_rates(BENCHMARKS.read_text()))) == text
    assert text.count(BEGIN) == text.count(END) == 1


def _shape(name: str, shelf: Shelf, data: Path) -> Path:
    return shelf.get(f"shape-{name}", lambda place: write_shape(SHAPES[name], place / name, data)) / name


def test_every_shape_has_a_release() -> None:
    assert RELEASES.keys() == SHAPES.keys()


def test_rates_are_read_from_their_sections() -> None:
    text = """
## fp8-dynamic

| | seconds |
| streamquant | 2.00 |

|  | s (small) | s (large) | steady MB/s | steady MB/CPU s | constant s |
| --- | ---: |
| streamquant | 2.85 | 5.71 | 1,563 | 1,319 | 0.5 |

## The ladder of file types from one read

|  | seconds | spread | CPU s | MiB | GB written | source MB/s | x time | x CPU |
| streamquant | 20.00 | 21.4 to 24.7 | 40.00 | 317 | 5.20 | 80 | 1.00 | 1.00 |

## Kernels
"""
    rates = read_rates(text)
    assert rates.fp8 == pytest.approx(1_319e6)
    assert rates.ladder == pytest.approx(40e6)
    assert "Kernels" not in section(text, "fp8-dynamic")
