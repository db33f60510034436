"""What the tests of publish share."""

import signal
from collections.abc import Iterator

import pytest

from tests.publish.card_fixtures import cards, plain
from tests.publish.hub_client import hub, out, small_variants
from tests.validate.engine_fixtures import hermes_14b
from tests.validate.report_fixtures import four_variants, report

__all__ = ["cards", "four_variants", "hermes_14b", "hub", "interrupts", "out", "plain", "report", "small_variants"]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the shell started the tests in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
