"""The examples of docs/api.md, run in their order as one program."""

from pathlib import Path

import pytest

from tests.conftest import Shelf
from tests.docs.pages import ROOT, blocks
from tests.docs.stand_ins import open_workshop

PAGE = ROOT / "docs" / "api.md"

# The client hands open files to httpx in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_the_examples_run(tmp_path: Path, shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    with open_workshop(tmp_path, shelf):
        capfd.readouterr()
        for block in blocks(PAGE):
            if block.language == "python":
                code = "\n" * (block.line - 1) + block.text  # tracebacks name the lines of the page
                exec(compile(code, PAGE, "exec"), names)
        printed = capfd.readouterr()
    assert "unknown variant" in printed.out
    assert printed.err == ""


def test_every_function_has_an_example() -> None:
    import streamquant

    text = "".join(block.text for block in blocks(PAGE) if block.language == "python")
    missing = [name for name in streamquant.__all__ if name[0].islower() and f"streamquant.{name}(" not in text]
    assert missing == []
