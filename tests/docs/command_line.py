"""The command line as its own program knows it: commands, options, examples in the help, and whether words parse."""

import functools
import re
import shlex
from collections.abc import Sequence
from typing import Any

import typer

from streamquant.cli import app as command_line

_EXAMPLE = re.compile(r"`(streamquant [^`]+)`")


@functools.cache
def application() -> Any:
    """The group of commands, as typer builds it."""
    return typer.main.get_command(command_line.app)


@functools.cache
def options() -> dict[str, set[str]]:
    """Command -> its options; "" is the program itself."""
    group = application()
    return {"": _options(group), **{name: _options(command) for name, command in group.commands.items()}}


def _options(command: Any) -> set[str]:
    given = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return {name for name in given if name.startswith("-")} | {"--help", "-h"}


def check(words: Sequence[str]) -> None:
    """Parse words after `streamquant` without running anything. Raises what click raises for a wrong command."""
    group = application()
    context = group.make_context("streamquant", list(words), resilient_parsing=False)
    words = [*context._protected_args, *context.args]
    if not words:  # --version and the like
        return
    name, command, rest = group.resolve_command(context, words)
    assert command is not None, name
    command.make_context(name, rest, parent=context)


def wrong_in(words: Sequence[str]) -> str | None:
    """The name of click's error for words after `streamquant`, None if they are a command."""
    try:
        check(words)
    except typer.BadParameter as error:
        return type(error).__name__
    except typer.Exit:  # --help
        return None
    return None


def examples() -> list[tuple[str, str]]:
    """(command, example) of every example in the help texts."""
    return [
        (name, " ".join(found.split()))
        for name, command in application().commands.items()
        for found in _EXAMPLE.findall(command.help or "")
    ]


def words_of(example: str) -> list[str]:
    """An example as a shell would take it."""
    return shlex.split(example, comments=True)
