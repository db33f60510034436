"""streamquant.convert.metadata.model_metadata against llama.cpp's converter, and against model cards that are wrong."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from streamquant.convert.metadata.model_metadata import ParameterCounts, read_model_metadata
from streamquant.quant.errors import StreamquantError, UsageError
from tests.peers import DATA, KV, Job, converter_vocab_kvs, requires_converter, requires_data, spelled

CARD = """---
license: llama3
license_name: Llama 3 Community
license_link: https://example.org/licence
language:
- en
- no
pipeline_tag: text-generation
tags: [Llama-3.1, instruct]
base_model:
- meta-llama/Meta-Llama-3.1-70B
- https://huggingface.co/Qwen/Qwen3-14B
datasets: [some/set-1B]
model_name: Hermes 4 — Llama-3.1 70B
model_creator: NousResearch
---
# Hermes 4
"""
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "mirostat": 1, "eos_token_id": [1, 2]}
FOLDERS: dict[str, dict[str, str]] = {
    "Hermes-4-70B": {"README.md": CARD, "generation_config.json": json.dumps(SAMPLING)},
    "Qwen3-0.6B-Instruct-v2": {"README.md": "no front matter"},
    "plain": {"README.md": ""},
    "Meta-Llama-3.1-8B": {"config.json": json.dumps({"_name_or_path": "NousResearch/Hermes-3-8B-128K"})},
    "empty-list": {"README.md": "---\ntags: []\nlicense: [mit, bsd]\n---\n"},
}


def write_folder(folder: pathlib.Path, files: Mapping[str, str]) -> pathlib.Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def add_model(folder: pathlib.Path) -> None:
    """Add the least that the converter needs beside the files in question: a configuration and a tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    given = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    config = {
        **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 257, "hidden_size": 64},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64},
        **{"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "head_dim": 16},
    }
    (folder / "config.json").write_text(json.dumps({**config, **given}))


def dense(count: int) -> ParameterCounts:
    return ParameterCounts(count, count)


