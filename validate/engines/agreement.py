"""A real engine's next-token probabilities against our forward pass of the same file.

A reader and a forward pass that share a mistake agree with each other: rows in the wrong order, a wrong rope, a scale
left out. The engine that the file is made for does not share it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.engine import Engine, TopLogprobs

Logits: TypeAlias = NDArray[np.floating] | Callable[[Sequence[Sequence[int]]], NDArray[np.floating]]
"""float[prompts, vocabulary] of the next token of each prompt, or what returns it; logits or log-probabilities."""

TOP = 64
"""Tokens that are compared for each prompt: the most probable ones in the engine."""
LENGTHS = (2, 8, 32, 64, 64, 128, 128, 256, 256, 512, 1024)
"""Tokens of the prompts; a rope scaling that is left out shows in long ones."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a healthy file stays within, and a wrong one does not (measured in tests/validate/test_engines.py).

    mean_kld         nats; engines round activations (llama.cpp to 8 bits), which costs up to about 0.01
    max_kld          nats, of the worst prompt: a rope scaling that is left out shows in long prompts alone
    median_error     of `PromptAgreement.error`, which needs no confident model: it sees random weights as well
    same_top         fraction of prompts with the same most probable token, near ties counted as the same
    tie_margin       nats between the two most probable tokens that count as a near tie
    """

    mean_kld: float = 0.05
    max_kld: float = 0.3
    median_error: float = 0.1
    same_top: float = 0.8
    tie_margin: float = 0.2


@dataclass(frozen=True, slots=True)
class PromptAgreement:
    """One prompt.

    tokens    its length
    kld       nats, of the engine's distribution from the reference's over its TOP tokens and the rest as one: a lower
              bound of the divergence over all tokens
    error     sum of squared differences of the log-probabilities of these tokens over that of their own variation,
              both about their means (NMSE): 0 is equal, 1 as good as no knowledge
    same_top  the most probable token is the same, or a near tie
    """

    tokens: int
    kld: float
    error: float
    same_top: bool


@dataclass(frozen=True, slots=True)
class EngineAgreement:
    """The engine against the reference over all prompts; `problems` is empty if they agree.

    mean_kld, max_kld  nats; median_error and same_top are fractions. See PromptAgreement
    """

    engine: str
    model: str
    top: int
    mean_kld: float
    max_kld: float
    median_error: float
    same_top: float
    prompts: tuple[PromptAgreement, ...]
    thresholds: Thresholds
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether all thresholds hold."""
        return not self.problems


def prompts_from(ids: Sequence[int], lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Prompts of these lengths, cut from a tokenized text at even distances.

    >>> prompts_from(range(10), (2, 3))
    [[0, 1], [5, 6, 7]]

    Raises StreamquantError if the text is too short.
    """
    step = len(ids) // len(lengths)
    prompts = [list(ids[number * step : number * step + length]) for number, length in enumerate(lengths)]
    if any(len(prompt) < length for prompt, length in zip(prompts, lengths, strict=True)):
        raise StreamquantError(
            "the text is too short for the prompts", found=f"{len(ids)} tokens", hint="give a longer text"
        )
    return prompts


def engine_agreement(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    logits: Logits,
    *,
    top: int = TOP,
    thresholds: Thresholds | None = None,
) -> EngineAgreement:
    """Compare the engine's next-token probabilities with `logits` (float[prompts, vocabulary]) of the same file.

    A row may be longer than the engine's vocabulary (padded embeddings), never shorter than its token ids need. Raises
    StreamquantError if there are no prompts, the engine fails, or the shapes cannot belong together.
    """
    limits = thresholds or Thresholds()
    if not prompts:
        raise StreamquantError("no prompts to compare an engine with")
    reference = np.asarray(logits(prompts) if callable(logits) else logits)
    found = engine.next_token_logprobs(prompts, top)
    highest = max(max(best.ids) for best in found)
    if reference.ndim != 2 or len(reference) != len(prompts) or reference.shape[1] <= highest:
        raise StreamquantError(
            "reference logits do not fit the prompts",
            found=f"shape {reference.shape}",
            required=f"({len(prompts)}, more than {highest})",
        )
    pairs = zip(prompts, found, reference, strict=True)
    rows = tuple(_compare(len(prompt), best, row.astype(np.float64), limits) for prompt, best, row in pairs)
    measured = {
        "mean_kld": float(np.mean([row.kld for row in rows])),
        "max_kld": float(np.max([row.kld for row in rows])),
        "median_error": float(np.median([row.error for row in rows])),
        "same_top": float(np.mean([row.same_top for row in rows])),
    }
    return EngineAgreement(
        engine=f"{engine.facts.kind}, {engine.facts.version}",
        model=engine.facts.model,
        top=top,
        prompts=rows,
        thresholds=limits,
        problems=tuple(_problems(measured, limits)),
        **measured,
    )


def _compare(tokens: int, best: TopLogprobs, logits: NDArray[np.float64], limits: Thresholds) -> PromptAgreement:
    reference = logits - logits.max()
    reference -= np.log(np.exp(reference).sum())
    ids, engine = np.array(best.ids), np.array(best.logprobs, np.float64)
    ours = reference[ids]
    p, q = np.exp(engine), np.exp(ours)
    # What is left for all other tokens; rounding may leave a little less than nothing.
    rest_p, rest_q = max(1 - p.sum(), 0.0), max(1 - q.sum(), 1e-12)
    kld = float((p * (engine - ours)).sum() + (rest_p * np.log(rest_p / rest_q) if rest_p > 1e-9 else 0.0))
    difference = (engine - engine.mean()) - (ours - ours.mean())
    variation = ((engine - engine.mean()) ** 2).sum()
    error = float((difference**2).sum() / variation) if variation > 0 else 0.0
    same = int(reference.argmax()) == best.ids[0] or float(reference.max() - ours[0]) < limits.tie_margin
    return PromptAgreement(tokens, kld, error, same)


def _problems(measured: dict[str, float], limits: Thresholds) -> list[str]:
    hint = "the file means another model to this engine than to our reader: row order, rope or scales"
    problems = []
    # Written so that a NaN is a problem.
    if not measured["mean_kld"] <= limits.mean_kld:
        problems.append(f"mean KLD {measured['mean_kld']:.4f} nats, at most {limits.mean_kld} expected: {hint}")
    if not measured["max_kld"] <= limits.max_kld:
        problems.append(f"KLD of one prompt {measured['max_kld']:.4f} nats, at most {limits.max_kld} expected: {hint}")
    if not measured["median_error"] <= limits.median_error:
        problems.append(f"median error {measured['median_error']:.3f}, at most {limits.median_error} expected: {hint}")
    if not measured["same_top"] >= limits.same_top:
        problems.append(f"same top token {measured['same_top']:.0%}, at least {limits.same_top:.0%} expected: {hint}")
    return problems
