"""What the documentation says of files, anchors, options and errors is there, and what is there is documented."""

import re
from pathlib import Path

import pytest
import yaml

from streamquant.publish.release import release_file
from streamquant.publish.release.release_file import parse_release
from tests.docs import command_line, messages
from tests.docs.command_line import wrong_in
from tests.docs.pages import (
    OPTION,
    PAGES,
    ROOT,
    SHELL,
    anchors,
    blocks,
    commands_of,
    links,
    name_of,
    parse,
    prose,
    spans,
)

OTHERS = {
    "--local-dir": "hf download",
    "--tool-call-parser": "vllm serve",
    "--enable-auto-tool-choice": "vllm serve",
    "--outtype": "convert_hf_to_gguf.py",
    "-r": "cp",
    "-m": "python",
    "-hf": "llama-cli",
    "-9": "kill",
}
"""Options of other programs that the pages speak of."""
IN_PROSE = [page for page in PAGES if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading; there are {sorted(anchors(target))}"


def test_every_page_is_in_the_index() -> None:
    listed = {(ROOT / "docs" / link).resolve() for link in links(ROOT / "docs" / "index.md")}
    assert set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "index.md"} <= listed
    assert "docs/index.md" in links(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_stand_where_they_are_run(page: Path) -> None:
    """A block in another language, or in none, holds no command of ours."""
    for block in blocks(page):
        if block.language not in SHELL:
            ours = [line for line in block.text.split("\n") if re.match(r"(\$ )?(streamquant|make) [a-z]", line)]
            assert not ours, f"{block.page}:{block.line}: mark the block as sh"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_exist(page: Path) -> None:
    ours = set().union(*command_line.options().values())
    for span in spans(page):
        words = [name for name in OPTION.findall(span) if name not in OTHERS]
        known = command_line.options().get(span.split()[1], ours) if span.startswith("streamquant ") else ours
        assert set(words) <= known, f"{name_of(page)}: `{span}`"


def test_options_of_other_programs_are_in_use() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert not [name for name in OTHERS if name not in text]


def test_every_command_and_option_is_documented() -> None:
    spoken: dict[str, set[str]] = {}
    said: set[str] = set()
    for page in IN_PROSE:
        for words in [command.words for command in commands_of(page)] + [tuple(span.split()) for span in spans(page)]:
            found = {name for word in words for name in OPTION.findall(word)}
            said |= found
            if len(words) > 1 and words[0] == "streamquant":
                spoken.setdefault(words[1], set()).update(found)
    options = command_line.options() | {"": {"--version", "--help"}}  # beside these typer's own, for completion
    assert spoken.keys() >= options.keys() - {""}, "a command without an example"
    for name, known in options.items():
        assert known - said <= {"-h"}, f"{name}: {known - said} are not documented"


def test_every_target_of_make_is_documented() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", makefile, re.MULTILINE))
    text = "\n".join(page.read_text() for page in IN_PROSE)
    assert not [target for target in sorted(targets) if not re.search(rf"make {target}\b", text)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_parse(page: Path) -> None:
    """`streamquant run release.yaml`; arguments may be left out, and dots stand for some."""
    for span in spans(page):
        command = parse(span, name_of(page), 0) if span.startswith("streamquant ") else None
        if command is None or "..." in span or command.words[1:] == ("COMMAND", "--help"):
            continue
        wrong = wrong_in(command.words[1:])
        assert wrong in (None, "MissingParameter"), f"{name_of(page)}: `{span}`: {wrong}"


def test_the_architecture_names_every_folder() -> None:
    """Those of the package that hold Python, and no others; of a room that has only rooms within it, these."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_/]+)/`", page.split("## Rooms")[1].split("\n## ")[0]))
    package = ROOT / "streamquant"
    tops = [path.resolve() for path in package.iterdir() if path.is_dir()]
    folders = {
        folder.relative_to(ROOT).as_posix()
        for top in tops
        for folder in (top, *top.rglob("*"))
        if folder.is_dir() and list(folder.glob("*.py"))
    }
    assert named - {"streamquant"} == folders


def test_every_error_is_explained() -> None:
    """Out of date? `python -m tests.docs.messages` prints what is missing."""
    raised, known = messages.messages(), messages.explained()
    assert raised.keys() - known.keys() == set(), "not in docs/troubleshooting.md"
    assert known.keys() - raised.keys() == set(), "in docs/troubleshooting.md, but nobody raises it"
    assert all(len(advice) > 10 for advice in known.values())


def test_every_error_is_explained_once() -> None:
    rows = [line.split("|")[1] for line in messages.PAGE.read_text().split("\n") if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(names) == sorted(set(names))


def test_messages_are_found_however_they_are_made() -> None:
    """A constant, an f-string, a choice of two, a variable, a helper's argument."""
    found = messages.messages()
    for message in (
        "not enough disk space",
        "… needs an importance matrix",
        "weight is infinite",
        "type cannot be made yet",
        "high_freq_factor must exceed low_freq_factor",
    ):
        assert message in found


def test_release_in_the_page_is_whole(tmp_path: Path) -> None:
    page = ROOT / "docs" / "publishing.md"
    (block,) = [block for block in blocks(page) if block.text.startswith("model:")]
    release = parse_release(yaml.safe_load(block.text), tmp_path / "release.yaml")
    assert release.push is not None
    told = set(re.findall(r"\w+", " ".join(spans(page))))
    assert {*release_file.KEYS, *(key for keys in release_file.STAGE_KEYS.values() for key in keys)} <= told


def test_variables_that_are_spoken_of_are_read() -> None:
    """Every variable of the environment in the pages is one of the Hub's client, of ours, or of the tests."""
    from huggingface_hub import constants

    code = "\n".join(path.read_text() for path in [*messages.sources(), *(ROOT / "tests").rglob("*.py")])
    client = Path(constants.__file__).read_text()
    for page in PAGES:
        for name in re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?:=\S*)?`", prose(page)):
            assert f'"{name}"' in code + client or name in code, f"{name_of(page)}: {name}"
