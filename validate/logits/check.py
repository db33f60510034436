"""The section that compares logits, tensors and noise: the layer-streamed pass over all variants that can be read."""

from streamquant.model.corpus import Corpus
from streamquant.model.errors import VariantError
from streamquant.validate.logits.comparison import Comparison, ComparisonOptions, compare
from streamquant.validate.run import ValidationRun


def check_logits(run: ValidationRun, corpus: Corpus) -> Comparison:
    """Compare all candidates that can be read; again without one that turns out to be broken while it is read.

    Raises StreamquantError if the original cannot be read.
    """
    wanted = run.options.sections("noise", "tensors")
    options = ComparisonOptions(
        run.options.setting, run.options.noise if "noise" in wanted else (), "tensors" in wanted, run.options.cache
    )
    while True:
        variants = [candidate.variant for candidate in run.candidates if candidate.variant is not None]
        try:
            found = compare(run.original, variants, corpus, options, run.listener)
            break
        except VariantError as error:
            broken = [candidate for candidate in run.candidates if candidate.variant is error.variant]
            if not broken:
                raise
            broken[0].unreadable(error)
    for result in found.variants:
        candidate = next(item for item in run.candidates if str(item.file) == result.model.path)
        # problems of the file are among the result's: those found while reading, and the differences, are added
        known = set(candidate.problems)
        candidate.problems += [problem for problem in result.problems if problem not in known]
    return found
