"""Behaviour: greedy answers of the original and of a variant to the same prompts, through the same kind of engine.

A variant need not give the same answer; it must give an answer of the same kind: a tool call that can be parsed and
fits the tool's schema, thoughts that are closed, an answer that ends.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
import referencing
import referencing.exceptions

from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.engine import Engine, Generation, TemplateRequest
from streamquant.validate.text.chat_suite import SEARCH, WEATHER, ChatCase
from streamquant.validate.text.tokens import first_difference

MAX_TOKENS = 256
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def _asked(name: str, text: str, *tools: Any, **variables: bool) -> ChatCase:
    return ChatCase(name, TemplateRequest(({"role": "user", "content": text},), tools, variables))


PROMPTS: tuple[ChatCase, ...] = (
    _asked("fact", "What is the capital of France? Answer in one sentence."),
    _asked("arithmetic", "What is 17 * 23? Think step by step, then give the number."),
    _asked("code", "Write a Python function that reverses a string. Only code."),
    _asked("list", "Name five planets, one per line."),
    _asked("translation", "Translate into German: The weather is nice today."),
    _asked("JSON", 'Reply with a JSON object with the keys "name" and "age" for a person of your choice.'),
    _asked("thinking", "Is 91 a prime number?", thinking=True),
    _asked("one tool", "What is the weather in Paris, in celsius?", WEATHER),
    _asked("two tools", "Find documents about black holes with the tag physics.", WEATHER, SEARCH),
    _asked("tool not needed", "Say hello.", WEATHER),
)
"""A small set; what matters most to the users of a model belongs into a set of their own."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer.

    tokens        its length
    stopped       it ended by itself
    text          special tokens visible
    tool_calls    number of <tool_call> blocks
    faults        what is wrong with its tool calls and thoughts, in words
    """

    tokens: int
    stopped: bool
    text: str
    tool_calls: int
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BehaviourCase:
    """One prompt.

    agreement  tokens that are the same from the beginning
    identical  the whole answers are the same
    """

    name: str
    prompt_tokens: int
    agreement: int
    identical: bool
    original: Answer
    variant: Answer


@dataclass(frozen=True, slots=True)
class BehaviourReport:
    """All prompts of one variant. `problems`: faults that the variant has and the original has not.

    same_engine      original and variant ran in the same kind of engine; if not, differences may be the engine's
    mean_agreement   tokens, over all prompts
    identical        prompts with the same answer
    tool_calls, valid_tool_calls  (original, variant)
    skipped          prompts whose rendering failed in one of them, with the error
    """

    original: str
    variant: str
    engine: str
    same_engine: bool
    max_tokens: int
    mean_agreement: float
    identical: int
    tool_calls: tuple[int, int]
    valid_tool_calls: tuple[int, int]
    cases: tuple[BehaviourCase, ...]
    skipped: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether the variant has no fault of its own."""
        return not self.problems


def compare_behaviour(
    original: Engine, variant: Engine, cases: Sequence[ChatCase] = PROMPTS, *, max_tokens: int = MAX_TOKENS
) -> BehaviourReport:
    """Let both answer every prompt greedily. Both get the token ids of the original's own rendering.

    Raises StreamquantError if an engine fails, or no prompt could be rendered.
    """
    rendered = original.apply_template([case.request for case in cases])
    usable = [(case, prompt) for case, prompt in zip(cases, rendered, strict=True) if prompt.error is None]
    skipped = [f"{case.name}: {prompt.error}" for case, prompt in zip(cases, rendered, strict=True) if prompt.error]
    if not usable:
        raise StreamquantError("no prompt can be rendered", where=original.facts.model, found="; ".join(skipped))
    prompts = [prompt.ids for _, prompt in usable]
    ours, theirs = (engine.generate_greedy(prompts, max_tokens) for engine in (original, variant))
    compared = tuple(
        _compare(case, len(prompt.ids), one, other)
        for (case, prompt), one, other in zip(usable, ours, theirs, strict=True)
    )
    pairs = [(case.original, case.variant) for case in compared]
    requests = [case.request for case, _ in usable]
    return BehaviourReport(
        original=original.facts.model,
        variant=variant.facts.model,
        engine=f"{variant.facts.kind}, {variant.facts.version}",
        same_engine=original.facts.kind == variant.facts.kind,
        max_tokens=max_tokens,
        mean_agreement=sum(case.agreement for case in compared) / len(compared),
        identical=sum(case.identical for case in compared),
        tool_calls=(sum(one.tool_calls for one, _ in pairs), sum(other.tool_calls for _, other in pairs)),
        valid_tool_calls=(sum(map(_valid_calls, ours, requests)), sum(map(_valid_calls, theirs, requests))),
        cases=compared,
        skipped=tuple(skipped),
        problems=tuple(problem for case in compared for problem in _problems(case)),
    )


