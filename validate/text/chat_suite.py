"""Conversations that chat templates get wrong, as messages of OpenAI's API."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from streamquant.validate.engines.engine import Message, TemplateRequest


@dataclass(frozen=True, slots=True)
class Conversation:
    """A named conversation, with the tools that the model is offered."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class ChatCase:
    """A conversation and the settings that it is rendered with."""

    name: str
    request: TemplateRequest


def _said(role: str, content: str | None, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def _call(name: str, arguments: object, number: int = 0) -> Mapping[str, Any]:
    return {"id": f"call_{number:09d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(name: str, description: str, properties: Mapping[str, Any], required: list[str]) -> Mapping[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = _tool(
    "get_weather",
    "The weather in a city, now. 'Feels like' <b>&</b> \"exact\" values.",
    {
        "city": {"type": "string", "description": "Name, such as Zürich or 東京"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    ["city"],
)
SEARCH = _tool(
    "search",
    "Search documents.",
    {
        "query": {"type": "string"},
        "filters": {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}},
        "exact": {"type": "boolean", "default": False},
        "threshold": {"type": "number"},
    },
    ["query"],
)
NO_ARGUMENTS = _tool("now", "The time.", {}, [])
TOOLS = (WEATHER, SEARCH, NO_ARGUMENTS)

_SYSTEM = _said("system", "You are a test.\nYou answer in one word.")
_HI, _HELLO, _MORE = _said("user", "Hi!"), _said("assistant", "Hello. How can I help?"), _said("user", "Tell me more.")
_THOUGHT = _said("assistant", "<think>\nThe user greets me.\n</think>\n\nHello!")
_PARIS = {"city": "Paris", "unit": "celsius"}
_SUNNY = _said("tool", '{"temperature": 21.5, "sky": "sunny ☀"}', tool_call_id="call_000000000")
_UNICODE = "Ünïcödé 東京 👩🏽‍🚀 \u202eעברית\u202c ﬁ e\u0301 \\ \" ' <b>&amp;</b> {{ x }} {% y %} <|im_end|x"

CONVERSATIONS: tuple[Conversation, ...] = (
    Conversation("no system", (_HI,)),
    Conversation("system", (_SYSTEM, _HI)),
    Conversation("empty system", (_said("system", ""), _HI)),
    Conversation("multi-turn", (_SYSTEM, _HI, _HELLO, _MORE, _said("assistant", "No."), _said("user", "Why?"))),
    Conversation("multi-turn without system", (_HI, _HELLO, _MORE)),
    Conversation("last turn of the assistant", (_HI, _HELLO)),
    Conversation("system in the middle", (_SYSTEM, _HI, _HELLO, _said("system", "Be brief."), _MORE)),
    Conversation("two user turns", (_HI, _MORE)),
    Conversation("empty user turn", (_said("user", ""),)),
    Conversation("empty assistant turn", (_HI, _said("assistant", ""), _MORE)),
    Conversation(
        "whitespace", (_said("user", "  \n leading and trailing \t\n "), _said("assistant", "\n\n x \n"), _MORE)
    ),
    Conversation("unicode", (_said("system", _UNICODE), _said("user", _UNICODE), _said("assistant", _UNICODE), _MORE)),
    Conversation("long", (_HI, *(_HELLO, _MORE) * 12)),
    Conversation("prior thought", (_HI, _THOUGHT, _MORE)),
    Conversation("two prior thoughts", (_SYSTEM, _HI, _THOUGHT, _MORE, _THOUGHT, _MORE)),
    Conversation("thought and plain reply", (_HI, _THOUGHT, _MORE, _HELLO, _MORE)),
    Conversation("empty thought", (_HI, _said("assistant", "<think>\n\n</think>\n\nHello!"), _MORE)),
    Conversation("thought never closed", (_HI, _said("assistant", "<think>\nHm"), _MORE)),
    Conversation("tools", (_HI,), TOOLS),
    Conversation("tools and system", (_SYSTEM, _HI), TOOLS),
    Conversation("tools, multi-turn", (_SYSTEM, _HI, _HELLO, _MORE), (WEATHER,)),
    Conversation(
        "call with mapping arguments",
        (_HI, _said("assistant", "", tool_calls=[_call("get_weather", _PARIS)]), _SUNNY),
        TOOLS,
    ),
    Conversation(
        "call with string arguments",
        (
            _HI,
            _said("assistant", "", tool_calls=[_call("get_weather", '{"city": "Paris", "unit": "celsius"}')]),
            _SUNNY,
        ),
        TOOLS,
    ),
    Conversation(
        "call with compact string arguments",
        (_HI, _said("assistant", "", tool_calls=[_call("get_weather", '{"city":"Paris","unit":"celsius"}')]), _SUNNY),
        TOOLS,
    ),
    Conversation(
        "call without content",
        (_HI, _said("assistant", None, tool_calls=[_call("get_weather", _PARIS)]), _SUNNY),
        TOOLS,
    ),
    Conversation(
        "call with no arguments",
        (
            _HI,
            _said("assistant", "", tool_calls=[_call("now", {})]),
            _said("tool", "18:05", tool_call_id="call_000000000"),
        ),
        TOOLS,
    ),
    Conversation(
        "thought before a call",
        (_HI, _said("assistant", "<think>\nI need it.\n</think>\n", tool_calls=[_call("get_weather", _PARIS)]), _SUNNY),
        TOOLS,
    ),
    Conversation(
        "text before a call",
        (_HI, _said("assistant", "Let me look.", tool_calls=[_call("get_weather", _PARIS)]), _SUNNY, _HELLO, _MORE),
        TOOLS,
    ),
    Conversation(
        "several calls",
        (
            _SYSTEM,
            _HI,
            _said(
                "assistant",
                "",
                tool_calls=[
                    _call("get_weather", _PARIS),
                    _call(
                        "search",
                        {"query": 'a "b" \\ é 東', "filters": {"tags": []}, "exact": True, "threshold": 0.5},
                        1,
                    ),
                ],
            ),
            _SUNNY,
            _said("tool", "line 1\nline 2\n", tool_call_id="call_000000001"),
            _HELLO,
            _MORE,
        ),
        TOOLS,
    ),
    Conversation(
        "calls one after another",
        (
            _HI,
            _said("assistant", "", tool_calls=[_call("now", {})]),
            _said("tool", "18:05", tool_call_id="call_000000000"),
            _said("assistant", "", tool_calls=[_call("get_weather", _PARIS, 1)]),
            _said("tool", "", tool_call_id="call_000000001"),
        ),
        TOOLS,
    ),
)

THINKING: tuple[Mapping[str, bool], ...] = (
    {},
    {"thinking": False},
    {"thinking": True},
    {"keep_cots": True},
    {"thinking": True, "keep_cots": False},
    {"thinking": True, "keep_cots": True},
)
"""Settings of the template's variables; a template that does not know them ignores them."""


def chat_cases(conversations: tuple[Conversation, ...] = CONVERSATIONS) -> Iterator[ChatCase]:
    """Every conversation with every setting of thinking, keep_cots and add_generation_prompt."""
    for talk, variables, prompted in product(conversations, THINKING, (True, False)):
        settings = [f"{name}={value}" for name, value in variables.items()]
        settings += [] if prompted else ["add_generation_prompt=False"]
        name = ", ".join([talk.name, *settings])
        yield ChatCase(name, TemplateRequest(talk.messages, talk.tools, variables, prompted))
