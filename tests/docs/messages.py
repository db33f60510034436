"""The messages of all errors that streamquant raises, read from the source: what docs/troubleshooting.md must explain.

`python -m tests.docs.messages` prints those that the page lacks, and those that it has and nobody raises.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from streamquant.quant.errors import StreamquantError, UsageError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"
"""What a message says here depends on the input."""
_ROW = re.compile(r"^\| (`.+?`) \| (.+) \|$", re.MULTILINE)
_CODE = re.compile(r"`([^`]+)`")


def sources() -> list[Path]:
    """Every file of the program."""
    package = ROOT / "streamquant"
    rooms = [path for path in package.iterdir() if path.is_dir()]  # links, which rglob does not follow
    return sorted([*package.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))])


@functools.cache
def messages() -> dict[str, set[str]]:
    """Message -> the files that raise it. What cannot be told without running the program is an error."""
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sources()}
    classes = _error_classes(trees.values())
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for message in _raised(function, classes, tree):
                    found.setdefault(message, set()).add(path)
    return found


def explained() -> dict[str, str]:
    """Message -> what the page says of it: first column (code spans) and second column of its tables."""
    return {
        message: advice
        for row in _ROW.finditer(PAGE.read_text())
        for message in _CODE.findall(row[1])
        for advice in [row[2]]
    }


def _error_classes(trees: Iterable[ast.Module]) -> set[str]:
    """Names of StreamquantError and all that are derived from it."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {StreamquantError.__name__, UsageError.__name__}
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found


def _raised(function: ast.FunctionDef, classes: set[str], tree: ast.Module) -> Iterator[str]:
    """The messages of the errors that a function makes itself, or has a JsonRecord make; those that its caller gives
    are the caller's."""
    given = {argument.arg for argument in function.args.args}
    for call in ast.walk(function):
        if not isinstance(call, ast.Call):
            continue
        if isinstance(call.func, ast.Name) and call.func.id in classes:
            text = call.args[0]
        elif isinstance(call.func, ast.Name) and call.func.id == "JsonRecord":  # (value, where, what)
            text = call.args[2]
        elif isinstance(call.func, ast.Attribute) and call.func.attr == "refuse":  # (key, what, ...)
            text = call.args[1]
        else:
            continue
        is_given = (isinstance(text, ast.Name) and text.id in given) or ast.unparse(text).startswith("self.")
        if not is_given:
            yield from _texts(text, function, tree)


def _texts(node: ast.expr, function: ast.FunctionDef, tree: ast.Module) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            texts = [part.value if isinstance(part, ast.Constant) else GAP for part in parts]
            yield "".join(map(str, texts))
        case ast.IfExp(body=one, orelse=other):
            yield from _texts(one, function, tree)
            yield from _texts(other, function, tree)
        case ast.Name(id=name):
            values = [
                statement.value
                for statement in (*ast.walk(function), *tree.body)
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name
            ]
            assert values, f"{function.name}: {name} is not assigned here"
            for value in values:
                yield from _texts(value, function, tree)
        case _:
            raise AssertionError(f"{function.name}: cannot tell the message of {ast.unparse(node)}")


def main() -> int:
    """Print what does not agree."""
    raised, known = messages(), explained()
    for message in sorted(raised.keys() - known.keys()):
        sys.stdout.write(f"missing: {message}   ({', '.join(sorted(raised[message]))})\n")
    for message in sorted(known.keys() - raised.keys()):
        sys.stdout.write(f"nobody raises: {message}\n")
    return int(raised.keys() != known.keys())


if __name__ == "__main__":
    sys.exit(main())
