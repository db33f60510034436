"""One record of options: what a manifest says of it comes back, and every option reaches the command line again."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from streamquant.convert.options import ARGUMENTS, ConversionOptions, parse_options
from streamquant.convert.recipes.container import GGUF, SAFETENSORS
from streamquant.convert.recipes.imatrix import ImportanceMatrix, parse_imatrix
from streamquant.convert.recipes.overrides import Overrides
from streamquant.files.json_record import JsonRecord
from streamquant.quant.errors import StreamquantError

MATRIX = ImportanceMatrix("x.gguf", "ab" * 32, ("a.txt",), 7, {"a": np.ones(2, np.float32)}, (), ("attn_k",))
EVERY = ConversionOptions(
    name="Name",
    split_max_size=40_000_000_000,
    split_max_tensors=7,
    max_shard_size=1234,
    pre="llama-bpe",
    metadata={"general.author": "me"},
    imatrix=MATRIX,
    overrides=Overrides((("attn_v", "Q8_0"),), "Q6_K", "Q5_K", pure=True, leave_output_tensor=True),
    guard_template=True,
)
"""No option at its default: a new one is to be added here."""


def manifest(options: ConversionOptions) -> JsonRecord:
    return JsonRecord(options.record(), "options", "broken manifest")


def test_no_option_is_forgotten() -> None:
    default = ConversionOptions()
    for field in dataclasses.fields(ConversionOptions):
        assert getattr(EVERY, field.name) != getattr(default, field.name), field.name
    assert list(EVERY.record()) == [field.name for field in dataclasses.fields(ConversionOptions)]


@pytest.mark.parametrize("options", [EVERY, ConversionOptions()])
def test_the_record_comes_back(options: ConversionOptions) -> None:
    assert parse_options(manifest(options)) == dataclasses.replace(options, imatrix=None)
    if options.imatrix is not None:
        assert parse_imatrix(manifest(options).object("imatrix")) == options.imatrix.record()


def test_a_manifest_that_does_not_know_an_option_has_its_default() -> None:
    assert parse_options(JsonRecord({}, "options", "broken manifest")) == ConversionOptions()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ConversionOptions)])
def test_values_of_another_kind_are_refused(name: str) -> None:
    wrong: list[Any] = [["x"], 1.5, {"pure": "x"}] if name != "metadata" else [["x"], 1.5]
    for value in wrong:
        record = JsonRecord({name: value}, "m.json", "broken manifest")
        with pytest.raises(StreamquantError, match=rf"broken manifest\n  where:    m.json\.{name}"):
            _ = parse_imatrix(record.object(name)) if name == "imatrix" else parse_options(record)


def test_every_argument_is_among_the_words_that_repeat_a_conversion() -> None:
    words = {word for container in (GGUF, SAFETENSORS) for word in EVERY.words(container, MATRIX.record())}
    other = dataclasses.replace(MATRIX, include_weights=("a",), exclude_weights=())
    words.update(EVERY.words(GGUF, other.record()))
    flags = {argument.flag for argument in ARGUMENTS} - {"--tensor-type-file"}  # its rules are repeated one by one
    assert {word for word in words if word.startswith("--")} == flags
    assert not ConversionOptions().words(GGUF, None)
    assert not ConversionOptions().words(SAFETENSORS, None)
