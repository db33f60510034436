"""The statistics: kernels against float64 in torch, formulas against llama-perplexity's own output."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamquant.validate.logits import divergence as d
from streamquant.validate.logits.divergence_cpu import TOP


def random_logits(rows: int, vocabulary: int, spread: float, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(size=(rows, vocabulary)) * spread
    return torch.from_numpy(values.astype(np.float32))


def exact(a: torch.Tensor, b: torch.Tensor) -> d.Floats:
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    found: d.Floats = (p.exp() * (p - q)).sum(-1).numpy()
    return found


# --- rows -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(TOP, 2000), st.floats(0, 200), st.floats(0, 30), st.integers(0, 99))
def test_kernels_are_float64(rows: int, vocabulary: int, spread: float, change: float, seed: int) -> None:
    a = random_logits(rows, vocabulary, spread, seed)
    b = a + random_logits(rows, vocabulary, change, seed + 1)
    p, q = d.prepare_rows(a), d.prepare_rows(b)
    expected = torch.logsumexp(a.double(), -1).numpy()
    assert np.allclose(p.normalizer, expected, rtol=1e-13, atol=1e-12)
    assert np.array_equal(np.take_along_axis(a.numpy(), p.top, 1), a.topk(TOP).values.numpy())
    assert np.allclose(d.kl_divergence(p, q), exact(a, b), rtol=1e-11, atol=1e-11 * (1 + spread + change))


def test_equal_logits_come_in_their_order() -> None:
    rows = d.prepare_rows(torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 1.0]]))
    assert rows.top.tolist() == [[1, 2, 4, 0, 5]]


def test_extreme_logits() -> None:
    """Far apart and far from 0: nothing overflows, and what has no probability counts nothing."""
    a = torch.tensor([[1e4, 0.0, -1e4, 3.0, -1e30, 1e4]])
    b = torch.tensor([[1e4, 0.0, 1e3, 3.0, -1e4, 1e4 - 1]])
    p, q = d.prepare_rows(a), d.prepare_rows(b)
    assert p.normalizer[0] == pytest.approx(1e4 + math.log(2), rel=1e-14)
    assert d.kl_divergence(p, q)[0] == pytest.approx(exact(a, b)[0], rel=1e-12)


def test_a_model_does_not_diverge_from_itself() -> None:
    rows = d.prepare_rows(random_logits(50, 3000, 4))
    targets = np.arange(50)
    scores = d.score_rows(rows, rows, targets)
    assert np.abs(scores.kld).max() < 1e-14
    assert not scores.delta_p.any()
    assert scores.same_top.all()
    assert scores.top5_overlap.all()


def test_other_devices_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path, which runs on GPUs, against the kernels."""
    a, b = random_logits(130, 500, 4), random_logits(130, 500, 4, 1)
    targets = np.arange(130)
    by_kernel = d.score_rows(d.prepare_rows(a), d.prepare_rows(b), targets)
    monkeypatch.setattr(d, "_on_cpu", lambda _logits: False)
    by_torch = d.score_rows(d.prepare_rows(a), d.prepare_rows(b), targets)
    for field in fields(by_torch):
        assert np.allclose(getattr(by_torch, field.name), getattr(by_kernel, field.name), rtol=1e-11, atol=1e-12)


def test_scores_of_a_row_by_hand() -> None:
    a, b = torch.log(torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.06, 0.04]])), torch.zeros(1, 6)
    scores = d.score_rows(d.prepare_rows(a), d.prepare_rows(b), np.array([0]))
    assert scores.nll[0] == pytest.approx(math.log(6))
    assert scores.delta_p[0] == pytest.approx(1 / 6 - 0.5)
    p = np.array([0.5, 0.2, 0.1, 0.1, 0.06, 0.04])
    assert scores.kld[0] == pytest.approx(float((p * np.log(p * 6)).sum()), rel=1e-6)
    assert scores.same_top[0] == 1
    assert scores.top5_overlap[0] == 1


# --- statistics -----------------------------------------------------------------------------------------------------


