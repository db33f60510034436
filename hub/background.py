"""Uploads in the background, and their end when somebody interrupts them."""

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from streamquant.files.worker import Worker

T = TypeVar("T")

STOP_SECONDS = 3.0
"""How long a stop waits for uploads to end."""


def in_background(call: Callable[[], T], stop: threading.Event) -> T:
    """`call` in a thread of its own, so that an interrupt reaches the caller in the midst of an upload.

    KeyboardInterrupt sets `stop` and is raised when the upload has ended, at the latest STOP_SECONDS later: one that
    waits for an answer is left behind. Other errors are those of the call.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # handed to the calling thread, whatever it is
            errors.append(error)

    thread = Worker(work, "upload")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        stop.set()
        abort_xet()
        thread.join(STOP_SECONDS)
        raise
    if errors:
        raise errors[0]
    return results[0]


def abort_xet() -> None:
    """End the transfers of hf_xet, which do not look at an event."""
    with contextlib.suppress(Exception):  # its session is a private matter of the client's, and may not be there
        from huggingface_hub.utils import _xet

        _xet.abort_xet_session()  # type: ignore[no-untyped-call] # it has no types
