"""Paths that no file can have, in every argument of the API that takes one: an error of ours, not Python's."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import streamquant
from streamquant.quant.errors import UsageError

WRONG = "a\0b"
FUNCTIONS = (
    *(streamquant.plan, streamquant.convert, streamquant.recipe, streamquant.card, streamquant.push),
    *(streamquant.convert_and_push, streamquant.run, streamquant.inspect, streamquant.verify),
    *(streamquant.validate, streamquant.chat_check, streamquant.imatrix),
)


def places() -> Iterator[tuple[Callable[..., object], str]]:
    """Function and name of each parameter whose type says Path or Model."""
    for function in FUNCTIONS:
        for parameter in inspect.signature(function).parameters.values():
            if "Path" in str(parameter.annotation) or "Model" in str(parameter.annotation):
                yield function, parameter.name


@pytest.mark.parametrize(("function", "name"), list(places()), ids=str)
@pytest.mark.parametrize("kind", [str, Path])
def test_nul(function: Callable[..., object], name: str, kind: Callable[[str], object]) -> None:
    needed = {
        parameter.name: "x"
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
    }
    with pytest.raises(UsageError, match="a path with a NUL character"):
        function(**{**needed, name: kind(WRONG)})


def test_nul_in_a_sequence_and_in_options() -> None:
    with pytest.raises(UsageError, match="NUL"):
        streamquant.validate("x", [Path(WRONG)], streamquant.ValidationOptions(()))
    with pytest.raises(UsageError, match="NUL"):
        streamquant.validate("x", [], streamquant.ValidationOptions((Path(WRONG),)))
    with pytest.raises(UsageError, match="NUL"):
        streamquant.validate("x", [], streamquant.ValidationOptions((), cache=Path(WRONG)))
