"""GGUF files of strangers: every key with a value of every other type, through everything that reads a GGUF."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from streamquant.convert.manifest import MANIFEST
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.convert.recipes.recipe_extract import extract_recipe
from streamquant.files.gguf_file import pack_header, pad, read_header, read_raw_metadata, read_split_set
from streamquant.model.variants.open import open_variant
from streamquant.publish.cards.origin import find_origin
from streamquant.publish.results import read_folders
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.engine import EngineFacts, Rendered
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.engines.vocabulary_gguf import write_vocabulary_gguf
from streamquant.validate.readback.inspect import inspect_path
from streamquant.validate.readback.verify_report import inspect_json, inspect_view
from streamquant.validate.text.chat import read_template
from streamquant.validate.text.template_lints import lint_checkpoint, lint_gguf
from streamquant.validate.text.tokens import check_token_types
from tests.attacks.harness import run, write_model
from tests.imatrix_files import some_entries, write_imatrix
from tests.small_models import edit_gguf

Type = GGUFValueType
VALUES = {
    "text": GGUFValue("[/bold]\x1b[2J", Type.STRING),
    "empty text": GGUFValue("", Type.STRING),
    "not UTF-8": GGUFValue(b"\xff\xfe{{", Type.STRING),
    "u8": GGUFValue(255, Type.UINT8),
    "negative": GGUFValue(-(2**31), Type.INT32),
    "huge": GGUFValue(2**64 - 1, Type.UINT64),
    "least": GGUFValue(-(2**63), Type.INT64),
    "zero": GGUFValue(0, Type.UINT32),
    "nan": GGUFValue(math.nan, Type.FLOAT32),
    "infinity": GGUFValue(math.inf, Type.FLOAT64),
    "float": GGUFValue(2.0, Type.FLOAT32),
    "true": GGUFValue(True, Type.BOOL),
    "no texts": GGUFValue([], Type.ARRAY, Type.STRING),
    "texts": GGUFValue(["a", "", "a"], Type.ARRAY, Type.STRING),
    "no numbers": GGUFValue([], Type.ARRAY, Type.INT32),
    "numbers": GGUFValue([2**31 - 1, -1], Type.ARRAY, Type.INT32),
    "floats": GGUFValue([math.nan, 1.5], Type.ARRAY, Type.FLOAT32),
    "flags": GGUFValue([True], Type.ARRAY, Type.BOOL),
}
MORE_KEYS = (
    *("split.no", "split.count", "split.tensors.count", "general.alignment", "general.type", "general.quantized_by"),
    *("general.license", "general.license.name", "general.license.link", "general.tags", "general.languages"),
    *("general.base_model.count", "general.sampling.temp", "general.sampling.top_k", "general.sampling.top_p"),
    *("tokenizer.chat_template", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"),
    *("tokenizer.ggml.add_eos_token", "tokenizer.ggml.scores", "tokenizer.ggml.bos_token_id"),
    *("llama.expert_count", "llama.vocab_size", "llama.rope.scaling.type", "llama.rope.scaling.factor"),
    *("llama.rope.scaling.original_context_length", "llama.rope.scaling.attn_factor", "llama.rope.scale_linear"),
    *("llama.rope.scaling.yarn_beta_fast", "llama.attention.key_length", "llama.attention.value_length"),
    *("quantize.imatrix.file", "quantize.imatrix.entries_count", "quantize.imatrix.chunks_count"),
    *("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"),
)


class NoEngine:
    """Renders nothing: the lints read the file."""

    def __init__(self, path: Path = Path()) -> None:
        self.path = path
        self.facts = EngineFacts("transformers", "transformers 5", str(path), None, None, False, 0)

    def special_tokens(self) -> list[object]:
        return []

    def render(
        self, _template: str, requests: list[object], _special: object, *, model: Path | None = None
    ) -> list[Rendered]:
        del model
        return [Rendered("", (), "no engine") for _ in requests]


@dataclasses.dataclass(frozen=True)
class Base:
    """A release folder with one small GGUF, and its keys."""

    out: Path
    file: Path
    keys: tuple[str, ...]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("types")
    model = write_model(folder / "Tiny")
    run("convert", model, "--to", "gguf:Q8_0", "--out", folder / "out").done()
    (file,) = (folder / "out").rglob("*.gguf")
    return Base(folder / "out", file, tuple(dict.fromkeys((*read_header(file).metadata, *MORE_KEYS))))


def view(path: Path) -> None:
    files = inspect_path(path)
    inspect_view(files, tensors=True)
    json.dumps(inspect_json(files))


def stand_in(path: Path) -> None:
    write_vocabulary_gguf(path, path.with_suffix(".stand-in"))


def card(path: Path) -> None:
    (folder,) = read_folders(path.parent, None)
    find_origin(folder, None)


READERS: dict[str, Callable[[Path], object]] = {
    "inspect": view,
    "recipe": lambda path: extract_recipe(path).recipe.yaml(),
    "split set": read_split_set,
    "variant": lambda path: open_variant(path).rotary(),
    "template": read_template,
    "lints": lambda path: lint_gguf(path, cast(EngineProcess, NoEngine())),
    "token types": lambda path: check_token_types(path, [(0, "<s>", True), (256, "th", False)]),
    "stand-in": stand_in,
    "card": card,
    "imatrix": read_imatrix,
}


def wrong_files(base: Base, folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Each key with each value, in a folder with the manifest; the weights are zeros, and take no disk."""
    path = folder / base.file.name
    (folder / MANIFEST).write_bytes((base.file.parent / MANIFEST).read_bytes())
    header, raw = read_raw_metadata(base.file)
    infos = [(tensor.name, tensor.shape, tensor.stored_as, tensor.stop - tensor.start) for tensor in header.tensors]
    for key in base.keys:
        for name in names:
            value = VALUES[name]
            with path.open("wb") as file:
                file.write(pack_header({**raw, key: value}, infos))
                file.truncate(file.tell() + sum(pad(nbytes) for _, _, _, nbytes in infos))
            yield f"{key}: {name}", path


