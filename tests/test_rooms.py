"""The shape of the source: rooms import one way, modules in no circle, folders are small, no branch reads a message."""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "streamquant"
ORDER = (
    ("quant",),
    ("files",),
    ("hub",),
    ("convert",),
    ("model",),
    ("calibrate", "validate"),
    ("publish",),
    (PACKAGE,),
)
"""The rooms, lowest first; a room imports from those before its step, and rooms of one step not from each other."""
STEP = {room: step for step, rooms in enumerate(ORDER) for room in rooms}
LARGEST_FOLDER = 14
"""Python files of one folder, `__init__.py` apart."""
LARGE_FOLDERS = {
    "quant/kernels": "one file for each algorithm and machine: siblings of one kind",
}
MOST_PARAMETERS = 6
"""Of a function; self and those that are given by keyword count."""
MANY_PARAMETERS = {
    "streamquant/api/conversion.py plan": "the arguments of convert, and of what is uploaded meanwhile",
    "streamquant/api/publication.py convert_and_push": "the arguments of convert and of push",
    "streamquant/api/validation.py imatrix": "the options of the command; all but three are given by keyword",
}
"""Not the commands of streamquant/cli, whose parameters are their options, nor quant/kernels, which take arrays."""
FOREIGN_TEXT = {
    "hub/errors.py": "huggingface_hub, hf_xet and servers tell some faults by their text alone",
}
"""Files that read the text of messages that are not ours."""
TEXTS = frozenset({"what", "reason", "hint", "message"})
"""Names of fields and variables that hold prose."""
ERRORS = frozenset({"error", "cause", "exception", "problem", "failure"})
"""Names that an exception is bound to."""


