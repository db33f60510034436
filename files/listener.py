"""What a long call tells its caller while it runs."""

from typing import Literal

Unit = Literal["bytes", "steps"]


class Listener:
    """Hears of progress, waits and notes. Every method does nothing here: override those that matter.

    One listener serves every call of the library. Methods are called from any thread, and often: they return at once
    and raise nothing. A task is named by what is done ("converting", "fetching", "uploading", "layers").

    >>> class Percent(Listener):
    ...     def started(self, task, total, unit="steps"):
    ...         self.done, self.total = 0, total
    ...
    ...     def advanced(self, task, amount=1):
    ...         self.done += amount
    ...         print(f"{task}: {100 * self.done // self.total} %")
    >>> percent = Percent()
    >>> percent.started("layers", 4)
    >>> percent.advanced("layers")
    layers: 25 %
    """

    def planned(self, plan: object) -> None:
        """The plan of what is left to do (a `streamquant.convert.plan` Plan), before the first weight is read."""

    def started(self, task: str, total: int | None, unit: Unit = "steps") -> None:
        """A task begins, or its size is known by now; `total` None: its size is not known."""

    def advanced(self, task: str, amount: int = 1) -> None:
        """So many more bytes or steps of a task are done. A task that never started is one of unknown size."""

    def waiting(self, what: str, seconds: float) -> None:
        """Something failed for now, and is tried again after so many seconds."""

    def stage_finished(self, outcome: object) -> None:
        """A stage of a release is over (`streamquant.publish.release` tells a StageOutcome, whose text is its str)."""

    def note(self, text: str) -> None:
        """Something that a person should know, one sentence."""


SILENT = Listener()
"""The default everywhere: nobody listens."""
