"""A thread that is waited for after Ctrl-C is really waited for."""

import threading
from collections.abc import Callable

import pytest

from streamquant.files.worker import Worker

SECONDS = 20


def test_it_is_alive_after_an_interrupt_of_join(interrupt_after: Callable[[float], None]) -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def work() -> None:
        goes_on.wait(SECONDS)
        ended.set()

    worker = Worker(work, "test")
    assert not worker.is_alive(), "not started"
    worker.start()
    interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        worker.join()
    assert worker.is_alive()
    worker.join(0.01)
    assert worker.is_alive()
    goes_on.set()
    worker.join(SECONDS)
    assert ended.is_set()
    assert not worker.is_alive()


def test_one_that_fails_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _arguments: None)
    worker = Worker(lambda: 1 / 0, "test")
    worker.start()
    worker.join(SECONDS)
    assert not worker.is_alive()
