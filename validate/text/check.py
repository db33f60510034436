"""The sections about tokens, chat templates and their known faults, in the tokenizers and engines themselves."""

from contextlib import ExitStack

from streamquant.model.problem import Problem
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.run import Candidate, ValidationRun, one_line
from streamquant.validate.sections import Section
from streamquant.validate.text.chat import compare_chat, folder_templates
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
        run.skip("chat", "the original has no chat template")
        wanted = tuple(section for section in wanted if section != "chat")
    run.listener.started(TASK, len(run.candidates) + 1)
    with ExitStack() as stack:
        try:
            source = stack.enter_context(EngineProcess(run.original.path, tokenizer_only=True))
        except StreamquantError as error:
            for section in wanted:
                run.skip(section, f"the original's tokenizer cannot be loaded: {one_line(error)}")
            return
        run.versions["transformers"] = source.facts.version.removeprefix("transformers ")
        with run.section("lints", None):
            run.original_lints = tuple(lint_checkpoint(source)) if "lints" in wanted else None
        special = source.special_tokens()
        for candidate in run.candidates:
            run.listener.advanced(TASK)
            if candidate.readable:
                _check_tokenizer(run, candidate, source, special, texts, wanted)
            else:
                run.skip_unreadable(candidate, wanted)
    run.listener.advanced(TASK)


def _check_tokenizer(
    run: ValidationRun,
    candidate: Candidate,
    source: EngineProcess,
    special: list[tuple[int, str, bool]],
    texts: dict[str, list[str]],
    wanted: tuple[Section, ...],
) -> None:
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(EngineProcess(candidate.file, tokenizer_only=True))
        except StreamquantError as error:
            run.skip_unloadable(candidate, error, wanted)
            return
        run.versions.setdefault(engine.facts.kind, engine.facts.version)
        if "tokens" in wanted:
            with run.section("tokens", candidate):
                candidate.tokens = compare_tokens(source, engine, special, texts)
                candidate.problems += [Problem("tokens", "error", what) for what in candidate.tokens.problems]
                candidate.problems += _token_types(candidate, special)
                candidate.problems += _special_tokens(candidate, engine, source, special)
        if "chat" in wanted:
            with run.section("chat", candidate):
                candidate.chat = compare_chat(source, engine)
                candidate.problems += [Problem("chat", "error", what) for what in candidate.chat.problems]
        if "lints" in wanted:
            with run.section("lints", candidate):
                gguf = candidate.file.suffix == ".gguf"
                lints = lint_gguf(candidate.file, source) if gguf else lint_checkpoint(engine)
                known = {lint.name for lint in run.original_lints or ()}
                candidate.lints = tuple(lint for lint in lints if lint.name not in known)
                candidate.problems += [_lint_problem(lint) for lint in candidate.lints]


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
