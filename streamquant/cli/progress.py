"""Progress on the terminal: bars for what runs, lines for what a person should know."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from streamquant.cli.console import INTERRUPTED, error_console, print_line, say, say_note, say_waiting
from streamquant.files.listener import Listener, Unit

if TYPE_CHECKING:
    from streamquant.convert.plan.records import Plan


class _AmountColumn(ProgressColumn):
    """Bytes and their rate, or steps and the time that they took."""

    def __init__(self) -> None:
        self._bytes = (DownloadColumn(), TransferSpeedColumn())
        self._steps = (MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__()

    def render(self, task: Task) -> Text:
        columns = self._bytes if task.fields.get("unit") == "bytes" else self._steps
        return Text(" ").join(column.render(task) for column in columns)


class ConsoleListener(Listener):
    """Draws a bar for each task, and prints notes and waits to standard error. Draws nothing without a terminal."""

    def __init__(self, progress: Progress, on_plan: "Callable[[Plan], None]") -> None:
        self._progress = progress
        self._on_plan = on_plan
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def planned(self, plan: object) -> None:
        """Show the plan, on a terminal."""
        if error_console.is_terminal:
            self._on_plan(cast("Plan", plan))

    def started(self, task: str, total: int | None, unit: Unit = "steps") -> None:
        """Draw the bar of a task, or give it another size; one that is full begins again."""
        number = self._task(task, unit)
        if self._progress.tasks[number].finished:
            self._progress.reset(number, total=total)
        else:
            self._progress.update(number, total=total)

    def advanced(self, task: str, amount: int = 1) -> None:
        """Move the bar of a task; bytes, if it never started."""
        self._progress.advance(self._task(task, "bytes"), amount)

    def waiting(self, what: str, seconds: float) -> None:
        """Print what is tried again."""
        say_waiting(what, seconds)

    def stage_finished(self, outcome: object) -> None:
        """Print what became of a stage of a release."""
        print_line(outcome)

    def note(self, text: str) -> None:
        """Print a note."""
        say_note(text)

    def _task(self, name: str, unit: Unit) -> TaskID:
        with self._lock:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=None, unit=unit)
            return self._tasks[name]


@contextmanager
def console_listener(
    hint: str = "run the same command again to continue", on_plan: "Callable[[Plan], None]" = lambda _plan: None
) -> Iterator[ConsoleListener]:
    """The listener of a command. Ctrl-C inside ends the command with exit code 130 and `hint`."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), _AmountColumn(), TimeRemainingColumn())
    try:
        with Progress(
            *columns,
            console=error_console,
            disable=not error_console.is_terminal,
            transient=True,
            redirect_stdout=False,  # what libraries write passes the guard of console.py
            redirect_stderr=False,
        ) as progress:
            yield ConsoleListener(progress, on_plan)
    except KeyboardInterrupt:
        say(f"interrupted; {hint}")
        raise typer.Exit(INTERRUPTED) from None
