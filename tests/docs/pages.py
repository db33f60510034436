"""The pages of the documentation: their blocks of code, commands, links, headings, and options."""

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("sh", "console")
"""Languages of blocks whose commands are run."""
_FENCE = re.compile(r"^(```+)[ \t]*(\w*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*|(?<![\w-])-[a-z](?![\w-])")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page as a shell would take it: variables set for it, words, and where it stands."""

    page: str
    line: int
    environment: dict[str, str]
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """The first word."""
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `line` is that of its first line."""

    page: str
    line: int
    language: str
    text: str


def name_of(page: Path) -> str:
    """The path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


@functools.cache
def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    return [
        Block(name_of(page), text.count("\n", 0, found.start()) + 2, found[2], found[3])
        for found in _FENCE.finditer(text)
    ]


@functools.cache
def prose(page: Path) -> str:
    """The text of a page without its fenced blocks; lines keep their numbers."""
    return _FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text())


def spans(page: Path) -> list[str]:
    """The code spans of a page, each on one line."""
    return [" ".join(found[2].split()) for found in _SPAN.finditer(prose(page))]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block of shell, comments left out, lines that end in a backslash joined."""
    lines = block.text.split("\n")
    number = 0
    while number < len(lines):
        first, line = number, lines[number]
        while line.endswith("\\"):
            number += 1
            line = line[:-1] + lines[number]
        number += 1
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        if command := parse(line, block.page, block.line + first):
            yield command


def parse(line: str, page: str, number: int) -> Command | None:
    """One line of shell; None for an empty one. Only words, quotes, comments and variables in front are known."""
    words = shlex.split(line, comments=True)
    environment = {}
    while words and (found := _VARIABLE.fullmatch(words[0])):
        environment[found[1]] = found[2]
        del words[0]
    return Command(page, number, environment, tuple(words)) if words else None


def commands_of(page: Path) -> list[Command]:
    """All commands of a page, in their order."""
    return [command for block in blocks(page) if block.language in SHELL for command in commands(block)]


def links(page: Path) -> list[str]:
    """The targets of all links in the prose of a page."""
    return [found[1] for found in _LINK.finditer(prose(page).replace("`", ""))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, hyphens for spaces, without other marks."""
    found: set[str] = set()
    for heading in _HEADING.finditer(prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 1
        while (numbered := anchor if number == 1 else f"{anchor}-{number - 1}") in found:
            number += 1
        found.add(numbered)
    return found
