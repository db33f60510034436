"""Known faults of chat templates and what belongs to them: each with its consequence in an engine, and the fix.

What a template does is found by rendering it (in transformers' sandbox, in the engine's process), not by reading it:
a marked reply that is gone from the text is lost, whatever the template looks like. Sources of the faults:
hermes4.md's list of known bugs; vllm PR #25281; src/llama-vocab.cpp and common/chat.cpp of llama.cpp.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gguf import TokenType

from streamquant.convert.metadata.vocabulary_defaults import engine_tokens, stop_ids
from streamquant.files.gguf_file import GgufKeys, read_header
from streamquant.files.strict_json import read_json_object
from streamquant.validate.engines.engine import Rendered, TemplateRequest
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.text.chat import folder_templates, stored_templates
from streamquant.validate.text.chat_suite import TOOLS

_MARK, _NEXT = "MARKED-REPLY-4711", "NEXT-QUESTION-4712"
_USER = {"role": "user", "content": "Hi!"}
_MORE = {"role": "user", "content": _NEXT}
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_MARKER = re.compile(r"<\|[\w.\- ]+\|>|<｜[^<>｜]+｜>")
_SAMPLING = ("temperature", "top_p", "top_k")
_GGUF_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
}


@dataclass(frozen=True, slots=True)
class Lint:
    """A fault that was found.

    name         of the lint, a key of LINTS
    severity     'error': something is wrong for users today; 'warning': it is wrong in some engine or setting
    where        the file
    found        what is there
    consequence  what that does, in which engine
    fix          what to do
    """

    name: str
    severity: Literal["error", "warning"]
    where: str
    found: str
    consequence: str
    fix: str

    @property
    def check(self) -> str:
        """The name of the check in a Problem."""
        return f"template:{self.name}"


@dataclass(frozen=True, slots=True)
class _Subject:
    """What a checkpoint folder or a GGUF file says of its chat template, tokenizer and defaults."""

    where: Path
    is_gguf: bool
    template: str | None
    other_template: str | None
    special: Mapping[str, str]
    added: Mapping[str, tuple[int, bool]]
    adds_bos: bool
    stops: frozenset[int]
    sampling: frozenset[str]
    render: Callable[[list[TemplateRequest], Mapping[str, str]], list[Rendered]]

    def rendered(self, *messages: Mapping[str, Any], **variables: Any) -> Rendered:
        """A conversation without a generation prompt."""
        (found,) = self.render([TemplateRequest(messages, (), variables, False)], self.special)
        return found


def lint_checkpoint(engine: EngineProcess) -> list[Lint]:
    """Lint the checkpoint folder that `engine` (transformers) has loaded.

    Raises StreamquantError if the engine fails or a file is broken.
    """
    folder = engine.path
    templates = folder_templates(folder)
    beside, inside = stored_templates(folder)
    generation = _json(folder / "generation_config.json")
    special = {"bos_token": engine.facts.bos, "eos_token": engine.facts.eos}
    subject = _Subject(
        where=folder,
        is_gguf=False,
        template=templates.get("default"),
        other_template=inside.get("default") if beside else None,
        special={name: text for name, text in special.items() if text is not None},
        added={text: (number, flag) for number, text, flag in engine.special_tokens()},
        adds_bos=engine.facts.adds_bos,
        stops=frozenset(stop_ids(_json(folder / "config.json"), generation, folder)),
        sampling=frozenset(name for name in _SAMPLING if generation.get(name) is not None),
        render=_renderer(engine, templates.get("default"), folder),
    )
    return _lint(subject)


def lint_gguf(path: Path, engine: EngineProcess) -> list[Lint]:
    """Lint the GGUF file at `path`; `engine` (transformers) renders its template with the file's special tokens.

    Raises StreamquantError if the engine fails or the file is broken.
    """
    header = read_header(path)
    keys = GgufKeys(path, header.metadata)
    tokens, types = keys.texts("tokenizer.ggml.tokens"), keys.wholes("tokenizer.ggml.token_type")
    kinds = {int(TokenType.CONTROL): True, int(TokenType.USER_DEFINED): False}
    added = {tokens[at]: (at, kinds[kind]) for at, kind in enumerate(types[: len(tokens)]) if kind in kinds}
    ids = {name: keys.whole(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    texts = {f"{name}_token": text for name in ("bos", "eos") if (text := _token(ids[name], tokens)) is not None}
    template = keys.text("tokenizer.chat_template")
    subject = _Subject(
        where=path,
        is_gguf=True,
        template=template,
        other_template=None,
        special=texts,
        added=added,
        adds_bos=bool(keys.flag("tokenizer.ggml.add_bos_token")),
        stops=engine_tokens(header.metadata).stops,
        sampling=frozenset(name for name, key in _GGUF_SAMPLING.items() if key in header.metadata),
        render=_renderer(engine, template, path),
    )
    return _lint(subject)


def _token(number: object, tokens: list[str]) -> str | None:
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _renderer(
    engine: EngineProcess, template: str | None, model: Path
) -> Callable[[list[TemplateRequest], Mapping[str, str]], list[Rendered]]:
    def render(requests: list[TemplateRequest], special: Mapping[str, str]) -> list[Rendered]:
        return engine.render(template or "", requests, special, model=model)

    return render


def _lint(subject: _Subject) -> list[Lint]:
    if subject.template is None:
        consequence = "llama.cpp renders ChatML, transformers and vLLM refuse chat requests"
        return [_found(subject, "no-template", "no chat template", consequence, "add chat_template.jinja", "error")]
    return [lint for check in LINTS.values() for lint in check(subject)]


def _found(
    subject: _Subject,
    name: str,
    found: str,
    consequence: str,
    fix: str,
    severity: Literal["error", "warning"] = "warning",
) -> Lint:
    return Lint(name, severity, str(subject.where), found, consequence, fix)


def _bos_undefined(subject: _Subject) -> Iterator[Lint]:
    """The template fails where the engine does not define bos_token."""
    without = {name: text for name, text in subject.special.items() if name != "bos_token"}
    (found,) = subject.render([TemplateRequest((_USER,))], without)
    if found.error is None or "bos_token" not in (subject.template or ""):
        return
    undefined = "bos_token" not in subject.special
    consequence = "LM Studio fails on every chat with `Cannot perform operation + on undefined values`"
    if undefined:
        consequence = f"transformers and vLLM fail on every chat ({found.error}); llama.cpp writes the text of token 11"
    yield _found(
        subject,
        "bos-undefined",
        "the template needs bos_token" + (", and the tokenizer names none" if undefined else " to be defined"),
        consequence,
        "--guard-template, or begin it with {%- if not bos_token is defined %}{% set bos_token = '...' %}{% endif %}",
        "error" if undefined else "warning",
    )


def _thought_split(subject: _Subject) -> Iterator[Lint]:
    """thinking=True with an earlier reply that has no </think>."""
    talk = (_USER, {"role": "assistant", "content": _MARK}, _MORE)
    plain, thinking = subject.rendered(*talk), subject.rendered(*talk, thinking=True, enable_thinking=True)
    if plain.error is not None or _MARK not in plain.text or _MARK in thinking.text:
        return
    yield _found(
        subject,
        "thought-split",
        "thinking=True and an earlier reply without </think>: " + (thinking.error or "the reply is gone"),
        "transformers and vLLM raise UndefinedError, LM Studio says `Cannot perform operation + on undefined values`"
        " (reasoning_effort sets thinking there); llama.cpp silently puts `<think> </think>` in the reply's place",
        "--guard-template, or cut the reply only {%- if '</think>' in content %}",
        "error",
    )


def _double_bos(subject: _Subject) -> Iterator[Lint]:
    """The template writes BOS, and the tokenizer adds one."""
    bos = subject.special.get("bos_token")
    if bos and subject.adds_bos and subject.rendered(_USER).text.startswith(bos):
        yield _found(
            subject,
            "double-bos",
            f"the template begins with {bos}, and the tokenizer adds it too",
            "text that is rendered first and tokenized later gets BOS twice: in transformers' tokenizer(text), vLLM's"
            " and llama.cpp's completion endpoints. Chat endpoints are right",
            "tokenize rendered text with add_special_tokens=False",
        )


def _empty_assistant(subject: _Subject) -> Iterator[Lint]:
    """An assistant turn with empty content is opened and never closed."""
    end = _end_of_turn(subject)
    empty = subject.rendered(_USER, {"role": "assistant", "content": ""}, _MORE)
    full = subject.rendered(_USER, {"role": "assistant", "content": _MARK}, _MORE)
    if end is None or full.error is not None:
        return
    if empty.error is not None or empty.text.count(end) < full.text.count(end):
        yield _found(
            subject,
            "empty-assistant",
            "an assistant turn with empty content: " + (empty.error or f"{end} is missing, the turn is never closed"),
            "in every engine the next question runs into an open turn of the assistant, which the model never saw so",
            "leave empty assistant messages out of the history",
        )


def _special_tags(subject: _Subject) -> Iterator[Lint]:
    """Tags that a parser must see are special tokens, which decoders leave out."""
    flagged = ", ".join(tag for tag in _TAGS if subject.added.get(tag, (0, False))[1])
    if flagged and subject.is_gguf:
        yield _found(
            subject,
            "special-tags",
            f"of type CONTROL: {flagged}",
            "llama.cpp leaves control tokens out of its answers, so LM Studio and others see no tool call or thought",
            "make them USER_DEFINED: convert from a tokenizer that has special: false",
            "error",
        )
    elif flagged:
        yield _found(
            subject,
            "special-tags",
            f"flagged special: {flagged}",
            "vLLM before PR #25281 (2025-09), and transformers with skip_special_tokens=True, drop them: no tool call"
            " is found",
            "set special: false for them in tokenizer.json and tokenizer_config.json",
            "error",
        )


def _wrong_family(subject: _Subject) -> Iterator[Lint]:
    """The template writes markers that are no tokens of this vocabulary."""
    talk = subject.rendered(_USER, {"role": "assistant", "content": "Hello."}, _MORE)
    text = talk.text + subject.rendered({"role": "system", "content": "x"}, _USER).text
    foreign = sorted({marker for marker in _MARKER.findall(text) if marker not in subject.added})
    if foreign:
        yield _found(
            subject,
            "wrong-family",
            f"the template writes {', '.join(foreign)}: no tokens of this vocabulary",
            "every engine spells them out letter by letter, a format that the model was not trained on; tool calls and"
            " thoughts are not recognized, answers do not end",
            "take the template of the original model",
            "error",
        )


def _stop_token(subject: _Subject) -> Iterator[Lint]:
    """The token that ends an assistant turn is not among the stop tokens."""
    end = _end_of_turn(subject)
    if end is None or subject.added[end][0] in subject.stops:
        return
    place = "tokenizer.ggml.eos_token_id" if subject.is_gguf else "eos_token_id of generation_config.json"
    yield _found(
        subject,
        "stop-token",
        f"{end} ({subject.added[end][0]}) ends a turn and is not in {place}",
        "llama.cpp and LM Studio go on after the answer until the length limit"
        if subject.is_gguf
        else "vLLM and transformers go on after the answer until the length limit",
        f"add {subject.added[end][0]} to {place}",
        "error",
    )


def _sampling(subject: _Subject) -> Iterator[Lint]:
    """No sampling defaults."""
    missing = [name for name in _SAMPLING if name not in subject.sampling]
    if missing:
        names = ", ".join(_GGUF_SAMPLING[name] for name in missing) if subject.is_gguf else ", ".join(missing)
        yield _found(
            subject,
            "sampling-defaults",
            f"no {names}" + ("" if subject.is_gguf else " in generation_config.json"),
            "llama.cpp uses its own (temperature 0.8, top_p 0.95, top_k 40), LM Studio and Ollama theirs"
            if subject.is_gguf
            else "vLLM and transformers use temperature 1.0, top_p 1.0 and no top_k",
            "write the values of the model's card into generation_config.json before converting",
        )


def _two_templates(subject: _Subject) -> Iterator[Lint]:
    """chat_template.jinja and tokenizer_config.json disagree."""
    if subject.other_template is not None and subject.other_template != subject.template:
        yield _found(
            subject,
            "two-templates",
            "chat_template.jinja and chat_template in tokenizer_config.json differ",
            "transformers, vLLM and LM Studio take the first, llama.cpp's converter the second",
            "keep one of them",
            "error",
        )


def _end_of_turn(subject: _Subject) -> str | None:
    """The added token that comes first after an assistant's text."""
    talk = subject.rendered(_USER, {"role": "assistant", "content": _MARK}, _MORE)
    if _MARK not in talk.text:
        return None
    rest = talk.text.split(_MARK, 1)[1].split(_NEXT, 1)[0]
    places = [(rest.index(text), -len(text), text) for text in subject.added if text and text in rest]
    return min(places)[2] if places else None


