"""Every path that a command takes, given as what no path can be: one message, and an exit code that says whose fault.

The parameters are those of the command line itself: one that is added is tested without anybody thinking of it.
"""

import contextlib
import ctypes
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from typer.models import ArgumentInfo

from streamquant.cli.app import COMMANDS
from tests.attacks.harness import TO, Ran, run, untouched

OUTPUTS = {"out", "cache", "scratch", ("calibrate", "imatrix")}
"""Parameters that name what is made: there may be nothing of that name yet."""
MODELS = {"model", "original", ("verify", "source")}
"""Texts that are a path, or the name of a model on the Hub."""
KINDS = ("loop", "below a loop", "below a file", "long", "forbidden", "NUL", "missing")
CAPABILITIES_OF_ROOT = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of linux/capability.h


@dataclass(frozen=True)
class Place:
    """A parameter of a command that takes a path."""

    command: str
    name: str
    is_argument: bool

    def __str__(self) -> str:
        return f"{self.command} {self.name}"


def places() -> Iterator[Place]:
    """All of them."""
    for command, function in COMMANDS.items():
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            kind, info, *_ = get_args(parameter.annotation)
            is_model = bool({parameter.name, (command, parameter.name)} & MODELS)
            if is_model or Path in _types(kind):
                yield Place(command, parameter.name, isinstance(info, ArgumentInfo))


def _types(kind: object) -> set[object]:
    """A type and those that it is made of."""
    return {kind, *(inner for part in get_args(kind) for inner in _types(part))}


PLACES = list(places())


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions count inside, for root too (capset(2))."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    before = data[0]
    data[0] = before & ~CAPABILITIES_OF_ROOT
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0


@pytest.fixture(scope="module")
def made(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variants, and a text."""
    folder = tmp_path_factory.mktemp("made")
    run("convert", pristine, *TO, "--out", folder / "variants").done()
    (folder / "text.txt").write_text("words " * 200)
    return folder


@pytest.fixture
def bad(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What no path can be, by kind."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    yield {
        "loop": f"{tmp_path}/loop",
        "below a loop": f"{tmp_path}/loop/x",
        "below a file": f"{tmp_path}/file/x",
        "long": f"{tmp_path}/{'x' * 300}",
        "forbidden": f"{closed}/x",
        "NUL": f"{tmp_path}/a\0b",
        "missing": f"{tmp_path}/nothing",
    }
    closed.chmod(0o700)


def words(place: Place, path: str, pristine: Path, made: Path) -> list[object]:
    """A command in which everything but one path is right."""
    variants, text, out = made / "variants", made / "text.txt", Path("out")
    gguf = next(variants.glob("*/*.gguf"))
    arguments: dict[str, dict[str, object]] = {
        "plan": {"model": pristine},
        "convert": {"model": pristine},
        "inspect": {"path": gguf},
        "verify": {"folder": variants},
        "recipe": {"path": gguf},
        "validate": {"original": pristine, "variants": gguf},
        "imatrix": {"model": pristine},
        "calibrate": {"model": pristine},
        "chat-check": {"original": pristine, "variants": gguf},
        "report": {"report": made / "report"},
        "push": {"folder": variants},
        "card": {"folder": variants},
        "run": {"release": made / "release.yaml"},
    }
    options: dict[str, dict[str, object]] = {
        "plan": {},
        "convert": {"out": out},
        "validate": {"text": text, "out": out, "chunks": 1, "context": 32, "skip": "engines"},
        "imatrix": {"text": text, "out": out, "chunks": 1, "context": 32},
        "calibrate": {"text": text, "out": out, "samples": 1, "context": 32},
        "push": {"repo": "a/b", "dry-run": None},
    }
    given, more = dict(arguments[place.command]), dict(options.get(place.command, {}))
    if place.is_argument:
        given[place.name] = path
    else:
        more[place.name.replace("_", "-")] = path
    if place.name == "chat":
        del more["text"]
    if place.command in ("plan", "convert") and place.name != "recipe":
        more |= {"to": "gguf:Q8_0"}
    flags = [word for name, value in more.items() for word in (f"--{name}", value) if word is not None]
    return [place.command, *given.values(), *flags]


def check(ran: Ran, path: str) -> None:
    """One message, short, without a traceback, which names the path."""
    assert ran.code in (1, 2), ran
    assert "Traceback" not in ran.err
    assert ran.err.count("error: ") + ran.err.count("Usage: ") == 1, ran.err
    assert len(ran.err) < 2000
    assert "\0" not in ran.err
    name = "null byte" if "\0" in path and "Usage: " in ran.err else path.rpartition("/")[2][:20].replace("\0", r"\x00")
    said = re.sub(r"[│\s]+", "", ran.err)  # a usage error stands in a box, and lines of long paths are broken there
    assert any(part in said for part in (name.replace(" ", ""), "loop", "file", "closed"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_path_that_cannot_be(
    place: Place,
    kind: str,
    pristine: Path,
    made: Path,
    bad: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "missing" and {place.name, (place.command, place.name)} & OUTPUTS:
        return
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = words(place, bad[kind], pristine, made)
    with untouched(pristine), untouched(made), without_privileges():
        check(run(*command), bad[kind])
    assert list(work.iterdir()) == []
