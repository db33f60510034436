"""The prompt format of a model, shown by its own chat template: rendered in the sandbox of validate/engines."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamquant.publish.cards.origin import Template
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.engine import Message, Rendered, TemplateRequest
from streamquant.validate.engines.process import EngineProcess, TimeLimits

LIMITS = TimeLimits(request=60.0)
"""Time limit for all conversations together."""
LONGEST = 20_000
"""Characters of a rendered conversation that a card shows."""
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
_SYSTEM: Message = {"role": "system", "content": "{system_prompt}"}
_USER: Message = {"role": "user", "content": "{prompt}"}
_WEATHER: Message = {"role": "user", "content": "What is the weather in Paris?"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call_000000000", "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
}  # fmt: skip
_ANSWER: Message = {"role": "tool", "tool_call_id": "call_000000000", "content": '{"temperature": 21, "sky": "clear"}'}
_THINKING: tuple[tuple[str, bool], ...] = (("thinking", True), ("enable_thinking", True), ("enable_thinking", False))
"""Variables that switch reasoning: Hermes 4's and Qwen3's."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the model sees it."""

    title: str
    text: str
    folded: bool = False
    """Whether it is long, and shown on demand."""


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What a card shows of a chat template."""

    prompts: tuple[Prompt, ...]
    faults: tuple[str, ...]
    """What the template refused to render, and what it said."""
    thinking: str | None
    """The variable that switches reasoning, as `thinking=True`."""
    thinking_needs_no_system: bool
    """Whether it does nothing in a conversation that has a system prompt (Hermes 4)."""
    tools: bool
    """Whether tools that are offered change what the model sees."""
    tool_tags: bool
    """Whether calls are written in <tool_call> tags, as Hermes does."""


def prompt_format(template: Template) -> PromptFormat:
    """Render conversations with and without system prompt, with reasoning switched, with a tool.

    Raises StreamquantError if the template does not end in time, takes too much memory, or cannot be run at all.
    """
    asked = list(_requests(template.text))
    found = dict(zip((name for name, _ in asked), _render(template, [request for _, request in asked]), strict=True))
    wrong = {name: answer.error for name, answer in found.items() if answer.error is not None and name != NO_TOOLS}
    faults = tuple(f"{name}: {error}" for name, error in wrong.items())
    texts = {name: answer.text for name, answer in found.items() if answer.error is None}
    plain = texts.get(NO_SYSTEM)
    prompts = [Prompt(name, texts[name]) for name in (BASIC, NO_SYSTEM) if texts.get(name)]
    thinking, needs_no_system = None, False
    for name, value in _THINKING:
        title = f"{name}={value}"
        if thinking is None and texts.get(title) and texts[title] != plain:
            thinking, needs_no_system = title, texts.get(f"{BASIC}, {title}") == texts.get(BASIC)
            prompts.append(Prompt(f"Without a system prompt, {title}", texts[title]))
    offered = texts.get(TOOLS)
    tools = offered is not None and offered != texts.get(NO_TOOLS) and "get_weather" in offered
    if tools:
        prompts.append(Prompt(TOOLS, texts[TOOLS], folded=True))
    shown = tuple(prompt for prompt in prompts if len(prompt.text) <= LONGEST)
    long = tuple(f"{prompt.title}: {len(prompt.text):,} characters, too long to show" for prompt in prompts
                 if prompt not in shown)  # fmt: skip
    tags = tools and "<tool_call>" in texts[TOOLS]
    return PromptFormat(shown, (*faults, *long), thinking, needs_no_system, tools, tags)


BASIC, NO_SYSTEM = "With a system prompt", "Without a system prompt"
TOOLS, NO_TOOLS = "A tool, its call and its result", "No tool"


def _requests(template: str) -> Sequence[tuple[str, TemplateRequest]]:
    requests = [
        (BASIC, TemplateRequest((_SYSTEM, _USER))),
        (NO_SYSTEM, TemplateRequest((_USER,))),
    ]
    for name, value in _THINKING:
        if re.search(rf"\b{name}\b", template):
            variables = {name: value}
            requests.append((f"{name}={value}", TemplateRequest((_USER,), variables=variables)))
            requests.append((f"{BASIC}, {name}={value}", TemplateRequest((_SYSTEM, _USER), variables=variables)))
    if re.search(r"\btools\b", template):
        talk = (_WEATHER, _CALL, _ANSWER)
        requests.append((TOOLS, TemplateRequest(talk, (TOOL,))))
        requests.append((NO_TOOLS, TemplateRequest(talk)))
    return requests


def _render(template: Template, requests: list[TemplateRequest]) -> list[Rendered]:
    special: Mapping[str, Any] | None = template.special
    try:
        if special is not None:
            with EngineProcess(template.path, kind="jinja", limits=LIMITS) as engine:
                return engine.render(template.text, requests, special)
        with EngineProcess(template.path, tokenizer_only=True, limits=LIMITS) as engine:
            return engine.apply_template(requests)
    except StreamquantError as error:
        raise StreamquantError(
            "the chat template cannot be shown",
            where=str(template.path),
            found=" ".join(str(error).split()),
            hint="look for an endless loop in the template, or publish without it: streamquant card --no-prompts",
        ) from error
