"""The sections that load each variant in its engine: its probabilities against our forward pass, and its answers."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from streamquant.files.machine import usable_cores
from streamquant.model.forward import Head, Lane, Setting, run_layers
from streamquant.model.problem import Problem
from streamquant.model.variants.variant import Variant
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.agreement import engine_agreement, prompts_from
from streamquant.validate.engines.process import LoadOptions, open_engine
from streamquant.validate.engines.reference import ReferenceEngines, too_large
from streamquant.validate.run import Candidate, ValidationRun
from streamquant.validate.sections import Section
from streamquant.validate.text.behaviour import compare_behaviour

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TASK = "engines"
"""Of the listener: a step for each variant that can be read."""
ENGINE_CONTEXT = 2048
"""Tokens of a prompt and its answer together, at most."""


def check_engines(run: ValidationRun, ids: list[int]) -> None:
    """Load every candidate in its engine. `ids`: a text, of which prompts are cut. What cannot run is noted."""
    wanted = run.options.sections("engines", "behaviour")
    readable = [candidate for candidate in run.candidates if candidate.readable]
    for candidate in run.candidates:
        if not candidate.readable:
            run.skip_unreadable(candidate, wanted)
    with ExitStack() as stack:
        references = ReferenceEngines(run, stack)
        run.listener.started(TASK, len(readable))
        for candidate in readable if wanted else ():
            _check_engine(run, candidate, ids, wanted, references)
            run.listener.advanced(TASK)


def _check_engine(
    run: ValidationRun, candidate: Candidate, ids: list[int], wanted: tuple[Section, ...], references: ReferenceEngines
) -> None:
    variant = candidate.variant
    assert variant is not None
    if candidate.unloadable is not None:
        run.failed(wanted, candidate.unloadable, candidate)
        return
    if (reason := too_large(variant)) is not None:
        for section in wanted:
            run.skip(section, reason, candidate)
        return
    context = min(ENGINE_CONTEXT, int(variant.config.get("max_position_embeddings") or ENGINE_CONTEXT))
    with ExitStack() as stack:
        try:
            loading = LoadOptions(context=context, threads=usable_cores())
            engine = stack.enter_context(open_engine(candidate.file, run.options.engine, loading))
        except StreamquantError as error:
            run.failed(wanted, error, candidate)
            return
        run.versions[engine.facts.kind] = engine.facts.version
        if "engines" in wanted:
            with run.section("engines", candidate):
                prompts = _prompts(ids, context, run.options.lengths)
                logits = last_logits(variant, prompts, run.options.setting)
                candidate.engine = engine_agreement(engine, prompts, logits)
                candidate.problems += [Problem("engine", "error", what) for what in candidate.engine.problems]
        if "behaviour" in wanted:
            with run.section("behaviour", candidate):
                source = references.get(candidate, context)
                candidate.behaviour = compare_behaviour(source, engine, max_tokens=run.options.answer_tokens)
                candidate.problems += [Problem("behaviour", "warning", what) for what in candidate.behaviour.problems]


def _prompts(ids: list[int], context: int, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of the lengths that fit into the context and the text."""
    room = min(context - 1, len(ids) // len(lengths))
    return prompts_from(ids, [length for length in lengths if length <= room])


def last_logits(variant: Variant, prompts: Sequence[Sequence[int]], setting: Setting) -> "NDArray[np.floating]":
    """float32[prompts, vocabulary] of the token after each prompt, by the layer-streamed pass.

    Short prompts are filled up to 128 tokens, long ones to the longest: attention is causal, so what comes later does
    not matter, and the weights are read twice at most.
    """
    import numpy as np
    import torch

    groups = [[at for at, prompt in enumerate(prompts) if (len(prompt) <= 128) is short] for short in (True, False)]
    lane = Lane(variant)
    rows: dict[int, torch.Tensor] = {}
    for members in filter(None, groups):
        width = max(len(prompts[at]) for at in members)
        tokens = np.zeros((len(members), width), np.int64)
        for row, at in enumerate(members):
            tokens[row, : len(prompts[at])] = prompts[at]
        run_layers([lane], tokens, setting)
        assert lane.hidden is not None
        for row, at in enumerate(members):
            rows[at] = lane.hidden[row, len(prompts[at]) - 1].clone()
    hidden = torch.stack([rows[at] for at in sorted(rows)])
    return Head(lane, setting).logits(hidden).cpu().numpy()  # type: ignore[no-any-return] # torch is not typed here
