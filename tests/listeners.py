"""Listeners that tests hang onto calls."""

from collections.abc import Callable

from streamquant.files.listener import Listener


class Hears(Listener):
    """Calls functions with the amounts of tasks, and with waits."""

    def __init__(
        self,
        advanced: dict[str, Callable[[int], object]] | None = None,
        waiting: Callable[[str, float], object] | None = None,
    ) -> None:
        self._advanced, self._waiting = advanced or {}, waiting

    def advanced(self, task: str, amount: int = 1) -> None:
        """See Listener.advanced."""
        if task in self._advanced:
            self._advanced[task](amount)

    def waiting(self, what: str, seconds: float) -> None:
        """See Listener.waiting."""
        if self._waiting is not None:
            self._waiting(what, seconds)
