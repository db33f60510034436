"""What pyproject.toml declares is what the source imports, no more and no less."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.package.conftest import ROOT

DEVICE = "_gpu.py"
"""Ending of the files whose whole content needs an extra; they are imported where that is there."""
TOOLS = frozenset({"dev", "fuzz", "test"})
"""Extras of those who work on the package itself."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name."""
    return {normal(re.match(r"[\w.-]+", text)[0]) for text in requirements}  # type: ignore[index]


DEPENDENCIES = names(PROJECT["dependencies"])
EXTRAS = {name: names(listed) for name, listed in PROJECT["optional-dependencies"].items() if name not in TOOLS}


def modules(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """The top-level names that are imported; without `lazy`, only those that are imported together with the file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.orelse:
                yield from modules(statement, lazy=lazy)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from modules(node, lazy=lazy)


def imported(*, lazy: bool) -> set[str]:
    """The distributions that the package imports."""
    owners = importlib.metadata.packages_distributions()
    found: set[str] = set()
    rooms = [path for path in (ROOT / "streamquant").iterdir() if path.is_dir()]
    for path in (
        *(ROOT / "streamquant").glob("*.py"),
        *(file for room in rooms for file in room.resolve().rglob("*.py")),
    ):
        if lazy or not path.name.endswith(DEVICE):
            found |= {name for name in modules(ast.parse(path.read_text()), lazy=lazy) if name != "streamquant"}
    # A name that is not installed here (vllm) is taken for that of its distribution.
    return {normal(owners.get(name, [name])[0]) for name in found - sys.stdlib_module_names}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    assert imported(lazy=True) == DEPENDENCIES | set[str]().union(*EXTRAS.values())


def test_what_an_extra_brings_is_imported_where_it_is_needed() -> None:
    at_once = imported(lazy=False)
    assert len(at_once) > 10
    assert at_once <= DEPENDENCIES


def test_every_dependency_says_what_it_is_for() -> None:
    lines = Path(ROOT / "pyproject.toml").read_text().partition("\ndependencies = [\n")[2].partition("\n]\n")[0]
    assert all(re.search(r'",\s+# \w', line) for line in lines.split("\n"))


def test_the_tests_of_the_newest_libraries_are_there() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (listed,) = re.findall(r"^NEWEST_TESTS := (.+)$", text, re.MULTILINE)
    assert len(listed.split()) > 5
    assert [path for path in listed.split() if not (ROOT / path).exists()] == []


def test_the_documentation_names_the_versions_that_the_suite_runs_with() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    text = (ROOT / "docs" / "index.md").read_text()
    for name in ("transformers", "huggingface_hub", "compressed-tensors", "torch"):
        assert f"{name} {pinned[name]}" in text
