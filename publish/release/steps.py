"""A Listener for callers that still take (what, done, total) as a function."""

from collections.abc import Callable

from streamquant.files.listener import Listener, Unit


class Steps(Listener):
    """Calls `on_step(prefix + task, done, total)` after every step of a task."""

    def __init__(self, on_step: Callable[[str, int, int], None], prefix: str = "") -> None:
        self._on_step, self._prefix = on_step, prefix
        self._tasks: dict[str, list[int]] = {}

    def started(self, task: str, total: int | None, unit: Unit = "steps") -> None:
        """See Listener.started."""
        del unit
        self._tasks[task] = [0, total or 0]
        self._on_step(self._prefix + task, 0, total or 0)

    def advanced(self, task: str, amount: int = 1) -> None:
        """See Listener.advanced."""
        state = self._tasks.setdefault(task, [0, 0])
        state[0] += amount
        self._on_step(self._prefix + task, *state)
