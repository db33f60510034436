"""Checks around every test of the API: nothing is printed, and the process is as it was."""

import gc
import logging
import os
import signal
from collections.abc import Iterator

import pytest

import streamquant


class Recorder(streamquant.Listener):
    """What a listener heard."""

    def __init__(self) -> None:
        self.plans: list[object] = []
        self.totals: dict[str, int | None] = {}
        self.units: dict[str, str] = {}
        self.done: dict[str, int] = {}
        self.outcomes: list[object] = []

    def planned(self, plan: object) -> None:
        self.plans.append(plan)

    def started(self, task: str, total: int | None, unit: str = "steps") -> None:
        self.totals[task] = total
        self.units[task] = unit

    def advanced(self, task: str, amount: int = 1) -> None:
        self.done[task] = self.done.get(task, 0) + amount

    def stage_finished(self, outcome: object) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def listener() -> Recorder:
    return Recorder()


def process_state() -> dict[str, object]:
    """What a library has to leave alone."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("streamquant", "gguf", "transformers"))]
    signals = signal.valid_signals() - {signal.SIGALRM}  # that of pytest-timeout
    return {
        "signals": {number: signal.getsignal(number) for number in signals},
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "garbage": (gc.isenabled(), gc.get_threshold()),
        "logging": [(logger.name, logger.level, logger.disabled, handlers_of(logger)) for logger in loggers],
        "folder": os.getcwd(),  # noqa: PTH109
        "umask": _umask(),
    }


def handlers_of(logger: logging.Logger) -> list[logging.Handler]:
    """But for those that pytest puts there for each test."""
    return [handler for handler in logger.handlers if not type(handler).__module__.startswith("_pytest.")]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.fixture(scope="session")
def libraries() -> None:
    """The first import of transformers sets a logging handler and a variable of the environment: those are not ours."""
    import transformers.modeling_utils  # noqa: F401


@pytest.fixture(autouse=True)
def silent(libraries: None, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No test of this folder may print, or leave the process otherwise than it was."""
    before, frozen = process_state(), gc.get_freeze_count()
    capfd.readouterr()
    yield
    assert gc.get_freeze_count() <= frozen, "frozen objects may go, but none are added"
    assert capfd.readouterr() == ("", "")
    assert process_state() == before
