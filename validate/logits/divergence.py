"""How far a variant's next-token probabilities are from the original's: the statistics of llama-perplexity, and more.

Definitions as in llama.cpp's tools/perplexity (perplexity.cpp, kl_divergence): per scored token the negative log
likelihood under both models, KL divergence of the original P from the variant Q over the whole vocabulary, the change
of the probability of the token that follows, and whether the most likely token is the same. Unlike there, nothing is
rounded to 16 bits or cut off at 16 nats, so that KL has no negative values and no floor.

Every mean has two errors. `error` is that of llama-perplexity, sqrt((E[x^2] - E[x]^2) / (n - 1)), as if tokens were
independent. `error_by_chunk` clusters them by chunk (the sandwich estimator of a mean; Liang and Zeger, 1986): tokens
of one text are not independent, so it is the one to quote. Units are nats and probabilities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streamquant.model.row_slices import for_each_slice, row_slices

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
TOP = 5

PERCENTS = (0.0, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, or a function of means, and its standard errors: i.i.d. over tokens, and clustered by chunk.

    None where there are too few tokens or chunks to tell.
    """

    value: float
    error: float | None
    error_by_chunk: float | None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of a value per token, linear between the sorted values as in llama-perplexity; 0 is the minimum."""

    minimum: float
    p0_1: float
    p1: float
    p5: float
    p10: float
    p25: float
    median: float
    p75: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """counts[i] values lie in [edges[i], edges[i + 1]); those outside are in the first and the last bin."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How well one model predicts the text."""

    tokens: int
    """Scored tokens."""
    chunks: int
    nll: Estimate
    """Mean negative log likelihood, nats per token."""
    perplexity: Estimate


