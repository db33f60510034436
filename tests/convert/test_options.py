"""One record of options: what a manifest says of it comes back, and every option reaches the command line again."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamquant.convert.options import ARGUMENTS, ConversionOptions, check_ignore, parse_options
from streamquant.convert.recipes.calibration import Calibration, CalibrationRecord, parse_calibration
from streamquant.convert.recipes.container import GGUF, SAFETENSORS
from streamquant.convert.recipes.imatrix import ImportanceMatrix, parse_imatrix
from streamquant.convert.recipes.overrides import Overrides
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.files.json_record import JsonRecord
from streamquant.quant.errors import StreamquantError, UsageError

MATRIX = ImportanceMatrix("x.gguf", "ab" * 32, ("a.txt",), 7, {"a": np.ones(2, np.float32)}, (), ("attn_k",))
MEASURED = Calibration(
    CalibrationRecord("x.safetensors", "cd" * 32, 5, 2048, 10_000, ("a.txt",)),
    "ef" * 32,
    {"a": np.ones(1, np.float32)},
    {"a": np.array([10_000])},
    {0: (1.0, 2.0)},
)
EVERY = ConversionOptions(
    name="Name",
    split_max_size=40_000_000_000,
    split_max_tensors=7,
    max_shard_size=1234,
    pre="llama-bpe",
    metadata={"general.author": "me"},
    imatrix=MATRIX,
    overrides=Overrides((("attn_v", "Q8_0"),), "Q6_K", "Q5_K", pure=True, leave_output_tensor=True),
    ignore=("re:.*down_proj$", "lm_head"),
    guard_template=True,
    calibration=MEASURED,
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
    assert parse_options(manifest(options)) == dataclasses.replace(options, imatrix=None, calibration=None)
    if options.calibration is not None:
        assert parse_calibration(manifest(options).object("calibration")) == options.calibration.record
    if options.imatrix is not None:
        assert parse_imatrix(manifest(options).object("imatrix")) == options.imatrix.record()


def test_a_manifest_that_does_not_know_an_option_has_its_default() -> None:
    assert parse_options(JsonRecord({}, "options", "broken manifest")) == ConversionOptions()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ConversionOptions)])
def test_values_of_another_kind_are_refused(name: str) -> None:
    wrong: list[Any] = [["x"], 1.5, {"pure": "x"}] if name != "metadata" else [["x"], 1.5]
    wrong = [["re:("], [3], "x", 1.5] if name == "ignore" else wrong
    for value in wrong:
        record = JsonRecord({name: value}, "m.json", "broken manifest")
        read = {"imatrix": parse_imatrix, "calibration": parse_calibration}.get(name)
        with pytest.raises(StreamquantError, match=rf"broken manifest\n  where:    m.json\.{name}"):
            _ = parse_options(record) if read is None else read(record.object(name))


def test_every_argument_is_among_the_words_that_repeat_a_conversion() -> None:
    records = MATRIX.record(), MEASURED.record
    words = {word for container in (GGUF, SAFETENSORS) for word in EVERY.words(container, *records)}
    other = dataclasses.replace(MATRIX, include_weights=("a",), exclude_weights=())
    words.update(EVERY.words(GGUF, other.record()))
    flags = {argument.flag for argument in ARGUMENTS} - {"--tensor-type-file"}  # its rules are repeated one by one
    assert {word for word in words if word.startswith("--")} == flags
    assert not ConversionOptions().words(GGUF, None)
    assert not ConversionOptions().words(SAFETENSORS, None)


@pytest.mark.parametrize(
    ("ignore", "specs", "what"),
    [
        (["re:("], ["fp8-dynamic"], "pattern does not compile"),
        (["Linear"], ["fp8-dynamic"], "not a module to leave alone"),
        ([""], ["fp8-dynamic"], "not a module to leave alone"),
        (["lm_head"], ["gguf:Q8_0", "bf16"], "--ignore without a variant that takes it"),
    ],
)
def test_modules_that_cannot_be_left_alone(ignore: list[str], specs: list[str], what: str) -> None:
    with pytest.raises(UsageError) as error:
        check_ignore(ignore, parse_variants(specs))
    assert error.value.what == what


# docs/adding-an-option.md promises that an option is one file, and the file or two where it acts

ROOT = Path(__file__).parents[2]
ROOMS = ("quant", "files", "hub", "convert", "model", "calibrate", "validate", "publish", "streamquant/cli")
ACTS = {
    "guard_template": {
        "convert/conversion.py",  # side files of checkpoints
        "convert/plan/layout_gguf.py",
        "convert/metadata/gguf_metadata.py",
        "convert/metadata/guard_template.py",  # a function of this name
        "publish/cards/card_view.py",  # cards name the variants with guards
    }
}
"""Options that are used in more than two files, which is not to become the custom."""
SELECTS = {"convert/recipes/imatrix.py", "validate/readback/verify.py", "publish/release"}
"""Where entries of an importance matrix are chosen; a release file has a stage for it."""


def names_in_code(path: Path) -> set[str]:
    """Identifiers, attributes, keywords, and texts that are a name or a flag; not docstrings and messages."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=str(name)) | ast.Attribute(attr=str(name)) | ast.arg(arg=str(name)):
                found.add(name)
            case ast.keyword(arg=str(name)) | ast.FunctionDef(name=str(name)) | ast.Constant(value=str(name)):
                found.add(name.removeprefix("--").replace("-", "_") if name.startswith("--") else name)
    return found


@pytest.fixture(scope="module")
def code() -> dict[str, set[str]]:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): names_in_code(path) for path in paths}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ConversionOptions) if "_" in field.name])
def test_an_option_is_in_at_most_three_files(name: str, code: dict[str, set[str]]) -> None:
    homes = {"convert/options.py", "convert/recipes/container.py"}  # container.py: which option splits its files
    files = {path for path, names in code.items() if name in names} - homes
    assert files <= ACTS[name] if name in ACTS else len(files) <= 2, files


@pytest.mark.parametrize("name", [argument.name for argument in ARGUMENTS if "_" in argument.name])
def test_commands_releases_and_manifests_name_no_option(name: str, code: dict[str, set[str]]) -> None:
    generic = {path for path in code if path.startswith(("streamquant/cli/", "publish/release/"))}
    generic |= {"convert/manifest.py", "validate/readback/verify.py"}
    named = {path for path in generic if name in code[path]}
    if name in ("include_weights", "exclude_weights"):
        named = {path for path in named if not path.startswith(tuple(SELECTS))}
    assert named == set()