def outcome(reader: Callable[[Path], object], path: Path) -> str | None:
    """What was wrong with what a reader did: nothing, if it came back or refused the file."""
    try:
        reader(path)
    except StreamquantError as error:
        return None if error.where else "an error without a place"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


FEW = ("text", "negative", "infinity", "texts", "numbers")
"""A value of each kind."""


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(VALUES), marks=pytest.mark.long)], ids=["few", "all"])
def test_a_key_of_another_type_is_refused_by_a_clear_error(names: tuple[str, ...], base: Base, tmp_path: Path) -> None:
    wrong = {
        f"{name}, {case}": found
        for case, path in wrong_files(base, tmp_path, names)
        for name, reader in READERS.items()
        if (found := outcome(reader, path)) is not None
    }
    assert not wrong, f"{len(wrong)}: {dict(list(wrong.items())[:12])}"


def test_commands_show_what_the_readers_refuse(base: Base, tmp_path: Path) -> None:
    for case, path in wrong_files(base, tmp_path, ("text",)):
        if case.startswith(("split.count", "tokenizer.ggml.tokens", "general.architecture")):
            for command in ("inspect", "recipe", "card"):
                ran = run(command, tmp_path if command == "card" else path, *(["--force"] if command == "card" else []))
                assert ran.code in (0, 1), (case, command, ran.err)
                assert "Traceback" not in ran.err


# Importance matrices


def test_a_key_of_an_importance_matrix_of_another_type(tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "a.gguf", some_entries({"blk.0.attn_q.weight": 64}))
    keys = ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    for key in keys:
        for name, value in VALUES.items():
            wrong = edit_gguf(path, tmp_path / "b.gguf", keys={key: value})
            assert outcome(read_imatrix, wrong) is None, (key, name)


# Checkpoint folders: what a tokenizer or a generation says


TEMPLATES: dict[str, object] = {
    "number": 3,
    "object": {"default": "x"},
    "list of texts": ["x"],
    "no name": [{"template": "x"}],
    "name null": [{"name": None, "template": "x"}],
    "no template": [{"name": "default"}],
    "nested": [[{"name": "default", "template": "x"}]],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_of_another_shape(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES[name]}))
    with pytest.raises(StreamquantError, match="not a chat template"):
        read_template(tmp_path)


def test_chat_templates_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(StreamquantError, match="cannot read the chat template"):
        read_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"\xff")
    with pytest.raises(StreamquantError, match=r"(?s)cannot read the chat template.*tool_use"):
        read_template(tmp_path)


@pytest.mark.parametrize("ids", [[{}], {}, "2", [2, None], 2.5, True, [[2]]])
def test_eos_ids_of_another_type(ids: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(StreamquantError, match=r"(?s)wrong type.*eos_token_id"):
        lint_checkpoint(cast(EngineProcess, NoEngine(tmp_path)))


@pytest.mark.parametrize("ids", [2, [2, 3], None, []])
def test_eos_ids(ids: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert lint_checkpoint(cast(EngineProcess, NoEngine(tmp_path)))
