"""What is printed: strangers' text reaches the terminal as text, whatever prints it and wherever it stands."""

import ast
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from rich.table import Table
from rich.text import Text

from streamquant.cli import console
from streamquant.cli.progress import console_listener
from streamquant.convert.recipes.overrides import Overrides
from streamquant.convert.recipes.recipe_file import RecipeFile
from streamquant.files.gguf_file import pack_header
from streamquant.quant.errors import LONGEST, StreamquantError
from tests.attacks.harness import run
from tests.test_rooms import sources

ESCAPES = (
    "\x1b]52;c;ZXZpbA==\x07",  # OSC 52: the clipboard
    "\x1b[2J",  # clears the screen
    "\x9b2J",  # the same in C1
    "\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x90q#0!99~\x9c",  # DCS
    "\rerror: none",
    "a\x08\x08b",
    "\u202egnp.exe",
    "\u2066a\u2069",
    "zero\u200bwidth\ufeff",
    "\u2028line",
    "\x7f",
    "\udcff",  # of a file name that is not UTF-8
    "\U000e0041\U000e0042",  # tags: text that is not seen
)
MARKUP = ("[/bold]", "[bold]x", "[link=https://evil.example]x[/link]", "[", "\\[/]", ":smile:", "{task.total}", "$x^$")
HOSTILE = "".join((*ESCAPES, *MARKUP))


def hidden(text: str) -> set[str]:
    """Characters of the categories that a terminal acts on, or that are not seen; LF and tabs apart."""
    return {
        letter
        for letter in text
        if letter not in "\n\t" and (unicodedata.category(letter)[0] == "C" or letter in "\u2028\u2029")
    }


def colourless(text: str) -> str:
    """Without what is the printer's: colours, and the movements of bars."""
    text = re.sub(r"(\r?\x1b\[(\?25[lh]|1A|2K)\r?)+", "", text)
    return re.sub(r"\x1b\[[0-9;]*m|\r(?=\n)", "", text)


def in_a_table(text: str) -> None:
    table = Table("a", title=text)
    table.add_column(text)
    table.add_row(text, Text(text, "bold"))
    console.print_result(table)


def as_progress(text: str) -> None:
    with console_listener() as listener:
        listener.started(text, 2)
        listener.advanced(text, 1)
        listener.waiting(text, 3)
        listener.note(text)
        listener.stage_finished(text)


def as_warning(text: str) -> None:
    sys.stderr.write(warnings.formatwarning(text, UserWarning, "library.py", 1))  # pytest takes real ones


def as_log(text: str) -> None:
    logger, handler = logging.Logger("a library"), logging.StreamHandler()
    logger.addHandler(handler)
    logger.warning("%s", text)


