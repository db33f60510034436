"""Commands that a card shows: how to run a variant, and how it was made. Every argument is quoted for a shell."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from streamquant.convert.manifest import ManifestFile
from streamquant.convert.recipes.container import GGUF
from streamquant.convert.recipes.recipe import RECIPES
from streamquant.files.folders import real_path
from streamquant.publish.results import PublishedVariant, VariantFolder

_LLAMA_CPP = {
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repeat-penalty",
}
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


def first_file(variant: PublishedVariant) -> ManifestFile:
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
    return shell("hf", "download", repo, *wanted, "--local-dir", real_path(folder.path).name)


def llama_cpp(
    program: str,
    folder: VariantFolder,
    variant: PublishedVariant,
    repo: str | None,
    sampling: Mapping[str, float | int],
) -> str:
    """llama-cli or llama-server, from the Hub where `repo` is known, else with the local file."""
    tag = hub_tag(variant)
    path = f"{real_path(folder.path).name}/{first_file(variant).path}"
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
        groups.setdefault(json.dumps(_shared(folder, variant)), []).append(variant)
    return [_made(folder, group) for group in groups.values()]


def _shared(folder: VariantFolder, variant: PublishedVariant) -> tuple[list[str], str]:
    """The options that variants of one call have in common, as words, and the contents of metadata.json, if any."""
    made = variant.made
    options = replace(made.options, name=None) if made.options.name == folder.source.name else made.options
    words = options.words(made.recipe.container, made.imatrix, made.calibration)
    return words, json.dumps(options.metadata, indent=2, ensure_ascii=False) if "metadata.json" in words else ""


def _made(folder: VariantFolder, variants: Sequence[PublishedVariant]) -> Made:
    source = folder.source
    model = source.name
    if source.repo is not None:
        model = f"{source.repo}@{source.revision}" if source.revision else source.repo
    arguments, inputs = ["streamquant", "convert", model], list[tuple[str, str]]()
    plain = [variant for variant in variants if variant.made.recipe.file is None]
    arguments += [word for spec in _specs(plain) for word in ("--to", spec)]
    for variant in variants:
        if (file := variant.made.recipe.file) is not None:
            arguments += ["--recipe", f"{variant.label}.yaml"]
            inputs.append((f"{variant.label}.yaml", file.yaml()))
    words, metadata = _shared(folder, variants[0])
    if metadata:
        inputs.append(("metadata.json", metadata))
    return Made(shell(*arguments, *words, "--out", "variants"), tuple(inputs))


def _specs(variants: Sequence[PublishedVariant]) -> list[str]:
    """As for --to, GGUF types in one list."""
    types = [variant.label for variant in variants if variant.container is GGUF]
    others = [variant.spec for variant in variants if variant.container is not GGUF]
    return others + ([GGUF.prefix + ",".join(types)] if types else [])