def _fails(subject: _Subject) -> Iterator[Lint]:
    """A plain question, or one with tools, cannot be rendered at all."""
    requests = [TemplateRequest((_USER,)), TemplateRequest((_USER,), TOOLS)]
    for name, found in zip(
        ("a question", "a question with tools"), subject.render(requests, subject.special), strict=True
    ):
        if found.error is not None and "bos_token" not in found.error:
            yield _found(
                subject, "fails", f"{name}: {found.error}", "every such chat fails", "mend the template", "error"
            )
            return


_ARGUMENTS = {"city": "MARKED-CITY-4713"}


def _call_rendered(subject: _Subject, arguments: object) -> Rendered:
    """A history with a tool call whose arguments are in the given form."""
    call = {"id": "call_000000000", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    answer = {"role": "tool", "content": "sunny", "tool_call_id": call["id"], "name": "get_weather"}
    talk = (_USER, {"role": "assistant", "content": "", "tool_calls": [call]}, answer)
    (found,) = subject.render([TemplateRequest(talk, TOOLS, {}, False)], subject.special)
    return found


def _string_arguments(subject: _Subject) -> Iterator[Lint]:
    """Arguments of a tool call as OpenAI's API has them, a string of JSON: the template fails, or quotes them again."""
    mapping, string = _call_rendered(subject, _ARGUMENTS), _call_rendered(subject, json.dumps(_ARGUMENTS))
    if mapping.error is not None or _ARGUMENTS["city"] not in mapping.text:
        return
    quoted = '\\"city' in string.text and '\\"city' not in mapping.text
    lost = _ARGUMENTS["city"] not in string.text
    if string.error is not None or quoted or lost:
        what = string.error or ("they are quoted once more" if quoted else "they are gone")
        yield _found(
            subject,
            "string-arguments",
            f"arguments of a tool call that are a string of JSON: {what}",
            "transformers gives the template the history as it is, so one that was kept as OpenAI's API sends it is"
            " rendered wrong; vLLM's and llama.cpp's servers parse the string before",
            "write {{ arguments if arguments is string else arguments | tojson }}",
        )


def _mapping_arguments(subject: _Subject) -> Iterator[Lint]:
    """Arguments of a tool call as an object: the template takes them for a string."""
    mapping, string = _call_rendered(subject, _ARGUMENTS), _call_rendered(subject, json.dumps(_ARGUMENTS))
    if string.error is not None or _ARGUMENTS["city"] not in string.text:
        return
    spelled = "{'city'" in mapping.text
    if mapping.error is not None or spelled:
        yield _found(
            subject,
            "mapping-arguments",
            "arguments of a tool call that are an object: "
            + (mapping.error or "they are written as Python spells them, {'city': ...}"),
            "vLLM parses the arguments of OpenAI's API into an object before the template sees them, and transformers'"
            " own tools pass objects: a history with a tool call fails, or is no JSON",
            "write {{ arguments if arguments is string else arguments | tojson }}",
        )


LINTS: Mapping[str, Callable[[_Subject], Iterator[Lint]]] = {
    "fails": _fails,
    "bos-undefined": _bos_undefined,
    "thought-split": _thought_split,
    "double-bos": _double_bos,
    "empty-assistant": _empty_assistant,
    "special-tags": _special_tags,
    "wrong-family": _wrong_family,
    "string-arguments": _string_arguments,
    "mapping-arguments": _mapping_arguments,
    "stop-token": _stop_token,
    "sampling-defaults": _sampling,
    "two-templates": _two_templates,
}
"""Every lint by its name (and `no-template`, after which nothing else can be said)."""