def some_scores(chunks: int = 6, length: int = 40) -> tuple[d.Floats, d.TokenScores, NDArray[np.int64]]:
    draw = np.random.default_rng(3)
    n = chunks * length
    base = draw.gamma(2, 1.5, n) + np.repeat(draw.normal(size=chunks), length) ** 2
    nll = base + draw.normal(0.02, 0.1, n)
    scores = d.TokenScores(
        nll,
        draw.gamma(1, 0.02, n),
        np.exp(-nll) - np.exp(-base),
        (draw.random(n) < 0.9).astype(np.float64),
        draw.random(n),
    )
    return base, scores, np.repeat(np.arange(chunks), length)


def test_errors_are_llama_perplexitys() -> None:
    """Its formulas, written down from perplexity.cpp on their own."""
    base, scores, chunks = some_scores()
    found, n, nll = d.divergence(base, scores, chunks), len(base), scores.nll

    def variance(x: d.Floats) -> float:
        return float(((x**2).mean() - x.mean() ** 2) / (n - 1))

    covariance = float(((nll * base).mean() - nll.mean() * base.mean()) / (n - 1))
    ppl, base_ppl = math.exp(nll.mean()), math.exp(base.mean())
    log_ratio = math.sqrt(variance(nll) + variance(base) - 2 * covariance)
    difference = ppl**2 * variance(nll) + base_ppl**2 * variance(base) - 2 * ppl * base_ppl * covariance
    share = float(scores.same_top.mean())
    squares = scores.delta_p**2
    rms = math.sqrt(squares.mean())
    expected = {
        "perplexity": (ppl, ppl * math.sqrt(variance(nll))),
        "base_perplexity": (base_ppl, base_ppl * math.sqrt(variance(base))),
        "log_ratio": (nll.mean() - base.mean(), log_ratio),
        "ratio": (ppl / base_ppl, ppl / base_ppl * log_ratio),
        "difference": (ppl - base_ppl, math.sqrt(difference)),
        "kld": (scores.kld.mean(), math.sqrt(variance(scores.kld))),
        "delta_p": (scores.delta_p.mean(), math.sqrt(variance(scores.delta_p))),
        "rms_delta_p": (rms, 0.5 / rms * math.sqrt(variance(squares))),
        "same_top": (share, math.sqrt(share * (1 - share) / (n - 1))),
    }
    for name, (value, error) in expected.items():
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(value, rel=1e-9), name
        assert estimate.error == pytest.approx(error, rel=1e-9), name
    assert found.correlation == pytest.approx(covariance / math.sqrt(variance(nll) * variance(base)))
    assert (found.tokens, found.chunks) == (n, 6)


def test_errors_by_chunk_are_those_of_the_means_of_chunks() -> None:
    """With chunks of one length the clustered error is the plain error of the chunks' means."""
    base, scores, chunks = some_scores()
    means = scores.kld.reshape(6, -1).mean(1)
    assert d.divergence(base, scores, chunks).kld.error_by_chunk == pytest.approx(means.std(ddof=1) / math.sqrt(6))
    likelihood = d.likelihood(base, chunks)
    assert likelihood.nll.error_by_chunk == pytest.approx(base.reshape(6, -1).mean(1).std(ddof=1) / math.sqrt(6))
    assert likelihood.nll.error is not None
    assert likelihood.nll.error_by_chunk is not None
    assert likelihood.nll.error_by_chunk > likelihood.nll.error, "tokens of a chunk are alike here"
    assert d.clustered_error(base, np.zeros(len(base), np.int64)) is None


def test_percentiles_and_histograms() -> None:
    values = np.arange(101, dtype=np.float64)
    found = d.percentiles(values)
    assert (found.minimum, found.p5, found.median, found.p99, found.maximum) == (0, 5, 50, 99, 100)
    assert d.percentiles(np.array([1.0, 2.0])).p25 == 1.25
    histogram = d.histogram(np.array([-9.0, 0.5, 1.5, 1.6, 99.0]), np.array([0.0, 1.0, 2.0]))
    assert histogram.counts == (2, 3)


def test_one_token_has_no_error() -> None:
    one = np.array([0.5])
    found = d.divergence(one, d.TokenScores(one, one, one, one, one), np.array([0]))
    assert found.kld == d.Estimate(0.5, None, None)
    assert found.correlation is None