@dataclass(frozen=True, slots=True)
class Divergence:
    """A variant (Q) against the original (P) over the same scored tokens."""

    tokens: int
    chunks: int
    perplexity: Estimate
    """PPL(Q)."""
    base_perplexity: Estimate
    """PPL(P)."""
    correlation: float | None
    """Of the tokens' log likelihoods, Cor(ln PPL(Q), ln PPL(P)), -1 to 1."""
    log_ratio: Estimate
    """ln(PPL(Q) / PPL(P)), nats per token."""
    ratio: Estimate
    """PPL(Q) / PPL(P)."""
    difference: Estimate
    """PPL(Q) - PPL(P)."""
    kld: Estimate
    """Mean KL(P || Q), nats per token."""
    kld_percentiles: Percentiles
    kld_histogram: Histogram
    """Over log10 of KL, -8 to 1.5."""
    delta_p: Estimate
    """Mean of Q(token) - P(token), -1 to 1."""
    rms_delta_p: Estimate
    delta_p_percentiles: Percentiles
    delta_p_histogram: Histogram
    same_top: Estimate
    """Share of tokens where both models' most likely token is the same, 0 to 1."""
    top5_overlap: Estimate
    """Mean share of the five most likely tokens that both models have, 0 to 1."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """Values per scored token of one model against the base: float64[tokens] each, chunk after chunk."""

    nll: Floats
    kld: Floats
    delta_p: Floats
    same_top: Floats
    top5_overlap: Floats

    @classmethod
    def join(cls, parts: "Sequence[TokenScores]") -> "TokenScores":
        """One after another."""
        names = ("nll", "kld", "delta_p", "same_top", "top5_overlap")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def select(self, mask: NDArray[np.bool_]) -> "TokenScores":
        """Those of some tokens."""
        return TokenScores(
            self.nll[mask], self.kld[mask], self.delta_p[mask], self.same_top[mask], self.top5_overlap[mask]
        )


# Rows of logits


@dataclass(frozen=True, slots=True, eq=False)
class LogitRows:
    """Logits of some rows with what is needed of each: log normalizer, most likely tokens."""

    logits: "torch.Tensor"
    """float32[r, v], on any device."""
    normalizer: Floats
    """float64[r]: log(sum(exp(logits)))."""
    top: NDArray[np.int64]
    """int64[r, 5]: ids of the largest logits, largest first."""

    def nll(self, targets: NDArray[np.int64]) -> Floats:
        """float64[r]: -log p of the tokens int64[r]."""
        import torch

        picked = self.logits.gather(1, torch.from_numpy(targets).to(self.logits.device)[:, None])[:, 0]
        found: Floats = self.normalizer - picked.double().cpu().numpy()
        return found


def prepare_rows(logits: "torch.Tensor") -> LogitRows:
    """float32[r, v] -> LogitRows. Float64 throughout: Numba on the CPU, torch on other devices."""
    rows = len(logits)
    normalizer, top = np.empty(rows), np.empty((rows, TOP), np.int64)
    if _on_cpu(logits):
        from streamquant.validate.logits.divergence_cpu import log_normalizers

        values = logits.numpy()
        for_each_slice(rows, lambda part: log_normalizers(values[part], normalizer[part], top[part]))
        return LogitRows(logits, normalizer, top)
    for part in row_slices(rows, 64):
        normalizer[part] = logits[part].double().logsumexp(-1).cpu().numpy()
    top[:] = logits.topk(TOP, dim=-1).indices.cpu().numpy()
    return LogitRows(logits, normalizer, top)


def score_rows(base: LogitRows, other: LogitRows, targets: NDArray[np.int64]) -> TokenScores:
    """Compare the rows of two models; targets int64[r] are the tokens that follow."""
    base_nll, nll = base.nll(targets), other.nll(targets)
    same = (base.top[:, 0] == other.top[:, 0]).astype(np.float64)
    overlap = (base.top[:, :, None] == other.top[:, None, :]).any(-1).mean(-1)
    return TokenScores(nll, kl_divergence(base, other), np.exp(-nll) - np.exp(-base_nll), same, overlap)


def kl_divergence(base: LogitRows, other: LogitRows) -> Floats:
    """float64[r]: sum over the vocabulary of p (log p - log q), in nats; not negative but for rounding (1e-15)."""
    out = np.empty(len(base.normalizer))
    if _on_cpu(base.logits):
        from streamquant.validate.logits.divergence_cpu import divergences

        a, b = base.logits.numpy(), other.logits.numpy()
        p, q = base.normalizer, other.normalizer
        for_each_slice(len(out), lambda part: divergences(a[part], b[part], p[part], q[part], out[part]))
        return out
    import torch

    for part in row_slices(len(out), 64):
        shift = torch.from_numpy(base.normalizer[part]).to(base.logits.device)[:, None]
        a64, b64 = base.logits[part].double(), other.logits[part].double()
        total = ((a64 - shift).exp() * (a64 - b64)).sum(-1).cpu().numpy()
        out[part] = total - base.normalizer[part] + other.normalizer[part]
    return out


def _on_cpu(logits: "torch.Tensor") -> bool:
    return bool(logits.device.type == "cpu")


# Statistics


def mean(values: Floats, chunks: NDArray[np.int64], scale: float = 1.0, value: float | None = None) -> Estimate:
    """The mean of float64[tokens]; chunks are the tokens' chunk numbers. `scale` multiplies the errors (the derivative
    of a function of the mean), `value` replaces the mean itself."""
    n = len(values)
    average = float(values.mean()) if n else math.nan
    return Estimate(
        average if value is None else value,
        scale * iid_error(values) if n > 1 else None,
        None if (clustered := clustered_error(values, chunks)) is None else scale * clustered,
    )


def iid_error(values: Floats) -> float:
    """sqrt((E[x^2] - E[x]^2) / (n - 1)) of float64[n], n > 1."""
    return float(np.sqrt(np.mean((values - values.mean()) ** 2) / (len(values) - 1)))


def clustered_error(values: Floats, chunks: NDArray[np.int64]) -> float | None:
    """The standard error of the mean when the tokens of a chunk depend on each other; None for a single chunk."""
    _, number = np.unique(chunks, return_inverse=True)
    count = int(number.max()) + 1 if len(number) else 0
    if count < 2:
        return None
    sums = np.bincount(number, weights=values - values.mean(), minlength=count)
    return float(np.sqrt(np.sum(sums**2) * count / (count - 1)) / len(values))


def percentiles(values: Floats) -> Percentiles:
    """Percentiles of float64[n], n > 0."""
    return Percentiles(*(float(found) for found in np.percentile(values, PERCENTS)))


def histogram(values: Floats, edges: Floats) -> Histogram:
    """Counts of float64[n] in the bins between float64[b + 1]; values outside go to the outermost bins."""
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], -np.inf))
    counts, _ = np.histogram(inside, edges)
    return Histogram(tuple(map(float, edges)), tuple(map(int, counts)))


def likelihood(nll: Floats, chunks: NDArray[np.int64]) -> Likelihood:
    """Perplexity of one model: float64[tokens] and their chunk numbers."""
    ppl = float(np.exp(nll.mean()))
    return Likelihood(len(nll), len(np.unique(chunks)), mean(nll, chunks), mean(nll, chunks, ppl, ppl))


def divergence(base_nll: Floats, scores: TokenScores, chunks: NDArray[np.int64]) -> Divergence:
    """All statistics of a variant; base_nll float64[tokens] is that of the original, chunks their chunk numbers.

    Errors of functions of means by the delta method, with the covariance of the two models, as llama-perplexity's.
    """
    nll = scores.nll
    log_ratio = nll - base_nll
    ppl, base_ppl = float(np.exp(nll.mean())), float(np.exp(base_nll.mean()))
    ratio = float(np.exp(log_ratio.mean()))
    squares = scores.delta_p**2
    rms = math.sqrt(float(squares.mean()))
    return Divergence(
        tokens=len(nll),
        chunks=len(np.unique(chunks)),
        perplexity=mean(nll, chunks, ppl, ppl),
        base_perplexity=mean(base_nll, chunks, base_ppl, base_ppl),
        correlation=correlation(nll, base_nll),
        log_ratio=mean(log_ratio, chunks),
        ratio=mean(log_ratio, chunks, ratio, ratio),
        difference=mean(ppl * nll - base_ppl * base_nll, chunks, 1.0, ppl - base_ppl),
        kld=mean(scores.kld, chunks),
        kld_percentiles=percentiles(scores.kld),
        kld_histogram=histogram(np.log10(np.maximum(scores.kld, 1e-12)), np.linspace(-8, 1.5, 77)),
        delta_p=mean(scores.delta_p, chunks),
        rms_delta_p=mean(squares, chunks, 0.5 / rms if rms else 0.0, rms),
        delta_p_percentiles=percentiles(scores.delta_p),
        delta_p_histogram=histogram(scores.delta_p, np.linspace(-1, 1, 81)),
        same_top=mean(scores.same_top, chunks),
        top5_overlap=mean(scores.top5_overlap, chunks),
    )


def correlation(one: Floats, other: Floats) -> float | None:
    """Pearson's, None where one does not vary."""
    if len(one) < 2 or not one.std() or not other.std():
        return None
    return float(np.corrcoef(one, other)[0, 1])
