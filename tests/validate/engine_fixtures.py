"""Models with the tokenizers of Hermes 4, and engines that have them loaded; started once for all tests of a worker."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf.gguf_writer import GGUFValue

from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.gguf_file import pack_header, pack_key, pad, read_header, read_raw_metadata
from streamquant.validate.engines.process import EngineProcess
from tests import synthetic
from tests.conftest import Shelf

FAMILIES = {"hermes4-llama": "LlamaForCausalLM", "hermes4-14b": "Qwen3ForCausalLM"}


@dataclass(frozen=True, slots=True)
class Model:
    """A synthetic checkpoint with a real tokenizer and template, and its variants."""

    name: str
    source: Path
    gguf: Path
    fp8: Path

    @property
    def metadata(self) -> dict[str, Any]:
        """The keys of the GGUF file; read once."""
        return _metadata(self.gguf)


@functools.cache
def _metadata(path: Path) -> dict[str, Any]:
    return read_header(path).metadata


def make_model(shelf: Shelf, data: Path, name: str) -> Model:
    """From the shelf, made at the first time."""

    def make(folder: Path) -> None:
        tokenizer = data / "tokenizers" / name
        source = synthetic.write_checkpoint(folder / name, architecture=FAMILIES[name], tokenizer=tokenizer)
        convert(
            make_plan(open_checkpoint(source), parse_variants(["fp8-dynamic", "gguf:BF16"])),
            folder / "variants",
            RunOptions(jobs=2),
        )

    folder = shelf.get(f"chat-{name}", make)
    variants = folder / "variants"
    gguf = variants / f"{name}-GGUF" / f"{name}-BF16.gguf"
    return Model(name, folder / name, gguf, variants / f"{name}-FP8-dynamic")


@pytest.fixture(scope="session")
def hermes_llama(shelf: Shelf, data: Path) -> Model:
    """The tokenizer and template of Hermes 4 70B and 405B."""
    return make_model(shelf, data, "hermes4-llama")


@pytest.fixture(scope="session")
def hermes_14b(shelf: Shelf, data: Path) -> Model:
    """The tokenizer and template of Hermes 4 14B."""
    return make_model(shelf, data, "hermes4-14b")


@pytest.fixture(scope="session")
def llama_source(hermes_llama: Model) -> Iterator[EngineProcess]:
    """transformers with the tokenizer of hermes_llama."""
    with EngineProcess(hermes_llama.source, tokenizer_only=True) as engine:
        yield engine


@pytest.fixture(scope="session")
def qwen_source(hermes_14b: Model) -> Iterator[EngineProcess]:
    """transformers with the tokenizer of hermes_14b."""
    with EngineProcess(hermes_14b.source, tokenizer_only=True) as engine:
        yield engine


@pytest.fixture(scope="session")
def llama_gguf(hermes_llama: Model) -> Iterator[EngineProcess]:
    """llama.cpp with the vocabulary of hermes_llama's GGUF."""
    with EngineProcess(hermes_llama.gguf, tokenizer_only=True) as engine:
        yield engine


@pytest.fixture(scope="session")
def qwen_gguf(hermes_14b: Model) -> Iterator[EngineProcess]:
    """llama.cpp with the vocabulary of hermes_14b's GGUF."""
    with EngineProcess(hermes_14b.gguf, tokenizer_only=True) as engine:
        yield engine


def with_keys(source: Path, target: Path, keys: Mapping[str, GGUFValue | None]) -> Path:
    """A copy of a GGUF file in which these keys have other values, or are gone."""
    header, raw = read_raw_metadata(source)
    metadata = raw | {key: pack_key(key, value) for key, value in keys.items() if value is not None}
    for key in (key for key, value in keys.items() if value is None):
        metadata.pop(key, None)
    tensors = [(t.name, t.shape, t.stored_as, t.stop - t.start) for t in header.tensors]
    content = source.read_bytes()
    with target.open("wb") as file:
        file.write(pack_header(metadata, tensors))
        for tensor in header.tensors:
            data = content[tensor.start : tensor.stop]
            file.write(data + bytes(pad(len(data)) - len(data)))
    return target
