"""Chat templates: does a variant show the model the same text and the same tokens as the original does?

The original is rendered by transformers' apply_chat_template. A GGUF is rendered by llama.cpp's own Jinja engine with
the template in the file, an FP8 folder by transformers with the folder's template. Where a GGUF differs, its template
is rendered by transformers as well: if that gives the original's text, the file is right and the engines differ.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from streamquant.convert.metadata.vocabulary_special import read_template_file
from streamquant.files.gguf_file import read_keys
from streamquant.files.json_record import JsonRecord
from streamquant.files.strict_json import read_json_object
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.engine import Engine, Rendered
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.text.chat_suite import ChatCase, chat_cases
from streamquant.validate.text.tokens import first_difference

Cause: TypeAlias = Literal["file", "engine"]
TEXT_WINDOW = 60
"""Characters that are shown on either side of the first difference."""
ID_WINDOW = 6


@dataclass(frozen=True, slots=True)
class ChatDifference:
    """A case whose rendering is not the original's.

    case             conversation and settings
    kind             'text', 'ids' (same text), or 'error' (one of them fails)
    cause            'file': the variant's template or tokenizer differs. 'engine': llama.cpp does otherwise with the
                     very template that gives the original's text in transformers
    at               character, or index of the id, where they first differ
    expected, found  what is there, with a window around it: original, variant
    expected_ids, found_ids  the same of ids, where kind is 'ids'
    original_fails   the original's template fails, so that nobody can say what is right
    """

    case: str
    kind: Literal["text", "ids", "error"]
    cause: Cause
    at: int
    expected: str
    found: str
    expected_ids: tuple[int, ...] = ()
    found_ids: tuple[int, ...] = ()
    original_fails: bool = False


@dataclass(frozen=True, slots=True)
class ChatReport:
    """All cases of one variant. `problems` is about the file; differences of the engines are in `differences` alone.

    cases, agreeing   how many were rendered, and how many gave the same text and ids
    failing           cases in which the original's template fails and the variant's does too
    template_equal    the templates are the same text; None if one of them could not be read
    """

    original: str
    variant: str
    engine: str
    cases: int
    agreeing: int
    failing: int
    template_equal: bool | None
    differences: tuple[ChatDifference, ...]
    problems: tuple[str, ...]

    @property
    def wrong(self) -> int:
        """Cases that the file is at fault for."""
        return sum(item.cause == "file" and not item.original_fails for item in self.differences)

    @property
    def original_fails(self) -> int:
        """Cases in which the original's template fails, whatever the variant's does: nobody can say what is right."""
        return self.failing + sum(item.original_fails for item in self.differences)

    @property
    def right(self) -> int:
        """All other cases: the same text and ids, or a difference of the engines."""
        return self.cases - self.wrong - self.original_fails

    @property
    def engine_differs(self) -> int:
        """Those of the right ones that the engine renders otherwise."""
        return sum(item.cause == "engine" and not item.original_fails for item in self.differences)

    @property
    def agrees(self) -> bool:
        """Whether the file is right: every difference is one of the engines."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class ExpectedChat:
    """The cases, and the original's rendering of each."""

    cases: tuple[ChatCase, ...]
    rendered: tuple[Rendered, ...]


def expected_chat(original: Engine, cases: Sequence[ChatCase] | None = None) -> ExpectedChat:
    """Render every case (by default the whole suite) with the original's template.

    Raises EngineError if the engine fails as a whole; a template that fails is in `Rendered.error`.
    """
    cases = tuple(chat_cases()) if cases is None else tuple(cases)
    return ExpectedChat(cases, tuple(original.apply_template([case.request for case in cases])))


def compare_chat(
    original: EngineProcess, variant: Engine, chat: ExpectedChat | None = None, *, template: str | None = None
) -> ChatReport:
    """Render every case in the variant's engine and compare it with the original's rendering.

    original  transformers with the original's tokenizer
    chat      `expected_chat` of the original
    template  the variant's chat template; by default read from its file

    Raises EngineError if an engine fails as a whole; a template that fails is a difference.
    """
    chat = expected_chat(original) if chat is None else chat
    path = Path(variant.facts.model)
    template = template if template is not None else read_template(path)
    source = read_template(original.path)
    found = variant.apply_template([case.request for case in chat.cases])
    pairs = list(zip(chat.cases, chat.rendered, found, strict=True))
    wrong = [(case, want, got) for case, want, got in pairs if not _same(want, got)]
    control = _control(original, variant, template, [case for case, _, _ in wrong])
    differences = tuple(
        _difference(original, variant, *item, other) for item, other in zip(wrong, control, strict=True)
    )
    failing = sum(want.error is not None and got.error is not None for _, want, got in pairs)
    return ChatReport(
        original=original.facts.model,
        variant=variant.facts.model,
        engine=f"{variant.facts.kind}, {variant.facts.version}",
        cases=len(chat.cases),
        agreeing=len(chat.cases) - len(differences) - failing,
        failing=failing,
        template_equal=None if template is None or source is None else template == source,
        differences=differences,
        problems=tuple(_problems(differences, len(chat.cases))),
    )


