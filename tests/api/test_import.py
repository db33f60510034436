"""`import streamquant`: light, complete, and its two packages that are functions too."""

import inspect
import json
import pydoc
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import streamquant
import streamquant.convert.conversion as conversion_module
from streamquant import convert, validate
from streamquant.api.conversion import convert as convert_function
from streamquant.api.validation import validate as validate_function

HEAVY = (
    "numpy",
    "torch",
    "transformers",
    "numba",
    "gguf",
    "huggingface_hub",
    "typer",
    "rich",
    "pydantic",
    "matplotlib",
)


def in_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_import_is_light() -> None:
    imported = json.loads(in_python("import json, sys, streamquant; print(json.dumps(list(sys.modules)))"))
    assert "streamquant" in imported
    assert not set(HEAVY) & set(imported)


def test_the_command_line_starts_without_what_only_some_commands_need() -> None:
    """`streamquant plan --help` has to come at once."""
    imported = json.loads(in_python("import json, sys, streamquant.cli.app; print(json.dumps(list(sys.modules)))"))
    assert "streamquant.cli.app" in imported
    late = {"torch", "transformers", "huggingface_hub", "pydantic", "matplotlib", "streamquant.api.conversion"}
    assert not late & set(imported)


def test_the_module_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "streamquant", "--version"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["streamquant"] == streamquant.__version__


def test_every_name_is_there_and_documented() -> None:
    assert len(set(streamquant.__all__)) == len(streamquant.__all__)
    for name in streamquant.__all__:
        assert inspect.getdoc(getattr(streamquant, name)), name
        assert name in dir(streamquant)
    assert streamquant.__version__
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = streamquant.no_such_name  # type: ignore[attr-defined]


def test_functions_are_typed_and_short() -> None:
    for name in streamquant.__all__:
        found = getattr(streamquant, name)
        if isinstance(found, type) or not callable(found):
            continue
        parameters = inspect.signature(found).parameters.values()
        assert sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) <= 5, name
        assert all(p.annotation is not p.empty for p in parameters), name


def test_help_reads_well() -> None:
    text = pydoc.plain(pydoc.render_doc(streamquant))
    for name in streamquant.__all__:
        assert name in text
    assert "convert a model: every variant from one read" in text
    assert "convert(model: str | pathlib.Path" in pydoc.plain(pydoc.render_doc(convert_function))


@pytest.mark.parametrize(
    ("room", "function"), [(convert, convert_function), (validate, validate_function)], ids=["convert", "validate"]
)
def test_a_package_that_is_a_function(room: Any, function: Callable[..., object]) -> None:
    assert inspect.signature(room) == inspect.signature(function)
    assert room.__doc__ == function.__doc__
    assert room.__wrapped__ is function
    assert isinstance(room, ModuleType)


def test_they_stay_callable_in_every_order_of_imports() -> None:
    code = (
        "import streamquant; assert callable(streamquant.convert) and callable(streamquant.validate);"
        "import streamquant.convert.plan.planner; assert callable(streamquant.convert);"
        "import streamquant.convert.conversion as c; assert c.Conversion;"
        "from streamquant.validate.gates import Gates;"
        "from streamquant import convert, validate; assert callable(convert) and callable(validate);"
        "assert streamquant.convert.plan.planner.make_plan; print('fine')"
    )
    assert in_python(code) == "fine\n"
    assert (
        in_python("import streamquant.convert.options, streamquant; print(callable(streamquant.convert))") == "True\n"
    )
    assert conversion_module.Conversion is streamquant.Conversion
