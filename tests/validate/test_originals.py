"""Originals with other tensors than config.json tells of: what `plan` refuses, nothing else measures in part."""

from collections.abc import Callable
from pathlib import Path

import pytest

import streamquant
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant.errors import StreamquantError
from tests.attacks.harness import edit_json, write_model

COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "imatrix": lambda source, folder: streamquant.imatrix(source, [_text(folder)], folder / "im.gguf", context=16),
    "validate": lambda source, folder: streamquant.validate(
        source, [source], streamquant.ValidationOptions((_text(folder),))
    ),
    "chat_check": lambda source, _: streamquant.chat_check(source, [source]),
    "chat_check of a str": lambda source, _: streamquant.chat_check(str(source), [source]),
}


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("a text " * 200)
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("layers", "what", "said"),
    [
        (1, "the checkpoint has a tensor that its config.json does not explain", "such tensors"),
        (500, "the checkpoint lacks tensors that its config.json demands", "missing"),
    ],
)
def test_as_plan_refuses_it(tmp_path: Path, command: str, layers: int, what: str, said: str) -> None:
    source = write_model(tmp_path / "Tiny")
    edit_json(source / "config.json", num_hidden_layers=layers)
    with pytest.raises(StreamquantError) as planned:
        make_plan(open_checkpoint(source), parse_variants(["gguf:Q8_0"]))
    with pytest.raises(StreamquantError) as refused:
        COMMANDS[command](source, tmp_path)
    assert refused.value.what == planned.value.what == what
    assert refused.value.found == planned.value.found
    assert said in str(refused.value.found)
    assert str(source) in str(refused.value.where)
    assert len(str(refused.value)) < 1000
    assert not (tmp_path / "im.gguf").exists()