def read(folder: pathlib.Path, **options: Any) -> dict[str, Any]:
    """The values alone."""
    found = read_model_metadata(folder, **{"counts": dense(0), **options})
    return {key: value.value for key, value in found.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("cards")
    made = {name: write_folder(root / name, files) for name, files in FOLDERS.items()}
    for folder in made.values():
        add_model(folder)
    return made


@pytest.fixture(scope="module")
def references(folders: dict[str, pathlib.Path]) -> dict[str, KV]:
    return dict(zip(folders, converter_vocab_kvs([Job(f, "gpt-2") for f in folders.values()]), strict=True))


@requires_converter
@pytest.mark.parametrize("name", FOLDERS)
def test_equals_the_reference_converter(folders: dict[str, pathlib.Path], references: dict[str, KV], name: str) -> None:
    others = {"general.architecture", "general.file_type", "general.quantization_version"}
    reference = {k: v for k, v in references[name].items() if k.startswith("general.") and k not in others}
    assert "error" not in references[name]
    assert spelled(read_model_metadata(folders[name], counts=dense(0))) == reference
    assert others <= references[name].keys()


@requires_data
def test_stories() -> None:
    assert read(DATA / "models" / "stories260K-bf16", counts=dense(260032)) == {
        "general.type": "model",
        "general.name": "stories260K Bf16",
        "general.size_label": "260K",
    }


@pytest.mark.parametrize(
    ("count", "label"), [(405_853_388_800, "406B"), (36_151_104_512, "36B"), (1_500_000_000, "1.5B"), (0, None)]
)
def test_size_label_from_the_count(folders: dict[str, pathlib.Path], count: int, label: str | None) -> None:
    assert read(folders["plain"], counts=dense(count)).get("general.size_label") == label


def test_the_name_tells_the_size_if_it_can_be_true(folders: dict[str, pathlib.Path]) -> None:
    folder = folders["Meta-Llama-3.1-8B"]
    assert read(folder, counts=dense(8_030_000_000))["general.size_label"] == "8B"
    assert read(folder, counts=dense(8_030_000_000))["general.finetune"] == "128k"


def test_names(folders: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(folders["Hermes-4-70B"])["general.name"] == "Hermes 4 — Llama-3.1 70B"
    both = read(folders["Hermes-4-70B"], overrides={"general.name": "Mine", "general.version": "v2"})
    assert (both["general.name"], both["general.version"]) == ("Mine", "v2")
    monkeypatch.chdir(folders["plain"])
    assert read(pathlib.Path())["general.name"] == "Plain"


def test_overrides(folders: dict[str, pathlib.Path]) -> None:
    found = read(
        folders["Hermes-4-70B"],
        overrides={
            "general.license": "mit",
            "general.source.url": "https://example.org",
            "general.sampling.temp": 1,
            "general.sampling.top_p": None,
            "general.tags": ["a"],
            "general.base_models": [{"name": "B", "repo_url": "u"}],
            "general.datasets": None,
        },
    )
    assert found["general.license"] == "mit"
    assert found["general.source.url"] == "https://example.org"
    assert found["general.sampling.temp"] == 1
    assert "general.sampling.top_p" not in found
    assert found["general.tags"] == ["a"]
    assert (found["general.base_model.count"], found["general.base_model.0.name"]) == (1, "B")
    assert "general.dataset.count" not in found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"general.nmae": "x"}, r"unknown metadata key\n.*\n.*'general.nmae'\n.*one of general\.author"),
        ({"general.architecture": "x"}, "unknown metadata key"),
        ({"general.name": 3}, r"general.name\n.*3\n.*a string"),
        ({"general.tags": "a"}, r"general.tags\n.*\n.*a list of strings"),
        ({"general.tags": ["a", 1]}, "a list of strings"),
        ({"general.base_models": [{"name": 1}]}, "a list of objects of strings"),
        ({"general.sampling.top_k": 1.5}, r"general.sampling.top_k\n.*1.5\n.*an integer of 32 bits"),
        ({"general.sampling.temp": float("nan")}, r"general.sampling.temp\n.*NaN\n.*a finite number"),
        ({"general.sampling.sequence": 3}, "a string"),
    ],
)
def test_wrong_overrides(folders: dict[str, pathlib.Path], overrides: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(folders["plain"], overrides=overrides)
    assert re.search(expected, str(caught.value)), str(caught.value)


def test_numbers_and_dates_of_yaml_become_text(tmp_path: pathlib.Path) -> None:
    card = "---\nversion: 1.0\nauthor: 2026-11-22\ntags: [1, two, true]\n---\n"
    found = read(write_folder(tmp_path / "x", {"README.md": card}))
    assert (found["general.version"], found["general.author"]) == ("1.0", "2026-11-22")
    assert found["general.tags"] == ["1", "two", "True"]


FAULTS = {
    "yaml": ({"README.md": "---\na: [b\n---\n"}, r"broken model card\n.*README.md, front matter.*\n.*expected"),
    "yaml tag": (
        {"README.md": "---\na: !!python/object/apply:os.system [ls]\n---\n"},
        "could not determine a constructor",
    ),
    "licence": ({"README.md": "---\nlicense: {a: b}\n---\n"}, r"no text\n.*general.license\n.*\n.*--metadata"),
    "name": ({"README.md": "---\nmodel_name: [a]\n---\n"}, r"no text\n.*general.name\n.*\['a'\]"),
    "tags": ({"README.md": "---\ntags: [[a]]\n---\n"}, r"no text\n.*general.tags"),
    "licences": ({"README.md": "---\nlicense: [1]\n---\n"}, r"wrong shape\n.*README.md\n.*TypeError"),
    "surrogate": ({"README.md": '---\nauthor: "\\uD800"\n---\n'}, r"not valid Unicode|broken model card"),
    "generation": ({"generation_config.json": "{"}, r"broken JSON\n.*generation_config.json"),
    "generation list": ({"generation_config.json": "[]"}, "an object at the top level"),
    "NaN": ({"generation_config.json": '{"temperature": NaN}'}, "NaN"),
    "infinite": ({"generation_config.json": '{"temperature": 1e999}'}, "1e999 is too large"),
    "top_k": ({"generation_config.json": '{"top_k": "50"}'}, r'top_k\n.*"50"\n.*an integer of 32 bits'),
    "top_k float": ({"generation_config.json": '{"top_k": 50.0}'}, r"top_k\n.*50.0"),
    "top_k bool": ({"generation_config.json": '{"top_k": true}'}, r"top_k\n.*true"),
    "top_k large": ({"generation_config.json": '{"top_k": 2147483648}'}, r"top_k\n.*2147483648"),
    "top_p": ({"generation_config.json": '{"top_p": [1]}'}, r"top_p\n.*\[1\]\n.*a finite number"),
    "config": ({"config.json": "[]"}, "an object at the top level"),
    "origin": ({"config.json": '{"_name_or_path": 3}'}, r"_name_or_path\n.*3\n.*a string or null"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_files(tmp_path: pathlib.Path, fault: str) -> None:
    files, expected = FAULTS[fault]
    with pytest.raises(StreamquantError) as caught:
        read(write_folder(tmp_path / "x", files))
    assert re.search(expected, str(caught.value)), str(caught.value)


def test_card_that_is_not_text(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "x", {})
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(StreamquantError, match=r"broken model card\n.*\n.*utf-8"):
        read(folder)


def test_what_the_library_cannot_read(folders: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    def fail(*_: object) -> None:
        raise IndexError("part")

    monkeypatch.setattr(gguf.Metadata, "load", fail)
    with pytest.raises(StreamquantError, match=r"cannot read the model card metadata\n.*\n.*IndexError: part"):
        read(folders["plain"])
