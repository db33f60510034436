"""The one printer: tables and JSON on standard output; errors, notes and progress on standard error.

What is printed holds strangers' names, keys and values, which can hold escape sequences (OSC 52 writes the clipboard,
CSI 2J clears the screen), markup of rich, and marks that turn text around. Here every character that is not seen
becomes an escape, and no text is markup. Nothing else prints: tests/attacks/test_terminal.py sees to it.
"""

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from streamquant.quant.errors import StreamquantError
from streamquant.quant.printable import visible_json, visible_lines


def _open_standard_streams() -> None:
    """Streams that were closed lead nowhere: else the first files that are opened would take their numbers, and what
    libraries print would be written into them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 # open to the end


_open_standard_streams()
WIDE = 160
"""Columns of tables that go into a file or a pipe."""
INTERRUPTED = 130
"""The exit code after Ctrl-C or SIGTERM."""


class Printer(Console):
    """rich's console for text of strangers. Colours and the movements of a progress bar are its own."""

    def __init__(self, *, stderr: bool) -> None:
        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else WIDE
        super().__init__(stderr=stderr, soft_wrap=True, markup=False, emoji=False, width=width)

    @property
    def file(self) -> IO[str]:
        """The stream itself, also where libraries that write to it meet the guard."""
        found = super().file
        return found.stream if isinstance(found, _Guard) else found

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError again: rich would end the process, whatever it is doing."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a string, as it is measured and printed."""
        return super().render_str(visible_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed passes here, the cells of tables too."""
        if isinstance(renderable, Text):
            renderable = _visible_text(renderable)  # before its lines are laid out
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else visible_lines(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


def _visible_text(text: Text) -> Text:
    """A text with characters that are not seen as escapes; its styles stay, if a little to the left."""
    plain = visible_lines(text.plain)
    if plain != text.plain:
        text = text.copy()
        text.plain = plain
    return text


class _Guard(io.TextIOBase):
    """Standard error for libraries: their warnings, logs and tracebacks quote strangers' text, and are printed here."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._line = stream, ""

    def write(self, text: str) -> int:
        """Print every line that is complete."""
        whole, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            say(whole)
        return len(text)

    def flush(self) -> None:
        """Print what there is of a line."""
        line, self._line = self._line, ""
        if line:
            error_console.print(line, end="", highlight=False)

    def fileno(self) -> int:
        """That of the stream."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """False: a library that draws would draw with escape sequences."""
        return False


out_console = Printer(stderr=False)
error_console = Printer(stderr=True)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Inside, sys.stderr is guarded, and what a stream's encoding lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before = sys.stderr
    sys.stderr = cast("TextIO", _Guard(before))
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before


_lost: list[OSError] = []
"""What was wrong with standard output when the result of a command was printed."""


@contextlib.contextmanager
def _printing(console: Printer) -> Iterator[None]:
    """A stream that is full or closed ends no command: what it does not take is dropped. A closed pipe is raised."""
    try:
        yield
        console.file.flush()
    except BrokenPipeError:
        _drop(console.file)
        raise
    except OSError as error:
        _drop(console.file)
        if console is out_console:
            _lost.append(error)


def _drop(stream: IO[str]) -> None:
    """What is still buffered, and all that follows, goes nowhere: the interpreter would fail over it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def check_printed() -> None:
    """Raise StreamquantError if standard output did not take the result of a command that has no other."""
    if _lost:
        error = _lost.pop()
        _lost.clear()
        raise StreamquantError("standard output takes no more", found=error.strerror, hint="write it somewhere else")


def print_result(value: Any, *, is_kept: bool = False) -> None:
    """Print a dict or a list as JSON, anything else as rich renders it. `is_kept`: it is on the disk or the Hub too."""
    before = len(_lost)
    with _printing(out_console):
        if isinstance(value, dict | list):
            out_console.file.write(visible_json(json.dumps(value, indent=1, ensure_ascii=False, default=str)) + "\n")
        else:
            out_console.print(value)
    if is_kept:
        del _lost[before:]


def print_line(text: object) -> None:
    """Print a line about what was done to standard output."""
    before = len(_lost)
    with contextlib.suppress(BrokenPipeError), _printing(out_console):
        out_console.print(str(text), highlight=False)
    del _lost[before:]


def print_text(text: str) -> None:
    """Print lines, which end with LF, to standard output."""
    with _printing(out_console):
        out_console.file.write(visible_lines(text))


def say(text: object) -> None:
    """Print a line to standard error."""
    with contextlib.suppress(BrokenPipeError), _printing(error_console):
        error_console.print(str(text), highlight=False)


def say_view(view: RenderableType) -> None:
    """Print what rich renders to standard error."""
    with contextlib.suppress(BrokenPipeError), _printing(error_console):
        error_console.print(view)


def say_note(text: str) -> None:
    """Print a note to standard error."""
    say(f"note: {text}")


def say_waiting(what: str, seconds: float) -> None:
    """Print what is tried again, and when, to standard error."""
    say(f"{what}; again in {f'{seconds:.0f} s' if seconds < 180 else f'{seconds / 60:.0f} min'}")
