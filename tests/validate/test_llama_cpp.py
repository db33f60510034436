"""The streamed pass on SmolLM2 against llama-perplexity and llama-imatrix (tests/goldens/README.md has the recipe)."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from streamquant.calibrate.importance import write_importance
from streamquant.model.corpus import Corpus, read_corpus
from streamquant.model.variants.open import open_variant
from streamquant.validate.logits.comparison import Comparison, ComparisonOptions, VariantResult, compare
from tests.peers import DATA

pytestmark = [pytest.mark.xdist_group("validate"), pytest.mark.timeout(1800)]

GOLDENS = Path(__file__).parents[1] / "goldens"
TEXT = DATA / "text" / "wiki.test.raw"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((GOLDENS / "llama_perplexity.json").read_text())  # type: ignore[no-any-return]


def corpus_of(smollm2: Path, chunks: int) -> Corpus:
    if not TEXT.is_file():
        pytest.skip(f"no {TEXT}")
    return read_corpus([TEXT], smollm2, 512, chunks)


def run(smollm2: Path, variants: Path, chunks: int, kinds: tuple[str, ...]) -> Comparison:
    paths = [variants / "SmolLM2-135M-Instruct-GGUF" / f"SmolLM2-135M-Instruct-{kind}.gguf" for kind in kinds]
    corpus = corpus_of(smollm2, chunks)
    return compare(
        open_variant(smollm2), [open_variant(path) for path in paths], corpus, ComparisonOptions(tensors=False)
    )


def test_tokens_are_those_of_llama_perplexity(smollm2: Path, golden: dict[str, Any]) -> None:
    tokens = corpus_of(smollm2, 20).tokens
    assert tokens[:, :4].tolist() == golden["first_tokens"]
    assert hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest() == golden["tokens_sha256"]


def test_the_first_chunk(smollm2: Path, smollm2_variants: Path, golden: dict[str, Any]) -> None:
    """Perplexity to all its digits, KLD of Q8_0 and Q4_0 to its error bar."""
    found = run(smollm2, smollm2_variants, 1, ("Q8_0", "Q4_0"))
    assert found.scored_tokens == 255
    assert found.original.overall.perplexity.value == pytest.approx(golden["base"]["running_ppl"][0], rel=5e-4)
    for kind, variant in zip(("Q8_0", "Q4_0"), found.variants, strict=True):
        check_line(variant, golden["variants"][kind]["chunks"][0])


def check_line(variant: VariantResult, line: list[float]) -> None:
    """Numbers of a line of output: chunk, then value and error of PPL, ln ratio, KLD, RMS delta-p, same top.

    Rounding of activations makes both a draw of the same noise: two of their combined errors. One token in a chunk may
    flip by it, and be most of the error of the mean KLD: 0.00027 in llama-perplexity's run, 0.00034, 0.00044 or 0.0012
    here, by the instructions that the CPU has for float32 sums. So KLD and RMS delta-p are compared once more, without
    that token.
    """
    overall = variant.overall
    for estimate, at, scale in (
        (overall.perplexity, 1, 1.0),
        (overall.log_ratio, 3, 1.0),
        (overall.kld, 5, 1.0),
        (overall.rms_delta_p, 7, 0.01),
        (overall.same_top, 9, 0.01),
    ):
        value, error = line[at] * scale, line[at + 1] * scale
        assert estimate.error is not None
        assert abs(estimate.value - value) <= 2 * math.hypot(error, estimate.error), (variant.model.label, at)
        if estimate not in (overall.kld, overall.rms_delta_p):
            assert estimate.error == pytest.approx(error, rel=0.35), (variant.model.label, at)
    tokens = overall.tokens
    others = (overall.kld.value * tokens - overall.kld_percentiles.maximum) / (tokens - 1)
    assert others == pytest.approx(line[5], rel=0.15), variant.model.label
    largest = max(-overall.delta_p_percentiles.minimum, overall.delta_p_percentiles.maximum)
    others = math.sqrt((overall.rms_delta_p.value**2 * tokens - largest**2) / (tokens - 1))
    assert others == pytest.approx(0.01 * line[7], rel=0.15), variant.model.label


@pytest.mark.long
def test_twenty_chunks(smollm2: Path, smollm2_variants: Path, golden: dict[str, Any]) -> None:
    kinds = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0")
    found = run(smollm2, smollm2_variants, 20, kinds)
    value, error = golden["base"]["final"]
    assert found.original.overall.perplexity.value == pytest.approx(value, rel=1e-4)
    assert found.original.overall.perplexity.error == pytest.approx(error, rel=1e-3)
    assert round(found.original.overall.perplexity.value, 1) == 28.6
    for kind, variant in zip(kinds, found.variants, strict=True):
        check_line(variant, golden["variants"][kind]["chunks"][19])
        final = golden["variants"][kind]["final"]
        kld, (value, error) = variant.overall.kld, final["Mean KLD"]
        assert kld.error is not None
        assert abs(kld.value - value) <= math.hypot(error, kld.error), "one combined error: both are draws"
        percentiles, overall = variant.overall.kld_percentiles, variant.overall
        assert percentiles.median == pytest.approx(final["Median KLD"][0], rel=0.05)
        assert percentiles.p90 == pytest.approx(final["90.0% KLD"][0], rel=0.08)
        assert percentiles.p99 == pytest.approx(final["99.0% KLD"][0], rel=0.25)
        assert abs(overall.ratio.value - final["Mean PPL(Q)/PPL(base)"][0]) < 2 * final["Mean PPL(Q)/PPL(base)"][1]
        assert abs(overall.delta_p.value - 0.01 * final["Mean Δp"][0]) < 0.02 * final["Mean Δp"][1]


def check_importance(path: Path, golden: dict[str, Any], chunks: int) -> None:
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    assert {name.rpartition(".")[0] for name in stored} == set(golden["entries"])
    for name, entry in golden["entries"].items():
        sums = stored[f"{name}.in_sum2"].astype(np.float64)
        assert stored[f"{name}.counts"].tolist() == [512 * chunks] == [entry["count"]]
        # llama.cpp keeps keys and values in float16, so that what comes after attention differs in the fourth digit
        assert sums.sum() == pytest.approx(entry["sum"], rel=5e-4), name
        assert sums[::97] == pytest.approx(entry["some"], rel=5e-3), name
        if name.startswith("blk.0.attn_q"):
            assert sums[::97] == pytest.approx(entry["some"], rel=1e-5), "before the first attention"


@pytest.mark.long
def test_importance_is_that_of_llama_imatrix(smollm2: Path, tmp_path: Path) -> None:
    golden = json.loads((GOLDENS / "llama_imatrix.json").read_text())
    corpus = corpus_of(smollm2, golden["chunks"])
    assert hashlib.sha256(corpus.tokens.astype("<i8").tobytes()).hexdigest() == golden["tokens_sha256"]
    run = write_importance(open_variant(smollm2), corpus, tmp_path / "imatrix.gguf")
    assert run.entries == 210
    check_importance(tmp_path / "imatrix.gguf", golden, golden["chunks"])
