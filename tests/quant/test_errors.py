"""Errors: their parts can be read, and the table of exit codes is complete."""

import re

import streamquant.publish.release.release  # for all errors of the library
import streamquant.publish.upload.push  # noqa: F401
from streamquant.quant import errors
from streamquant.quant.errors import StreamquantError, UsageError


def test_the_parts_are_attributes() -> None:
    error = UsageError("what", where="a file", found=3, required="at least 4", hint="take another")
    parts = (error.what, error.where, error.found, error.required, error.hint)
    assert parts == ("what", "a file", 3, "at least 4", "take another")
    assert (StreamquantError("what").where, StreamquantError("what").found) == (None, None)


def _all_kinds(kind: type[StreamquantError]) -> list[type[StreamquantError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _all_kinds(child))]


def test_every_exit_code_is_in_the_table() -> None:
    """An error with an exit code of its own is in the table of quant/errors.py; the others have their parent's."""
    assert errors.__doc__ is not None
    table = {name: int(code) for name, code in re.findall(r"(\w+) +\| (\d+) ", errors.__doc__)}
    assert table.pop("KeyboardInterrupt") == 130
    kinds = _all_kinds(StreamquantError)
    assert {kind.__name__: kind.exit_code for kind in kinds if "exit_code" in vars(kind)} == table
    assert len(set(table.values())) == len(table)
