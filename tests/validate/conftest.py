"""What the tests of validate share."""

import pytest

from tests.conftest import Shelf
from tests.validate.engine_fixtures import (
    hermes_14b,
    hermes_llama,
    llama_gguf,
    llama_source,
    qwen_gguf,
    qwen_source,
)
from tests.validate.models import Models
from tests.validate.report_fixtures import four_variants, report

__all__ = [
    "four_variants",
    "hermes_14b",
    "hermes_llama",
    "llama_gguf",
    "llama_source",
    "qwen_gguf",
    "qwen_source",
    "report",
]


@pytest.fixture(scope="session")
def models(shelf: Shelf) -> Models:
    """Small models of every family."""
    return Models(shelf)
