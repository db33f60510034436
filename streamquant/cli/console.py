"""What a person reads on the terminal: tables and JSON on standard output, notes and progress on standard error."""

import json
import sys
from typing import Any

from rich.console import Console

WIDE = 160
"""Columns of tables that go into a file or a pipe."""
INTERRUPTED = 130
"""The exit code after Ctrl-C or SIGTERM."""
out_console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
error_console = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else WIDE)


def print_result(value: Any) -> None:
    """Print a dict or a list as JSON, anything else as rich renders it."""
    if isinstance(value, dict | list):
        sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")
    else:
        out_console.print(value)


def print_line(text: object) -> None:
    """Print a line as it is to standard output."""
    out_console.print(str(text), markup=False, highlight=False)


def say(text: object) -> None:
    """Print a line as it is to standard error."""
    error_console.print(str(text), markup=False, highlight=False)


def say_note(text: str) -> None:
    """Print a note to standard error."""
    say(f"note: {text}")


def say_waiting(what: str, seconds: float) -> None:
    """Print what is tried again, and when, to standard error."""
    say(f"{what}; again in {seconds:.0f} s")
