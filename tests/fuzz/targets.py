"""What is fuzzed: functions of bytes that read a file. StreamquantError is an answer, anything else is a fault.

The corpus, tests/corpus/TARGET/*, holds small files that the program or the tests made, and what fuzzing found.
"""

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from streamquant.convert.architectures import ARCHITECTURES, describe
from streamquant.convert.manifest import MANIFEST, read_manifest
from streamquant.convert.metadata.guard_template import guard_template
from streamquant.convert.metadata.vocabulary import read_vocabulary
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.convert.recipes.recipe_file import read_recipe
from streamquant.convert.run.journal import JOURNAL, WORK_FOLDER, Journal
from streamquant.convert.source.weights import Place, read_weight_map
from streamquant.files.gguf_file import read_header as read_gguf
from streamquant.files.safetensors_file import read_header as read_safetensors
from streamquant.files.strict_json import parse_json, read_json_object
from streamquant.model.variants.gguf_model import read_model
from streamquant.publish.cards.base_card import read_base_card
from streamquant.publish.release.release_file import read_release
from streamquant.publish.release.release_state import ReleaseState
from streamquant.quant.errors import StreamquantError
from streamquant.validate.report.data import REPORT, read_report

CORPUS = Path(__file__).parents[1] / "corpus"
Target = Callable[[bytes], object]
LONGEST_MESSAGE = 20_000
"""Bytes."""
VOCABULARY = 520
"""Rows of the embedding that the tokenizers belong to."""


@cache
def _folder() -> Path:
    """One folder for all inputs of this process, which takes it away."""
    kept = tempfile.TemporaryDirectory(prefix="streamquant-fuzz-")
    _KEPT.append(kept)
    return Path(kept.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def gguf_header(data: bytes) -> None:
    """A GGUF file, and the model that its keys describe."""
    path = _file("fuzz.gguf", data)
    header = read_gguf(path)
    read_model(path, header.metadata, {tensor.name: tensor for tensor in header.tensors})


def index(data: bytes) -> None:
    """model.safetensors.index.json."""
    path = _file("index.json", data)
    read_weight_map(Place("fuzz", {path.name}, lambda _: read_json_object(path)))


def config(data: bytes) -> None:
    """config.json."""
    describe(parse_json(data, "config.json"))


def _vocabulary(family: str, files: Mapping[str, bytes], pre: str | None = "llama-bpe") -> None:
    folder = _folder() / family
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    read_vocabulary(folder, ARCHITECTURES[family].llama_cpp.vocabulary, vocab_size=VOCABULARY, pre=pre)


def tokenizer(data: bytes) -> None:
    """tokenizer.json."""
    _vocabulary("Qwen2ForCausalLM", {"tokenizer.json": data, "tokenizer_config.json": b"{}"})


def tokenizer_config(data: bytes) -> None:
    """tokenizer_config.json."""
    beside = (CORPUS / "tokenizer" / "bpe.json").read_bytes()
    _vocabulary("Qwen2ForCausalLM", {"tokenizer.json": beside, "tokenizer_config.json": data})


def sentencepiece(data: bytes) -> None:
    """tokenizer.model."""
    _vocabulary("LlamaForCausalLM", {"tokenizer.model": data, "tokenizer_config.json": b"{}"}, None)


def template(data: bytes) -> None:
    """A chat template, which is changed without being run."""
    with contextlib.suppress(UnicodeDecodeError):
        guard_template(data.decode(), "<s>")


def journal(data: bytes) -> None:
    """The journal of an unfinished run."""
    folder = _folder() / "run"
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / WORK_FOLDER / JOURNAL).write_bytes(data)
    with contextlib.closing(Journal(folder)) as found:
        found.head()


def manifest(data: bytes) -> None:
    """streamquant.json."""
    read_manifest(_file(MANIFEST, data).parent)


TARGETS: Mapping[str, Target] = {
    "gguf": gguf_header,
    "safetensors": lambda data: read_safetensors(_file("fuzz.safetensors", data)),
    "index": index,
    "config": config,
    "tokenizer": tokenizer,
    "tokenizer_config": tokenizer_config,
    "sentencepiece": sentencepiece,
    "template": template,
    "recipe": lambda data: read_recipe(_file("recipe.yaml", data)),
    "release": lambda data: read_release(_file("release.yaml", data)),
    "card": lambda data: read_base_card(_file("README.md", data)),
    "imatrix": lambda data: read_imatrix(_file("fuzz.imatrix", data)),
    "journal": journal,
    "manifest": manifest,
    "report": lambda data: read_report(_file(REPORT, data)),
    "release_state": lambda data: ReleaseState(_file("state.json", data)),
}
"""Names of targets, which are folders of the corpus."""


def answer(name: str, data: bytes) -> StreamquantError | None:
    """Run a target. Returns its refusal, which must be short, or None; anything else that it raises is a fault."""
    try:
        TARGETS[name](data)
    except StreamquantError as error:
        if len(message := str(error).encode()) > LONGEST_MESSAGE:
            raise AssertionError(f"{name}: a message of {len(message):,} bytes") from error
        return error
    return None