def judge_answer(answer: Generation, request: TemplateRequest) -> Answer:
    """Count tool calls, check each against the schema of its tool, and see whether every thought is closed.

    A tool call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes' format, hermes4.md). Schemas are
    JSON Schema, checked by the library jsonschema; a reference out of the schema is not followed.

    Raises StreamquantError for a schema that cannot be used.
    """
    blocks = list(_CALL.finditer(answer.text))
    faults = [fault for block in blocks for fault in _call_faults(block, request)]
    opened, closed = answer.text.count("<think>"), answer.text.count("</think>")
    if opened > closed:
        faults.append("a <think> block is never closed" + ("" if answer.stopped else " (cut off at the limit)"))
    elif closed > opened and not request.variables.get("thinking"):
        faults.append("</think> without <think>")
    return Answer(len(answer.ids), answer.stopped, answer.text, len(blocks), tuple(faults))


def _call_faults(block: re.Match[str], request: TemplateRequest) -> list[str]:
    tools = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in request.tools}
    if not block[0].endswith("</tool_call>"):
        return ["tool call: never closed"]
    try:
        call = json.loads(block[1])
    except (ValueError, RecursionError) as error:
        return [f"tool call: not JSON ({error})"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        return ["tool call: not an object with name and arguments"]
    if call["name"] not in tools:
        return [f"tool call: no tool named {call['name'][:60]!r}"]
    # An empty registry: a `$ref` to anything outside the schema is an error, and not fetched.
    validator = jsonschema.Draft202012Validator(tools[call["name"]], registry=referencing.Registry())
    try:
        wrong = next(validator.iter_errors(call["arguments"]), None)
    except (jsonschema.SchemaError, referencing.exceptions.Unresolvable, TypeError, ValueError, re.error) as error:
        raise StreamquantError(
            "the schema of a tool cannot be used",
            where=f"tool {call['name']!r}",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return [f"tool call: arguments of {call['name']} do not fit its schema ({wrong.message[:120]})"] if wrong else []


def _compare(case: ChatCase, prompt_tokens: int, one: Generation, other: Generation) -> BehaviourCase:
    return BehaviourCase(
        name=case.name,
        prompt_tokens=prompt_tokens,
        agreement=first_difference(one.ids, other.ids),
        identical=(one.ids, one.stopped) == (other.ids, other.stopped),
        original=judge_answer(one, case.request),
        variant=judge_answer(other, case.request),
    )


def _valid_calls(answer: Generation, request: TemplateRequest) -> int:
    return sum(not _call_faults(block, request) for block in _CALL.finditer(answer.text))


def _problems(case: BehaviourCase) -> list[str]:
    problems = [f"{case.name}: {fault}" for fault in case.variant.faults if not case.original.faults]
    if case.original.tool_calls and not case.original.faults and not case.variant.tool_calls:
        problems.append(f"{case.name}: no tool call, where the original makes {case.original.tool_calls}")
    if case.original.stopped and not case.variant.stopped:
        problems.append(f"{case.name}: does not end, where the original does")
    return problems
