"""The threads of a run: each takes the next task until there is none; the first error ends them all."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from streamquant.convert.run.blocks import Scratch
from streamquant.files.worker import Worker

Task = Callable[[Scratch], None]


class Workers:
    """Threads that do urgent tasks first, then those of `rest` in their order. Tasks may add urgent ones.

    `interrupt` wakes up tasks that wait for something; it is called before the threads are waited for.
    """

    def __init__(self, rest: Iterator[Task], interrupt: Callable[[], None]) -> None:
        self._rest = rest
        self._interrupt = interrupt
        self._urgent: deque[Task] = deque()
        self._running = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self.is_stopping = False
        """Whether tasks should end soon: one failed, or the caller was interrupted."""

    def add(self, tasks: Iterable[Task]) -> None:
        """Add urgent tasks."""
        with self._changed:
            self._urgent.extend(tasks)
            self._changed.notify_all()

    def run(self, jobs: int) -> None:
        """Start `jobs` threads and wait until all tasks are done. Raises the first error of a task, whatever it is."""
        threads = [Worker(self._work, f"streamquant-{i}") for i in range(jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            self._stop()
            try:
                if any(thread.is_alive() for thread in threads):
                    self._interrupt()
            finally:
                for thread in threads:
                    thread.join()
        if self._error is not None:
            raise self._error

    def _stop(self) -> None:
        with self._changed:
            self.is_stopping = True
            self._changed.notify_all()

    def _work(self) -> None:
        scratch = Scratch()
        try:
            while (task := self._next()) is not None:
                task(scratch)
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()
        except BaseException as error:  # handed to the calling thread, whatever it is
            self._error = self._error or error
            self._stop()
            self._interrupt()

    def _next(self) -> Task | None:
        """The next task; None when there is nothing left, and nothing running that might add some."""
        with self._changed:
            while not self.is_stopping:
                task = self._urgent.popleft() if self._urgent else next(self._rest, None)
                if task is not None:
                    self._running += 1
                    return task
                if self._running == 0:
                    self._stop()
                    break
                self._changed.wait()
            return None
