import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.engine import EngineFacts, Generation, Rendered, TemplateRequest, TopLogprobs
from streamquant.validate.engines.process import EngineProcess, LoadOptions
from streamquant.validate.text.behaviour import PROMPTS, compare_behaviour, judge_answer
from streamquant.validate.text.chat_suite import WEATHER
from tests.peers import requires_llama_cpp

ASKED = TemplateRequest(({"role": "user", "content": "Weather?"},), (WEATHER,))


def call(content: str) -> str:
    return f"<tool_call>\n{content}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (call('{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'), None),
        ("No tool is needed.", None),
        ("<think>\nHm.\n</think>\n\nYes.", None),
        (call('{"name": "get_weather", "arguments": {"days": 2}}'), "'city' is a required property"),
        (call('{"name": "get_weather", "arguments": {"city": "Paris", "unit": "kelvin"}}'), "is not one of"),
        (call('{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}'), "is not of type 'object'"),
        (call('{"name": "weather", "arguments": {}}'), "no tool named 'weather'"),
        (call('{"name": "get_weather"}'), "not an object with name and arguments"),
        (call("{'name': 'get_weather'}"), "not JSON"),
        (call("[" * 100000), "not JSON"),
        ('<tool_call>\n{"name": "get_weather"', "never closed"),
        ("<think>\nHm.", "a <think> block is never closed"),
        ("Hm.</think>", "</think> without <think>"),
    ],
)
def test_an_answer_is_judged(text: str, fault: str | None) -> None:
    answer = judge_answer(Generation((1, 2), text, True), ASKED)
    assert answer.tool_calls == text.count("<tool_call>")
    assert (fault is None) == (not answer.faults)
    assert fault is None or fault in answer.faults[0]


def test_a_schema_that_points_elsewhere_is_not_followed() -> None:
    function = {"name": "f", "parameters": {"$ref": "https://example.org/schema.json"}}
    asked = TemplateRequest(ASKED.messages, ({"type": "function", "function": function},))
    with pytest.raises(StreamquantError, match="schema of a tool cannot be used"):
        judge_answer(Generation((1,), call('{"name": "f", "arguments": {}}'), True), asked)


class Scripted:
    """An engine that answers what it is told."""

    def __init__(self, *answers: Generation, kind: str = "llama.cpp", error: str | None = None) -> None:
        self.answers, self.error = answers, error
        self.facts = EngineFacts("llama.cpp" if kind == "llama.cpp" else "transformers", "0", "m", None, None, False, 9)

    def tokenize(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[tuple[int, ...]]:
        raise NotImplementedError

    def detokenize(self, ids: Sequence[Sequence[int]]) -> list[str]:
        raise NotImplementedError

    def next_token_logprobs(self, prompts: Sequence[Sequence[int]], top: int) -> list[TopLogprobs]:
        raise NotImplementedError

    def apply_template(self, requests: Sequence[TemplateRequest]) -> list[Rendered]:
        return [Rendered("x", (1, 2, 3), self.error) for _ in requests]

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Generation]:
        assert max_tokens > 0
        assert [tuple(prompt) for prompt in prompts] == [(1, 2, 3)] * len(self.answers)
        return list(self.answers)


def test_faults_of_the_variant_alone_are_problems() -> None:
    good = Generation((1, 2, 3, 4), call('{"name": "get_weather", "arguments": {"city": "Paris"}}'), True)
    bad = Generation((1, 2, 9, 4), call('{"name": "get_weather", "arguments": {}}'), True)
    silent, endless = Generation((1,), "Sunny.", True), Generation((1, 2, 3, 4, 5), good.text, False)
    (tool,) = [case for case in PROMPTS if case.name == "one tool"]
    cases = [tool] * 4
    report = compare_behaviour(Scripted(good, good, good, bad), Scripted(bad, silent, endless, bad), cases)
    assert [case.agreement for case in report.cases] == [2, 1, 4, 4]
    assert [case.identical for case in report.cases] == [False, False, False, True]
    assert (report.tool_calls, report.valid_tool_calls) == ((4, 3), (3, 1))
    assert len(report.problems) == 3
    for problem, part in zip(report.problems, ("do not fit", "no tool call", "does not end"), strict=True):
        assert problem.startswith("one tool: ")
        assert part in problem
    assert json.loads(json.dumps(asdict(report)))["identical"] == 1
    assert not compare_behaviour(Scripted(good), Scripted(good, kind="transformers"), cases[:1]).same_engine


def test_nothing_to_ask_is_an_error() -> None:
    with pytest.raises(StreamquantError, match="no prompt can be rendered"):
        compare_behaviour(Scripted(error="UndefinedError"), Scripted())


@requires_llama_cpp
def test_smollm2_in_llama_cpp(smollm2_variants: Path) -> None:
    folder = next(smollm2_variants.glob("*-GGUF"))
    cases = [case for case in PROMPTS if case.name in ("fact", "list")]
    ours, theirs = (next(folder.glob(f"*-{name}.gguf")) for name in ("BF16", "Q8_0"))
    with (
        EngineProcess(ours, options=LoadOptions(threads=1, context=512)) as original,
        EngineProcess(theirs, options=LoadOptions(threads=1, context=512)) as variant,
    ):
        report = compare_behaviour(original, variant, cases, max_tokens=12)
        again = compare_behaviour(variant, variant, cases, max_tokens=12)
    assert report.same_engine
    assert report.mean_agreement >= 5
    assert "Paris" in report.cases[0].variant.text
    assert again.identical == 2
    assert report.cases[0].prompt_tokens > 30