def without_a_newline(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


WAYS: dict[str, Callable[[str], object]] = {
    "line": console.print_line,
    "lines": console.print_text,
    "json": lambda text: console.print_result({text: [text]}),
    "text": lambda text: console.print_result(Text(text)),
    "table": in_a_table,
    "note": console.say_note,
    "error": lambda text: console.say(StreamquantError(text, where=text, found=text, required=text, hint=text)),
    "progress": as_progress,
    "warning": as_warning,
    "log": as_log,
    "partial line": without_a_newline,
}


def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What stands on both streams, which are one terminal with colours."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    for name in ("out_console", "error_console"):
        printer = console.Printer(stderr=name == "error_console")
        for module in ("streamquant.cli.console", "streamquant.cli.progress"):
            monkeypatch.setattr(f"{module}.{name}", printer, raising=False)
    return stream.getvalue


@pytest.mark.parametrize("way", WAYS)
def test_whatever_prints_it_a_strangers_text_is_text(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = terminal(monkeypatch)
    for text in (*ESCAPES, *MARKUP, HOSTILE):
        with console.guarded_streams():
            WAYS[way](text)
    shown = colourless(printed())
    assert not hidden(shown)
    assert "[/bold]" in shown.replace('\\"', '"')
    assert "52;c;" in shown


def test_a_colour_stays_where_it_is_the_printers(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = terminal(monkeypatch)
    console.print_result(Text("bad", "red"))
    assert "\x1b[31mbad\x1b[0m" in printed()


def test_json_means_what_it_meant(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "né 字 😀"]}
    console.print_result(value)
    shown = capsys.readouterr().out
    assert not hidden(shown)
    assert "né 字 😀" in shown
    assert json.loads(shown) == value


def test_yaml_means_what_it_meant(capsys: pytest.CaptureFixture[str]) -> None:
    note = HOSTILE.replace("\udcff", "")  # YAML has no surrogates
    recipe = RecipeFile("x", "Q4_K_M", Overrides(), note)
    console.print_text(recipe.yaml())
    shown = capsys.readouterr().out
    assert not hidden(shown)
    assert yaml.safe_load(shown)["note"] == note
    assert "字" in RecipeFile("x", "Q4_K_M", Overrides(), "字").yaml()


def test_a_part_of_an_error_cannot_pass_for_another() -> None:
    error = StreamquantError("broken", where="a\n  to do:    run evil", found="x" * 200_000, hint="none")
    lines = str(error).split("\n")
    assert [line for line in lines if line.startswith("  to do:")] == ["  to do:    none"]
    assert len(str(error)) < LONGEST + 300
    assert error.found == "x" * 200_000


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_letters_gets_escapes(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "字.gguf"
    path.write_bytes(pack_header({"general.name": GGUFValue("字", GGUFValueType.STRING)}, []))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "streamquant", "inspect", str(path)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert done.stdout.count(rb"\u5b57") == 2


def hostile_file(folder: Path) -> Path:
    """A GGUF whose name, keys, values and tensors are hostile."""
    path = folder / f"{HOSTILE.replace('/', '')[:60]}.gguf"
    text = GGUFValue(HOSTILE.replace("\udcff", ""), GGUFValueType.STRING)
    metadata = {"general.architecture": text, "general.name": text, HOSTILE.replace("\udcff", ""): text}
    path.write_bytes(pack_header(metadata, [(f"{HOSTILE[:9]}{MARKUP[0]}", (4,), "F32", 16)]) + bytes(32))
    return path


def test_a_hostile_file_on_a_real_terminal(tmp_path: Path) -> None:
    path = hostile_file(tmp_path)
    for command in (["inspect", path, "--tensors"], ["recipe", path], ["inspect", f"{path}.no"], ["verify", path]):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "streamquant", *map(str, command)],
            stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # the terminal is closed
            pass
        os.close(ours)
        process.wait()
        text = colourless(shown.decode())
        assert "Traceback" not in text, text
        assert not hidden(text), text
        unwrapped = re.sub(r"[\s│]", "", text)  # typer's box breaks long names over lines
        assert r"\x1b]52" in unwrapped


def test_every_stream_of_a_command_is_clean(tmp_path: Path) -> None:
    path = hostile_file(tmp_path)
    for command in (["inspect", path, "--json"], ["inspect", path, "--tensors"], ["recipe", path], ["verify", path]):
        ran = run(*command)
        assert not hidden(ran.out + ran.err)


# Nothing prints but the printer

PRINTS = {
    "streamquant/cli/console.py": "the printer",
    "convert/recipes/quantization_config.py": "a child that answers its parent",
    "validate/engines/worker.py": "a child that answers its parent",
}
"""Files that may use standard output and standard error."""


def prints(tree: ast.AST) -> Iterator[int]:
    """The lines that reach for a stream, or for a console of their own."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Call(func=ast.Name(id="print" | "Console" | "Printer"))
                | ast.Call(func=ast.Attribute(attr="echo" | "secho" | "print" | "print_json" | "print_exception"))
                | ast.Call(func=ast.Attribute(attr="print_exc" | "StreamHandler" | "print_tb"))
                | ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr" | "__stdout__" | "__stderr__")
            ):
                yield node.lineno
            case ast.ImportFrom(module="rich", names=names) if any(name.name == "print" for name in names):
                yield node.lineno
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="write"), args=[ast.Constant(), *_]):
                yield node.lineno


def test_nothing_prints_but_the_printer() -> None:
    found = {source.path: [*prints(source.tree)] for source in sources()}
    wrong = [f"{path}:{line}" for path, lines in found.items() for line in lines if path not in PRINTS]
    assert not wrong, "use streamquant/cli/console.py: " + ", ".join(wrong)
    assert all(found[path] for path in PRINTS), "an exception that is needed no more"


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "sys.stderr.write('x')",
        "typer.echo('x')",
        "Console()",
        "error_console.print(x)",
        "os.write(2, b'x')",
    ],
)
def test_a_line_that_prints_is_seen(code: str) -> None:
    assert [*prints(ast.parse(code))]
