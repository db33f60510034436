"""YAML and sizes from strangers: one error, and soon."""

import time
from pathlib import Path

import pytest

from streamquant.files.sizes import parse_size
from streamquant.files.strict_yaml import read_yaml
from streamquant.quant.errors import UsageError


def read(folder: Path, text: str) -> object:
    (folder / "x.yaml").write_text(text)
    return read_yaml(folder / "x.yaml")


def test_dates_are_texts(tmp_path: Path) -> None:
    assert read(tmp_path, "a: 2025-08-26\nb: 2001-12-14t21:59:43.10-05:00\nc: 1.5\nd: no\n") == {
        **{"a": "2025-08-26", "b": "2001-12-14t21:59:43.10-05:00", "c": 1.5, "d": False}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!timestamp 2025-08-26\n", "tags"),
        ("a: !!python/object:os.system x\n", "tags"),
        ("!x {a: 1}\n", "tags"),
        ("? !!set {a}\n: 1\n", "tags"),
        ("a: &x 1\nb: *x\n", "anchors and aliases"),
        ("a: 1\nb: 2\na: 3\n", "'a' occurs twice"),
        ("? [a, b]\n: 1\n", "unhashable"),
        ("a: [", "broken YAML"),
    ],
)
def test_what_is_not_plain_yaml(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, text)


def test_many_keys_take_no_minutes(tmp_path: Path) -> None:
    """Every key was compared with every other: 70,000 took minutes."""
    text = "".join(f"k{number}: 1\n" for number in range(70_000))
    started = time.process_time()
    found = read(tmp_path, text)
    assert isinstance(found, dict)
    assert len(found) == 70_000
    assert time.process_time() - started < 60


@pytest.mark.parametrize("text", ["1" * 5000, "1" * 16 + "G", "\u0661G", "0", "1.5G", "-1", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)not a size.*--split") as error:
        parse_size(text, "--split-max-size")
    assert len(str(error.value)) < 500
