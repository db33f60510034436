"""What every function of the API does with its paths: those that no file can have are refused, as by the commands."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from streamquant.files.writing import os_errors_told
from streamquant.quant.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")


def paths_told(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: UsageError for a path with a NUL, which Python refuses by ValueError; faults as `os_errors_told`."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for path in (*_paths(args), *_paths(tuple(kwargs.values()))):
            if "\0" in str(path):
                raise UsageError(
                    "a path with a NUL character", found=f"{str(path)!r:.200}", required="a path that a file can have"
                )
        with os_errors_told():
            return function(*args, **kwargs)

    return checked


def _paths(value: object) -> Iterator[str | Path]:
    """The texts and paths of arguments, those in sequences, and the paths among the options in a record."""
    match value:
        case str() | Path():
            yield value
        case list() | tuple():
            for inner in value:
                yield from _paths(inner)
        case _ if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                match getattr(value, field.name):
                    case Path() as path:
                        yield path
                    case tuple() as paths if paths and isinstance(paths[0], Path):
                        yield from paths
                    case inner if dataclasses.is_dataclass(inner):
                        yield from _paths(inner)