@dataclass(frozen=True, slots=True)
class Import:
    """One import of a module of this package."""

    name: str
    """The module, or module.name where a name is taken from it."""
    line: int
    only_types: bool
    """Stands under TYPE_CHECKING."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the package."""

    path: str
    """In the repository, not through a link."""
    tree: ast.Module

    @property
    def module(self) -> str:
        """The name that it is imported by."""
        parts = Path(self.path).with_suffix("").parts
        return ".".join([*(() if parts[0] == PACKAGE else (PACKAGE,)), *parts]).removesuffix(".__init__")

    @property
    def room(self) -> str:
        """The folder at the top."""
        return self.path.split("/")[0]

    def imports(self) -> Iterator[Import]:
        """All of them, those in functions and under TYPE_CHECKING too."""
        for_types = {
            id(node)
            for test in ast.walk(self.tree)
            if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
            for statement in test.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                assert not (isinstance(node, ast.ImportFrom) and node.level), (
                    f"{self.path}:{node.lineno}: a relative import"
                )
                for name in (base + alias.name for alias in node.names):
                    if name.split(".")[0] == PACKAGE:
                        yield Import(name, node.lineno, id(node) in for_types)


@cache
def sources() -> tuple[Source, ...]:
    """Every file of the package."""
    paths = [path for room in STEP for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(paths) > 100
    return tuple(Source(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in paths)


def target(name: str, modules: frozenset[str]) -> str:
    """The module that an import reaches."""
    return name if name in modules else name.rpartition(".")[0]


def test_rooms_are_the_folders_that_the_package_links_to() -> None:
    links = {path.name: path for path in (ROOT / PACKAGE).iterdir() if path.is_symlink()}
    assert set(links) == set(STEP) - {PACKAGE}
    assert all(path.resolve() == ROOT / name for name, path in links.items())


def test_rooms_import_one_way() -> None:
    wrong = []
    for source in sources():
        for found in source.imports():
            room = found.name.split(".")[1] if found.name.count(".") else PACKAGE
            room = room if room in STEP else PACKAGE
            if room != source.room and STEP[room] >= STEP[source.room]:
                wrong.append(f"{source.path}:{found.line}: {source.room} imports {found.name}")
    assert not wrong, "\n".join(wrong)


def test_modules_import_in_no_circle() -> None:
    modules = frozenset(source.module for source in sources())
    reached = {
        source.module: {target(found.name, modules) for found in source.imports() if not found.only_types}
        for source in sources()
    }
    done: set[str] = set()

    def follow(module: str, road: tuple[str, ...]) -> None:
        assert module not in road, " -> ".join((*road[road.index(module) :], module))
        if module not in done:
            for other in sorted(reached.get(module, ())):
                follow(other, (*road, module))
            done.add(module)

    for module in sorted(modules):
        follow(module, ())


def test_a_folder_holds_few_files() -> None:
    counts = Counter(str(Path(source.path).parent) for source in sources() if not source.path.endswith("__init__.py"))
    large = {folder: count for folder, count in counts.items() if count > LARGEST_FOLDER}
    assert set(large) == set(LARGE_FOLDERS), large


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a function has."""
    found = function.args
    return len(found.posonlyargs) + len(found.args) + len(found.kwonlyargs)


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function of streamquant/cli is a command, which typer calls."""
    return function.name.endswith("_command")


def test_no_function_has_many_parameters() -> None:
    many = {
        f"{source.path} {node.name}": parameters(node)
        for source in sources()
        if not source.path.startswith("quant/kernels/")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and parameters(node) > MOST_PARAMETERS
        and not (source.path.startswith("streamquant/cli/") and is_command(node))
    }
    assert set(many) == set(MANY_PARAMETERS), f"a record is missing: {many}"


def is_text(node: ast.expr) -> bool:
    """Whether an expression is the text of a message: `error.what`, `reason`, `str(error)`, or one in lower case."""
    match node:
        case ast.Attribute(attr=name):
            return name in TEXTS
        case ast.Name(id=name):
            return name in {"reason", "message"}
        case ast.Call(func=ast.Name(id="str"), args=[ast.Name(id=name)]):
            return name in ERRORS
        case ast.Call(func=ast.Attribute(value=value, attr="lower" | "strip" | "casefold")):
            return is_text(value)
    return False


def branches_on_text(tree: ast.AST) -> Iterator[int]:
    """The lines that compare a text with another, look into it, or search it; not those that ask if it is empty."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, comparators=others, ops=ops):
                absent = any(isinstance(side, ast.Constant) and not side.value for side in (left, *others))
                same = any(isinstance(op, ast.Is | ast.IsNot) for op in ops)
                if any(map(is_text, (left, *others))) and not absent and not same:
                    yield left.lineno
            case ast.Call(func=ast.Attribute(value=value, attr="startswith" | "endswith" | "find" | "partition")):
                if is_text(value):
                    yield value.lineno
            case ast.Call(func=ast.Attribute(value=value, attr="search" | "match" | "fullmatch"), args=arguments):
                if any(map(is_text, arguments)):
                    yield value.lineno


def test_nothing_branches_on_the_text_of_a_message() -> None:
    wrong = {source.path: [*branches_on_text(source.tree)] for source in sources()}
    found = [f"{path}:{line}" for path, lines in wrong.items() for line in lines if path not in FOREIGN_TEXT]
    assert not found, "a class or a field is missing: " + ", ".join(found)
    assert all(wrong[path] for path in FOREIGN_TEXT), "an exception that is needed no more"


@pytest.mark.parametrize(
    ("code", "is_branch"),
    [
        ("error.what == 'the engine cannot load the model'", True),
        ("reason.startswith('left out')", True),
        ("choice.reason.startswith(('a', 'b'))", True),
        ("path in error.message.lower()", True),
        ("'x' in str(error)", True),
        ("re.search('x', str(cause))", True),
        ("reason != ''", False),
        ("error.hint is None", False),
        ("error.found == 'x'", False),
        ("name.startswith('gguf')", False),
    ],
)
def test_a_branch_on_text_is_seen(code: str, is_branch: bool) -> None:
    assert bool([*branches_on_text(ast.parse(code))]) is is_branch
