"""Commands that a card shows: how to run a variant, and how it was made. Every argument is quoted for a shell."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from streamquant.convert.recipes.container import GGUF
from streamquant.convert.recipes.recipe import RECIPES
from streamquant.publish.results import PublishedFile, PublishedVariant, VariantFolder

_LLAMA_CPP = {
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repeat-penalty",
}
_OF_SAFETENSORS = ("name", "max_shard_size", "guard_template")
_OF_GGUF = ("name", "split_max_size", "pre", "metadata", "imatrix", "overrides", "guard_template")
"""Options of convert, as the manifest names them, that mean something for a kind of variant."""
_OLLAMA = {name: name for name in ("temperature", "top_k", "top_p", "min_p")} | {"repetition_penalty": "repeat_penalty"}


@dataclass(frozen=True, slots=True)
class Made:
    """One call of convert, and the files that it takes beside the original."""

    command: str
    inputs: tuple[tuple[str, str], ...]
    """(name, contents) of recipe files and metadata."""


def shell(*arguments: str) -> str:
    """One command line.

    >>> shell("hf", "download", "ORG/My Model")
    "hf download 'ORG/My Model'"
    """
    return shlex.join(arguments)


def sampling_flags(sampling: Mapping[str, float | int]) -> list[str]:
    """llama.cpp's options.

    >>> sampling_flags({"temperature": 0.6, "top_k": 20})
    ['--temp', '0.6', '--top-k', '20']
    """
    return [word for name, value in sampling.items() for word in (_LLAMA_CPP[name], str(value))]


def first_file(variant: PublishedVariant) -> PublishedFile:
    """What llama.cpp is given: of a split set the first file."""
    return variant.files[0]


def hub_tag(variant: PublishedVariant) -> str | None:
    """The TYPE of ORG/NAME:TYPE in llama.cpp, LM Studio and Ollama; None for a name that they do not know."""
    return variant.label if variant.spec in RECIPES else None


def download(repo: str, folder: VariantFolder, variant: PublishedVariant) -> str:
    """hf's command for one variant of a repository."""
    path = PurePosixPath(first_file(variant).path)
    pattern = f"{path.parent}/*" if len(variant.files) > 1 and path.parent.name else str(path)
    wanted = [] if folder.container.is_checkpoint else ["--include", pattern]
    return shell("hf", "download", repo, *wanted, "--local-dir", folder.path.resolve().name)


def llama_cpp(
    program: str,
    folder: VariantFolder,
    variant: PublishedVariant,
    repo: str | None,
    sampling: Mapping[str, float | int],
) -> str:
    """llama-cli or llama-server, from the Hub where `repo` is known, else with the local file."""
    tag = hub_tag(variant)
    path = f"{folder.path.resolve().name}/{first_file(variant).path}"
    if repo is not None:
        model = ["-hf", f"{repo}:{tag}"] if tag else ["--hf-repo", repo, "--hf-file", first_file(variant).path]
    else:
        model = ["-m", path]
    return shell(program, *model, "--jinja", *sampling_flags(sampling))


def modelfile(model: str, sampling: Mapping[str, float | int]) -> str:
    """Ollama's Modelfile."""
    return "\n".join([f"FROM {model}", *(f"PARAMETER {_OLLAMA[name]} {value}" for name, value in sampling.items())])


def merged_name(variant: PublishedVariant) -> str:
    """The name of a split set that was merged."""
    return f"{PurePosixPath(first_file(variant).path).parent.name}.gguf"


# How it was made


def made_by(folder: VariantFolder) -> list[Made]:
    """The calls of convert that make these variants: one for all that were made with the same options."""
    groups: dict[str, list[PublishedVariant]] = {}
    for variant in folder.variants:
        groups.setdefault(json.dumps(_shared(variant), sort_keys=True), []).append(variant)
    return [_made(folder, group) for group in groups.values()]


def _shared(variant: PublishedVariant) -> dict[str, Any]:
    """Options that variants of one call have in common; a recipe file takes no overrides, and these are none then."""
    theirs = _OF_SAFETENSORS if variant.container.is_checkpoint else _OF_GGUF
    return {name: variant.options[name] for name in theirs if variant.options.get(name) not in (None, {}, [], False)}


def _made(folder: VariantFolder, variants: Sequence[PublishedVariant]) -> Made:
    source, options = folder.source, _shared(variants[0])
    model = source.name
    if source.repo is not None:
        model = f"{source.repo}@{source.revision}" if source.revision else source.repo
    arguments, inputs = ["streamquant", "convert", model], list[tuple[str, str]]()
    plain = [variant for variant in variants if variant.recipe is None]
    arguments += [word for spec in _specs(plain) for word in ("--to", spec)]
    for variant in variants:
        if variant.recipe is not None:
            arguments += ["--recipe", f"{variant.label}.yaml"]
            text = yaml.safe_dump(dict(variant.recipe), sort_keys=False, allow_unicode=True, width=110)
            inputs.append((f"{variant.label}.yaml", text))
    if options.get("name") and options["name"] != source.name:
        arguments += ["--name", str(options["name"])]
    for option in ("split_max_size", "max_shard_size"):
        if options.get(option):
            arguments += [f"--{option.replace('_', '-')}", _size(options[option])]
    if options.get("pre"):
        arguments += ["--pre", str(options["pre"])]
    if options.get("metadata"):
        arguments += ["--metadata", "metadata.json"]
        inputs.append(("metadata.json", json.dumps(options["metadata"], indent=2, ensure_ascii=False)))
    arguments += _imatrix(variants[0].imatrix) + _overrides(options.get("overrides") or {})
    if options.get("guard_template"):
        arguments.append("--guard-template")
    return Made(shell(*arguments, "--out", "variants"), tuple(inputs))


def _specs(variants: Sequence[PublishedVariant]) -> list[str]:
    """As for --to, GGUF types in one list."""
    types = [variant.label for variant in variants if variant.container is GGUF]
    others = [variant.spec for variant in variants if variant.container is not GGUF]
    return others + ([GGUF.prefix + ",".join(types)] if types else [])


def _size(value: object) -> str:
    """Bytes as --split-max-size takes them.

    >>> _size(40_000_000_000), _size(1234)
    ('40G', '1234')
    """
    if type(value) is int and value > 0:
        for unit, scale in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
            if value % scale == 0:
                return f"{value // scale}{unit}"
    return str(value)


def _imatrix(record: Mapping[str, Any] | None) -> list[str]:
    if record is None:
        return []
    words = ["--imatrix", PurePosixPath(str(record.get("file"))).name]
    for name in ("include_weights", "exclude_weights"):
        words += [word for text in record.get(name) or () for word in (f"--{name.replace('_', '-')}", str(text))]
    return words


def _overrides(record: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in record.items():
        if isinstance(value, list):
            words += [word for item in value for word in (f"--{name}", str(item))]
        elif value is True:
            words.append(f"--{name}")
        elif isinstance(value, str):
            words += [f"--{name}", value]
    return words