def read_template(path: Path) -> str | None:
    """The default chat template of a GGUF file or a checkpoint folder, as text; None if there is none.

    A folder's chat_template.jinja wins over tokenizer_config.json, as in transformers and LM Studio. Raises
    StreamquantError if the file is broken.
    """
    if path.suffix == ".gguf":
        return read_keys(path).text("tokenizer.chat_template")
    return folder_templates(path).get("default")


def folder_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a checkpoint folder by name, as transformers chooses them."""
    beside, inside = stored_templates(folder)
    return beside or inside


def stored_templates(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The chat templates by name that stand in files of their own, and those in tokenizer_config.json.

    Raises StreamquantError for a file that is not UTF-8 or too large, and for a template that is no text or, in a list,
    has no name.
    """
    beside = {}
    if (folder / "chat_template.jinja").is_file():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        beside = {"default": read_template_file(folder / "chat_template.jinja")}
        beside |= {path.stem: read_template_file(path) for path in more}
    config = folder / "tokenizer_config.json"
    stored = read_json_object(config).get("chat_template") if config.is_file() else None
    if stored is None or isinstance(stored, str):
        return beside, {} if stored is None else {"default": stored}
    if not isinstance(stored, list):
        raise StreamquantError(
            "not a chat template",
            where=f"{config}, chat_template",
            found=f"{stored!r:.100}",
            required="a text or a list",
        )
    entries = [JsonRecord(item, f"{config}, chat_template", "not a chat template") for item in stored]
    return beside, {entry.text("name"): entry.text("template") for entry in entries}


def _same(expected: Rendered, found: Rendered) -> bool:
    if expected.error is not None or found.error is not None:
        return expected.error is not None and found.error is not None
    return expected.text == found.text and expected.ids == found.ids


def _control(
    original: EngineProcess, variant: Engine, template: str | None, cases: Sequence[ChatCase]
) -> list[Rendered | None]:
    """A GGUF's template as transformers renders it, with the original's special tokens."""
    if variant.facts.kind != "llama.cpp" or template is None or not cases:
        return [None for _ in cases]
    requests = [case.request for case in cases]
    return list(original.render(template, requests, model=Path(variant.facts.model)))


def _difference(
    original: Engine, variant: Engine, case: ChatCase, expected: Rendered, found: Rendered, control: Rendered | None
) -> ChatDifference:
    cause: Cause
    same_template = control is not None and (control.text, control.error) == (expected.text, expected.error)
    if expected.error is not None or found.error is not None:
        want, got = (item.error or item.text[-2 * TEXT_WINDOW :] for item in (expected, found))
        cause = "engine" if same_template else "file"
        fails = expected.error is not None
        return ChatDifference(case.name, "error", cause, 0, want, got, original_fails=fails)
    if expected.text != found.text:
        at = first_difference(expected.text, found.text)
        # What llama.cpp adds or lacks at the front is BOS, which is the file's flag and not the engine's Jinja.
        bos = expected.text.endswith(found.text) or found.text.endswith(expected.text)
        cause = "engine" if same_template and not bos else "file"
        around = slice(max(0, at - TEXT_WINDOW), at + TEXT_WINDOW)
        return ChatDifference(case.name, "text", cause, at, expected.text[around], found.text[around])
    at = first_difference(expected.ids, found.ids)
    window = slice(max(0, at - ID_WINDOW), at + ID_WINDOW)
    ids = expected.ids[window], found.ids[window]
    known = [[number for number in run if number < original.facts.vocabulary] for run in ids]
    expected_text, found_text = original.detokenize(known)
    return ChatDifference(case.name, "ids", _ids_cause(variant, expected), at, expected_text, found_text, *ids)


def _ids_cause(variant: Engine, expected: Rendered) -> Cause:
    """Same text, other ids: the engine's doing if it is only that llama.cpp does not normalize Unicode."""
    form = unicodedata.normalize("NFC", expected.text)
    if variant.facts.kind != "llama.cpp" or form == expected.text:
        return "file"
    return "engine" if variant.tokenize([form], add_special=False, parse_special=True)[0] == expected.ids else "file"


def _problems(differences: Sequence[ChatDifference], cases: int) -> Iterator[str]:
    for kind, what in (("text", "text"), ("ids", "tokens of the same text"), ("error", "a template that fails")):
        wrong = [item for item in differences if item.cause == "file" and item.kind == kind and not item.original_fails]
        if wrong:
            first = wrong[0]
            yield (
                f"{what}: {len(wrong)} of {cases} cases differ; first {first.case!r} at {first.at}:"
                f" {first.expected[:160]!r} expected, {first.found[:160]!r} found"
            )
