"""What is found of the weights before they are encoded: the largest magnitude of tensors with a scale for all of them.

A visit reads the rows of a chunk and keeps one number. The visits of all tensors that share a scale come right before
the first chunk of any of them (Plan.visits): what they read is still in the page cache when it is encoded, unless such
a set is larger than the memory that is free. A tensor's number goes to the journal before it is used.
"""

import threading
from collections.abc import Callable, Mapping

from streamquant.convert.plan.records import Plan
from streamquant.files.worker import Stopped


class Magnitudes:
    """The largest magnitudes of source tensors, found chunk by chunk. Safe to use from any thread."""

    def __init__(
        self, plan: Plan, known: Mapping[str, float] | None = None, record: Callable[[str, float], None] | None = None
    ) -> None:
        """`known` are those that an earlier run found; `record` is given each that becomes complete."""
        self._known = dict(known or {})
        self._record = record
        self._matrices = [plan.matrices[chunk.matrix].source.name for chunk in plan.chunks]
        self._left: dict[str, int] = {}
        self._found: dict[str, float] = {}
        for number in [number for numbers in plan.visits.values() for number in numbers]:
            if self.is_wanted(number):
                self._left[self._matrices[number]] = self._left.get(self._matrices[number], 0) + 1
        self._changed = threading.Condition()
        self._is_stopped = False

    def is_wanted(self, number: int) -> bool:
        """Whether a chunk has to be visited: its tensor's is not known yet."""
        return self._matrices[number] not in self._known

    def add(self, number: int, value: float) -> None:
        """The largest magnitude of a chunk, visited once."""
        name = self._matrices[number]
        with self._changed:
            self._found[name] = max(self._found.get(name, 0.0), value)
            self._left[name] -= 1
            if self._left[name]:
                return
            value = self._found[name]
        if self._record is not None:
            self._record(name, value)
        with self._changed:
            self._known[name] = value
            self._changed.notify_all()

    def largest(self, names: tuple[str, ...]) -> float:
        """The largest magnitude in some tensors; waits for their visits, which began before. Raises Stopped."""
        with self._changed:
            while not all(name in self._known for name in names):
                if self._is_stopped:
                    raise Stopped
                self._changed.wait()
            return max(self._known[name] for name in names)

    def stop(self) -> None:
        """Wake up who waits."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
