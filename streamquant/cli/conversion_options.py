"""The options of convert/options.py as options of commands: `plan` and `convert` share one set of them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from streamquant.convert.options import ARGUMENTS, Argument
from streamquant.files.sizes import parse_size

GIVEN = "given"
"""The parameter of a command that stands for all of these options."""


class CommandLine:
    """The values that typer parsed, by the names of their arguments: what `read_options` takes."""

    where = None

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def at(self, key: str) -> str:
        """The option as users write it."""
        return f"--{key.replace('_', '-')}"

    def take(self, key: str) -> Any:
        """The value as it stands."""
        return self._values.get(key)

    def text(self, key: str) -> str | None:
        """A text."""
        found: str | None = self.take(key)
        return found

    def flag(self, key: str) -> bool:
        """A switch."""
        return bool(self.take(key))

    def size(self, key: str) -> int | None:
        """Bytes of a text like 40G. Raises UsageError, which names the option."""
        text = self.text(key)
        return None if text is None else parse_size(text, self.at(key))

    def count(self, key: str) -> int | None:
        """A whole number; typer refuses those below 1."""
        found: int | None = self.take(key)
        return found

    def path(self, key: str) -> Path | None:
        """A path."""
        found: Path | None = self.take(key)
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        """The values of a repeatable option."""
        return tuple(self.take(key) or ())


NOTHING = CommandLine({})
"""No option at all."""


def takes_conversion_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put an option for each of ARGUMENTS in the place of the parameter `given: CommandLine` of a command."""

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        given = CommandLine({argument.name: values.pop(argument.name) for argument in ARGUMENTS})
        command(**{GIVEN: given}, **values)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += map(_parameter, ARGUMENTS) if parameter.name == GIVEN else [own]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # what typer reads
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _parameter(argument: Argument) -> inspect.Parameter:
    is_switch = argument.type is bool
    least = 1 if argument.type is int else None
    return inspect.Parameter(
        argument.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_switch else None,
        annotation=Annotated[
            argument.type if is_switch else argument.type | None,
            typer.Option(argument.flag, help=argument.help, min=least),
        ],
    )
