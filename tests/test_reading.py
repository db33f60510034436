"""Files whose names others choose: a FIFO or a device in their place is one error, and nobody waits."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streamquant.convert.source.side_files import read_side_file
from streamquant.files.hashing import sha256_of
from streamquant.files.reading import open_regular
from streamquant.files.strict_json import read_json_object
from streamquant.files.strict_yaml import read_yaml
from streamquant.hub.outgoing import Outgoing, git_sha1
from streamquant.publish.cards.base_card import read_base_card
from streamquant.publish.upload.selection import check_content
from streamquant.quant.errors import StreamquantError

READERS: dict[str, Callable[[Path], object]] = {
    "open_regular": open_regular,
    "sha256_of": sha256_of,
    "git_sha1": git_sha1,
    "read_json_object": read_json_object,
    "read_yaml": read_yaml,
    "read_base_card": read_base_card,
    "read_side_file": lambda path: read_side_file(path.parent, path.name),
    "check_content": lambda path: check_content(Outgoing(path.name, path, 1, "0" * 64)),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", READERS)
def test_a_fifo_is_refused_and_nobody_waits(name: str, tmp_path: Path) -> None:
    fifo = tmp_path / "tokenizer.json"
    os.mkfifo(fifo)
    with pytest.raises(StreamquantError, match=r"(?s)not a regular file.*tokenizer\.json"):
        READERS[name](fifo)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    with open_regular(tmp_path / "b") as file:
        assert file.read() == b"x"
