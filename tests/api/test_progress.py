"""The bars of the command line."""

import io

from rich.console import Console
from rich.progress import Progress

from streamquant.cli.progress import ConsoleListener


def test_a_task_that_runs_twice_fills_its_bar_twice() -> None:
    """The layers of an importance matrix, and then of a validation, in one release."""
    progress = Progress(console=Console(file=io.StringIO()))
    listener = ConsoleListener(progress, lambda _plan: None)
    listener.started("layers", 3)
    listener.started("layers", 2)
    listener.advanced("layers", 2)
    assert progress.finished
    listener.started("layers", 4)
    assert (progress.tasks[0].completed, progress.tasks[0].total) == (0, 4)
    listener.advanced("layers")
    assert [(task.completed, task.total) for task in progress.tasks] == [(1, 4)]
