"""`validate`, `chat_check`, reports, and `imatrix`: what runs a model or its tokenizer."""

import os
from collections.abc import Sequence
from pathlib import Path

from streamquant.api.models import Model, local_weights, without_weights
from streamquant.api.paths import paths_told
from streamquant.calibrate.importance import ImportanceOptions, ImportanceRun, write_importance
from streamquant.files.listener import SILENT, Listener
from streamquant.files.writing import check_writable, partial_of
from streamquant.model.corpus import read_corpus
from streamquant.model.variants.open import open_original
from streamquant.quant.errors import UsageError
from streamquant.validate import validation
from streamquant.validate.logits.hidden_states import prune_cache
from streamquant.validate.options import ValidationOptions
from streamquant.validate.report import render
from streamquant.validate.report.data import ChatCheck, Report, check_report_folder, write_report
from streamquant.validate.report.render import PLOTS


@paths_told
def validate(
    original: Model,
    variants: Sequence[str | Path],
    options: ValidationOptions,
    *,
    out: str | Path | None = None,
    listener: Listener = SILENT,
) -> Report:
    """Measure whether each variant is still the model: perplexity, divergence, tokens, chat, engines, greedy answers.

    Args:
        original: the reference: the checkpoint, ORG/NAME[@REVISION] (fetched whole into the local cache), or any
            variant taken as the reference.
        variants: GGUF files (of a split set, any file) and compressed-tensors folders, of any publisher.
        options: the texts to measure on, gates, and what to leave out.
        out: a folder for report.json, report.md, report.html and plots.
        listener: hears of steps of "layers", "logits and divergence", "tokens and chat templates" and "engines".

    Returns the report, which a notebook shows as a page. A failed gate is not raised: see `Report.gate_results`.

    Raises:
        UsageError: for wrong options.
        StreamquantError: for an original, a text or an output folder that cannot be used.
    """
    folder = None if out is None else Path(out)
    if folder is not None:
        check_report_folder(folder)
        check_writable(folder / PLOTS, try_it=True)  # before hours of computing
    _check_writable(options.cache, options.setting.scratch)
    report = validation.validate(local_weights(original, listener), _paths(variants), options, listener)
    if folder is not None:
        listener.started("report", 1)
        write_report(report, folder)
        render.write_pages(report, folder)
    if options.cache is not None:
        prune_cache(options.cache)
    return report


@paths_told
def chat_check(original: Model, variants: Sequence[str | Path], *, listener: Listener = SILENT) -> ChatCheck:
    """Compare tokens and chat templates of variants with the original's, in the engines themselves. Reads no weight.

    Raises:
        UsageError: for variants that cannot be compared.
        StreamquantError: for an original that cannot be read.
    """
    return validation.chat_check(without_weights(original, listener), _paths(variants), listener)


@paths_told
def imatrix(
    model: Model,
    texts: Sequence[str | Path],
    out: str | Path,
    options: ImportanceOptions | None = None,
    *,
    context: int = 512,
    chunks: int | None = None,
    tokenizer: str | Path | None = None,
    listener: Listener = SILENT,
) -> ImportanceRun:
    """Compute the importance matrix of a model over texts, and write it in llama.cpp's GGUF format.

    `read_imatrix` reads the file for `ConversionOptions`; llama-quantize takes it too.

    Args:
        model: the checkpoint, ORG/NAME[@REVISION], or any variant of it.
        texts: UTF-8 files.
        out: the file to write; one that is there is continued if it is of the beginning of the same tokens.
        options: device, dtype, after how many chunks the file is saved, whether special tokens are tokens.
        context: tokens of a chunk.
        chunks: chunks of each text, at most.
        tokenizer: tokenizer.json of the texts, where the model has none (a GGUF).
        listener: hears of steps of "layers".

    Raises:
        UsageError: for texts that are too short, and for a tokenizer that is not there.
        StreamquantError: for a file that belongs to other texts, and for a model that cannot be read or computed.
    """
    out = Path(out)
    if os.path.lexists(out) and not out.is_file():
        raise UsageError("the output file is a folder, or no file at all", where=str(out), hint="choose another --out")
    check_writable(out.parent, [partial_of(out).name], try_it=True)  # before hours of computing
    _check_writable(options.setting.scratch if options is not None else None)
    variant = open_original(local_weights(model, listener))
    parse_special = options is not None and options.parse_special
    corpus = read_corpus(_paths(texts), Path(tokenizer or variant.path), context, chunks, parse_special=parse_special)
    return write_importance(variant, corpus, out, options, listener)


def _check_writable(*folders: Path | None) -> None:
    """Raise StreamquantError for a folder that takes no files. Nothing is made."""
    for folder in folders:
        if folder is not None:
            check_writable(folder, try_it=True)


def _paths(names: Sequence[str | Path]) -> list[Path]:
    return [Path(name) for name in names]
