"""Paths that no file can have, in every argument of the API that takes one: an error of ours, not Python's."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import streamquant
from streamquant.quant.errors import UsageError

WRONG = "a\0b"
FUNCTIONS = (
    *("plan", "convert", "recipe", "card", "push", "convert_and_push", "run", "inspect", "verify"),
    *("validate", "chat_check", "imatrix"),
)


def places() -> Iterator[tuple[str, str]]:
    """Names of function and parameter, of each whose type says Path or Model."""
    for function in FUNCTIONS:
        for parameter in inspect.signature(getattr(streamquant, function)).parameters.values():
            if "Path" in str(parameter.annotation) or "Model" in str(parameter.annotation):
                yield function, parameter.name


@pytest.mark.parametrize(("function", "name"), list(places()))
@pytest.mark.parametrize("kind", [str, Path])
def test_nul(function: str, name: str, kind: Callable[[str], object]) -> None:
    called = getattr(streamquant, function)
    needed = {
        parameter.name: "x"
        for parameter in inspect.signature(called).parameters.values()
        if parameter.default is parameter.empty
    }
    with pytest.raises(UsageError, match="a path with a NUL character"):
        called(**{**needed, name: kind(WRONG)})


def test_nul_in_a_sequence_and_in_options() -> None:
    with pytest.raises(UsageError, match="NUL"):
        streamquant.validate("x", [Path(WRONG)], streamquant.ValidationOptions(()))
    with pytest.raises(UsageError, match="NUL"):
        streamquant.validate("x", [], streamquant.ValidationOptions((Path(WRONG),)))
    with pytest.raises(UsageError, match="NUL"):
        streamquant.validate("x", [], streamquant.ValidationOptions((), cache=Path(WRONG)))
