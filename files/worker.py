"""Threads that are waited for, also after Ctrl-C."""

import threading
from collections.abc import Callable


class Stopped(Exception):  # noqa: N818 - not an error: somebody else failed first, or the user stopped the run
    """What a thread was doing was given up, because the whole ends."""


class Worker(threading.Thread):
    """A daemon thread that `join` and `is_alive` tell the truth about after a KeyboardInterrupt.

    One that strikes in threading.Thread.join makes Python take the thread for ended while it runs (Lib/threading.py of
    Python 3.11 and 3.12, `_wait_for_tstate_lock`): the next join returns at once, and files are closed that the thread
    still writes to.
    """

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self._over = threading.Event()

    def run(self) -> None:
        """See threading.Thread.run."""
        try:
            super().run()
        finally:
            self._over.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until `run` has ended, at most `timeout` seconds. The thread must have been started."""
        self._over.wait(timeout)

    def is_alive(self) -> bool:
        """Whether it was started and `run` has not ended."""
        return self.ident is not None and not self._over.is_set()
