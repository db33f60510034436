"""What every engine can be asked, and what it answers. Records are plain data: `dataclasses.asdict` gives JSON."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from streamquant.files.strict_json import read_json_object
from streamquant.quant.errors import StreamquantError, UsageError

Message: TypeAlias = Mapping[str, Any]
"""A message as OpenAI's API spells it: role, content, tool_calls."""
Kind: TypeAlias = Literal["llama.cpp", "transformers", "vllm", "jinja"]
"""`jinja` renders chat templates and does nothing else."""
FolderEngine: TypeAlias = Literal["vllm", "transformers"]
"""What can run a checkpoint folder."""
NOT_IN_TRANSFORMERS = ("modelopt",)
"""Values of quant_method that vLLM loads and transformers does not."""


@dataclass(frozen=True, slots=True)
class TemplateRequest:
    """A conversation to render: what `apply_chat_template` (transformers) and /apply-template (llama.cpp) take."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    """The template's own variables, such as thinking and keep_cots (llama.cpp: chat_template_kwargs)."""
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation.

    text   what the model gets to see, the BOS included that llama.cpp takes off the text and its tokenizer adds again
    ids    the tokens of it, as the engine's own chat endpoint makes them
    error  what the engine said instead, or None; text and ids are empty then
    """

    text: str
    ids: tuple[int, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The most probable next tokens of a prompt, best first: token ids and natural logarithms over all tokens."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """A greedy answer: ids without the stop token, its text with special tokens visible, whether the model stopped."""

    ids: tuple[int, ...]
    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself and the file.

    kind, version     the engine
    model             the path that it has loaded
    bos, eos          texts of these tokens, None where the tokenizer has none
    adds_bos          its tokenizer puts BOS before plain text
    vocabulary        number of token ids
    """

    kind: Kind
    version: str
    model: str
    bos: str | None
    eos: str | None
    adds_bos: bool
    vocabulary: int


class EngineError(StreamquantError):
    """An engine that runs does not do with a model what it is made for: it ended, hung, failed, or answered nonsense.

    A package that is not installed is none: that is a UsageError.
    """

    def __init__(
        self, what: str, *, model: Path, where: str | None = None, found: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what, where=where, found=found, hint=hint)
        self.model = model
        """The file or folder that the engine was at work on."""


class EngineLoadError(EngineError):
    """The engine refuses the model."""


class Engine(Protocol):
    """An engine with a model, or only a model's tokenizer and chat template, loaded.

    Every method raises EngineError if the engine ends, fails, takes longer than its time limit, or answers something
    else than was asked.
    """

    @property
    def facts(self) -> EngineFacts:
        """What the engine says of itself and the file."""
        ...

    def tokenize(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[tuple[int, ...]]:
        """Token ids of each text; add_special: with BOS/EOS as the tokenizer adds them; parse_special: texts of special
        (llama.cpp: control) tokens become those tokens. Other added tokens are always found, in every engine.
        """
        ...

    def detokenize(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each run of ids, special tokens visible."""
        ...

    def apply_template(self, requests: Sequence[TemplateRequest]) -> list[Rendered]:
        """Each conversation through the file's chat template; a template's own failure is in `Rendered.error`."""
        ...

    def next_token_logprobs(self, prompts: Sequence[Sequence[int]], top: int) -> list[TopLogprobs]:
        """The `top` most probable next tokens of each prompt of token ids; nothing is added to a prompt."""
        ...

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Generation]:
        """The most probable token, again and again, until a stop token or `max_tokens`."""
        ...


def kind_of(path: Path) -> Kind:
    """The engine for a file or folder: llama.cpp for *.gguf, transformers for a folder with config.json.

    Raises UsageError for anything else.
    """
    if path.suffix == ".gguf" and path.is_file():
        return "llama.cpp"
    if (path / "config.json").is_file():
        return "transformers"
    raise UsageError(
        "no engine for this", where=str(path), required="a .gguf file, or a checkpoint folder with config.json"
    )


def is_installed(engine: FolderEngine) -> bool:
    """Whether the engine's package is there; whether it works on this machine shows when it loads."""
    return importlib.util.find_spec(engine) is not None


def _quant_method(folder: Path) -> object:
    """What config.json says; None where it says nothing that can be read, which the engine will say better."""
    try:
        settings = read_json_object(folder / "config.json").get("quantization_config")
    except StreamquantError:
        return None
    return settings.get("quant_method") if isinstance(settings, dict) else None


def engines_for(path: Path, wanted: FolderEngine | None) -> tuple[Kind, ...]:
    """The engines that may run a file or folder, best first: a GGUF file llama.cpp, a folder the wanted engine; if none
    is wanted, vLLM where it is installed, and transformers where vLLM cannot be used on this machine and it loads the
    folder's quantization.

    Raises UsageError for anything else.
    """
    kind = kind_of(path)
    if kind != "transformers":
        return (kind,)
    if wanted is not None:
        return (wanted,)
    if _quant_method(path) in NOT_IN_TRANSFORMERS:
        return ("vllm",)
    return ("vllm", "transformers") if is_installed("vllm") else ("transformers",)
