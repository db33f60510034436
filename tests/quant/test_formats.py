"""The shared contract (tests/checks.py) on every entry of the table, and the table itself."""

import importlib
import pkgutil
from collections.abc import Callable

import pytest

import streamquant.quant as quant
from streamquant.quant.format import Format
from streamquant.quant.formats import FORMATS
from tests.checks import BOUNDS, CHECKS


def bf16_or_long(format_: Format) -> object:
    """compressed-tensors' formats differ in nothing but the rounding from one source dtype to the next."""
    is_alike = format_.name.startswith(("INT", "MXFP", "NVFP")) and format_.source_dtype in ("F16", "F32")
    return pytest.param(format_, marks=pytest.mark.long if is_alike else ())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("format_", [bf16_or_long(format_) for format_ in FORMATS.values()], ids=FORMATS)
def test_contract(format_: Format, check: Callable[[Format], None]) -> None:
    check(format_)


def test_every_format_is_in_the_table_once() -> None:
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(quant.__path__, "streamquant.quant.")
        if module.name not in ("streamquant.quant.formats", "streamquant.quant.gpu")  # users of the table
    ]
    names = [format_.name for module in modules for format_ in getattr(module, "FORMATS", ())]
    assert sorted(names) == sorted(FORMATS)
    assert [format_.name for format_ in FORMATS.values()] == list(FORMATS)


def test_every_format_has_an_error_bound() -> None:
    assert set(BOUNDS) == set(FORMATS)
