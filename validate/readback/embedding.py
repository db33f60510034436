"""Embedding models and rerankers: what a validation does not measure of them, and the keys and files that it can check.

A wrong pooling is silent: llama.cpp then takes the mean, or none, and so does sentence-transformers without its
modules.json.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from streamquant.convert.metadata.embedding import MODULES, embedding_keys, pooling_keys, read_modules
from streamquant.model.problem import Problem
from streamquant.model.variants.folder import FolderVariant
from streamquant.model.variants.gguf import GgufVariant
from streamquant.quant.errors import StreamquantError
from streamquant.validate.run import ValidationRun

POOLING_TYPE = ".pooling_type"
"""Ending of the key of a GGUF."""


def check_embedding(run: ValidationRun) -> None:
    """Note on every variant of an embedding model or a reranker what is not measured; pooling that differs is an error.

    Reads small files and keys, no weight.
    """
    original = run.original
    if not isinstance(original, FolderVariant):
        return
    folder = original.checkpoint.folder
    try:
        keys = {key: value.value for key, value in embedding_keys(original.checkpoint, original.description)[0].items()}
        pools = any(module.kind.endswith("Pooling") for module in read_modules(folder))
    except StreamquantError as error:  # `convert` to GGUF ends with it; an FP8 folder may be right
        keys, pools = {}, True
        for candidate in run.candidates:
            what = "an embedding model whose pooling cannot be compared"
            candidate.problems.append(Problem("pooling", "warning", what, where=error.where, found=error.what))
    if not keys and not pools:
        return
    for candidate in run.candidates:
        if candidate.variant is None:
            continue
        if not any(problem.check == "reranker" for problem in candidate.problems):
            what = "an embedding model: its vectors" if pools else "a reranker: its scores"
            measured = "the hidden states of every layer, and next tokens by the head, or by the embeddings without one"
            candidate.problems.append(Problem("embedding", "note", f"{what} are not measured", found=measured))
        if isinstance(candidate.variant, GgufVariant):
            candidate.problems += _wrong_keys(keys, candidate.variant.metadata)
        elif pools and isinstance(candidate.variant, FolderVariant):
            candidate.problems += _wrong_modules(original, candidate.variant)


def _wrong_keys(keys: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[Problem]:
    """The keys of a GGUF that say another pooling, other labels or another template than the original has."""
    for key, value in keys.items():
        found = metadata.get(key)
        if (list(found) if isinstance(found, list | tuple) else found) != value:
            said = "no such key" if found is None else f"{found!r:.80}"
            what = "pools otherwise than the original" if key.endswith(POOLING_TYPE) else "ranks otherwise"
            yield Problem("pooling", "error", what, where=key, found=said, required=f"{value!r:.80}")


def _wrong_modules(original: FolderVariant, variant: FolderVariant) -> Iterator[Problem]:
    """What a folder's modules.json, or its pooling, says otherwise than the original's."""
    expected, found = (_pooling(folder) for folder in (original, variant))
    if found != expected:
        said = f"no {MODULES}" if found == ((), {}) else "other modules, or another pooling"
        what = "pools otherwise than the original"
        yield Problem("pooling", "error", what, where=MODULES, found=said, required="the original's")


def _pooling(variant: FolderVariant) -> tuple[object, object]:
    folder = variant.checkpoint.folder
    try:
        return read_modules(folder), pooling_keys(folder, variant.description)[0]
    except StreamquantError as error:
        return error.what, None
