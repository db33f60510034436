"""Every command of the documentation is run as it is written, on small stand-ins under the names written there.

The blocks of a page run in their order, in one folder. What no test can run is listed here with its reason.
"""

import contextlib
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests.conftest import Shelf
from tests.docs import command_line
from tests.docs.pages import PAGES, ROOT, Command, blocks, commands_of, name_of, parse
from tests.docs.stand_ins import Workshop, copy_makefile, open_workshop

# The client hands open files to httpx in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WITH_COMMANDS = [page for page in PAGES if commands_of(page)]
NOT_RUN = {
    "hf auth login": "asks for a token",
    "vllm serve": "needs vLLM and a GPU",
    "llama-cli -hf": "needs llama.cpp's programs, and fetches from the real Hub",
    "ollama run": "needs Ollama, and fetches from the real Hub",
}
"""Beginnings of commands that are only read, and why."""
COMPARISON_ALONE = "tensors,noise,tokens,chat,lints,engines,behaviour"
SMALL = ("--context", "32", "--chunks", "2", "--no-cache")
ENGINE_GATES = ("--max-token-mismatches", "--max-chat-mismatches")
"""They need sections that start engines."""


def shrink(command: Command, *, whole: bool) -> list[str] | None:
    """The arguments that a command is run with, None for one that is only parsed. If `whole`, answers alone are short.

    A validation compares two small chunks and starts no engine, which takes seconds for each file: `chat-check` and the
    other sections are run by `test_commands_to_the_letter`, and by tests/validate.
    """
    words = list(command.words[1:])
    if whole:
        if words[0] == "run":
            _change_release(Path(words[1]), {"answer_tokens": 4})
        return [*words, "--answer-tokens", "4"] if words[0] == "validate" else words
    match words[0]:
        case "chat-check":
            return None
        case "validate":
            for gate in ENGINE_GATES:
                if gate in words:
                    del words[words.index(gate) : words.index(gate) + 2]
            return [*words, *SMALL, "--skip", COMPARISON_ALONE]
        case "imatrix":
            return [*words, *SMALL[:-1]]
        case "run":
            _shrink_release(Path(words[1]))
    return words


def _shrink_release(path: Path) -> None:
    """The stages of a release as the commands above."""
    small = {"context": 32, "chunks": 2}
    _change_release(path, {**small, "skip": COMPARISON_ALONE.split(","), "cache": False}, small)


def _change_release(path: Path, validate: Mapping[str, object], imatrix: Mapping[str, object] | None = None) -> None:
    """Other options for stages of a release; gates on what is skipped go."""
    release = yaml.safe_load(path.read_text())
    release["imatrix"] |= imatrix or {}
    release["validate"] |= validate
    if "skip" in validate:
        release["validate"]["gates"].pop("max_token_mismatches", None)
    path.write_text(yaml.safe_dump(release))


def carry_out(page: Path, workshop: Workshop) -> None:
    """Run the blocks of a page; YAML of a release becomes release.yaml, as the page has it."""
    for block in blocks(page):
        if block.language == "yaml" and block.text.startswith("model:"):
            (workshop.folder / "release.yaml").write_text(block.text)
    for command in commands_of(page):
        _carry_out(command, workshop)


def _carry_out(command: Command, workshop: Workshop) -> None:
    if any(" ".join(command.words).startswith(beginning) for beginning in NOT_RUN):
        return
    if command.program == "make":
        check_make(command, workshop.folder)
    elif command.program == "hf":
        done = workshop.hf(command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    else:
        assert command.program == "streamquant", f"{command}: run it, or list it with a reason"
        command_line.check([word for argument in command.words[1:] for word in workshop.spread(argument)])
        arguments = shrink(command, whole=workshop.whole)
        if arguments is not None:
            ran = workshop.run(command, arguments)
            assert ran.code == 0, f"{command}\n{ran.out}{ran.err}"


def check_make(command: Command, folder: Path) -> None:
    """`make -n`: every variable is one of the Makefile's, and the target expands to commands that parse."""
    makefile = (ROOT / "Makefile").read_text()
    for variable in (word.partition("=")[0] for word in command.words[1:] if "=" in word):
        assert f"$({variable})" in makefile or f"$({variable}," in makefile, f"{command}: {variable} is not in use"
    make = ["make", "--no-print-directory", "-n", *command.words[1:]]
    done = subprocess.run(make, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    for line in done.stdout.splitlines():
        if ".venv/bin/streamquant " in line:
            command_line.check(shlex.split(line)[1:])


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands(page: Path, tmp_path: Path, shelf: Shelf) -> None:
    with open_workshop(tmp_path, shelf) as workshop:
        carry_out(page, workshop)
        assert workshop.hub.leaked_tokens() == []


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands_to_the_letter(page: Path, tmp_path: Path, shelf: Shelf) -> None:
    """The same with every section of a validation, every engine, every plot."""
    with open_workshop(tmp_path, shelf, whole=True) as workshop:
        carry_out(page, workshop)


def test_what_is_not_run_is_still_there() -> None:
    words = [" ".join(command.words) for page in PAGES for command in commands_of(page)]
    assert [beginning for beginning in NOT_RUN if not any(word.startswith(beginning) for word in words)] == []


def test_examples_of_the_help_parse() -> None:
    """They are run where they stand in a page; here every one is parsed, and every command has one."""
    found = command_line.examples()
    assert {name for name, _ in found} == command_line.options().keys() - {""}
    for name, example in found:
        words = command_line.words_of(example)
        assert words[:2] == ["streamquant", name]
        if name not in ("inspect",):  # its file must exist
            command_line.check(words[1:])


def test_a_wrong_command_is_found(tmp_path: Path) -> None:
    """The checks can fail: options, variables, targets."""
    copy_makefile(tmp_path)
    for line, message in {
        "make plan MODEL=x": None,
        "make plan MODEL=x NO_SUCH=1": "not in use",
        "make no-such-target": "No rule",
        "make upload OUT=x": "REPO= is missing",
        "make card OUT=x REPO='a b'": "unexpected extra argument",
    }.items():
        command = parse(line, "page", 1)
        assert command is not None
        with contextlib.nullcontext() if message is None else pytest.raises(Exception, match=message):
            check_make(command, tmp_path)
    with pytest.raises(Exception, match="no-such"):
        command_line.check(["plan", "x", "--no-such", "1"])
