"""The whole validation: the comparison, and tokens, chat, engines and behaviour in the real engines, as one report.

A section that cannot run does not end the others: the report says which, for which variant, and why. A variant that
cannot be read is a finding like any other. Only a fault of the original, of the texts or of the command ends it all.
"""

from collections.abc import Sequence
from pathlib import Path

from streamquant.files.listener import SILENT, Listener
from streamquant.model.corpus import encode_text, read_corpus, read_text, read_tokenizer
from streamquant.model.variants.open import open_original
from streamquant.model.variants.variant import Variant
from streamquant.validate.engines.check import check_engines
from streamquant.validate.logits.check import check_logits
from streamquant.validate.options import ValidationOptions
from streamquant.validate.readback.embedding import check_embedding
from streamquant.validate.report.data import ChatCheck, NotRun, Report
from streamquant.validate.report.make import make_report
from streamquant.validate.run import ValidationRun, open_candidates
from streamquant.validate.sections import SKIPPABLE
from streamquant.validate.text.check import check_tokenizers

TEXT_CHARACTERS = 100_000
"""Of each text, how much is tokenized by every engine."""


def validate(
    original: Path, variants: Sequence[Path], options: ValidationOptions, listener: Listener = SILENT
) -> Report:
    """Compare variants with their original in every way that the options do not skip.

    The listener hears of steps of "layers", "logits and divergence", "tokens and chat templates" and "engines". Raises
    UsageError for a wrong command, StreamquantError if the original or a text cannot be read.
    """
    run = ValidationRun(open_original(original), open_candidates(variants), options, listener)
    for section in SKIPPABLE:
        if section in options.skip:
            run.not_run.append(NotRun(section, None, "left out by --skip", requested=True))
    folder = options.tokenizer or run.original.path
    corpus = read_corpus(options.texts, folder, options.context, options.chunks)
    texts = {path.name: [read_text(path)[:TEXT_CHARACTERS]] for path in options.texts}
    backend = read_tokenizer(folder)
    # Tokens and chat first: they cost seconds, and a fault there is the most common one.
    check_tokenizers(run, texts)
    check_embedding(run)
    comparison = check_logits(run, corpus)
    check_engines(run, encode_text(backend, next(iter(texts.values()))[0]))
    return make_report(run, comparison)


def chat_check(original: Variant, variants: Sequence[Path], listener: Listener = SILENT) -> ChatCheck:
    """Tokens, chat templates and lints alone, of strings made to break tokenizers: no weight is read.

    Raises what `validate` raises.
    """
    run = ValidationRun(original, open_candidates(variants), ValidationOptions(()), listener)
    check_tokenizers(run, {})
    check_embedding(run)
    reports = tuple(candidate.report() for candidate in run.candidates)
    return ChatCheck(reports, run.original_lints or (), tuple(run.not_run))
