"""The sections about tokens, chat templates and their known faults, in the tokenizers and engines themselves."""

from contextlib import ExitStack
from dataclasses import dataclass

from streamquant.model.problem import Problem
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.run import Candidate, ValidationRun, one_line
from streamquant.validate.sections import Section
from streamquant.validate.text.chat import ChatReport, ExpectedChat, compare_chat, expected_chat, folder_templates
from streamquant.validate.text.chat_suite import chat_cases
from streamquant.validate.text.special_tokens import check_special_tokens
from streamquant.validate.text.template_lints import Lint, lint_checkpoint, lint_gguf
from streamquant.validate.text.tokens import check_token_types, compare_tokens

TASK = "tokens and chat templates"
"""Of the listener: a step for each model."""
NAMED = 5
"""Tokens that a problem names."""


def check_tokenizers(run: ValidationRun, texts: dict[str, list[str]]) -> None:
    """Compare tokens and rendered chats with the original's, and look for known faults of chat templates.

    texts: name -> texts to tokenize, beside those made to break tokenizers. No weight is read. What cannot run is
    noted.
    """
    wanted = run.options.sections("tokens", "chat", "lints")
    if not wanted:
        return
    if not run.original.is_folder:
        for section in wanted:
            run.skip(section, "the original is a GGUF file: a checkpoint folder has the tokenizer to compare with")
        return
    if "chat" in wanted and not folder_templates(run.original.path):
        run.nothing_to_check("chat", "the original has no chat template")
        wanted = tuple(section for section in wanted if section != "chat")
    run.listener.started(TASK, len(run.candidates) + 1)
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(EngineProcess(run.original.path, tokenizer_only=True))
            special = engine.special_tokens()
        except StreamquantError as error:
            for section in wanted:
                run.skip(section, f"the original's tokenizer cannot be loaded: {one_line(error)}")
            return
        run.versions["transformers"] = engine.facts.version.removeprefix("transformers ")
        with run.section("lints", None):
            run.original_lints = tuple(lint_checkpoint(engine)) if "lints" in wanted else None
        chat = None
        if "chat" in wanted:
            with run.section("chat", None):
                chat = expected_chat(_running(engine), list(chat_cases()))
            wanted = wanted if chat is not None else tuple(section for section in wanted if section != "chat")
        original = _Original(engine, special, texts, chat)
        for candidate in run.candidates:
            run.listener.advanced(TASK)
            if candidate.readable:
                _check_tokenizer(run, candidate, original, wanted)
            else:
                run.skip_unreadable(candidate, wanted)
    run.listener.advanced(TASK)


@dataclass(frozen=True, slots=True)
class _Original:
    """What variants are compared with: the original's engine, its added tokens and its chats, and texts by name."""

    engine: EngineProcess
    special: list[tuple[int, str, bool]]
    texts: dict[str, list[str]]
    chat: ExpectedChat | None


def _running(engine: EngineProcess) -> EngineProcess:
    """The engine, started again if a template of before has ended it."""
    if engine.ended:
        engine.restart()
    return engine


def _check_tokenizer(
    run: ValidationRun, candidate: Candidate, original: _Original, wanted: tuple[Section, ...]
) -> None:
    with ExitStack() as stack:
        try:
            source = _running(original.engine)
            engine = stack.enter_context(EngineProcess(candidate.file, tokenizer_only=True))
        except StreamquantError as error:
            candidate.unloadable = error
            run.failed(wanted, error, candidate)
            return
        run.versions.setdefault(engine.facts.kind, engine.facts.version)
        if "tokens" in wanted:
            with run.section("tokens", candidate):
                candidate.tokens = compare_tokens(source, engine, original.special, original.texts)
                candidate.problems += [Problem("tokens", "error", what) for what in candidate.tokens.problems]
                candidate.problems += _token_types(candidate, original.special)
                candidate.problems += _special_tokens(candidate, engine, source, original.special)
        if original.chat is not None:
            with run.section("chat", candidate):
                candidate.chat = compare_chat(source, engine, original.chat)
                candidate.problems += [Problem("chat", "error", what) for what in candidate.chat.problems]
                candidate.problems += _chats_without_original(candidate.chat)
                if not candidate.chat.right and not candidate.chat.wrong:
                    run.skip("chat", "the original's template renders none of the conversations", candidate)
        if "lints" in wanted:
            with run.section("lints", candidate):
                gguf = candidate.file.suffix == ".gguf"
                lints = lint_gguf(candidate.file, _running(source)) if gguf else lint_checkpoint(engine)
                known = {lint.name for lint in run.original_lints or ()}
                candidate.lints = tuple(lint for lint in lints if lint.name not in known)
                candidate.problems += [_lint_problem(lint) for lint in candidate.lints]


def _chats_without_original(chat: ChatReport) -> list[Problem]:
    """A warning for chats that another template renders, and the original's does not."""
    mended = [item.case for item in chat.differences if item.original_fails and item.cause == "file"]
    if not mended:
        return []
    what = f"another template, which renders {len(mended)} of {chat.cases} chats that the original's fails on"
    return [Problem("chat", "warning", what, found=f"first {mended[0]!r}")]


def _token_types(candidate: Candidate, special: list[tuple[int, str, bool]]) -> list[Problem]:
    """One problem for all added tokens of another text or type."""
    found = check_token_types(candidate.file, special) if candidate.file.suffix == ".gguf" else ()
    if not found:
        return []
    shown = "; ".join(found[:NAMED]) + (f"; and {len(found) - NAMED} more" if len(found) > NAMED else "")
    return [Problem("token-types", "error", "added tokens of another text or type than the original's", found=shown)]


def _special_tokens(
    candidate: Candidate, engine: EngineProcess, source: EngineProcess, special: list[tuple[int, str, bool]]
) -> list[Problem]:
    """What a GGUF makes llama.cpp take for BOS, EOS and the end of an answer."""
    if engine.facts.kind != "llama.cpp":
        return []
    found = check_special_tokens(candidate.file, engine.facts, source.path, source.facts, special)
    return [Problem("special-tokens", "error", what) for what in found]


def _lint_problem(lint: Lint) -> Problem:
    what = f"{lint.found}: {lint.consequence}"
    return Problem(lint.check, lint.severity, what, required=lint.fix)
